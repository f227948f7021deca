//! Where a copy out of a guest lands on this host, and how it gets there without ever being half there.
//!
//! ```text
//!  parent/.nido-<random>/root...   written here, below a descriptor of the fresh directory
//!  parent/NAME                     renamed to, at the very end
//! ```
//!
//! Invariant: below the fresh directory every name is resolved by `openat2` with "beneath" and "no symlinks", and
//! created only where nothing was, so nothing the guest sends can make a write land anywhere else. Modes are masked to
//! the nine permission bits.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nido_guest_agent::replace::free_bytes;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::fresh::{DIRECTORY, Fresh, kind_at};
use super::merge::{put_directory, put_new, put_over};
use super::receive::{Item, ItemKind, Piece, Receiver};
use super::{Copied, Progress};
use crate::guest::error::GuestError;

/// Name of the copy inside the fresh directory.
pub(super) const ROOT: &str = "root";
/// How often the free space is looked at: after so many bytes.
const LOOK_EVERY: u64 = 16 << 20;
/// So much stays free, in bytes: a guest must not fill the host's disk to its last byte.
const RESERVE: u64 = 128 << 20;
/// How many symlinks lead to a file that does not exist yet: the kernel's limit.
const MAX_LINKS: usize = 40;
/// Memory for directories whose mode and time are still to be set, in bytes.
const MAX_PENDING: usize = 64 << 20;

const NEW_FILE: OFlags =
    OFlags::RDWR.union(OFlags::CREATE).union(OFlags::EXCL).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const INSIDE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// How a download is to be written.
#[derive(Debug, Clone, Copy)]
pub(super) struct How {
    /// Replace what exists.
    pub overwrite: bool,
    /// Keep owners and exact modes.
    pub preserve: bool,
}

/// The place for a copy, looked at before the guest is asked for anything.
#[derive(Debug)]
pub(super) struct Destination {
    pub parent: OwnedFd,
    /// For messages.
    pub parent_path: PathBuf,
    pub name: OsString,
    pub how: How,
    /// The permission bits that this process gives to nothing new.
    umask: u32,
    /// The destination was written with a slash behind it.
    must_be_directory: bool,
}

