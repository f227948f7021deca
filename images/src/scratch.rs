//! Scratch directories of builds, `build/<random>/`, and their removal however a build ended.
//! Invariant: a scratch directory whose lock is free belongs to nobody and is removed by the next build; creating and
//! sweeping exclude each other by a lock on `build/` itself.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nido_files::flock::{Flock, Mode, try_lock};

use crate::error::ImageError;
use crate::host::Host;
use crate::store::{create_private, lock_directory};

/// A locked scratch directory, removed on drop.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    host: Host,
    leftovers: Vec<PathBuf>,
    // Held, and so released by the kernel whatever ends this process.
    _lock: Flock,
}

impl Scratch {
    /// Makes a fresh directory below `build`, after removing what dead builds left there.
    ///
    /// # Errors
    /// [`ImageError::Io`], [`ImageError::DiskFull`].
    pub fn create(build: &Path) -> Result<Self, ImageError> {
        create_private(build)?;
        let failed = |error| ImageError::io("create a directory in", build, error);
        let _whole = File::open(build).and_then(lock_directory).map_err(failed)?;
        let host = Host::for_cleaning();
        let leftovers = sweep(build, &host)?;
        // tempfile makes it mode 0700 under a name nobody can guess.
        let path = tempfile::Builder::new().prefix("").tempdir_in(build).map_err(failed)?.keep();
        let lock = File::open(&path).and_then(lock_directory).map_err(failed)?;
        Ok(Self { path, host, leftovers, _lock: lock })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Directories of dead builds that could not be removed (another user's, for instance).
    #[must_use]
    pub fn leftovers(&self) -> &[PathBuf] {
        &self.leftovers
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed now, the next build removes.
        let _ = remove(&self.path, &self.host);
    }
}

/// Removes every directory below `build` whose lock is free; returns those that resist.
fn sweep(build: &Path, host: &Host) -> Result<Vec<PathBuf>, ImageError> {
    let mut leftovers = Vec::new();
    let failed = |error| ImageError::io("read", build, error);
    for entry in fs::read_dir(build).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let Ok(directory) = File::open(&path) else { continue };
        if try_lock(&directory, Mode::Exclusive).is_ok_and(|taken| taken) && remove(&path, host).is_err() {
            leftovers.push(path);
        }
    }
    Ok(leftovers)
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
    fn the_next_build_removes_what_a_dead_one_left_and_only_that() {
        let home = tempfile::tempdir().unwrap();
        let build = home.path().join("build");
        let alive = Scratch::create(&build).unwrap();
        fs::create_dir_all(build.join("dead/rootfs")).unwrap();
        let next = Scratch::create(&build).unwrap();
        assert!(alive.path().exists() && next.path().exists());
        assert_eq!(count(&build), 2);
    }
}
