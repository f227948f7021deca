//! The last step of a download: puts what was received where it belongs, over what may be there.
//!
//! Invariant: a directory is never replaced, nor a device, pipe or socket; a file that is replaced hands on its mode, owner,
//! attributes and further names; below an existing directory no symlink is followed.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nido_guest_agent::replace::{ExistingEntry, GivenAttributes, inspect};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps};
use rustix::io::Errno;

use super::destination::{DIRECTORY, Destination, give, kind_at, names, special};
use super::fresh::{ROOT, StagingDirectory};
use super::receive::Item;
use crate::guest::error::GuestError;

impl Destination {
    /// What of a file that is replaced does not stay as it is.
    pub fn given(&self, item: &Item) -> GivenAttributes {
        let mode = self.how.preserve.then(|| u32::from(item.mode));
        let owner = item.owner.filter(|_| rustix::process::geteuid().is_root());
        GivenAttributes { owner, mode }
    }
}

/// Puts a file where another one may be, which hands on its mode, owner, attributes and further names.
pub(super) fn put_over(
    (from, name): (&OwnedFd, &OsStr),
    (to, target): (&OwnedFd, &OsStr),
    given: GivenAttributes,
    path: &Path,
) -> Result<(), GuestError> {
    let failed = |e: Errno| GuestError::host(path, e.into());
    match inspect(to, target).map_err(failed)? {
        ExistingEntry::Directory => return Err(GuestError::PathExists(path.to_owned())),
        ExistingEntry::Special => return Err(special(path)),
        ExistingEntry::Nothing | ExistingEntry::Symlink => {}
        ExistingEntry::File(kept) => {
            let time = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
            if FileType::from_raw_mode(time.st_mode) == FileType::RegularFile {
                // The guest's mode may forbid its owner to read it.
                rustix::fs::chmodat(from, name, Mode::RUSR | Mode::WUSR, AtFlags::empty()).map_err(failed)?;
                let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut new = File::from(rustix::fs::openat(from, name, flags, Mode::empty()).map_err(failed)?);
                if !kept.hand_on(&new, given).map_err(|e| GuestError::host(path, e))? {
                    let old = kept.overwrite(&mut new, given).map_err(|e| GuestError::host(path, e))?;
                    let at = Timespec { tv_sec: time.st_mtime, tv_nsec: time.st_mtime_nsec.cast_signed() };
                    // The file of another user, which this user may write, keeps its modification time.
                    let set = rustix::fs::futimens(&old, &Timestamps { last_access: at, last_modification: at });
                    return give(set).map_err(failed);
                }
            }
        }
    }
    rustix::fs::renameat(from, name, to, target).map_err(failed)
}

/// Puts a directory in its place. Returns the paths below it that were there before.
pub(super) fn put_directory(
    fresh: &StagingDirectory<'_>,
    destination: &Destination,
) -> Result<HashSet<Vec<u8>>, GuestError> {
    let mut merged = HashSet::new();
    match destination.existing()? {
        Some(FileType::Directory) if destination.how.overwrite => {
            let path = destination.path();
            let open = |dir: &OwnedFd, name: &OsStr| {
                rustix::fs::openat(dir, name, DIRECTORY, Mode::empty()).map_err(|e| GuestError::host(&path, e.into()))
            };
            let (from, to) = (open(&fresh.fd, OsStr::new(ROOT))?, open(&destination.parent, &destination.name)?);
            Merge { destination, merged: &mut merged }.directory(&from, &to, b"")?;
        }
        _ => put_new(fresh, destination)?,
    }
    Ok(merged)
}

/// Renames to where nothing is; the kernel makes sure of that.
pub(super) fn put_new(fresh: &StagingDirectory<'_>, destination: &Destination) -> Result<(), GuestError> {
    let flags = RenameFlags::NOREPLACE;
    match rustix::fs::renameat_with(&fresh.fd, ROOT, &destination.parent, &destination.name, flags) {
        Err(Errno::EXIST) => Err(GuestError::PathExists(destination.path())),
        outcome => outcome.map_err(|e| destination.failed(e)),
    }
}

/// Moves a tree into an existing directory, each file as a whole, symlinks never followed.
struct Merge<'a> {
    destination: &'a Destination,
    merged: &'a mut HashSet<Vec<u8>>,
}

impl Merge<'_> {
    fn directory(&mut self, from: &OwnedFd, to: &OwnedFd, below: &[u8]) -> Result<(), GuestError> {
        let path = self.destination.path().join(OsStr::from_bytes(below));
        self.merged.insert(below.to_vec());
        for name in names(from).map_err(|e| GuestError::host(&path, e.into()))? {
            let path = path.join(&name);
            let failed = |e: Errno| GuestError::host(&path, e.into());
            let new_is_directory = kind_at(from, &name).map_err(failed)? == Some(FileType::Directory);
            match kind_at(to, &name).map_err(failed)? {
                Some(FileType::Directory) if new_is_directory => {
                    let open = |dir: &OwnedFd| rustix::fs::openat(dir, &name, DIRECTORY, Mode::empty()).map_err(failed);
                    let below = [below, if below.is_empty() { b"" } else { b"/" }, name.as_bytes()].concat();
                    self.directory(&open(from)?, &open(to)?, &below)?;
                }
                None => rustix::fs::renameat(from, &name, to, &name).map_err(failed)?,
                Some(_) if new_is_directory => return Err(GuestError::PathExists(path)),
                Some(_) => {
                    let given = self.given(from, &name).map_err(failed)?;
                    put_over((from, &name), (to, &name), given, &path)?;
                }
            }
        }
        Ok(())
    }

    /// What of the file that is replaced does not stay: with `preserve` what the new one has.
    fn given(&self, from: &OwnedFd, name: &OsStr) -> rustix::io::Result<GivenAttributes> {
        if !self.destination.how.preserve {
            return Ok(GivenAttributes::default());
        }
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let owner = rustix::process::geteuid().is_root().then_some((stat.st_uid, stat.st_gid));
        Ok(GivenAttributes { owner, mode: Some(stat.st_mode & 0o777) })
    }
}
