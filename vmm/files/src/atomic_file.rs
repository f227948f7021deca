//! Files that are replaced as a whole: written to a temporary file beside the target, then renamed.
//!
//! Invariant: under the final name there is always a complete file, whatever is killed. With [`Durability::PowerCut`] that also
//! holds after a power cut.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// What a written file has to survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The end of this process.
    Kill,
    /// A power cut, too.
    PowerCut,
}

/// Replaces the file at `path`, which only its owner may read.
///
/// # Errors
/// Of the file system; then the file is as it was, and no temporary file is left.
pub fn write_private(path: &Path, bytes: &[u8], durability: Durability) -> io::Result<()> {
    let temporary = temporary_name(path)?;
    let written = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        publish(&file, &temporary, path, durability)
    };
    written().inspect_err(|_| drop(fs::remove_file(&temporary)))
}

/// Gives a finished temporary file its final name.
///
/// # Errors
/// Of the file system; the temporary file is left.
pub fn publish(file: &File, temporary: &Path, path: &Path, durability: Durability) -> io::Result<()> {
    if durability == Durability::PowerCut {
        file.sync_all()?;
    }
    fs::rename(temporary, path)?;
    if durability == Durability::PowerCut { sync_parent(path) } else { Ok(()) }
}

/// Makes the entries of the directory that `path` is in survive a power cut.
///
/// # Errors
/// Of the file system.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

/// Whether `name` is the name of a temporary file of this module.
#[must_use]
pub fn is_temporary(name: &str) -> bool {
    name.starts_with(PREFIX)
}

const PREFIX: &str = ".tmp-";

fn temporary_name(path: &Path) -> io::Result<std::path::PathBuf> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Ok(path.with_file_name(format!("{PREFIX}{name}-{}", nido_api::hex::encode(&random))))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write_private(&path, b"one", Durability::PowerCut).unwrap();
        write_private(&path, b"two", Durability::Kill).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // A directory under the final name: the rename fails.
        fs::create_dir(dir.path().join("taken")).unwrap();
        fs::write(dir.path().join("taken/x"), "").unwrap();
        write_private(&dir.path().join("taken"), b"x", Durability::Kill).unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
