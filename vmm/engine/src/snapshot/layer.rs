//! Copies of a VM's layer, the file `disk.qcow2`.
//!
//! ```text
//!  begin --refresh--> a draft --refresh--> a draft of a quiet guest --refresh, CPUs paused--> equal --sync--> on the disk
//! ```
//!
//! Where the file system can share blocks, the last refresh is all of the copy. Elsewhere each refresh writes what has changed
//! since the one before, so that the last one, for which the guest is paused, has little to do.
//!
//! Invariant: after a refresh during which the layer did not change, every byte is equal.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use nido_api::error::{Error, Result};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::home::{DISK, GUEST_CONFIG, VmDir};

/// Blocks in which a file is copied and compared, in bytes.
const BLOCK: usize = 1 << 20;

/// A copy of a layer that is in use.
#[derive(Debug)]
pub struct LayerCopy {
    source: File,
    target: File,
    shares_blocks: bool,
}

impl LayerCopy {
    /// Creates an empty copy. Its file stays if this is dropped: it lies in a directory that is removed.
    pub(super) fn begin(from: &Path, to: &Path) -> Result<Self> {
        let begin = || -> io::Result<Self> {
            let source = File::open(from)?;
            let target = create(to)?;
            nido_files::failpoint!("layer.copying", io)?;
            let shares_blocks = rustix::fs::ioctl_ficlone(&target, &source).is_ok();
            Ok(Self { source, target, shares_blocks })
        };
        begin().map_err(failed)
    }

    /// Brings the copy up to date. `last`: the layer does not change meanwhile, nor after it.
    ///
    /// # Errors
    /// `disk_full`, `internal`.
    pub fn refresh(&self, last: bool) -> Result<()> {
        let refresh = || -> io::Result<()> {
            match (self.shares_blocks, last) {
                (true, true) => Ok(rustix::fs::ioctl_ficlone(&self.target, &self.source)?),
                // What is to be shared has to be on the disk: so the last refresh need not wait for it.
                (true, false) => self.source.sync_data(),
                (false, _) => {
                    check_space(&self.source, &self.target)?;
                    match make_equal(&self.source, &self.target) {
                        // It has shrunk meanwhile.
                        Err(error) if !last && error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
                        made => made,
                    }
                }
            }
        };
        refresh().map_err(failed)
    }

    /// Brings the copy to the disk.
    ///
    /// # Errors
    /// `disk_full`, `internal`.
    pub fn sync(&self) -> Result<()> {
        self.target.sync_all().map_err(failed)
    }
}

fn create(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

fn failed(error: io::Error) -> Error {
    Error::io("cannot copy the VM's disk", error)
}

/// Copies a layer, and brings it to the disk: shares its blocks where the file system can, else copies what is not a hole.
pub(super) fn copy_layer(from: &Path, to: &Path) -> Result<()> {
    let copy = || -> Result<()> {
        let copy = LayerCopy::begin(from, to)?;
        copy.refresh(true)?;
        copy.sync()
    };
    copy().inspect_err(|_| drop(fs::remove_file(to)))
}

/// Bytes that a copy of the VM's layer takes: none where the file system can share its blocks.
#[must_use]
pub fn copy_bytes(vm: &VmDir) -> u64 {
    let probe = || -> io::Result<()> {
        let path = vm.file(".clone-probe");
        let source = File::open(vm.file(GUEST_CONFIG))?;
        let target = File::options().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        let _ = fs::remove_file(&path);
        Ok(rustix::fs::ioctl_ficlone(&target, &source)?)
    };
    if probe().is_ok() { 0 } else { fs::metadata(vm.file(DISK)).map_or(0, |facts| facts.blocks() * 512) }
}

/// A copy that cannot be finished would fill the disk for all others.
fn check_space(source: &File, target: &File) -> io::Result<()> {
    let free = rustix::fs::fstatvfs(target)?;
    let missing = source.metadata()?.blocks().saturating_sub(target.metadata()?.blocks());
    if missing.saturating_mul(512) > free.f_bavail.saturating_mul(free.f_frsize) {
        return Err(io::ErrorKind::StorageFull.into());
    }
    Ok(())
}

/// Writes what differs. Holes of both files are left out.
fn make_equal(source: &File, target: &File) -> io::Result<()> {
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut blocks = (vec![0; BLOCK], vec![0; BLOCK]);
    let mut at = 0;
    loop {
        at = match (next_data(source, at)?, next_data(target, at)?) {
            (Some(one), Some(other)) => one.min(other),
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => return Ok(()),
        };
        let end = data_end(source, target, at)?.min(length);
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(BLOCK).min(BLOCK);
            let (new, old) = (&mut blocks.0[..wanted], &mut blocks.1[..wanted]);
            source.read_exact_at(new, at)?;
            target.read_exact_at(old, at)?;
            if new != old {
                target.write_all_at(new, at)?;
            }
            at += wanted as u64;
        }
        if at >= length {
            return Ok(());
        }
    }
}

/// Where the next data begins, if there is any.
fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Up to where one of the two files has data without a hole.
fn data_end(source: &File, target: &File, at: u64) -> io::Result<u64> {
    let hole = |file: &File| match rustix::fs::seek(file, SeekFrom::Hole(at)) {
        Ok(hole) => Ok(hole),
        Err(Errno::NXIO) => Ok(at),
        Err(error) => Err(io::Error::from(error)),
    };
    Ok(hole(source)?.max(hole(target)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer() -> (tempfile::TempDir, File, LayerCopy) {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("disk");
        let file = create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        let copy = LayerCopy::begin(&from, &dir.path().join("copy")).unwrap();
        (dir, file, copy)
    }

    fn assert_equal(dir: &tempfile::TempDir) {
        let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
        assert!(read("disk") == read("copy"));
    }

    #[test]
    fn each_refresh_copies_what_has_changed() {
        let (dir, file, copy) = layer();
        file.write_all_at(&[1; 5000], 70_000).unwrap();
        file.write_all_at(&[2; 3 << 20], 20 << 20).unwrap();
        copy.refresh(true).unwrap();
        assert_equal(&dir);
        // New, changed, discarded, and grown.
        file.write_all_at(&[3; 10], 50 << 20).unwrap();
        file.write_all_at(&[4; 10], 21 << 20).unwrap();
        rustix::fs::fallocate(
            &file,
            rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
            65_536,
            65_536,
        )
        .unwrap();
        file.write_all_at(&[5; 10], 70 << 20).unwrap();
        copy.refresh(true).unwrap();
        assert_equal(&dir);
        // Shrunk.
        file.set_len(21 << 20).unwrap();
        copy.refresh(true).unwrap();
        copy.sync().unwrap();
        assert_equal(&dir);
        // Its holes are holes.
        assert!(copy.target.metadata().unwrap().blocks() * 512 <= 4 << 20);
    }
}
