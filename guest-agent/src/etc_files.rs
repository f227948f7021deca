//! Small files of the guest's configuration.
//!
//! Invariant: under its own name a file is always whole, the old one or the new one, but for [`overwrite_file`].

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Mode of what everybody may read and root may change.
pub const PUBLIC: u32 = 0o644;

/// Longest file of the guest's configuration that is read, in bytes.
pub const MAX_FILE: u64 = 4 * 1024 * 1024;
/// What is at most written over a file in place: such a piece lies in one block of the disk, which the file has already.
const MAX_IN_PLACE: u64 = 4096;

/// Reads a small regular file. What has its name in its place (a directory, a pipe, a device) is an error, never waited
/// for and never read without end.
///
/// # Errors
/// It is not there, not a regular file, too large, or cannot be read.
pub fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let nonblocking = rustix::fs::OFlags::NONBLOCK.union(rustix::fs::OFlags::NOCTTY).bits().cast_signed();
    let file = fs::OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    let facts = file.metadata()?;
    if !facts.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {MAX_FILE} bytes")));
    }
    Ok(bytes)
}

/// Writes a small file by renaming, unless it holds just that already. `mode` is the mode of a new file.
///
/// # Errors
/// The file system refuses.
pub fn replace_file(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    if read_file(path).is_ok_and(|present| present == contents) {
        return Ok(());
    }
    let temporary = path.with_extension("nido-new");
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true).mode(mode);
    let file = match options.open(&temporary) {
        // An earlier write was interrupted here.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_file(&temporary)?;
            options.open(&temporary)
        }
        opened => opened,
    };
    let written = file?.write_all(contents).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // The first error is more specific than a second one.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Writes a small file over what it holds, where it is a plain file with one name; else by renaming. This takes a tenth
/// of the kernel's work, and a process that reads at the same time may see half of it: for files that are made right
/// again at every start.
///
/// # Errors
/// The file system refuses.
pub fn overwrite_file(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};
    let flags = rustix::fs::OFlags::NOFOLLOW.union(rustix::fs::OFlags::NONBLOCK).bits().cast_signed();
    let Ok(file) = fs::OpenOptions::new().write(true).custom_flags(flags).open(path) else {
        return replace_file(path, contents, mode);
    };
    let facts = file.metadata()?;
    if !facts.is_file() || facts.nlink() != 1 || contents.len() as u64 > MAX_IN_PLACE {
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
    fn special_files_neither_block_nor_count_as_empty() {
        // A pipe under the name of a configuration file blocked the start for ever.
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("hosts");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert_eq!(read_file(&pipe).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(read_file(directory.path()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(read_file(Path::new("/dev/zero")).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(read_file(&directory.path().join("missing")).unwrap_err().kind(), io::ErrorKind::NotFound);
        overwrite_file(&pipe, b"a name\n", PUBLIC).unwrap();
        assert_eq!(read_file(&pipe).unwrap(), b"a name\n");
    }

    #[test]
    fn a_replacement_that_fails_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("hosts/in-the-way")).unwrap();
        overwrite_file(&directory.path().join("hosts"), b"x", PUBLIC).unwrap_err();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("resolv.conf");
        std::os::unix::fs::symlink("/nowhere/at/all", &file).unwrap();
        // An orphan of an interrupted writer that points elsewhere.
        std::os::unix::fs::symlink("/nowhere/either", directory.path().join("resolv.nido-new")).unwrap();
        replace_file(&file, b"nameserver 10.0.2.3\n", 0o444).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"nameserver 10.0.2.3\n");
        let facts = file.symlink_metadata().unwrap();
        assert!(facts.is_file());
        assert_eq!(facts.permissions().mode() & 0o777, 0o444);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