impl Destination {
    /// Decides where the copy goes. `name` is what it is called in a directory. A symlink that is named is followed; one
    /// that has the copy's name in a directory is not, because a guest chose that name.
    pub fn resolve(path: &Path, name: Option<&[u8]>, how: How) -> Result<Self, GuestError> {
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
    fn finish(&self, fd: impl AsFd, item: &Item) -> rustix::io::Result<()> {
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

/// The process's file mode creation mask, which can be asked for without changing it only here.
fn umask() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    mask.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok()).unwrap_or(0o022)
}

/// A path that does not exist, or shall be replaced: its directory and its name.
fn split(path: &Path, slash: bool) -> Result<(PathBuf, OsString, bool), GuestError> {
    let Some(name) = path.file_name() else {
        return Err(GuestError::BadName(format!("{} is no name for a copy", path.display())));
    };
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((parent.to_owned(), name.to_owned(), slash))
}

/// Receives the whole tree and puts it in its place.
pub(super) fn download<F: FnMut(Progress)>(
    receiver: &mut Receiver<F>,
    destination: &Destination,
) -> Result<Copied, GuestError> {
    let fresh = Fresh::make(destination)?;
    let Some(root) = receiver.item()? else { return Err(GuestError::breach("an empty tree")) };
    if let ItemKind::File(_) = root.kind {
        if destination.must_be_directory {
            return Err(GuestError::PathNotFound(destination.path()));
        }
        let file = rustix::fs::openat(&fresh.fd, ROOT, NEW_FILE, Mode::RUSR | Mode::WUSR);
        write_file(receiver, &root, file.map_err(|e| destination.failed(e))?, destination)?;
        if receiver.item()?.is_some() {
            return Err(GuestError::breach("something inside a file"));
        }
        let from = (&fresh.fd, OsStr::new(ROOT));
        match destination.existing()? {
            Some(_) if destination.how.overwrite => {
                let given = destination.given(&root);
                put_over(from, (&destination.parent, &destination.name), given, &destination.path())?;
            }
            _ => put_new(&fresh, destination)?,
        }
    } else {
        receiver.body(false, |_| Ok(()))?;
        let made = rustix::fs::mkdirat(&fresh.fd, ROOT, Mode::RWXU);
        let tree = made.and_then(|()| rustix::fs::openat(&fresh.fd, ROOT, DIRECTORY, Mode::empty()));
        let tree = tree.map_err(|e| destination.failed(e))?;
        let mut tree = Tree { tree, near: None, pending: Vec::new(), pending_bytes: 0, destination };
        tree.fill(receiver, root)?;
        // A directory that may not be written cannot be moved by an ordinary user: modes come after that.
        let merged = put_directory(&fresh, destination)?;
        tree.finish(&merged)?;
    }
    Ok(receiver.copied(destination.path().into_os_string().into_vec()))
}

fn write_file<F: FnMut(Progress)>(
    receiver: &mut Receiver<F>,
    item: &Item,
    fd: OwnedFd,
    destination: &Destination,
) -> Result<(), GuestError> {
    let mut file = File::from(fd);
    let at = destination.path();
    let full = || GuestError::DiskFull(at.clone());
    // Known before the first byte: then nothing is written at all.
    let needed = item.stored.unwrap_or_default();
    if needed > LOOK_EVERY && free_bytes(&file).is_some_and(|free| free < needed.saturating_add(RESERVE)) {
        return Err(full());
    }
    let (mut since, mut ends_in_hole) = (0, false);
    receiver.body(true, |piece| match piece {
        Piece::Bytes(bytes) => {
            since += bytes.len() as u64;
            if since >= LOOK_EVERY {
                since = 0;
                if free_bytes(&file).is_some_and(|free| free < RESERVE) {
                    return Err(full());
                }
            }
            ends_in_hole = false;
            file.write_all(bytes).map_err(|e| GuestError::host(&at, e))
        }
        Piece::Hole(length) => {
            ends_in_hole = true;
            let length = i64::try_from(length).map_err(|_| GuestError::breach("a hole that is too long"))?;
            file.seek(SeekFrom::Current(length)).map(drop).map_err(|e| GuestError::host(&at, e))
        }
    })?;
    if ends_in_hole {
        file.stream_position().and_then(|end| file.set_len(end)).map_err(|e| GuestError::host(&at, e))?;
    }
    destination.finish(&file, item).map_err(|e| destination.failed(e))
}

fn times(mtime_ns: i64) -> Timestamps {
    let at = Timespec { tv_sec: mtime_ns.div_euclid(1_000_000_000), tv_nsec: mtime_ns.rem_euclid(1_000_000_000) };
    Timestamps { last_access: at, last_modification: at }
}

/// The inside of a directory that is being received.
struct Tree<'a> {
    tree: OwnedFd,
    /// The directory of the entry before, which is mostly the next one's too.
    near: Option<(Vec<u8>, OwnedFd)>,
    /// Directories whose mode and time come last, because filling them needs the one and changes the other.
    pending: Vec<Item>,
    pending_bytes: usize,
    destination: &'a Destination,
}

