//! Small files of the guest's configuration.
//!
//! Invariant: under its own name a file is always whole, the old one or the new one, but for [`overwrite_file`].

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

/// Writes a small file over what it holds, where it is a plain file with one name; else by renaming. This takes a tenth
/// of the kernel's work, and somebody who reads at the same moment may see half of it: for files that are made right
/// again at every start.
///
/// # Errors
/// The file system refuses.
pub fn overwrite_file(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};
    let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    let Ok(file) = fs::OpenOptions::new().write(true).custom_flags(flags).open(path) else {
        return replace_file(path, contents, mode);
    };
    let facts = file.metadata()?;
    if !facts.is_file() || facts.nlink() != 1 {
        return replace_file(path, contents, mode);
    }
    file.write_all_at(contents, 0)?;
    if facts.len() > contents.len() as u64 { file.set_len(contents.len() as u64) } else { Ok(()) }
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
    fn a_file_is_overwritten_where_it_is_a_plain_one() {
        let directory = tempfile::tempdir().unwrap();
        let (file, other) = (directory.path().join("hostname"), directory.path().join("other"));
        for text in ["first\n", "longer than that\n", "x\n"] {
            overwrite_file(&file, text.as_bytes(), PUBLIC).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
        fs::write(&other, "keep").unwrap();
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(&other, &file).unwrap();
        overwrite_file(&file, b"mine", PUBLIC).unwrap();
        fs::hard_link(&file, directory.path().join("twin")).unwrap();
        overwrite_file(&file, b"new", PUBLIC).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert_eq!(fs::read(directory.path().join("twin")).unwrap(), b"mine");
        assert_eq!(fs::read(&other).unwrap(), b"keep");
    }

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
