//! The disk's side of `Put`: writes a tree.
//!
//! A file is written under a temporary name next to its place and renamed; a directory that did not exist is filled
//! under a temporary name and renamed as a whole; into one that exists entries are merged, each by itself. Invariant:
//! whatever ends the copy, no temporary name stays behind, and what was there before is whole.

use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use minicbor::bytes::ByteVec;
use nido_guest_agent::wire::{Entry, EntryKind, Fault, Put, Summary, check_component, check_path};
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::output::Output;
use super::{Inbound, resolve};
use crate::agent::Refusal;
use crate::passwd::{self, User};

/// Directories are looked at, not read.
const AS_PLACE: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Writes the tree that comes through `queue`.
///
/// # Errors
/// What the host is to be told, also when the queue ends before the tree does.
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
    let place = Place::find(request, &home, ids)?;
    let mut summary = Summary { path: Some(place.path().into_os_string().into_vec().into()), ..Summary::default() };
    if root.kind == EntryKind::Directory {
        write_directory(&place, root, ids, &mut queue, &mut summary)?;
    } else {
        let parent = place.open_parent()?;
        let leaf = write_leaf(&parent, &place.name, &root, ids, &mut queue, &mut summary)?;
        match queue.blocking_recv() {
            Some(Inbound::TreeEnd) => leaf.take_name(&place.name)?,
            _ => return Err(malformed("a tree whose root is no directory has one entry")),
        }
    }
    Ok(summary)
}

fn malformed(message: &str) -> Refusal {
    Refusal::new(Fault::Invalid, message)
}

fn failed(path: &Path, error: impl Into<io::Error>) -> Refusal {
    Refusal::from_io(&path.display().to_string(), &error.into())
}

fn owner(wanted: Option<&str>) -> Result<Option<User>, Refusal> {
    let name = wanted.unwrap_or("0");
    match passwd::find(name).map_err(|error| Refusal::from_io("/etc/passwd", &error))? {
        Some(user) if user.uid == 0 && wanted.is_none() && !rustix::process::geteuid().is_root() => Ok(None),
        Some(user) => Ok(Some(user)),
        None => Err(Refusal::new(Fault::NoUser, format!("there is no user {name:?} in the guest"))),
    }
}

type Ids = Option<(u32, u32)>;

/// Where the root of the tree goes.
struct Place {
    parent: PathBuf,
    name: OsString,
}

impl Place {
    /// Follows the request's path: a directory takes the copy under the name given, everything else is meant itself.
    fn find(request: &Put, home: &Path, ids: Ids) -> Result<Self, Refusal> {
        let mut path = resolve(&request.path, home)?;
        let wants_directory = request.path.last().is_none_or(|&byte| byte == b'/');
        let found = fs::metadata(&path);
        if let Some(name) = &request.name {
            check_component(name).map_err(|error| malformed(&error.to_string()))?;
            let is_directory = found.as_ref().is_ok_and(fs::Metadata::is_dir);
            if !is_directory && wants_directory {
                make_directories(&path, request.parents, ids)?;
            }
            if is_directory || wants_directory {
                path.push(OsStr::from_bytes(name));
            }
        }
        // What is meant may be a symlink to the real thing, which is what shall be replaced.
        if let Ok(real) = fs::canonicalize(&path) {
            path = real;
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Refusal::new(Fault::WrongType, format!("{}: cannot be replaced", path.display())));
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        make_directories(parent, request.parents, ids)?;
        Ok(Self { parent: parent.to_owned(), name: name.to_owned() })
    }

    fn path(&self) -> PathBuf {
        self.parent.join(&self.name)
    }

    fn open_parent(&self) -> Result<OwnedFd, Refusal> {
        rustix::fs::open(&self.parent, AS_PLACE, Mode::empty()).map_err(|error| failed(&self.parent, error))
    }
}

