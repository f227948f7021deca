//! A file of the host that is being written for a caller: complete under its name, or not there.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nido_api::error::{Error, Result};
use nido_api::hex;
use nido_files::random;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::{check_size, not_a_file, of, refused, shown};

/// How often the kernel is asked again when something was renamed while it looked.
pub(super) const NAME_ATTEMPTS_MAX: u32 = 64;

/// A file that is being written, and has no name, or a name of its own, until it is whole. Dropped, nothing is left of it.
#[derive(Debug)]
pub struct PendingFile {
    pub(super) file: File,
    /// Where it lies if it needs a name.
    pub(super) fresh: Option<String>,
    pub(super) directory: OwnedFd,
    pub(super) name: OsString,
    pub(super) overwrite: bool,
    /// For messages and for the answer.
    pub(super) path: PathBuf,
}

impl PendingFile {
    /// The file, to be written to.
    ///
    /// # Errors
    /// `limit_exceeded` if there are too many open files.
    pub fn file(&self) -> Result<File> {
        self.file.try_clone().map_err(|e| Error::io(format!("cannot write {}", shown(&self.path)), e))
    }

    /// SHA-256 of what has been written, in hexadecimal.
    ///
    /// # Errors
    /// `internal` if it cannot be read back.
    pub fn sha256(&self) -> Result<String> {
        let broken = |e| Error::io(format!("cannot read back {}", shown(&self.path)), e);
        let mut file = self.file()?;
        file.seek(SeekFrom::Start(0)).map_err(broken)?;
        let mut hash = Sha256::new();
        let mut piece = vec![0; 64 << 10];
        loop {
            match file.read(&mut piece) {
                Ok(0) => break,
                Ok(length) => hash.update(&piece[..length]),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(broken(e)),
            }
        }
        Ok(hex::encode(&hash.finalize()))
    }

    /// Gives it its name, in one step. The answer is its path.
    ///
    /// # Errors
    /// `limit_exceeded` if it has become too long, `path_exists` if something came under its name meanwhile.
    pub fn commit(mut self, max_bytes: u64) -> Result<PathBuf> {
        let bytes =
            self.file.metadata().map_err(|e| Error::io(format!("cannot write {}", shown(&self.path)), e))?.len();
        check_size(&self.path, bytes, max_bytes)?;
        check_target(&self.directory, &self.name, self.overwrite, &self.path)?;
        self.publish().map_err(|e| refused(&self.path, e))?;
        Ok(std::mem::take(&mut self.path))
    }

    fn publish(&mut self) -> rustix::io::Result<()> {
        if self.fresh.is_none() {
            let name = if self.overwrite { OsString::from(fresh_name()?) } else { self.name.clone() };
            let from = of(&self.file);
            rustix::fs::linkat(CWD, &from, &self.directory, &name, AtFlags::SYMLINK_FOLLOW)?;
            if !self.overwrite {
                return Ok(());
            }
            self.fresh = name.into_string().ok();
        }
        let Some(fresh) = &self.fresh else { return Err(Errno::INVAL) };
        let flags = if self.overwrite { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        rustix::fs::renameat_with(&self.directory, fresh, &self.directory, &self.name, flags)?;
        self.fresh = None;
        Ok(())
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if let Some(fresh) = &self.fresh
            && let Err(error) = rustix::fs::unlinkat(&self.directory, fresh, AtFlags::empty())
        {
            tracing::warn!("cannot remove {fresh}: {error}");
        }
    }
}

/// A new file. Where the file system allows, it has no name, so that a killed process leaves nothing behind.
pub(super) fn make(directory: &OwnedFd) -> rustix::io::Result<(OwnedFd, Option<String>)> {
    let mode = Mode::from_raw_mode(0o666);
    let nameless = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::openat(directory, ".", nameless, mode) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => {}
        outcome => return outcome.map(|fd| (fd, None)),
    }
    let name = fresh_name()?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, &name, flags, mode).map(|fd| (fd, Some(name)))
}

pub(super) fn fresh_name() -> rustix::io::Result<String> {
    random::id().map(|id| format!(".nido-{id}")).map_err(|_| Errno::IO)
}

/// Whether a file may come under this name, as things are now.
pub(super) fn check_target(directory: &OwnedFd, name: &OsStr, overwrite: bool, path: &Path) -> Result<()> {
    let kind = match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(refused(path, error)),
        Ok(stat) => FileType::from_raw_mode(stat.st_mode),
    };
    match kind {
        FileType::RegularFile if overwrite => Ok(()),
        FileType::RegularFile => Err(refused(path, Errno::EXIST)),
        kind => Err(not_a_file(path, kind)),
    }
}
