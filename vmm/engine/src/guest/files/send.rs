//! The sending half of a copy into a guest: walks a tree of this host and writes it as frames.
//!
//! Small files share a write, large ones are read straight into the frame they leave in.
//!
//! Invariant: below the root no symlink is followed and nothing but files, directories and symlinks is opened for
//! reading, so a copy cannot wander off or hang on a pipe.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use minicbor::bytes::ByteVec;
use nido_guest_agent::replace::{Extent, is_sparse, next_extent, stored};
use nido_guest_agent::wire::{
    Entry, EntryKind, HEAD, Head, MAX_DEPTH, MAX_LEFT_OUT, MAX_RAW, Owner, ToGuest, ToHost, feature, kind,
};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::tar::{Archive, Member, MemberKind};
use super::wire::Wire;
use super::{CopyTotals, Limits, Progress, SkippedEntry};
use crate::guest::error::GuestError;
use crate::guest::session::unexpected;

/// Size of the one buffer: a full frame and some small ones.
const BUFFER: usize = HEAD + MAX_RAW + 8 * 1024;
/// With less room than this left, the buffer is sent before more of a file is read.
const READ_BYTES_MIN: usize = 32 * 1024;

/// How many files with several names are remembered; further ones are sent as files of their own.
const MAX_LINKED: usize = 100_000;

/// How an entry of this host is opened for reading. Not blocking, in case it has become a pipe meanwhile.
const OPEN: OFlags = OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

/// A source that is there and can be read.
pub(super) struct OpenSource {
    root: Root,
    /// For messages.
    path: PathBuf,
    /// The name of the copy if its destination is a directory.
    pub name: Option<Vec<u8>>,
    /// Whether names in it that begin with a dot are sent.
    hidden: bool,
}

enum Root {
    File(OwnedFd, Stat),
    Directory(OwnedFd, Stat),
    /// With the mode of the copy, and the number of bytes if it is known.
    Reader(Box<dyn Read + Send>, u16, Option<u64>),
    Archive(Box<dyn Read + Send>),
}

impl OpenSource {
    pub fn from_reader(reader: Box<dyn Read + Send>, mode: u16, bytes: Option<u64>) -> Self {
        Self { root: Root::Reader(reader, mode, bytes), path: "the input".into(), name: None, hidden: true }
    }

    pub fn from_archive(reader: Box<dyn Read + Send>) -> Self {
        Self { root: Root::Archive(reader), path: "the archive".into(), name: None, hidden: true }
    }

    pub fn from_directory(fd: OwnedFd, hidden: bool) -> Result<Self, GuestError> {
        let path = PathBuf::from("the directory");
        let stat = rustix::fs::fstat(&fd).map_err(|error| GuestError::host(&path, error.into()))?;
        Ok(Self { root: Root::Directory(fd, stat), path, name: None, hidden })
    }

    pub fn from_path(path: PathBuf) -> Result<Self, GuestError> {
        let failed = |error: Errno| GuestError::host(&path, error.into());
        // Asked before opening, because opening a device can do things.
        let kind = FileType::from_raw_mode(rustix::fs::stat(&path).map_err(failed)?.st_mode);
        if !matches!(kind, FileType::RegularFile | FileType::Directory) {
            let what = format!("{} is neither a file nor a directory; - reads it as standard input", path.display());
            return Err(GuestError::BadName(what));
        }
        let fd = rustix::fs::open(&path, OPEN.difference(OFlags::NOFOLLOW), Mode::empty()).map_err(failed)?;
        let stat = rustix::fs::fstat(&fd).map_err(failed)?;
        let root = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Root::File(fd, stat),
            FileType::Directory => Root::Directory(fd, stat),
            _ => return Err(GuestError::BadName(format!("{} changed while it was opened", path.display()))),
        };
        Ok(Self { root, name: copy_name(&path), path, hidden: true })
    }
}

/// The name of a copy of `path`: none for `dir/.` and the like, whose contents are meant.
fn copy_name(path: &Path) -> Option<Vec<u8>> {
    let bytes = path.as_os_str().as_bytes();
    super::last_name(bytes).map(<[u8]>::to_vec)
}

/// The features of the agent, and the options of the caller.
#[derive(Debug, Clone, Copy)]
pub(super) struct UploadOptions {
    /// Bits of [`feature`].
    pub features: u32,
    /// Keep owners and modes.
    pub preserve: bool,
}