/// Makes a directory and what is missing above it, if that is allowed.
fn make_directories(path: &Path, allowed: bool, ids: Ids) -> Result<(), Refusal> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) => return Err(Refusal::new(Fault::WrongType, format!("{}: not a directory", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound && allowed => {}
        Err(error) => return Err(failed(path, error)),
    }
    if let Some(parent) = path.parent() {
        make_directories(parent, allowed, ids)?;
    }
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) => give_to(CWD, path, ids).map_err(|error| failed(path, error)),
        Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(failed(path, error)),
    }
}

fn give_to(directory: impl AsFd, name: impl rustix::path::Arg, ids: Ids) -> Result<(), Errno> {
    let Some((uid, gid)) = ids else { return Ok(()) };
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::fs::chownat(directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}

fn temporary_name() -> Result<OsString, Refusal> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| Refusal::new(Fault::Other, error.to_string()))?;
    Ok(format!(".nido-{:016x}", u64::from_ne_bytes(random)).into())
}

fn times(entry: &Entry) -> Timestamps {
    let time = Timespec {
        tv_sec: entry.mtime_ns.div_euclid(1_000_000_000),
        tv_nsec: entry.mtime_ns.rem_euclid(1_000_000_000),
    };
    Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW }, last_modification: time }
}

fn mode(entry: &Entry) -> Mode {
    Mode::from_raw_mode(u32::from(entry.mode & 0o777))
}

/// A name that is removed again unless it is kept.
struct Temporary<'a> {
    directory: &'a OwnedFd,
    name: OsString,
    kept: bool,
}

impl<'a> Temporary<'a> {
    fn new(directory: &'a OwnedFd) -> Result<Self, Refusal> {
        Ok(Self { directory, name: temporary_name()?, kept: false })
    }

    /// Becomes what it was written for, in place of what may have that name.
    fn take_name(self, target: &OsStr) -> Result<(), Refusal> {
        self.rename(target, RenameFlags::empty())
    }

    fn rename(mut self, target: &OsStr, flags: RenameFlags) -> Result<(), Refusal> {
        let renamed = rustix::fs::renameat_with(self.directory, &self.name, self.directory, target, flags);
        self.kept = renamed.is_ok();
        renamed.map_err(|error| failed(Path::new(target), error))
    }
}

impl Drop for Temporary<'_> {
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

/// Writes a file or symlink under a temporary name.
fn write_leaf<'a>(
    directory: &'a OwnedFd,
    name: &OsStr,
    entry: &Entry,
    ids: Ids,
    queue: &mut mpsc::Receiver<Inbound>,
    summary: &mut Summary,
) -> Result<Temporary<'a>, Refusal> {
    let shown = Path::new(name);
    let temporary = Temporary::new(directory)?;
    match &entry.kind {
        EntryKind::Directory => return Err(malformed("a directory where a file was expected")),
        EntryKind::Symlink(target) => {
            let target = CString::new(target.to_vec()).map_err(|_| malformed("NUL in a symlink"))?;
            rustix::fs::symlinkat(&target, directory, &temporary.name).map_err(|error| failed(shown, error))?;
            give_to(directory, &temporary.name, ids).map_err(|error| failed(shown, error))?;
            expect_end(queue)?;
        }
        EntryKind::File(announced) => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(directory, &temporary.name, flags, Mode::from_raw_mode(0o600))
                .map_err(|error| failed(shown, error))?;
            let file = write_bytes(file.into(), *announced, shown, queue, summary)?;
            if let Some((uid, gid)) = ids {
                rustix::fs::fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                    .map_err(|error| failed(shown, error))?;
            }
            rustix::fs::fchmod(&file, mode(entry)).map_err(|error| failed(shown, error))?;
        }
    }
    rustix::fs::utimensat(directory, &temporary.name, &times(entry), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|error| failed(shown, error))?;
    summary.entries += 1;
    Ok(temporary)
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
            Some(Inbound::EntryEnd) => return output.finish().map_err(|error| failed(shown, error)),
            _ => return Err(malformed("a file that does not end")),
        }
    }
}

fn expect_end(queue: &mut mpsc::Receiver<Inbound>) -> Result<(), Refusal> {
    match queue.blocking_recv() {
        Some(Inbound::EntryEnd) => Ok(()),
        _ => Err(malformed("an entry that does not end")),
    }
}

