//! Liveness locks: a process holds a lock of its own below `present/` as long as it runs, for what belongs to it.
//!
//! Invariant: a process does not count as ended because a check failed. Only a lock that is free, or a file that does
//! not exist, proves it.

use std::path::{Path, PathBuf};

use nido_api::error::{Error, Result};
use nido_files::lock::{HeldLock, is_free};
use nido_files::private_dir::make_private_dir;
use nido_files::random;

/// How often another id is tried when reconciliation removed the file before it was locked.
const ATTEMPTS_MAX: u32 = 16;

/// A process's liveness lock; released when it is dropped or its process ends.
#[derive(Debug)]
pub struct LivenessLock {
    id: String,
    path: PathBuf,
    _held: HeldLock,
}

impl LivenessLock {
    /// Takes a lock of its own.
    pub fn begin(directory: &Path) -> Result<Self> {
        let broken = |e| Error::io(format!("cannot use {}", directory.display()), e);
        make_private_dir(directory).map_err(broken)?;
        for _ in 0..ATTEMPTS_MAX {
            let id = random::id()?;
            let path = directory.join(&id);
            match HeldLock::try_take(&path) {
                Ok(Some(held)) => return Ok(Self { id, path, _held: held }),
                Ok(None) => {}
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(broken(e)),
            }
        }
        Err(Error::internal("the liveness lock of this process could not be acquired"))
    }

    /// Its id for other processes.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl Drop for LivenessLock {
    fn drop(&mut self) {
        // While it is locked: no other process can acquire it, and without the file the process counts as ended.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Whether the process with this lock has certainly ended.
pub fn is_gone(directory: &Path, id: &str) -> bool {
    match is_free(&directory.join(id)) {
        Ok(free) => free,
        Err(error) => {
            tracing::warn!("cannot check the liveness lock {id}: {error}");
            false
        }
    }
}

/// The ids of processes that have ended: their files exist, and the locks are free.
#[must_use]
pub fn orphaned_ids(directory: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let ids = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    ids.filter(|id| is_free(&directory.join(id)).unwrap_or(false)).collect()
}

/// Removes the file of a process that has ended, unless another process has taken the lock since.
///
/// # Errors
/// The file cannot be opened or removed.
pub fn remove_orphan(directory: &Path, id: &str) -> std::io::Result<()> {
    let path = directory.join(id);
    let removed = match HeldLock::try_take_existing(&path) {
        Ok(Some(_held)) => std::fs::remove_file(&path),
        other => other.map(drop),
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_liveness_lock_is_released_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("present");
        let (first, second) = (LivenessLock::begin(&dir).unwrap(), LivenessLock::begin(&dir).unwrap());
        let id = first.id().to_owned();
        assert!(!is_gone(&dir, &id) && !is_gone(&dir, second.id()));
        drop(first);
        assert!(is_gone(&dir, &id) && !is_gone(&dir, second.id()));
        drop(second);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
        std::fs::write(dir.join("0123"), "").unwrap();
        assert!(is_gone(&dir, "0123"), "killed");
        let third = LivenessLock::begin(&dir).unwrap();
        assert_eq!(orphaned_ids(&dir), ["0123"]);
        for id in ["0123", third.id(), "never"] {
            remove_orphan(&dir, id).unwrap();
        }
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1, "only the one that died");
        assert!(!is_gone(&dir, third.id()));
    }

    #[test]
    fn a_failed_check_does_not_count_as_ended() {
        let root = tempfile::tempdir().unwrap();
        // There is no file, but not because it is missing.
        let file = root.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(!is_gone(&file, "0123"));
    }

    #[test]
    fn concurrent_liveness_locks_do_not_interfere() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("present");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let one = LivenessLock::begin(&dir).unwrap();
                        orphaned_ids(&dir).iter().for_each(|id| remove_orphan(&dir, id).unwrap());
                        assert!(!is_gone(&dir, one.id()));
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    }
}