/// Sends the tree and waits for the guest's confirmation that it is complete.
pub(super) fn send(
    wire: Wire,
    source: OpenSource,
    how: UploadOptions,
    report: impl FnMut(Progress),
) -> Result<CopyTotals, GuestError> {
    let (progress, hidden) = (Progress::default(), source.hidden);
    let (linked, left_out) = (HashMap::new(), Vec::new());
    let mut sender = Sender {
        wire,
        out: vec![0; BUFFER],
        used: 0,
        progress,
        skipped: 0,
        hidden,
        how,
        linked,
        left_out,
        left_out_count: 0,
        is_begun: false,
        report,
    };
    let mut at = WalkPosition { path: source.path, components: Vec::new() };
    match source.root {
        Root::File(fd, stat) => sender.file(&at, File::from(fd), &stat)?,
        Root::Directory(fd, stat) => sender.directory(&mut at, fd, &stat)?,
        Root::Reader(reader, mode, bytes) => {
            let kind = EntryKind::File(bytes.unwrap_or_default());
            let entry = Entry { path: Vec::new(), kind, mode, mtime_ns: now_ns(), owner: None, stored: bytes };
            sender.message(&ToGuest::Entry(entry))?;
            sender.bytes(&at, reader)?;
        }
        Root::Archive(reader) => sender.archive(&at, Archive::new(reader, Limits::default()))?,
    }
    sender.finish()
}

fn now_ns() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

/// Where the walk stands.
struct WalkPosition {
    path: PathBuf,
    components: Vec<Vec<u8>>,
}

impl WalkPosition {
    fn failed(&self, error: Errno) -> GuestError {
        GuestError::host(&self.path, error.into())
    }

    fn entry(&self, kind: EntryKind, stat: &Stat, how: UploadOptions) -> Entry {
        let path = self.components.iter().map(|c| c.clone().into()).collect();
        let mtime_ns = i64::try_from(i128::from(stat.st_mtime) * 1_000_000_000 + i128::from(stat.st_mtime_nsec));
        let mode = u16::try_from(stat.st_mode & 0o777).unwrap_or(0);
        let owner = (how.preserve && how.features & feature::OWNERS != 0)
            .then_some(Owner { uid: stat.st_uid, gid: stat.st_gid });
        let holes = how.features & feature::HOLES != 0;
        let stored = matches!(kind, EntryKind::File(_)).then(|| if holes { stored(stat) } else { length(stat) });
        Entry { path, kind, mode, mtime_ns: mtime_ns.unwrap_or(0), owner, stored }
    }
}

