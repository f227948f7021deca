//! The destination of a copy out of a guest on this host, resolved before any request to the guest.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::receive::Item;
use crate::guest::error::GuestError;

/// How many symlinks lead to a file that does not exist yet: the kernel's limit.
const MAX_LINKS: usize = 40;
pub(super) const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// How a download is to be written.
#[derive(Debug, Clone, Copy)]
pub(super) struct DownloadOptions {
    /// Replace what exists.
    pub overwrite: bool,
    /// Keep owners and exact modes.
    pub preserve: bool,
}

/// The destination of a copy, checked before any request to the guest.
#[derive(Debug)]
pub(super) struct Destination {
    pub parent: OwnedFd,
    /// For messages.
    pub parent_path: PathBuf,
    pub name: OsString,
    pub how: DownloadOptions,
    /// The permission bits that this process gives to nothing new.
    umask: u32,
    /// The destination was written with a slash behind it.
    pub must_be_directory: bool,
}

impl Destination {
    /// Decides where the copy goes. `name` is what it is called in a directory. A symlink that is named is followed; one
    /// that has the copy's name in a directory is not, because a guest chose that name.
    pub fn resolve(path: &Path, name: Option<&[u8]>, how: DownloadOptions) -> Result<Self, GuestError> {
        let slash = path.as_os_str().as_bytes().ends_with(b"/");
        let (parent_path, name, must_be_directory) = match std::fs::metadata(path) {
            Ok(found) if found.is_dir() => {
                let Some(name) = name else {
                    let what = "the source has no name of its own: give a destination that does not exist";
                    return Err(GuestError::BadName(what.into()));
                };
                (path.to_owned(), OsString::from_vec(name.to_vec()), false)
            }
            Ok(_) if slash => return Err(GuestError::host(path, Errno::NOTDIR.into())),
            Ok(found) if !found.is_file() => return Err(special(path)),
            Ok(_) if !how.overwrite => return Err(GuestError::PathExists(path.to_owned())),
            Ok(_) => split(&std::fs::canonicalize(path).map_err(|e| GuestError::host(path, e))?, slash)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && how.overwrite => {
                split(&follow(path)?, slash)?
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => split(path, slash)?,
            Err(error) => return Err(GuestError::host(path, error)),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = rustix::fs::open(&parent_path, flags, Mode::empty())
            .map_err(|e| GuestError::host(&parent_path, e.into()))?;
        let umask = if how.preserve { 0 } else { umask() };
        let this = Self { parent, parent_path, name, how, umask, must_be_directory };
        match this.existing()? {
            Some(_) if !how.overwrite => Err(GuestError::PathExists(this.path())),
            Some(kind) if !is_replaceable(kind) => Err(special(&this.path())),
            _ => Ok(this),
        }
    }

    pub fn path(&self) -> PathBuf {
        self.parent_path.join(&self.name)
    }

    pub fn failed(&self, error: Errno) -> GuestError {
        GuestError::host(&self.path(), error.into())
    }

    /// The mode that a new entry gets here.
    fn mode(&self, item: &Item) -> Mode {
        Mode::from_raw_mode(u32::from(item.mode) & !self.umask)
    }

    /// Sets owner (if it is kept), mode and time.
    pub fn finish(&self, fd: impl AsFd, item: &Item) -> rustix::io::Result<()> {
        if let Some((uid, gid)) = item.owner {
            give(rustix::fs::fchown(&fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))))?;
        }
        rustix::fs::fchmod(&fd, self.mode(item))?;
        rustix::fs::futimens(&fd, &times(item.mtime_ns))
    }

    /// What is there now, symlinks not followed.
    pub fn existing(&self) -> Result<Option<FileType>, GuestError> {
        kind_at(&self.parent, &self.name).map_err(|e| self.failed(e))
    }
}

/// Only root gives files away; for everybody else they are the user's own, as with cp -p.
pub(super) fn give(given: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match given {
        Err(Errno::PERM) if !rustix::process::geteuid().is_root() => Ok(()),
        given => given,
    }
}

/// What a copy may take the name of.
fn is_replaceable(kind: FileType) -> bool {
    matches!(kind, FileType::RegularFile | FileType::Directory | FileType::Symlink)
}

pub(super) fn special(path: &Path) -> GuestError {
    GuestError::BadName(format!("{} is not a regular file: a device, pipe or socket is not replaced", path.display()))
}

/// Where a chain of symlinks ends that leads to nothing.
fn follow(path: &Path) -> Result<PathBuf, GuestError> {
    let mut at = path.to_owned();
    for _ in 0..MAX_LINKS {
        match std::fs::read_link(&at) {
            Ok(target) => at = at.parent().unwrap_or(Path::new("/")).join(target),
            Err(_) => return Ok(at),
        }
    }
    Err(GuestError::host(path, Errno::LOOP.into()))
}

/// The process's file mode creation mask, which can be read without changing it only here.
fn umask() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    mask.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok()).unwrap_or(0o022)
}

/// A path that does not exist, or shall be replaced: its directory and its name.
fn split(path: &Path, slash: bool) -> Result<(PathBuf, OsString, bool), GuestError> {
    let Some(name) = path.file_name() else {
        return Err(GuestError::BadName(format!("{} is not a valid name for a copy", path.display())));
    };
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((parent.to_owned(), name.to_owned(), slash))
}

pub(super) fn times(mtime_ns: i64) -> Timestamps {
    let at = Timespec { tv_sec: mtime_ns.div_euclid(1_000_000_000), tv_nsec: mtime_ns.rem_euclid(1_000_000_000) };
    Timestamps { last_access: at, last_modification: at }
}

/// What has a name, symlinks not followed.
pub(super) fn kind_at(dir: impl AsFd, name: &OsStr) -> rustix::io::Result<Option<FileType>> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The names in a directory.
pub(super) fn names(dir: impl AsFd) -> rustix::io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for found in Dir::read_from(dir)? {
        let found = found?;
        let name = found.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    Ok(names)
}
