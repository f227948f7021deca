//! A directory of this user's alone, for what passes through this host on its way from one VM to another.
//!
//! Invariant: it and its content are removed when the value is dropped; no other user can read it.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use nido_api::error::Error;
use nido_files::private_dir::create_private_dir;
use nido_files::random::id as random_id;

/// The directory.
#[derive(Debug)]
pub struct Staging(PathBuf);

impl Staging {
    /// Makes it, below `TMPDIR`.
    ///
    /// # Errors
    /// The host's.
    pub fn make() -> Result<Self, Error> {
        let path = std::env::temp_dir().join(format!("nido-copy-{}", random_id()?));
        create_private_dir(&path).map_err(|e| Error::io_at("make", &path, e))?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if std::fs::remove_dir_all(&self.0).is_ok() {
            return;
        }
        // Directories that a guest has made unwritable.
        open_up(&self.0);
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Makes every directory below one writable for its owner.
fn open_up(directory: &Path) {
    let _ = std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o700));
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_up(&entry.path());
        }
    }
}