fn length(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

struct Sender<F> {
    wire: Wire,
    out: Vec<u8>,
    used: usize,
    progress: Progress,
    skipped: u64,
    hidden: bool,
    how: UploadOptions,
    /// Files with several names, by device and inode: under which path they were sent.
    linked: HashMap<(u64, u64), Vec<ByteVec>>,
    left_out: Vec<SkippedEntry>,
    left_out_count: u64,
    /// Whether the file at hand has been announced: then it can no longer be left out.
    is_begun: bool,
    report: F,
}

impl<F: FnMut(Progress)> Sender<F> {
    fn flush(&mut self) -> Result<(), GuestError> {
        self.wire.send(&self.out[..self.used])?;
        self.used = 0;
        (self.report)(self.progress);
        Ok(())
    }

    fn message(&mut self, message: &ToGuest) -> Result<(), GuestError> {
        let frame = GuestError::encode(message)?;
        if self.used + frame.len() > self.out.len() {
            self.flush()?;
        }
        if let Some(room) = self.out[self.used..].get_mut(..frame.len()) {
            room.copy_from_slice(&frame);
            self.used += frame.len();
            return Ok(());
        }
        self.wire.send(&frame)
    }

    fn file(&mut self, at: &WalkPosition, mut file: File, stat: &Stat) -> Result<(), GuestError> {
        let entry = at.entry(EntryKind::File(length(stat)), stat, self.how);
        if self.how.features & feature::LINKS != 0 && stat.st_nlink > 1 && !at.components.is_empty() {
            let key = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.linked.get(&key) {
                return self.empty_entry(Entry { kind: EntryKind::Link(first.clone()), ..entry });
            }
            if self.linked.len() < MAX_LINKED {
                self.linked.insert(key, entry.path.clone());
            }
        }
        if self.how.features & feature::HOLES != 0 && is_sparse(stat) {
            self.is_begun = true;
            self.message(&ToGuest::Entry(entry))?;
            return self.extents(at, &mut file, length(stat));
        }
        // Some files of the kernel's can be opened and not read: that is known before they are announced.
        let mut first = [0; 4096];
        let count = read(&mut file, &mut first).map_err(|source| GuestError::host(&at.path, source))?;
        self.is_begun = true;
        self.message(&ToGuest::Entry(entry))?;
        self.bytes(at, (&first[..count]).chain(file))
    }

    /// Sends what a file with holes holds, and ends the entry.
    fn extents(&mut self, at: &WalkPosition, file: &mut File, size: u64) -> Result<(), GuestError> {
        let mut position = 0;
        while position < size {
            match next_extent(&*file, position, size) {
                Extent::Hole(length) => {
                    self.message(&ToGuest::Hole(length))?;
                    position += length;
                }
                Extent::Data(length) => {
                    self.data(at, (&mut *file).take(length))?;
                    position = position.saturating_add(length);
                }
            }
        }
        self.progress.entries += 1;
        self.message(&ToGuest::EntryEnd)
    }

    /// Sends the bytes of the entry that was announced, up to the end, and ends it.
    fn bytes(&mut self, at: &WalkPosition, from: impl Read) -> Result<(), GuestError> {
        self.data(at, from)?;
        self.progress.entries += 1;
        self.message(&ToGuest::EntryEnd)
    }

    fn data(&mut self, at: &WalkPosition, mut from: impl Read) -> Result<(), GuestError> {
        loop {
            if self.out.len() - self.used < HEAD + READ_BYTES_MIN {
                self.flush()?;
            }
            let start = self.used + HEAD;
            let end = self.out.len().min(start + MAX_RAW);
            let length = match from.read(&mut self.out[start..end]) {
                Ok(0) => return Ok(()),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(GuestError::HostIo { path: at.path.clone(), source }),
            };
            self.out[self.used..start].copy_from_slice(&Head { kind: kind::FILE_DATA, length }.bytes());
            self.used = start + length;
            self.progress.bytes += length as u64;
        }
    }

    /// Notes an entry below the root that cannot be read; the copy continues without it.
    fn skip_entry(&mut self, path: &Path, reason: &dyn std::fmt::Display) {
        self.left_out_count += 1;
        if self.left_out.len() < MAX_LEFT_OUT {
            self.left_out.push(SkippedEntry { path: path.as_os_str().as_bytes().to_vec(), reason: reason.to_string() });
        }
    }

    fn directory(&mut self, at: &mut WalkPosition, fd: OwnedFd, stat: &Stat) -> Result<(), GuestError> {
        if at.components.len() >= MAX_DEPTH {
            return Err(GuestError::BadName(format!("{} is nested too deep", at.path.display())));
        }
        let listing = Dir::new(fd).map_err(|e| at.failed(e))?;
        self.empty_entry(at.entry(EntryKind::Directory, stat, self.how))?;
        self.children(at, listing)
    }

    fn children(&mut self, at: &mut WalkPosition, mut listing: Dir) -> Result<(), GuestError> {
        while let Some(found) = listing.read() {
            let found = match found {
                Ok(found) => found,
                Err(error) => {
                    self.skip_entry(&at.path, &io::Error::from(error));
                    break;
                }
            };
            let name = found.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            if !self.hidden && name.to_bytes().starts_with(b".") {
                self.skipped += 1;
                continue;
            }
            let fd = listing.fd().map_err(|e| at.failed(e))?;
            at.path.push(std::ffi::OsStr::from_bytes(name.to_bytes()));
            at.components.push(name.to_bytes().to_vec());
            self.is_begun = false;
            match self.child(at, fd, name) {
                // Gone since the directory was read.
                Err(GuestError::PathNotFound(path)) if path == at.path => self.skipped += 1,
                // Raised before anything of it was sent: by what lists or opens it, or by its first read.
                Err(GuestError::HostIo { path, source }) if path == at.path && !self.is_begun => {
                    self.skip_entry(&path, &source);
                }
                outcome => outcome?,
            }
            at.components.pop();
            at.path.pop();
        }
        Ok(())
    }

    fn child(&mut self, at: &mut WalkPosition, dir: impl AsFd, name: &CStr) -> Result<(), GuestError> {
        let stat = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| at.failed(e))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&dir, name, Vec::new()).map_err(|e| at.failed(e))?;
                let kind = EntryKind::Symlink(target.into_bytes().into());
                return self.empty_entry(at.entry(kind, &stat, self.how));
            }
            FileType::RegularFile | FileType::Directory => {}
            _ => {
                self.skipped += 1;
                return Ok(());
            }
        }
        let fd = rustix::fs::openat(&dir, name, OPEN, Mode::empty()).map_err(|e| at.failed(e))?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| at.failed(e))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => self.file(at, File::from(fd), &stat),
            FileType::Directory => self.directory(at, fd, &stat),
            _ => {
                self.skipped += 1;
                Ok(())
            }
        }
    }

    /// Sends what is in an archive. Directories that it does not name are made, and those that it comes back to are named to
    /// the guest again, which changes nothing about them: so none has to be remembered.
    fn archive(&mut self, at: &WalkPosition, mut archive: Archive<impl Read>) -> Result<(), GuestError> {
        let mut next = archive.next()?;
        let is_root = |member: &mut Member| member.path.is_empty();
        let root = next.take_if(is_root).unwrap_or_else(|| directory(&[]));
        self.empty_entry(entry(root, EntryKind::Directory))?;
        // The directory that the last entry is in, or is.
        let mut inside: Vec<Vec<u8>> = Vec::new();
        loop {
            let Some(member) = next.map_or_else(|| archive.next(), |member| Ok(Some(member)))? else { return Ok(()) };
            next = None;
            let Some((_, above)) = member.path.split_last() else { continue };
            let known = inside.iter().zip(above).take_while(|(one, other)| one == other).count();
            for depth in known + 1..=above.len() {
                archive.count()?;
                self.empty_entry(entry(directory(&above[..depth]), EntryKind::Directory))?;
            }
            inside = above.to_vec();
            match &member.kind {
                MemberKind::Special => self.skipped += 1,
                MemberKind::Directory => {
                    inside.clone_from(&member.path);
                    self.empty_entry(entry(member, EntryKind::Directory))?;
                }
                MemberKind::Symlink(target) => {
                    let kind = EntryKind::Symlink(target.clone().into());
                    self.empty_entry(entry(member, kind))?;
                }
                MemberKind::File(size) => {
                    let kind = EntryKind::File(*size);
                    self.message(&ToGuest::Entry(entry(member, kind)))?;
                    let sent = self.bytes(at, &mut archive);
                    sent.map_err(|error| match error {
                        GuestError::HostIo { source, .. } => archive.failed(source),
                        error => error,
                    })?;
                }
            }
        }
    }

    /// Sends an entry that has no bytes.
    fn empty_entry(&mut self, entry: Entry) -> Result<(), GuestError> {
        self.message(&ToGuest::Entry(entry))?;
        self.progress.entries += 1;
        self.message(&ToGuest::EntryEnd)
    }

    fn finish(mut self) -> Result<CopyTotals, GuestError> {
        self.message(&ToGuest::TreeEnd)?;
        self.flush()?;
        match self.wire.answer("to finish a copy")? {
            ToHost::PutDone(done) => Ok(CopyTotals {
                left_out_count: self.left_out_count,
                left_out: self.left_out,
                entries: self.progress.entries,
                bytes: self.progress.bytes,
                skipped: self.skipped.saturating_add(done.skipped),
                path: done.path.map(Into::into).unwrap_or_default(),
            }),
            other => Err(unexpected(other)),
        }
    }
}

/// A directory for which an archive has no entry.
fn directory(path: &[Vec<u8>]) -> Member {
    Member { path: path.to_vec(), kind: MemberKind::Directory, mode: 0o755, mtime_ns: now_ns() }
}

fn entry(member: Member, kind: EntryKind) -> Entry {
    let path = member.path.into_iter().map(Into::into).collect();
    let stored = if let EntryKind::File(size) = kind { Some(size) } else { None };
    Entry { path, kind, mode: member.mode, mtime_ns: member.mtime_ns, owner: None, stored }
}

/// Reads once, whatever interrupts it.
fn read(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_of_a_directorys_contents_has_no_name() {
        let name = |path: &str| copy_name(Path::new(path)).map(|name| String::from_utf8_lossy(&name).into_owned());
        assert_eq!(name("/srv/data"), Some("data".into()));
        assert_eq!(name("/srv/data/"), Some("data".into()));
        assert_eq!(name("/srv/data/."), None);
        assert_eq!(name(".."), None);
    }
}
