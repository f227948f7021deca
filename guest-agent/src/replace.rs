//! What both ends of a copy do to files alike: find the holes of a file, and put a new file in the place of another one.
//!
//! Invariant: nothing but a regular file (or a symlink, as a name) is ever replaced, and a file that is replaced keeps what
//! does not change: owner, mode, extended attributes, and its other names.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom as StdSeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{FileType, Gid, Mode, OFlags, SeekFrom, Stat, Uid, XattrFlags};
use rustix::io::Errno;

/// Longest value and longest list of extended attributes, in bytes: the kernel's limit.
const MAX_ATTRIBUTES: usize = 64 * 1024;
/// Shorter holes are sent as zeros: a message costs as much.
const HOLE_BYTES_MIN: u64 = 64 * 1024;

/// A stretch of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// So many zeros that take no room.
    Hole(u64),
    /// So many bytes to be read. [`u64::MAX`]: to the end of the file.
    Data(u64),
}

/// Whether a file has holes worth looking for.
#[must_use]
pub fn is_sparse(stat: &Stat) -> bool {
    stored(stat).saturating_add(HOLE_BYTES_MIN) < u64::try_from(stat.st_size).unwrap_or(0)
}

/// How many bytes a file takes on its disk, at most its length.
#[must_use]
pub fn stored(stat: &Stat) -> u64 {
    let blocks = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
    blocks.min(u64::try_from(stat.st_size).unwrap_or(0))
}

/// The stretch of `file` that begins at `at`. The file's position is at its end (of a hole) or at its beginning (of data).
/// A file system that cannot report them has no holes.
pub fn next_extent(file: impl AsFd, at: u64, size: u64) -> Extent {
    let file = file.as_fd();
    let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => data.min(size),
        // Nothing but zeros up to the end.
        Err(Errno::NXIO) => size,
        Err(_) => at,
    };
    if data >= at.saturating_add(HOLE_BYTES_MIN) {
        let _ = rustix::fs::seek(file, SeekFrom::Start(data));
        return Extent::Hole(data - at);
    }
    // Short holes on the way are part of the data.
    let mut end = data;
    let long = loop {
        let Ok(hole) = rustix::fs::seek(file, SeekFrom::Hole(end)) else { break u64::MAX };
        if hole >= size {
            break u64::MAX;
        }
        match rustix::fs::seek(file, SeekFrom::Data(hole)) {
            Ok(next) if next < hole.saturating_add(HOLE_BYTES_MIN) && next > end => end = next,
            _ => break hole - at,
        }
    };
    let _ = rustix::fs::seek(file, SeekFrom::Start(at));
    Extent::Data(long)
}

/// What has a name that a copy is to take.
#[derive(Debug)]
pub enum ExistingEntry {
    /// Nothing.
    Nothing,
    /// A regular file.
    File(ReplacedFile),
    /// A symlink.
    Symlink,
    /// A directory.
    Directory,
    /// A device, a FIFO or a socket: never replaced.
    Special,
}

/// Inspects a name without following it and without opening it.
///
/// # Errors
/// The system's.
pub fn inspect(directory: impl AsFd, name: &OsStr) -> Result<ExistingEntry, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = match rustix::fs::openat(directory, name, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(ExistingEntry::Nothing),
        Err(error) => return Err(error),
    };
    let stat = rustix::fs::fstat(&fd)?;
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => ExistingEntry::File(ReplacedFile { attributes: attributes(&fd), fd, stat }),
        FileType::Symlink => ExistingEntry::Symlink,
        FileType::Directory => ExistingEntry::Directory,
        _ => ExistingEntry::Special,
    })
}

