//! Reserved space for deletions: on a full disk the store and the audit log could not record them.
//!
//! Invariant: only what frees space uses it. It is kept again as soon as there is enough.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

use crate::home::Home;
use crate::host::facts;

/// As much as the store's index, its log and some lines of the audit log take.
const BYTES: u64 = 512 << 10;
/// Less free space than this is not taken from.
const FREE_BYTES_MIN: u64 = 16 << 20;

/// The file that keeps the space of a home.
#[derive(Debug)]
pub struct SpaceReserve {
    path: PathBuf,
}

impl SpaceReserve {
    /// Of a home.
    pub fn of(home: &Home) -> Self {
        Self { path: home.space_reserve() }
    }

    /// Releases the space to any process that writes first. Returns whether there was any.
    pub fn release(&self) -> bool {
        let was_kept = fs::remove_file(&self.path).is_ok();
        if was_kept {
            tracing::info!("the disk is full: {} KiB that were kept for this are free now", BYTES >> 10);
        }
        was_kept
    }

    /// Keeps the space, if it is not kept yet and there is enough.
    pub fn keep(&self) {
        let home = self.path.parent().unwrap_or(Path::new("."));
        // A process that was killed in between did not complete the file.
        let is_kept = fs::metadata(&self.path).is_ok_and(|meta| meta.len() >= BYTES);
        if is_kept || facts::disk_free_bytes(home).map_or(true, |free| free < FREE_BYTES_MIN) {
            return;
        }
        if let Err(error) = self.allocate() {
            let _ = fs::remove_file(&self.path);
            tracing::debug!("no space is kept for a full disk: {error}");
        }
    }

    fn allocate(&self) -> io::Result<()> {
        // Processes that do this at once allocate the same space.
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&self.path)?;
        Ok(fallocate(&file, FallocateFlags::empty(), 0, BYTES)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_created_once_and_released_once() {
        let home = tempfile::tempdir().unwrap();
        let reserve = SpaceReserve { path: home.path().join("space.reserve") };
        assert!(!reserve.release());
        fs::write(home.path().join("space.reserve"), "").unwrap();
        reserve.keep();
        reserve.keep();
        let kept = fs::metadata(home.path().join("space.reserve")).unwrap();
        assert_eq!(kept.len(), BYTES);
        assert!(std::os::unix::fs::MetadataExt::blocks(&kept) * 512 >= BYTES, "not sparse");
        assert!(reserve.release() && !reserve.release());
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    }
}
