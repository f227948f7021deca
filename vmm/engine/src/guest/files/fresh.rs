//! The fresh directory a copy out of a guest grows in, beside its destination.
//!
//! Invariant: it is locked as long as the copy runs. The orphan of a killed copy is found without a lock and removed by
//! the next download into the same directory.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nido_files::flock::{self, try_lock};
use nido_files::random;
use rustix::fs::{AtFlags, FileType, Mode};
use rustix::io::Errno;

use super::destination::{DIRECTORY, Destination, kind_at, names};
use crate::guest::error::GuestError;

/// Name of the copy inside the fresh directory.
pub(super) const ROOT: &str = "root";
/// What the names of fresh directories begin with; 16 hexadecimal digits follow.
const PREFIX: &str = ".nido-";
/// A fresh directory younger than this may not have been locked yet.
const AGE_MIN: Duration = Duration::from_secs(60);

/// The fresh directory a copy grows in. Goes with all that is in it when dropped.
pub(super) struct StagingDirectory<'a> {
    pub fd: OwnedFd,
    name: String,
    destination: &'a Destination,
}

impl<'a> StagingDirectory<'a> {
    pub fn make(destination: &'a Destination) -> Result<Self, GuestError> {
        remove_orphans(destination);
        let name = format!("{PREFIX}{}", random::id().map_err(|_| destination.failed(Errno::IO))?);
        let made = rustix::fs::mkdirat(&destination.parent, &name, Mode::RWXU);
        let fd = made.and_then(|()| rustix::fs::openat(&destination.parent, &name, DIRECTORY, Mode::empty()));
        let fresh = Self { fd: fd.map_err(|e| destination.failed(e))?, name, destination };
        // Where the file system knows no locks nothing is collected either.
        let _ = try_lock(&fresh.fd, flock::Mode::Exclusive);
        Ok(fresh)
    }
}

impl Drop for StagingDirectory<'_> {
    fn drop(&mut self) {
        let removed = remove_inside(&self.fd)
            .and_then(|()| rustix::fs::unlinkat(&self.destination.parent, &self.name, AtFlags::REMOVEDIR));
        if let Err(error) = removed {
            let path = self.destination.parent_path.join(&self.name);
            tracing::warn!("cannot remove {}: {error}", path.display());
        }
    }
}

/// Removes everything in a directory that no other process writes to.
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

/// Removes what killed copies of this user have left in the destination's directory. What cannot be looked at stays.
fn remove_orphans(destination: &Destination) {
    let directory = rustix::fs::openat(&destination.parent, ".", DIRECTORY, Mode::empty());
    let Ok(found) = directory.and_then(|directory| names(&directory)) else { return };
    for name in found.iter().filter(|name| is_ours(name)) {
        let Ok(orphan) = rustix::fs::openat(&destination.parent, name, DIRECTORY, Mode::empty()) else { continue };
        if !is_orphan(&orphan) {
            continue;
        }
        let removed =
            remove_inside(&orphan).and_then(|()| rustix::fs::unlinkat(&destination.parent, name, AtFlags::REMOVEDIR));
        if let Err(error) = removed {
            tracing::warn!("cannot remove {}: {error}", destination.parent_path.join(name).display());
        }
    }
}

/// Whether a name is one of a fresh directory.
fn is_ours(name: &OsStr) -> bool {
    let number = name.as_bytes().strip_prefix(PREFIX.as_bytes());
    number.is_some_and(|number| number.len() == 16 && number.iter().all(u8::is_ascii_hexdigit))
}

/// Whether an open directory is this user's, old enough, holds nothing but a copy, and no process holds its lock.
fn is_orphan(directory: &OwnedFd) -> bool {
    let Ok(stat) = rustix::fs::fstat(directory) else { return false };
    let changed = Duration::from_secs(u64::try_from(stat.st_ctime).unwrap_or(u64::MAX));
    let age = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().saturating_sub(changed);
    stat.st_uid == rustix::process::geteuid().as_raw()
        && age >= AGE_MIN
        && names(directory).is_ok_and(|names| names.iter().all(|name| name == ROOT))
        && try_lock(directory, flock::Mode::Exclusive).is_ok_and(|taken| taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_fresh_directories_are_collected() {
        for (name, ours) in [
            (".nido-f4d9879f0b4dbcbb", true),
            (".nido-f4d9879f0b4dbcb", false),
            (".nido-f4d9879f0b4dbcbz", false),
            ("nido-f4d9879f0b4dbcbb", false),
            (".nido-f4d9879f0b4dbcbb.bak", false),
        ] {
            assert_eq!(is_ours(OsStr::new(name)), ours, "{name}");
        }
    }
}