/// What a file that is replaced hands on to the one that takes its place.
#[derive(Debug)]
pub struct ReplacedFile {
    fd: OwnedFd,
    stat: Stat,
    attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What of the new file counts more than what the old one had.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GivenAttributes {
    /// User and group.
    pub owner: Option<(u32, u32)>,
    /// Permission bits.
    pub mode: Option<u32>,
}

impl ReplacedFile {
    /// Gives a new file the old one's owner, mode and attributes where `given` has no other. False: it has to be written over in
    /// place ([`Self::overwrite`]), because the old one has further names, or an owner that this process cannot give.
    ///
    /// # Errors
    /// The system's.
    pub fn hand_on(&self, new: &File, given: GivenAttributes) -> io::Result<bool> {
        let (uid, gid) = given.owner.unwrap_or((self.stat.st_uid, self.stat.st_gid));
        let now = rustix::fs::fstat(new)?;
        if (now.st_uid, now.st_gid) != (uid, gid)
            && let Err(error) = rustix::fs::fchown(new, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
        {
            return if error == Errno::PERM && given.owner.is_none() { Ok(false) } else { Err(error.into()) };
        }
        if self.stat.st_nlink > 1 {
            return Ok(false);
        }
        self.set_mode_and_attributes(new, given)?;
        Ok(true)
    }

    /// Writes what is in `new` into the file itself.
    ///
    /// # Errors
    /// The system's; the file may hold a part of the new bytes then.
    pub fn overwrite(&self, new: &mut File, given: GivenAttributes) -> io::Result<File> {
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
        let found = rustix::fs::fstat(&*new)?;
        let size = u64::try_from(found.st_size).unwrap_or(0);
        // Refused before the old bytes are gone.
        if free_bytes(&file).is_some_and(|free| free.saturating_add(stored(&self.stat)) < stored(&found)) {
            return Err(Errno::NOSPC.into());
        }
        file.set_len(0)?;
        file.set_len(size)?;
        let mut at = 0;
        while at < size {
            match next_extent(&*new, at, size) {
                Extent::Hole(length) => at += length,
                Extent::Data(length) => {
                    let length = length.min(size - at);
                    file.seek(StdSeekFrom::Start(at))?;
                    let copied = io::copy(&mut (&mut *new).take(length), &mut file)?;
                    if copied < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    at += length;
                }
            }
        }
        file.flush()?;
        if let Some((uid, gid)) = given.owner {
            rustix::fs::fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
        // To write a file takes its capabilities and set-id bits away. Only its owner may give them back, and change its mode.
        let mine = [0, self.stat.st_uid].contains(&rustix::process::geteuid().as_raw());
        if mine || given != GivenAttributes::default() {
            self.set_mode_and_attributes(&file, given)?;
        }
        Ok(file)
    }

    fn set_mode_and_attributes(&self, new: &File, given: GivenAttributes) -> io::Result<()> {
        // What a program may do more than others belongs to its owner.
        let is_same_owner = given.owner.is_none_or(|owner| owner == (self.stat.st_uid, self.stat.st_gid));
        let kept = self.stat.st_mode & if is_same_owner { 0o7777 } else { 0o777 };
        rustix::fs::fchmod(new, Mode::from_raw_mode(given.mode.unwrap_or(kept)))?;
        for (name, value) in &self.attributes {
            let is_acl = name == b"system.posix_acl_access";
            if is_acl && given.mode.is_some() || name == b"security.capability" && !is_same_owner {
                continue;
            }
            match rustix::fs::fsetxattr(new, name.as_slice(), value, XattrFlags::empty()) {
                // An ordinary user can give some of them to nothing, and another file system may not know them.
                Ok(()) | Err(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// The extended attributes of a file, as far as this user may read them.
fn attributes(fd: &OwnedFd) -> Vec<(Vec<u8>, Vec<u8>)> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let mut list = vec![0; MAX_ATTRIBUTES];
    let Ok(length) = rustix::fs::listxattr(path.as_str(), list.as_mut_slice()) else { return Vec::new() };
    let names = list[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty());
    names
        .filter_map(|name| {
            let mut value = vec![0; MAX_ATTRIBUTES];
            let length = rustix::fs::getxattr(path.as_str(), name, value.as_mut_slice()).ok()?;
            value.truncate(length);
            Some((name.to_vec(), value))
        })
        .collect()
}

/// Bytes that this process can still write where `fd` lies; none if the file system does not report it.
pub fn free_bytes(fd: impl AsFd) -> Option<u64> {
    let stat = rustix::fs::fstatvfs(fd).ok().filter(|stat| stat.f_blocks > 0)?;
    let blocks = if rustix::process::geteuid().is_root() { stat.f_bfree } else { stat.f_bavail };
    Some(blocks.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extents_of_a_file_are_its_data_and_its_long_holes() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        file.seek(StdSeekFrom::Start(1 << 20)).unwrap();
        file.write_all(&[7; 8192]).unwrap();
        let size = 4 << 20;
        let mut found = Vec::new();
        let mut at = 0;
        while at < size {
            let extent = next_extent(&file, at, size);
            at += match extent {
                Extent::Hole(length) => length,
                Extent::Data(u64::MAX) => size - at,
                Extent::Data(length) => length,
            };
            found.push(extent);
        }
        // A file system without holes has one stretch of data.
        let sparse = [Extent::Hole(1 << 20), Extent::Data(8192), Extent::Hole((3 << 20) - 8192)];
        assert!(found == sparse || found == [Extent::Data(u64::MAX)], "{found:?}");
    }

    // A file that was replaced lost its mode and its other names.
    #[test]
    fn a_file_that_is_replaced_keeps_its_mode_and_its_other_names() {
        let directory = tempfile::tempdir().unwrap();
        let open = File::open(directory.path()).unwrap();
        let (one, two, new) = (directory.path().join("a"), directory.path().join("b"), directory.path().join("n"));
        std::fs::write(&one, "old and long").unwrap();
        std::fs::hard_link(&one, &two).unwrap();
        rustix::fs::chmod(&one, Mode::from_raw_mode(0o750)).unwrap();
        std::fs::write(&new, "new").unwrap();
        let ExistingEntry::File(kept) = inspect(&open, OsStr::new("a")).unwrap() else { panic!("not a file") };
        let mut new = File::options().read(true).write(true).open(new).unwrap();
        assert!(!kept.hand_on(&new, GivenAttributes::default()).unwrap());
        kept.overwrite(&mut new, GivenAttributes::default()).unwrap();
        assert_eq!(std::fs::read(&two).unwrap(), b"new");
        std::fs::remove_file(&two).unwrap();
        let ExistingEntry::File(kept) = inspect(&open, OsStr::new("a")).unwrap() else { panic!("not a file") };
        assert!(kept.hand_on(&new, GivenAttributes::default()).unwrap());
        assert_eq!(rustix::fs::fstat(&new).unwrap().st_mode & 0o7777, 0o750);
    }

    #[test]
    fn devices_pipes_and_sockets_are_special() {
        let directory = tempfile::tempdir().unwrap();
        let open = File::open(directory.path()).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(directory.path().join("s")).unwrap();
        std::os::unix::fs::symlink("nowhere", directory.path().join("l")).unwrap();
        let inspect = |name: &str| inspect(&open, OsStr::new(name)).unwrap();
        assert!(matches!(inspect("s"), ExistingEntry::Special));
        assert!(matches!(inspect("l"), ExistingEntry::Symlink));
        assert!(matches!(inspect("none"), ExistingEntry::Nothing));
        assert!(matches!(
            super::inspect(File::open("/dev").unwrap(), OsStr::new("null")).unwrap(),
            ExistingEntry::Special
        ));
    }
}
