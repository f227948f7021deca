//! Files that are replaced as a whole: written under a temporary name in the same directory, then renamed.
//!
//! ```text
//!   open temporary ── write ── [fsync file] ── rename ── [fsync directory]     [..]: with Durability::PowerCut
//! ```
//!
//! Invariants: under the final name there is always a complete file, whatever is killed; with [`Durability::PowerCut`] also
//! after a power cut. A temporary file is removed when its writer fails; the file of a killed writer has a name that
//! [`is_temporary`] recognizes, or has the one fixed name that its caller chose and the next attempt replaces.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::random;

/// What a written file has to survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The end of this process.
    Kill,
    /// A power cut, too.
    PowerCut,
}

/// Mode of a file that only its owner may read.
pub const PRIVATE: u32 = 0o600;
/// Mode of a file that others may read and write, as far as the umask allows.
pub const PUBLIC: u32 = 0o666;

const PREFIX: &str = ".tmp-";
/// Bytes of the final name that a temporary name repeats: together they stay below the 255 of a name.
const NAME_BYTES_MAX: usize = 100;

/// A file under a temporary name. Dropped unpublished, it is removed.
#[derive(Debug)]
pub struct TemporaryFile {
    file: File,
    path: PathBuf,
    is_published: bool,
}

impl TemporaryFile {
    /// A new file in the directory of `path`, with the mode `mode` as far as the umask allows.
    ///
    /// # Errors
    /// Of the file system.
    pub fn beside(path: &Path, mode: u32) -> io::Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let short = name.char_indices().take_while(|(at, c)| at + c.len_utf8() <= NAME_BYTES_MAX);
        let prefix = format!("{PREFIX}{}-", short.map(|(_, c)| c).collect::<String>());
        Self::new(parent(path), &prefix, mode)
    }

    /// A new private file in a directory whose readers know temporary files by a prefix of their own.
    ///
    /// # Errors
    /// Of the file system.
    pub fn with_prefix(directory: &Path, prefix: &str) -> io::Result<Self> {
        Self::new(directory, prefix, PRIVATE)
    }

    fn new(directory: &Path, prefix: &str, mode: u32) -> io::Result<Self> {
        let random = random::id().map_err(io::Error::other)?;
        let path = directory.join(format!("{prefix}{random}"));
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(&path)?;
        Ok(Self { file, path, is_published: false })
    }

    /// The file, to be written to.
    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it the name `path`, in place of what has that name.
    ///
    /// # Errors
    /// Of the file system; then what has the name is as it was.
    pub fn replace(self, path: &Path, durability: Durability) -> io::Result<()> {
        self.publish_by(|from, to| fs::rename(from, to), path, durability)
    }

    /// Gives it the name `path`, which must be free.
    ///
    /// # Errors
    /// `AlreadyExists` if something has that name; those of the file system.
    pub fn create(self, path: &Path, durability: Durability) -> io::Result<()> {
        self.publish_by(rename_to_free_name, path, durability)
    }

    fn publish_by(
        mut self,
        rename: fn(&Path, &Path) -> io::Result<()>,
        path: &Path,
        durability: Durability,
    ) -> io::Result<()> {
        crate::failpoint!("file.written", io)?;
        sync(&self.file, durability)?;
        rename(&self.path, path)?;
        self.is_published = true;
        crate::failpoint!("file.published");
        sync_entry(path, durability)
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if !self.is_published {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Renames a file unless something has the name `to`.
fn rename_to_free_name(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // The file system cannot do that in one step: for a moment the file has both names.
        Err(Errno::INVAL | Errno::NOSYS) => fs::hard_link(from, to).and_then(|()| fs::remove_file(from)),
        renamed => Ok(renamed?),
    }
}

/// Replaces the file at `path`, which only its owner may read.
///
/// # Errors
/// Of the file system; then the file is as it was, and no temporary file is left.
pub fn write_private(path: &Path, bytes: &[u8], durability: Durability) -> io::Result<()> {
    private(path, bytes)?.replace(path, durability)
}

/// Creates the file at `path`, which only its owner may read. Of several processes that do so, one succeeds.
///
/// # Errors
/// `AlreadyExists` if it is there; those of the file system. Then no temporary file is left.
pub fn create_private(path: &Path, bytes: &[u8], durability: Durability) -> io::Result<()> {
    private(path, bytes)?.create(path, durability)
}

fn private(path: &Path, bytes: &[u8]) -> io::Result<TemporaryFile> {
    let mut temporary = TemporaryFile::beside(path, PRIVATE)?;
    temporary.file().write_all(bytes)?;
    Ok(temporary)
}

/// Gives a finished file, which has a temporary name that its caller chose, its final name.
///
/// # Errors
/// Of the file system; the temporary file is left.
pub fn publish(file: &File, temporary: &Path, path: &Path, durability: Durability) -> io::Result<()> {
    sync(file, durability)?;
    rename_synced(temporary, path, durability)
}

/// The same for a directory, which must not replace one with content. Its files are made as durable as itself.
///
/// # Errors
/// As [`publish`]; `DirectoryNotEmpty` or `AlreadyExists` if the name is taken.
pub fn publish_directory(temporary: &Path, path: &Path, durability: Durability) -> io::Result<()> {
    if durability == Durability::PowerCut {
        for entry in fs::read_dir(temporary)? {
            File::open(entry?.path())?.sync_all()?;
        }
    }
    publish(&File::open(temporary)?, temporary, path, durability)
}

/// Gives a file whose content is on the disk already another name, in place of what has that name.
///
/// # Errors
/// Of the file system; if the rename failed, both are as they were.
pub fn rename_synced(from: &Path, to: &Path, durability: Durability) -> io::Result<()> {
    crate::failpoint!("rename.begin", io)?;
    fs::rename(from, to)?;
    crate::failpoint!("rename.done");
    sync_entry(to, durability)
}

/// Makes the entries of the directory that `path` is in survive a power cut.
///
/// # Errors
/// Of the file system.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(parent(path))?.sync_all()
}

