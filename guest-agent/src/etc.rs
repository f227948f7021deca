//! Small files of the guest's configuration.
//!
//! Invariant: under its own name a file is always whole, the old one or the new one.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Mode of what everybody may read and root may change.
pub const PUBLIC: u32 = 0o644;

/// Writes a small file by renaming, unless it holds just that already. What a new file's mode is, `mode` says.
///
/// # Errors
/// The file system refuses.
pub fn replace_file(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    if fs::read(path).is_ok_and(|present| present == contents) {
        return Ok(());
    }
    let temporary = path.with_extension("nido-new");
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true).mode(mode);
    let file = match options.open(&temporary) {
        // Somebody was cut off here.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_file(&temporary)?;
            options.open(&temporary)
        }
        opened => opened,
    };
    file?.write_all(contents)?;
    fs::rename(&temporary, path)
}

/// An error with the name of what it happened to.
pub fn named(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("resolv.conf");
        std::os::unix::fs::symlink("/nowhere/at/all", &file).unwrap();
        // Left by somebody who was cut off, and pointing elsewhere.
        std::os::unix::fs::symlink("/nowhere/either", directory.path().join("resolv.nido-new")).unwrap();
        replace_file(&file, b"nameserver 10.0.2.3\n", 0o444).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"nameserver 10.0.2.3\n");
        let facts = file.symlink_metadata().unwrap();
        assert!(facts.is_file());
        assert_eq!(facts.permissions().mode() & 0o777, 0o444);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
