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

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, ResolveFlags, Timespec, Timestamps};
use rustix::io::Errno;

use super::receive::{Item, ItemKind, Receiver};
use super::{Copied, Progress};
use crate::guest::error::GuestError;

/// Name of the copy inside the fresh directory.
const ROOT: &str = "root";
/// Memory for directories whose mode and time are still to be set, in bytes.
const MAX_PENDING: usize = 64 << 20;

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const NEW_FILE: OFlags =
    OFlags::WRONLY.union(OFlags::CREATE).union(OFlags::EXCL).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const INSIDE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// The place for a copy, looked at before the guest is asked for anything.
#[derive(Debug)]
pub(super) struct Destination {
    parent: OwnedFd,
    /// For messages.
    parent_path: PathBuf,
    name: OsString,
    overwrite: bool,
    /// The destination was written with a slash behind it.
    must_be_directory: bool,
}

impl Destination {
    /// Decides where the copy goes. `name` is what it is called in a directory.
    pub fn resolve(path: &Path, name: Option<&[u8]>, overwrite: bool) -> Result<Self, GuestError> {
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
            Ok(_) if !overwrite => return Err(GuestError::PathExists(path.to_owned())),
            Ok(_) => split(path, slash)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => split(path, slash)?,
            Err(error) => return Err(GuestError::host(path, error)),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = rustix::fs::open(&parent_path, flags, Mode::empty())
            .map_err(|e| GuestError::host(&parent_path, e.into()))?;
        let this = Self { parent, parent_path, name, overwrite, must_be_directory };
        if !overwrite && this.existing()?.is_some() {
            return Err(GuestError::PathExists(this.path()));
        }
        Ok(this)
    }

    fn path(&self) -> PathBuf {
        self.parent_path.join(&self.name)
    }

    fn failed(&self, error: Errno) -> GuestError {
        GuestError::host(&self.path(), error.into())
    }

    /// What is there now, symlinks not followed.
    fn existing(&self) -> Result<Option<FileType>, GuestError> {
        kind_at(&self.parent, &self.name).map_err(|e| self.failed(e))
    }
}

/// A path that does not exist, or shall be replaced: its directory and its name.
fn split(path: &Path, slash: bool) -> Result<(PathBuf, OsString, bool), GuestError> {
    let Some(name) = path.file_name() else {
        return Err(GuestError::BadName(format!("{} is no name for a copy", path.display())));
    };
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((parent.to_owned(), name.to_owned(), slash))
}

fn kind_at(dir: impl AsFd, name: &OsStr) -> rustix::io::Result<Option<FileType>> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
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
        put_file(&fresh, destination)?;
    } else {
        receiver.body(false, |_| Ok(()))?;
        let made = rustix::fs::mkdirat(&fresh.fd, ROOT, Mode::RWXU);
        let tree = made.and_then(|()| rustix::fs::openat(&fresh.fd, ROOT, DIRECTORY, Mode::empty()));
        let tree = tree.map_err(|e| destination.failed(e))?;
        Tree { tree, near: None, pending: Vec::new(), pending_bytes: 0, destination }.fill(receiver, root)?;
        put_directory(&fresh, destination)?;
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
    receiver.body(true, |bytes| file.write_all(bytes).map_err(|e| GuestError::host(&destination.path(), e)))?;
    finish(&file, item).map_err(|e| destination.failed(e))
}

