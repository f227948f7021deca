//! A file, symlink or hard link on its way into the guest: written under a temporary name, then put in its place.
//!
//! Invariant: whatever ends the copy, the temporary name is removed and what was there before is whole; a device, pipe or
//! socket is never replaced.

use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use nido_guest_agent::replace::{ExistingEntry, GivenAttributes, ReplacedFile, free_bytes, inspect};
use nido_guest_agent::wire::{Entry, EntryKind, Fault, Summary};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::Inbound;
use super::destination::{Ids, failed, give_to, malformed, special};
use super::output::Output;
use crate::refusal::Refusal;

/// How files are written for this request.
#[derive(Debug, Clone, Copy)]
pub struct WriteOptions {
    /// Whose they are.
    pub ids: Ids,
    /// The request named the owner.
    pub set_owner: bool,
    /// The request named the mode.
    pub set_mode: bool,
}

impl WriteOptions {
    /// Whose an entry is.
    pub fn ids(&self, entry: &Entry) -> Ids {
        entry.owner.map(|owner| (owner.uid, owner.gid)).or(self.ids)
    }

    /// What of a file that is replaced does not stay as it is.
    fn given(&self, entry: &Entry) -> GivenAttributes {
        let is_preserved = entry.owner.is_some();
        GivenAttributes {
            owner: if is_preserved || self.set_owner { self.ids(entry) } else { None },
            mode: (is_preserved || self.set_mode).then(|| u32::from(entry.mode & 0o777)),
        }
    }
}

pub fn times(entry: &Entry) -> Timestamps {
    let time = Timespec {
        tv_sec: entry.mtime_ns.div_euclid(1_000_000_000),
        tv_nsec: entry.mtime_ns.rem_euclid(1_000_000_000),
    };
    Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW }, last_modification: time }
}

pub fn mode(entry: &Entry) -> Mode {
    Mode::from_raw_mode(u32::from(entry.mode & 0o777))
}

fn temporary_name() -> Result<OsString, Refusal> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| Refusal::new(Fault::Other, error.to_string()))?;
    Ok(format!(".nido-{:016x}", u64::from_ne_bytes(random)).into())
}

/// A name that is removed again unless it is kept.
pub struct TemporaryName<'a> {
    directory: &'a OwnedFd,
    pub name: OsString,
    kept: bool,
}

impl<'a> TemporaryName<'a> {
    pub fn new(directory: &'a OwnedFd) -> Result<Self, Refusal> {
        Ok(Self { directory, name: temporary_name()?, kept: false })
    }

    /// Becomes what it was written for.
    pub fn rename(mut self, target: &OsStr, flags: RenameFlags, shown: &Path) -> Result<(), Refusal> {
        let renamed = rustix::fs::renameat_with(self.directory, &self.name, self.directory, target, flags);
        self.kept = renamed.is_ok();
        renamed.map_err(|error| failed(shown, error))
    }
}

impl Drop for TemporaryName<'_> {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // If it cannot be removed there is nothing better to do.
        if rustix::fs::unlinkat(self.directory, &self.name, AtFlags::empty()) == Err(Errno::ISDIR) {
            let open = Path::new("/proc/self/fd").join(std::os::fd::AsRawFd::as_raw_fd(self.directory).to_string());
            let _ = fs::remove_dir_all(open.join(&self.name));
        }
    }
}

/// An entry that is complete and not in its place yet.
pub struct Leaf<'a> {
    temporary: TemporaryName<'a>,
    /// A file whose place is taken by one that has to be written over: it has further names.
    over: Option<(fs::File, ReplacedFile, GivenAttributes, Timestamps)>,
    is_link: bool,
}

impl Leaf<'_> {
    /// Puts it in its place.
    pub fn commit(self, target: &OsStr, shown: &Path) -> Result<(), Refusal> {
        if let Some((mut new, kept, given, times)) = self.over {
            let file = kept.overwrite(&mut new, given).map_err(|error| failed(shown, error))?;
            return rustix::fs::futimens(&file, &times).map_err(|error| failed(shown, error));
        }
        // Check again: another process may have created something there while the bytes arrived.
        replaceable(self.temporary.directory, target, shown)?;
        let (directory, temporary) = (self.temporary.directory, self.temporary.name.clone());
        self.temporary.rename(target, RenameFlags::empty(), shown)?;
        if self.is_link {
            // Where the target is the same file already, the kernel renames nothing and leaves both names.
            let _ = rustix::fs::unlinkat(directory, &temporary, AtFlags::empty());
        }
        Ok(())
    }
}

