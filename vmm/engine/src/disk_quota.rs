//! A VM's quota on the host's disk: how far its own disk layer may grow, and whether a snapshot still fits.
//!
//! ```text
//!  quota = disk layer + everything else in the VM's directory (snapshots, logs, records)
//!                |
//!                +-- RLIMIT_FSIZE of QEMU: a write behind it fails, and the guest sees an I/O error
//! ```
//!
//! Invariant: the layer's limit is never below its length, so what the guest has written stays writable.

use std::io;
use std::path::Path;

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::operation as op;
use nido_api::{LimitHit, LimitKind};

use crate::home::{DISK, VmDir};

/// QEMU allocates in clusters and writes several at once: the last write that fits ends so far before the limit at most.
const UNUSABLE_BYTES: u64 = 4 << 20;
/// How deep directories are below a VM's.
const DEPTH_MAX: usize = 4;
/// The message of a hit by the guest.
const GUEST_MESSAGE: &str = "the VM's files have reached their quota; writes of the guest fail";

/// What the files of a VM have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// Length of the VM's own disk layer.
    pub layer: u64,
    /// Bytes of all other files.
    pub others: u64,
}

impl DiskUsage {
    /// What the files in a VM's directory have. A file that vanishes meanwhile has nothing.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn of(dir: &VmDir) -> io::Result<Self> {
        let layer = std::fs::metadata(dir.file(DISK)).map_or(0, |facts| facts.len());
        let all = bytes_below(dir.path(), DEPTH_MAX)?;
        Ok(Self { layer, others: all.saturating_sub(layer) })
    }

    /// In total.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.layer.saturating_add(self.others)
    }

    /// How long the layer may become.
    #[must_use]
    pub fn layer_limit(self, quota: u64) -> u64 {
        quota.saturating_sub(self.others).max(self.layer)
    }

    /// The hit, if a write that failed did so for the quota.
    #[must_use]
    pub fn hit_by_guest(self, quota: u64) -> Option<LimitHit> {
        let is_full = self.layer.saturating_add(UNUSABLE_BYTES) >= self.layer_limit(quota);
        is_full.then(|| self.hit(quota, GUEST_MESSAGE))
    }

    /// Refuses a snapshot of so many bytes, with the hit.
    ///
    /// # Errors
    /// `limit_exceeded`
    pub fn check_snapshot(self, quota: u64, vm: &str, needed: u64) -> std::result::Result<(), Box<(Error, LimitHit)>> {
        if self.total().saturating_add(needed) <= quota {
            return Ok(());
        }
        let words = format!(
            "VM '{vm}' has a disk quota of {} MiB: its files have {} MiB, and the snapshot may need {} MiB",
            quota >> 20,
            self.total().div_ceil(1 << 20),
            needed.div_ceil(1 << 20)
        );
        let hint = Hint::run_on(op::VM_SNAPSHOT_DELETE, vm).to("make room");
        let hit = self.hit(quota, "a snapshot was refused: it does not fit into the VM's disk quota");
        Err(Box::new((Error::new(Code::LimitExceeded, words).hint(hint), hit.with("needed_bytes", needed))))
    }

    fn hit(self, quota: u64, message: &str) -> LimitHit {
        LimitHit::new(LimitKind::Disk, Some(quota), message)
            .with("used_bytes", self.total())
            .with("disk_layer_bytes", self.layer)
    }
}

fn bytes_below(dir: &Path, depth: usize) -> io::Result<u64> {
    let mut bytes = 0_u64;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let Ok(facts) = entry.metadata() else { continue };
        bytes = bytes.saturating_add(match () {
            () if facts.is_file() => facts.len(),
            () if facts.is_dir() && depth > 0 => bytes_below(&entry.path(), depth - 1).unwrap_or(0),
            () => 0,
        });
    }
    Ok(bytes)
}

/// The quota of QEMU's process: how long a file that it writes may become. From now on, for a process that runs already.
///
/// # Errors
/// There is no such process any more.
pub fn limit_file_size(pid: i32, bytes: u64) -> Result<()> {
    use rustix::process::{Pid, Resource, Rlimit, prlimit};
    let failed = |why: String| Error::internal(format!("the VM's disk quota cannot be put in force: {why}"));
    let pid = Pid::from_raw(pid).ok_or_else(|| failed("QEMU has no number".into()))?;
    let limit = Rlimit { current: Some(bytes), maximum: None };
    prlimit(Some(pid), Resource::Fsize, limit).map(drop).map_err(|error| failed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn snapshots_take_from_what_the_layer_may_have() {
        let usage = DiskUsage { layer: 10 * MIB, others: 30 * MIB };
        assert_eq!(usage.layer_limit(100 * MIB), 70 * MIB);
        assert_eq!(usage.layer_limit(35 * MIB), 10 * MIB, "never below its length");
        assert_eq!(usage.hit_by_guest(100 * MIB), None);
        let hit = DiskUsage { layer: 67 * MIB, ..usage }.hit_by_guest(100 * MIB).unwrap();
        assert_eq!((hit.kind, hit.limit, hit.evidence["used_bytes"]), (LimitKind::Disk, Some(100 * MIB), 97 * MIB));
    }

    #[test]
    fn a_snapshot_that_does_not_fit_is_refused_with_evidence() {
        let usage = DiskUsage { layer: 10 * MIB, others: 30 * MIB };
        assert!(usage.check_snapshot(100 * MIB, "web", 60 * MIB).is_ok());
        let (error, hit) = *usage.check_snapshot(100 * MIB, "web", 60 * MIB + 1).unwrap_err();
        assert_eq!((error.code(), hit.evidence["needed_bytes"]), (Code::LimitExceeded, 60 * MIB + 1));
    }

    #[test]
    fn all_files_of_the_directory_count() {
        let root = tempfile::tempdir().unwrap();
        std::fs::set_permissions(root.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let dir = crate::home::Home::open(root.path()).unwrap().vm("1");
        std::fs::create_dir_all(dir.path().join("snapshots/a")).unwrap();
        std::fs::write(dir.file(DISK), [0; 100]).unwrap();
        std::fs::write(dir.path().join("snapshots/a/memory"), [0; 20]).unwrap();
        std::fs::write(dir.path().join("log"), [0; 3]).unwrap();
        assert_eq!(DiskUsage::of(&dir).unwrap(), DiskUsage { layer: 100, others: 23 });
    }
}
