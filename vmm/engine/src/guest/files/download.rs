//! A copy out of a guest, written on this host so that it is never half there.
//!
//! ```text
//!  parent/.nido-<random>/root...   written here, below a descriptor of the fresh directory
//!  parent/NAME                     renamed to, as the last step
//! ```
//!
//! Invariant: below the fresh directory every name is resolved by `openat2` with "beneath" and "no symlinks", and
//! created only where nothing was, so nothing the guest sends can make a write land anywhere else. Modes are masked to
//! the nine permission bits.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use nido_guest_agent::replace::free_bytes;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;

use super::destination::{DIRECTORY, Destination, give, kind_at, times};
use super::fresh::{ROOT, StagingDirectory};
use super::merge::{put_directory, put_new, put_over};
use super::receive::{FileChunk, Item, ItemKind, Receiver};
use super::{CopyTotals, Progress};
use crate::guest::error::GuestError;

/// How often the free space is looked at: after so many bytes.
const SPACE_CHECK_BYTES: u64 = 16 << 20;
/// So much stays free, in bytes: a guest must not fill the host's disk to its last byte.
const RESERVE: u64 = 128 << 20;
/// Memory for directories whose mode and time are still to be set, in bytes.
const MAX_PENDING: usize = 64 << 20;

const NEW_FILE: OFlags =
    OFlags::RDWR.union(OFlags::CREATE).union(OFlags::EXCL).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const INSIDE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// Receives the whole tree and puts it in its place.
pub(super) fn download<F: FnMut(Progress)>(
    receiver: &mut Receiver<F>,
    destination: &Destination,
) -> Result<CopyTotals, GuestError> {
    let fresh = StagingDirectory::make(destination)?;
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
    if needed > SPACE_CHECK_BYTES && free_bytes(&file).is_some_and(|free| free < needed.saturating_add(RESERVE)) {
        return Err(full());
    }
    let (mut since, mut ends_in_hole) = (0, false);
    receiver.body(true, |piece| match piece {
        FileChunk::Bytes(bytes) => {
            since += bytes.len() as u64;
            if since >= SPACE_CHECK_BYTES {
                since = 0;
                if free_bytes(&file).is_some_and(|free| free < RESERVE) {
                    return Err(full());
                }
            }
            ends_in_hole = false;
            file.write_all(bytes).map_err(|e| GuestError::host(&at, e))
        }
        FileChunk::Hole(length) => {
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
            return Err(GuestError::breach("a hard link to something other than a file"));
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
