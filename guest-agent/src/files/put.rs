//! The disk's side of `Put`: writes a tree.
//!
//! A file is written under a temporary name next to its place and renamed (`leaf.rs`); a directory that did not exist is
//! filled under a temporary name and renamed as a whole; into one that exists entries are merged, each by itself. Invariant:
//! whatever ends the copy, no temporary name stays behind, and what was there before is whole.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use minicbor::bytes::ByteVec;
use nido_guest_agent::wire::{Entry, EntryKind, Put, Summary, check_path};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::Inbound;
use super::destination::{DIRECTORY_PATH_FLAGS, Destination, failed, give_to, malformed, owner};
use super::leaf::{TemporaryName, WriteOptions, expect_end, mode, times, write_leaf};
use crate::refusal::Refusal;

/// How entries of a tree are opened: below its root, whatever links are in it.
const INSIDE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// Writes the tree that comes through `queue`.
///
/// # Errors
/// The result for the host, also if the queue ends before the tree.
pub fn write_tree(request: &Put, mut queue: mpsc::Receiver<Inbound>) -> Result<Summary, Refusal> {
    let owner = owner(request.user.as_deref())?;
    let home = owner.as_ref().map_or("/root".into(), |user| user.home.clone());
    let Some(Inbound::Entry(root)) = queue.blocking_recv() else {
        return Err(malformed("a tree begins with an entry"));
    };
    if !root.path.is_empty() {
        return Err(malformed("the first entry of a tree has no name"));
    }
    let ids = owner.map(|user| (user.uid, user.gid));
    let set_mode = request.set_mode.unwrap_or(true);
    let how = WriteOptions { ids, set_owner: request.user.is_some(), set_mode };
    let destination = Destination::find(request, &home, ids)?;
    let shown = destination.path();
    let mut summary = Summary { path: Some(shown.clone().into_os_string().into_vec().into()), ..Summary::default() };
    if root.kind == EntryKind::Directory {
        write_directory(&destination, root, how, &mut queue, &mut summary)?;
    } else {
        let parent = destination.open_parent()?;
        let alone = |_: &OwnedFd, _: &OsStr| Err(malformed("a hard link to nothing"));
        let leaf = write_leaf((&parent, &destination.name, &shown), &root, how, alone, &mut queue, &mut summary)?;
        match queue.blocking_recv() {
            Some(Inbound::TreeEnd) => leaf.commit(&destination.name, &shown)?,
            _ => return Err(malformed("a tree whose root is not a directory has one entry")),
        }
    }
    Ok(summary)
}

/// Writes a directory and what comes below it.
fn write_directory(
    destination: &Destination,
    root: Entry,
    how: WriteOptions,
    queue: &mut mpsc::Receiver<Inbound>,
    summary: &mut Summary,
) -> Result<(), Refusal> {
    expect_end(queue)?;
    let shown = destination.path();
    let parent = destination.open_parent()?;
    let merged =
        match rustix::fs::openat(&parent, &destination.name, DIRECTORY_PATH_FLAGS | OFlags::NOFOLLOW, Mode::empty()) {
            Ok(directory) => Some(directory),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(failed(&shown, error)),
        };
    summary.entries += 1;
    let tree = |root, open| Tree { root, shown: shown.clone(), at: None, open, how };
    if let Some(directory) = merged {
        return tree(directory, Vec::new()).write(queue, summary);
    }
    let temporary = TemporaryName::new(&parent)?;
    rustix::fs::mkdirat(&parent, &temporary.name, Mode::from_raw_mode(0o700)).map_err(|error| failed(&shown, error))?;
    give_to(&parent, &temporary.name, how.ids(&root)).map_err(|error| failed(&shown, error))?;
    let directory =
        rustix::fs::openat(&parent, &temporary.name, DIRECTORY_PATH_FLAGS | OFlags::NOFOLLOW, Mode::empty())
            .map_err(|error| failed(&shown, error))?;
    let last = root.clone();
    tree(directory, vec![root]).write(queue, summary)?;
    // A directory that may not be written cannot be moved by an ordinary user: its mode comes after that.
    temporary.rename(&destination.name, RenameFlags::NOREPLACE, &shown)?;
    set_last(&parent, &destination.name, &last).map_err(|error| failed(&shown, error))
}

/// Gives the root its mode and time once it is in its place.
fn set_last(parent: &OwnedFd, name: &OsStr, entry: &Entry) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    rustix::fs::fchmod(&directory, mode(entry))?;
    rustix::fs::futimens(&directory, &times(entry))
}

/// A directory being filled.
struct Tree {
    root: OwnedFd,
    /// Its path in the guest, for messages.
    shown: PathBuf,
    /// The directory of the last entry: its path and an open descriptor.
    at: Option<(Vec<ByteVec>, OwnedFd)>,
    /// New directories that still get entries, each below the one before; mode and time are set when they are done.
    open: Vec<Entry>,
    how: WriteOptions,
}