impl Tree<'_> {
    fn fill<F: FnMut(Progress)>(&mut self, receiver: &mut Receiver<F>, root: Item) -> Result<(), GuestError> {
        self.keep(root)?;
        while let Some(item) = receiver.item()? {
            self.add(receiver, item)?;
        }
        Ok(())
    }

    /// Gives the new directories their modes and times, the deepest first: not those that were there before.
    fn finish(&mut self, merged: &HashSet<Vec<u8>>) -> Result<(), GuestError> {
        let destination = self.destination;
        let path = destination.path();
        let placed = rustix::fs::openat(&destination.parent, &destination.name, DIRECTORY, Mode::empty());
        self.tree = placed.map_err(|e| destination.failed(e))?;
        for item in self.pending.iter().rev().filter(|item| !merged.contains(&item.path)) {
            let set = self.open(&item.path, DIRECTORY).and_then(|fd| destination.finish(fd, item));
            set.map_err(|e| GuestError::host(&path.join(OsStr::from_bytes(&item.path)), e.into()))?;
        }
        Ok(())
    }

    fn add<F: FnMut(Progress)>(&mut self, receiver: &mut Receiver<F>, item: Item) -> Result<(), GuestError> {
        let cut = item.path.iter().rposition(|&b| b == b'/');
        let (parent, name) = cut.map_or((&b""[..], &item.path[..]), |at| (&item.path[..at], &item.path[at + 1..]));
        if self.near.as_ref().is_none_or(|(path, _)| path != parent) {
            let opened = self.open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC);
            self.near = Some((parent.to_vec(), opened.map_err(|e| self.refused(e))?));
        }
        let Some((_, dir)) = &self.near else { return Err(GuestError::Gone) };
        match &item.kind {
            ItemKind::File(_) => {
                let file = rustix::fs::openat(dir, name, NEW_FILE, Mode::RUSR | Mode::WUSR);
                write_file(receiver, &item, file.map_err(|e| self.refused(e))?, self.destination)
            }
            ItemKind::Directory => {
                rustix::fs::mkdirat(dir, name, Mode::RWXU).map_err(|e| self.refused(e))?;
                receiver.body(false, |_| Ok(()))?;
                self.keep(item)
            }
            ItemKind::Symlink(target) => {
                rustix::fs::symlinkat(OsStr::from_bytes(target), dir, name)
                    .and_then(|()| rustix::fs::utimensat(dir, name, &times(item.mtime_ns), AtFlags::SYMLINK_NOFOLLOW))
                    .and_then(|()| match item.owner {
                        Some((uid, gid)) => {
                            let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
                            give(rustix::fs::chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW))
                        }
                        None => Ok(()),
                    })
                    .map_err(|e| self.refused(e))?;
                receiver.body(false, |_| Ok(()))
            }
            ItemKind::Link(target) => {
                self.link(target, dir, name)?;
                receiver.body(false, |_| Ok(()))
            }
        }
    }

    /// Makes another name of a file that came before.
    fn link(&self, target: &[u8], dir: &OwnedFd, name: &[u8]) -> Result<(), GuestError> {
        let cut = target.iter().rposition(|&b| b == b'/');
        let (parent, last) = cut.map_or((&b""[..], target), |at| (&target[..at], &target[at + 1..]));
        let last = OsStr::from_bytes(last);
        let parent =
            self.open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC).map_err(|e| self.refused(e))?;
        if kind_at(&parent, last).map_err(|e| self.refused(e))? != Some(FileType::RegularFile) {
            return Err(GuestError::breach("a hard link to what is no file"));
        }
        rustix::fs::linkat(&parent, last, dir, name, AtFlags::empty()).map_err(|e| self.refused(e))
    }

    /// Opens a directory of the tree; `path` empty is the tree itself.
    fn open(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.is_empty() { b"." } else { path };
        rustix::fs::openat2(&self.tree, path, flags, Mode::empty(), INSIDE)
    }

    fn keep(&mut self, item: Item) -> Result<(), GuestError> {
        self.pending_bytes += item.path.len() + size_of::<Item>();
        if self.pending_bytes > MAX_PENDING {
            return Err(GuestError::LimitExceeded { what: "bytes of directory names", limit: MAX_PENDING as u64 });
        }
        self.pending.push(item);
        Ok(())
    }

    /// A failed call on something the guest named: in a fresh directory these can only be the guest's doing.
    fn refused(&self, error: Errno) -> GuestError {
        match error {
            Errno::EXIST => GuestError::breach("the same name twice in a directory"),
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV => {
                GuestError::breach("a file whose directory was not sent")
            }
            error => self.destination.failed(error),
        }
    }
}
