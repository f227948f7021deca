//! A file for the caller that appears under its name only when it is complete.
//! Invariant: until then the name keeps its content; unless the process is killed, no temporary file remains.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use nido_files::atomic_file::{Durability, TemporaryFile};

use crate::error::ImageError;

/// Has `write` fill a file that then gets the name `path`. It is readable by its owner only. What exists is replaced only
/// with `overwrite`, and only if it is a regular file.
///
/// # Errors
/// [`ImageError::PathExists`], [`ImageError::PathInvalid`], those of `write`, [`ImageError::Io`], [`ImageError::DiskFull`].
pub fn write_file_whole<T>(
    path: &Path,
    overwrite: bool,
    write: impl FnOnce(&mut File) -> Result<T, ImageError>,
) -> Result<T, ImageError> {
    check(path, overwrite)?;
    let failed = |error| ImageError::io("write", path, error);
    // The directory is the caller's: the name identifies the file's process.
    let mut temporary = TemporaryFile::with_prefix(directory(path), ".nido-new-").map_err(failed)?;
    let written = write(temporary.file())?;
    let place = if overwrite { TemporaryFile::replace } else { TemporaryFile::create };
    place(temporary, path, Durability::PowerCut).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => ImageError::PathExists { path: path.to_owned() },
        _ => failed(error),
    })?;
    Ok(written)
}

/// The directory of a file.
fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Refuses before any work what would be refused at its end.
fn check(path: &Path, overwrite: bool) -> Result<(), ImageError> {
    let invalid = |reason| ImageError::PathInvalid { path: path.to_owned(), reason };
    if path.file_name().is_none() {
        return Err(invalid("it is not the name of a file"));
    }
    if !directory(path).is_dir() {
        return Err(invalid("its directory does not exist"));
    }
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(ImageError::io("look at", path, error)),
        Ok(found) if !found.is_file() => Err(invalid("it exists and is not a regular file")),
        Ok(_) if !overwrite => Err(ImageError::PathExists { path: path.to_owned() }),
        Ok(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn write(path: &Path, overwrite: bool) -> Result<(), ImageError> {
        write_file_whole(path, overwrite, |file| file.write_all(b"new").map_err(|e| ImageError::io("write", path, e)))
    }

    #[test]
    fn an_existing_file_is_replaced_only_on_request() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        write(&path, false).unwrap();
        fs::write(&path, "old").unwrap();
        assert!(matches!(write(&path, false), Err(ImageError::PathExists { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        write(&path, true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_appeared_meanwhile_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let raced = write_file_whole(&path, false, |_| {
            fs::write(&path, "theirs").unwrap();
            Ok(())
        });
        assert!(matches!(raced, Err(ImageError::PathExists { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"theirs");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    }

    #[test]
    fn failed_work_keeps_the_existing_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "old").unwrap();
        let failed = write_file_whole::<()>(&path, true, |_| Err(ImageError::Interrupted));
        assert!(matches!(failed, Err(ImageError::Interrupted)));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    }

    #[test]
    fn only_regular_files_are_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("target", &link).unwrap();
        let nowhere = directory.path().join("no/file");
        for path in [&link, &nowhere, directory.path(), Path::new("/dev/null"), Path::new("..")] {
            assert!(matches!(write(path, true), Err(ImageError::PathInvalid { .. })), "{}", path.display());
        }
    }
}