/// Sets mode and time.
fn finish(fd: impl AsFd, item: &Item) -> rustix::io::Result<()> {
    rustix::fs::fchmod(&fd, Mode::from_raw_mode(item.mode.into()))?;
    rustix::fs::futimens(&fd, &times(item.mtime_ns))
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
    fn fill<F: FnMut(Progress)>(mut self, receiver: &mut Receiver<F>, root: Item) -> Result<(), GuestError> {
        self.keep(root)?;
        while let Some(item) = receiver.item()? {
            self.add(receiver, item)?;
        }
        for item in self.pending.iter().rev() {
            let set = self.open(&item.path, DIRECTORY).and_then(|fd| finish(fd, item));
            set.map_err(|e| self.refused(e))?;
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
                    .map_err(|e| self.refused(e))?;
                receiver.body(false, |_| Ok(()))
            }
        }
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

fn put_file(fresh: &Fresh<'_>, destination: &Destination) -> Result<(), GuestError> {
    match destination.existing()? {
        Some(FileType::Directory) => Err(GuestError::PathExists(destination.path())),
        Some(_) if destination.overwrite => {
            rustix::fs::renameat(&fresh.fd, ROOT, &destination.parent, &destination.name)
                .map_err(|e| destination.failed(e))
        }
        _ => put_new(fresh, destination),
    }
}

fn put_directory(fresh: &Fresh<'_>, destination: &Destination) -> Result<(), GuestError> {
    match destination.existing()? {
        Some(FileType::Directory) if destination.overwrite => {
            let path = destination.path();
            let open = |dir: &OwnedFd, name: &OsStr| {
                rustix::fs::openat(dir, name, DIRECTORY, Mode::empty()).map_err(|e| GuestError::host(&path, e.into()))
            };
            let (from, to) = (open(&fresh.fd, OsStr::new(ROOT))?, open(&destination.parent, &destination.name)?);
            merge(&from, &to, &path)
        }
        _ => put_new(fresh, destination),
    }
}

/// Renames to where nothing is; the kernel makes sure of that.
fn put_new(fresh: &Fresh<'_>, destination: &Destination) -> Result<(), GuestError> {
    let flags = RenameFlags::NOREPLACE;
    match rustix::fs::renameat_with(&fresh.fd, ROOT, &destination.parent, &destination.name, flags) {
        Err(Errno::EXIST) => Err(GuestError::PathExists(destination.path())),
        outcome => outcome.map_err(|e| destination.failed(e)),
    }
}

/// Moves everything in `from` into the existing directory `to`, each file as a whole, symlinks never followed.
fn merge(from: &OwnedFd, to: &OwnedFd, path: &Path) -> Result<(), GuestError> {
    for name in names(from).map_err(|e| GuestError::host(path, e.into()))? {
        let path = path.join(&name);
        let failed = |e: Errno| GuestError::host(&path, e.into());
        let new_is_directory = kind_at(from, &name).map_err(failed)? == Some(FileType::Directory);
        match kind_at(to, &name).map_err(failed)? {
            Some(FileType::Directory) if new_is_directory => {
                let open = |dir: &OwnedFd| rustix::fs::openat(dir, &name, DIRECTORY, Mode::empty()).map_err(failed);
                merge(&open(from)?, &open(to)?, &path)?;
            }
            Some(FileType::Directory) => return Err(GuestError::PathExists(path)),
            Some(_) if new_is_directory => return Err(GuestError::PathExists(path)),
            _ => rustix::fs::renameat(from, &name, to, &name).map_err(failed)?,
        }
    }
    Ok(())
}

fn names(dir: &OwnedFd) -> rustix::io::Result<Vec<OsString>> {
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

/// The fresh directory a copy grows in. Goes with all that is in it when dropped.
struct Fresh<'a> {
    fd: OwnedFd,
    name: String,
    destination: &'a Destination,
}

impl<'a> Fresh<'a> {
    fn make(destination: &'a Destination) -> Result<Self, GuestError> {
        let number = getrandom::u64().map_err(|_| destination.failed(Errno::IO))?;
        let name = format!(".nido-{number:016x}");
        let made = rustix::fs::mkdirat(&destination.parent, &name, Mode::RWXU);
        let fd = made.and_then(|()| rustix::fs::openat(&destination.parent, &name, DIRECTORY, Mode::empty()));
        Ok(Self { fd: fd.map_err(|e| destination.failed(e))?, name, destination })
    }
}

impl Drop for Fresh<'_> {
    fn drop(&mut self) {
        let removed = remove_inside(&self.fd)
            .and_then(|()| rustix::fs::unlinkat(&self.destination.parent, &self.name, AtFlags::REMOVEDIR));
        if let Err(error) = removed {
            let path = self.destination.parent_path.join(&self.name);
            tracing::warn!("cannot remove {}: {error}", path.display());
        }
    }
}

/// Removes everything in a directory that nobody else writes to.
fn remove_inside(dir: &OwnedFd) -> rustix::io::Result<()> {
    for name in names(dir)? {
        if kind_at(dir, &name)? != Some(FileType::Directory) {
            rustix::fs::unlinkat(dir, &name, AtFlags::empty())?;
            continue;
        }
        // Its mode may be the guest's already.
        rustix::fs::chmodat(dir, &name, Mode::RWXU, AtFlags::empty())?;
        remove_inside(&rustix::fs::openat(dir, &name, DIRECTORY, Mode::empty())?)?;
        rustix::fs::unlinkat(dir, &name, AtFlags::REMOVEDIR)?;
    }
    Ok(())
}