/// The file that an entry replaces, if it replaces one.
fn replaceable(directory: &OwnedFd, name: &OsStr, shown: &Path) -> Result<Option<ReplacedFile>, Refusal> {
    match inspect(directory, name).map_err(|error| failed(shown, error))? {
        ExistingEntry::File(kept) => Ok(Some(kept)),
        ExistingEntry::Nothing | ExistingEntry::Symlink => Ok(None),
        ExistingEntry::Directory => Err(failed(shown, Errno::ISDIR)),
        ExistingEntry::Special => Err(special(shown)),
    }
}

/// Writes an entry other than a directory under a temporary name. `linked` finds what a hard link is another name of.
pub fn write_leaf<'a>(
    (directory, name, shown): (&'a OwnedFd, &OsStr, &Path),
    entry: &Entry,
    how: WriteOptions,
    linked: impl FnOnce(&OwnedFd, &OsStr) -> Result<(), Refusal>,
    queue: &mut mpsc::Receiver<Inbound>,
    summary: &mut Summary,
) -> Result<Leaf<'a>, Refusal> {
    let existing = replaceable(directory, name, shown)?;
    let temporary = TemporaryName::new(directory)?;
    let at = |error: Errno| failed(shown, error);
    let mut over = None;
    match &entry.kind {
        EntryKind::Directory => return Err(malformed("a directory where a file was expected")),
        EntryKind::Symlink(target) => {
            let target = CString::new(target.to_vec()).map_err(|_| malformed("NUL in a symlink"))?;
            rustix::fs::symlinkat(&target, directory, &temporary.name).map_err(at)?;
            give_to(directory, &temporary.name, how.ids(entry)).map_err(at)?;
            expect_end(queue)?;
        }
        EntryKind::Link(_) => {
            linked(directory, &temporary.name)?;
            expect_end(queue)?;
            summary.entries += 1;
            return Ok(Leaf { temporary, over: None, is_link: true });
        }
        EntryKind::File(announced) => {
            check_room(directory, entry.stored.unwrap_or(*announced), shown)?;
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(directory, &temporary.name, flags, Mode::from_raw_mode(0o600)).map_err(at)?;
            let file = write_bytes(file.into(), *announced, shown, queue, summary)?;
            let given = how.given(entry);
            let is_whole = match &existing {
                Some(kept) => kept.hand_on(&file, given).map_err(|error| failed(shown, error))?,
                None => true,
            };
            match existing {
                Some(kept) if !is_whole => over = Some((file, kept, given, times(entry))),
                Some(_) => {}
                None => {
                    if let Some((uid, gid)) = how.ids(entry) {
                        rustix::fs::fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).map_err(at)?;
                    }
                    rustix::fs::fchmod(&file, mode(entry)).map_err(at)?;
                }
            }
        }
    }
    rustix::fs::utimensat(directory, &temporary.name, &times(entry), AtFlags::SYMLINK_NOFOLLOW).map_err(at)?;
    summary.entries += 1;
    Ok(Leaf { temporary, over, is_link: false })
}

/// Refuses what cannot fit before the first byte of it is written.
fn check_room(directory: &OwnedFd, needed: u64, shown: &Path) -> Result<(), Refusal> {
    match free_bytes(directory) {
        Some(free) if free < needed => {
            let (needed, free) = (needed.div_ceil(1 << 20), free >> 20);
            let what = format!("{}: it takes {needed} MiB, and {free} MiB are free in the guest", shown.display());
            Err(Refusal::new(Fault::DiskFull, what))
        }
        _ => Ok(()),
    }
}

fn write_bytes(
    file: fs::File,
    announced: u64,
    shown: &Path,
    queue: &mut mpsc::Receiver<Inbound>,
    summary: &mut Summary,
) -> Result<fs::File, Refusal> {
    let mut output = Output::new(file, announced);
    loop {
        match queue.blocking_recv() {
            Some(Inbound::Bytes(bytes)) => {
                output.write(bytes.as_ref()).map_err(|error| failed(shown, error))?;
                summary.bytes += bytes.as_ref().len() as u64;
            }
            Some(Inbound::Hole(length)) => output.skip(length).map_err(|error| failed(shown, error))?,
            Some(Inbound::EntryEnd) => return output.finish().map_err(|error| failed(shown, error)),
            _ => return Err(malformed("a file that does not end")),
        }
    }
}

pub fn expect_end(queue: &mut mpsc::Receiver<Inbound>) -> Result<(), Refusal> {
    match queue.blocking_recv() {
        Some(Inbound::EntryEnd) => Ok(()),
        _ => Err(malformed("an entry that does not end")),
    }
}