impl Tree {
    fn write(mut self, queue: &mut mpsc::Receiver<Inbound>, summary: &mut Summary) -> Result<(), Refusal> {
        loop {
            match queue.blocking_recv() {
                Some(Inbound::Entry(entry)) => {
                    check_path(&entry.path).map_err(|error| malformed(&error.to_string()))?;
                    self.entry(entry, queue, summary)?;
                }
                Some(Inbound::TreeEnd) => break,
                _ => return Err(malformed("a tree that does not end")),
            }
        }
        while let Some(directory) = self.open.pop() {
            self.finish(&directory)?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        entry: Entry,
        queue: &mut mpsc::Receiver<Inbound>,
        summary: &mut Summary,
    ) -> Result<(), Refusal> {
        let Some((name, above)) = entry.path.split_last() else { return Err(malformed("two roots in one tree")) };
        while let Some(directory) = self.open.pop_if(|directory| !above.starts_with(&directory.path)) {
            self.finish(&directory)?;
        }
        self.go_to(above)?;
        let Some((_, directory)) = &self.at else { return Err(malformed("not a directory")) };
        let name = OsStr::from_bytes(name);
        let shown = self.path(&entry.path);
        if entry.kind != EntryKind::Directory {
            let linked = |directory: &OwnedFd, name: &OsStr| match &entry.kind {
                EntryKind::Link(target) => self.link(target, directory, name),
                _ => Err(malformed("not a hard link")),
            };
            let leaf = write_leaf((directory, name, &shown), &entry, self.how, linked, queue, summary)?;
            return leaf.commit(name, &shown);
        }
        expect_end(queue)?;
        summary.entries += 1;
        match rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(0o700)) {
            Ok(()) => {
                give_to(directory, name, self.how.ids(&entry)).map_err(|error| failed(&shown, error))?;
                self.open.push(entry);
                Ok(())
            }
            // Merged into; its own mode and time stay. If it is something else, what goes into it will fail.
            Err(Errno::EXIST) => {
                let found = rustix::fs::openat(directory, name, DIRECTORY_PATH_FLAGS | OFlags::NOFOLLOW, Mode::empty());
                found.map(drop).map_err(|error| failed(&shown, error))
            }
            Err(error) => Err(failed(&shown, error)),
        }
    }

    /// Makes another name of a file that came before in this tree.
    fn link(&self, target: &[ByteVec], directory: &OwnedFd, name: &OsStr) -> Result<(), Refusal> {
        check_path(target).map_err(|error| malformed(&error.to_string()))?;
        let Some((last, above)) = target.split_last() else { return Err(malformed("a hard link to the root")) };
        let last = OsStr::from_bytes(last);
        let shown = self.path(target);
        let parent = rustix::fs::openat2(&self.root, joined(above), DIRECTORY_PATH_FLAGS, Mode::empty(), INSIDE)
            .map_err(|error| failed(&shown, error))?;
        let found = rustix::fs::statat(&parent, last, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| failed(&shown, e))?;
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
            return Err(malformed("a hard link to something other than a file"));
        }
        rustix::fs::linkat(&parent, last, directory, name, AtFlags::empty()).map_err(|error| failed(&shown, error))
    }

    /// Opens the directory of an entry, never leaving the tree, whatever links are in it.
    fn go_to(&mut self, above: &[ByteVec]) -> Result<(), Refusal> {
        if self.at.as_ref().is_some_and(|(path, _)| path == above) {
            return Ok(());
        }
        let opened = rustix::fs::openat2(&self.root, joined(above), DIRECTORY_PATH_FLAGS, Mode::empty(), INSIDE);
        let opened = opened.map_err(|error| failed(&self.path(above), error))?;
        self.at = Some((above.to_vec(), opened));
        Ok(())
    }

    /// Gives a directory its mode and time, now that nothing more goes into it. The root gets them where it is in its place.
    fn finish(&mut self, entry: &Entry) -> Result<(), Refusal> {
        if entry.path.is_empty() {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat2(&self.root, joined(&entry.path), flags, Mode::empty(), INSIDE);
        let done = opened.and_then(|directory| {
            rustix::fs::fchmod(&directory, mode(entry))?;
            rustix::fs::futimens(&directory, &times(entry))
        });
        done.map_err(|error| failed(&self.path(&entry.path), error))
    }

    /// The whole path of an entry, for messages.
    fn path(&self, below: &[ByteVec]) -> PathBuf {
        if below.is_empty() { self.shown.clone() } else { self.shown.join(Path::new(&joined(below))) }
    }
}

/// A path for the kernel, relative to the root of the tree.
fn joined(path: &[ByteVec]) -> OsString {
    if path.is_empty() {
        return ".".into();
    }
    OsString::from_vec(path.iter().map(|component| component.as_slice()).collect::<Vec<_>>().join(&b'/'))
}