/// Whether `name` is the name of a temporary file of this module.
#[must_use]
pub fn is_temporary(name: &str) -> bool {
    name.starts_with(PREFIX)
}

fn sync(file: &File, durability: Durability) -> io::Result<()> {
    if durability == Durability::PowerCut { file.sync_all() } else { Ok(()) }
}

fn sync_entry(path: &Path, durability: Durability) -> io::Result<()> {
    if durability == Durability::PowerCut { sync_parent(path) } else { Ok(()) }
}

/// The directory of a file; of a bare name the working directory.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
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
    #[test]
    fn of_several_that_create_a_file_one_succeeds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        create_private(&path, b"one", Durability::PowerCut).unwrap();
        let second = create_private(&path, b"two", Durability::PowerCut).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_name_of_any_length_has_a_temporary_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["x".repeat(255), "\u{e4}".repeat(127)] {
            let path = dir.path().join(name);
            let temporary = TemporaryFile::beside(&path, PRIVATE).unwrap();
            let name = temporary.path().file_name().unwrap().to_str().unwrap().to_owned();
            assert!(is_temporary(&name), "{name}");
            temporary.replace(&path, Durability::Kill).unwrap();
            assert!(path.exists());
        }
    }

    #[test]
    fn a_directory_is_published_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two, path] = ["one", "two", "path"].map(|name| dir.path().join(name));
        for temporary in [&one, &two] {
            fs::create_dir(temporary).unwrap();
            fs::write(temporary.join("file"), temporary.as_os_str().as_encoded_bytes()).unwrap();
        }
        publish_directory(&one, &path, Durability::PowerCut).unwrap();
        publish_directory(&two, &path, Durability::PowerCut).unwrap_err();
        assert_eq!(fs::read(path.join("file")).unwrap(), one.as_os_str().as_encoded_bytes());
        assert!(two.exists());
    }
}
