//! Scratch directories of builds, `build/<random>/`.
//!
//! Invariant: a scratch directory whose lock is free belongs to a build that was killed. Creating and removing exclude each other
//! by a lock on `build/` itself: a directory that was made a moment ago and is not locked yet is not taken for an orphan.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nido_files::flock::{Flock, Mode, try_lock};
use nido_files::layout;

use crate::error::ImageError;
use crate::host::Host;
use crate::store::{create_private, lock_directory};

/// A locked scratch directory, removed on drop.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    host: Host,
    // Held, and so released by the kernel whatever ends this process.
    _lock: Flock,
}

impl Scratch {
    /// Makes a fresh directory below `build`.
    ///
    /// # Errors
    /// [`ImageError::Io`], [`ImageError::DiskFull`].
    pub fn create(build: &Path) -> Result<Self, ImageError> {
        create_private(build)?;
        let _whole = lock(build)?;
        let failed = |error| ImageError::io("create a directory in", build, error);
        // tempfile makes it mode 0700 under an unguessable name.
        let path = tempfile::Builder::new().prefix("").tempdir_in(build).map_err(failed)?.keep();
        let lock = File::open(&path).and_then(lock_directory).map_err(failed)?;
        Ok(Self { path, host: Host::for_cleaning(), _lock: lock })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed now, reconciliation removes.
        let _ = remove(&self.path, &self.host);
    }
}

/// The scratch directories below `home` whose builds were killed.
#[must_use]
pub fn orphaned_builds(home: &Path) -> Vec<PathBuf> {
    let build = home.join(layout::BUILD);
    let Ok(_whole) = lock(&build) else { return Vec::new() };
    let Ok(entries) = fs::read_dir(&build) else { return Vec::new() };
    let is_free = |path: &PathBuf| File::open(path).and_then(|dir| try_lock(&dir, Mode::Exclusive)).unwrap_or(false);
    entries.flatten().map(|entry| entry.path()).filter(is_free).collect()
}

/// Removes one of them, unless it is gone already.
///
/// # Errors
/// [`ImageError::Io`]: it belongs to another user, for instance.
pub fn remove_orphaned_build(path: &Path) -> Result<(), ImageError> {
    match File::open(path).and_then(|directory| Flock::try_take(directory, Mode::Exclusive)) {
        Ok(Some(_held)) => remove(path, &Host::for_cleaning()),
        // A build has it now.
        Ok(None) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(ImageError::io("open", path, error)),
    }
}

/// Locks the directory of all scratch directories, until the file is closed.
fn lock(build: &Path) -> Result<Flock, ImageError> {
    File::open(build).and_then(lock_directory).map_err(|error| ImageError::io("lock", build, error))
}

/// Removes a tree that may hold files of subordinate ids: those go inside a user namespace.
fn remove(path: &Path, host: &Host) -> Result<(), ImageError> {
    let Err(error) = fs::remove_dir_all(path) else { return Ok(()) };
    if !path.exists() {
        return Ok(());
    }
    if !host.is_root() {
        let mut rm = host.confined("rm", Path::new("/"));
        rm.args(["-rf", "--one-file-system", "--"]).arg(path).stdout(Stdio::null()).stderr(Stdio::null());
        if rm.status().is_ok_and(|status| status.success()) {
            return Ok(());
        }
    }
    Err(ImageError::io("remove", path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(build: &Path) -> usize {
        fs::read_dir(build).unwrap().count()
    }

    #[test]
    fn a_scratch_directory_goes_with_its_owner() {
        let home = tempfile::tempdir().unwrap();
        let build = home.path().join("build");
        let scratch = Scratch::create(&build).unwrap();
        fs::write(scratch.path().join("half"), "made").unwrap();
        assert_eq!(count(&build), 1);
        drop(scratch);
        assert_eq!(count(&build), 0);
    }

    #[test]
    fn only_directories_of_killed_builds_are_orphans() {
        let home = tempfile::tempdir().unwrap();
        let build = home.path().join("build");
        assert!(orphaned_builds(home.path()).is_empty());
        let alive = Scratch::create(&build).unwrap();
        fs::create_dir_all(build.join("dead/rootfs")).unwrap();
        assert_eq!(orphaned_builds(home.path()), [build.join("dead")]);
        for path in [build.join("dead"), build.join("never"), alive.path().to_owned()] {
            remove_orphaned_build(&path).unwrap();
        }
        assert!(alive.path().exists());
        assert_eq!(count(&build), 1);
    }
}
