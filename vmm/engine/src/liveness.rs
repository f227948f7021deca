//! That somebody is still there, for what belongs to them: a lock of its own below `present/`, held for as long.
//!
//! Invariant: nobody is taken for gone because the look failed. Only a lock that is seen to be free, or a file that is seen not
//! to be there, says so.

use std::path::{Path, PathBuf};

use nido_api::error::{Error, Result};
use nido_files::lock::{Held, is_free};
use nido_files::private_dir::make_private_dir;
use nido_files::random;

/// How often another id is tried when reconciliation removed the file before it was locked.
const TRIES: u32 = 16;

/// Somebody who is there, until it is dropped or its process dies.
#[derive(Debug)]
pub struct Presence {
    id: String,
    path: PathBuf,
    _held: Held,
}

impl Presence {
    /// Takes a lock of its own.
    pub fn begin(directory: &Path) -> Result<Self> {
        let broken = |e| Error::io(format!("cannot use {}", directory.display()), e);
        make_private_dir(directory).map_err(broken)?;
        for _ in 0..TRIES {
            let id = random::id()?;
            let path = directory.join(&id);
            match Held::try_take(&path) {
                Ok(Some(held)) => return Ok(Self { id, path, _held: held }),
                Ok(None) => {}
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(broken(e)),
            }
        }
        Err(Error::internal("the liveness lock of this process could not be acquired"))
    }

    /// What others know it by.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        // While it is locked: nobody else can have it, and without the file it counts as gone.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Whether somebody is certainly gone.
pub fn is_gone(directory: &Path, id: &str) -> bool {
    match is_free(&directory.join(id)) {
        Ok(free) => free,
        Err(error) => {
            tracing::warn!("cannot check the liveness lock {id}: {error}");
            false
        }
    }
}

/// The ids of processes that died: their files are there, and nobody holds the locks.
#[must_use]
pub fn dead(directory: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let ids = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    ids.filter(|id| is_free(&directory.join(id)).unwrap_or(false)).collect()
}

/// Removes the file of a process that died, unless another process has taken the lock since.
///
/// # Errors
/// The file cannot be opened or removed.
pub fn remove_dead(directory: &Path, id: &str) -> std::io::Result<()> {
    let path = directory.join(id);
    let removed = match Held::try_take_existing(&path) {
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
        let (first, second) = (Presence::begin(&dir).unwrap(), Presence::begin(&dir).unwrap());
        let id = first.id().to_owned();
        assert!(!is_gone(&dir, &id) && !is_gone(&dir, second.id()));
        drop(first);
        assert!(is_gone(&dir, &id) && !is_gone(&dir, second.id()));
        drop(second);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
        std::fs::write(dir.join("0123"), "").unwrap();
        assert!(is_gone(&dir, "0123"), "killed");
        let third = Presence::begin(&dir).unwrap();
        assert_eq!(dead(&dir), ["0123"]);
        for id in ["0123", third.id(), "never"] {
            remove_dead(&dir, id).unwrap();
        }
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1, "only the one that died");
        assert!(!is_gone(&dir, third.id()));
    }

    #[test]
    fn a_failed_check_does_not_count_as_ended() {
        let root = tempfile::tempdir().unwrap();
        // No file, but not for want of one.
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
                        let one = Presence::begin(&dir).unwrap();
                        dead(&dir).iter().for_each(|id| remove_dead(&dir, id).unwrap());
                        assert!(!is_gone(&dir, one.id()));
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    }
}