/// Writes a directory and what comes below it.
fn write_directory(
    place: &Place,
    root: Entry,
    ids: Ids,
    queue: &mut mpsc::Receiver<Inbound>,
    summary: &mut Summary,
) -> Result<(), Refusal> {
    expect_end(queue)?;
    let shown = place.path();
    let parent = place.open_parent()?;
    let merged = match rustix::fs::openat(&parent, &place.name, AS_PLACE | OFlags::NOFOLLOW, Mode::empty()) {
        Ok(directory) => Some(directory),
        Err(Errno::NOENT) => None,
        Err(error) => return Err(failed(&shown, error)),
    };
    summary.entries += 1;
    if let Some(directory) = merged {
        return Tree { root: directory, at: None, open: Vec::new(), ids }.write(queue, summary);
    }
    let temporary = Temporary::new(&parent)?;
    rustix::fs::mkdirat(&parent, &temporary.name, Mode::from_raw_mode(0o700)).map_err(|error| failed(&shown, error))?;
    give_to(&parent, &temporary.name, ids).map_err(|error| failed(&shown, error))?;
    let directory = rustix::fs::openat(&parent, &temporary.name, AS_PLACE | OFlags::NOFOLLOW, Mode::empty())
        .map_err(|error| failed(&shown, error))?;
    Tree { root: directory, at: None, open: vec![root], ids }.write(queue, summary)?;
    temporary.rename(&place.name, RenameFlags::NOREPLACE)
}

/// A directory being filled.
struct Tree {
    root: OwnedFd,
    /// The directory of the last entry: its path and an open descriptor.
    at: Option<(Vec<ByteVec>, OwnedFd)>,
    /// New directories that still get entries, each below the one before; mode and time are set when they are done.
    open: Vec<Entry>,
    ids: Ids,
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
        let Some((_, directory)) = &self.at else { return Err(malformed("no directory")) };
        let name = OsStr::from_bytes(name);
        if entry.kind != EntryKind::Directory {
            return write_leaf(directory, name, &entry, self.ids, queue, summary)?.take_name(name);
        }
        expect_end(queue)?;
        summary.entries += 1;
        match rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(0o700)) {
            Ok(()) => {
                give_to(directory, name, self.ids).map_err(|error| failed(Path::new(name), error))?;
                self.open.push(entry);
                Ok(())
            }
            // Merged into; its own mode and time stay. If it is something else, what goes into it will fail.
            Err(Errno::EXIST) => {
                let found = rustix::fs::openat(directory, name, AS_PLACE | OFlags::NOFOLLOW, Mode::empty());
                found.map(drop).map_err(|error| failed(Path::new(name), error))
            }
            Err(error) => Err(failed(Path::new(name), error)),
        }
    }

    /// Opens the directory of an entry, never leaving the tree, whatever links are in it.
    fn go_to(&mut self, above: &[ByteVec]) -> Result<(), Refusal> {
        if self.at.as_ref().is_some_and(|(path, _)| path == above) {
            return Ok(());
        }
        let joined = joined(above);
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let opened = rustix::fs::openat2(&self.root, &joined, AS_PLACE, Mode::empty(), resolve);
        let opened = opened.map_err(|error| failed(Path::new(&joined), error))?;
        self.at = Some((above.to_vec(), opened));
        Ok(())
    }

    /// Gives a directory its mode and time, now that nothing more goes into it.
    fn finish(&mut self, entry: &Entry) -> Result<(), Refusal> {
        let shown = joined(&entry.path);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let done = rustix::fs::openat2(&self.root, &shown, flags, Mode::empty(), resolve).and_then(|directory| {
            rustix::fs::fchmod(&directory, mode(entry))?;
            rustix::fs::futimens(&directory, &times(entry))
        });
        done.map_err(|error| failed(Path::new(&shown), error))
    }
}

/// A path for the kernel, relative to the root of the tree.
fn joined(path: &[ByteVec]) -> OsString {
    if path.is_empty() {
        return ".".into();
    }
    OsString::from_vec(path.iter().map(|component| component.as_slice()).collect::<Vec<_>>().join(&b'/'))
}
