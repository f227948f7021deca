//! The disk's side of `Get`: walks a tree and reads its files.
//!
//! Invariant: nothing is opened that could block or be a device. Names are opened relative to their directory and
//! without following symlinks, so a tree that changes while it is read cannot lead the walk elsewhere.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use minicbor::bytes::ByteVec;
use nido_guest_agent::replace::{Extent, is_sparse, next_extent, stored};
use nido_guest_agent::wire::{
    Entry, EntryKind, Fault, Get, HEAD, MAX_COMPONENT, MAX_DEPTH, MAX_LEFT_OUT, MAX_LEFT_OUT_PATH, Owner, SkippedEntry,
    Summary, feature,
};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::{CHUNK, Outbound, resolve};
use crate::framing::raw_frame;
use crate::passwd;
use crate::refusal::Refusal;

/// Opens without blocking (on a FIFO's writer, a tape) and without following a symlink.
const OPEN_FLAGS: OFlags = OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

/// How many files with several names are remembered; further ones are sent as files of their own.
const MAX_LINKED: usize = 100_000;

/// Reads a tree. Ends early, without an error, when the receiver of the pieces is dropped.
///
/// # Errors
/// The result for the host.
pub fn read_tree(request: &Get, pieces: &mpsc::Sender<Outbound>) -> Result<Summary, Refusal> {
    let home = passwd::find("0").ok().flatten().map_or("/root".into(), |root| root.home);
    let root = resolve(&request.path, &home)?;
    let mut walk = Walk {
        pieces,
        summary: Summary::default(),
        path: Vec::new(),
        root: &root,
        features: request.features.unwrap_or_default(),
        linked: HashMap::new(),
    };
    // Only the root may be a symlink that is followed; what it is, is known before it is opened for reading.
    let stat = rustix::fs::stat(&root).map_err(|error| walk.refusal(error))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let flags = OPEN_FLAGS.difference(OFlags::NOFOLLOW);
            let file = rustix::fs::open(&root, flags, Mode::empty()).map_err(|error| walk.refusal(error))?;
            walk.file(&file)?.map_err(|error| walk.refusal(error))?;
        }
        FileType::Directory => walk.tree(&root)?,
        _ => return Err(Refusal::new(Fault::WrongType, format!("{}: neither file nor directory", root.display()))),
    }
    Ok(walk.summary)
}

/// One copy under way.
struct Walk<'a> {
    pieces: &'a mpsc::Sender<Outbound>,
    summary: Summary,
    /// Names below the root of the directory or file at hand.
    path: Vec<CString>,
    root: &'a Path,
    /// What the host understands.
    features: u32,
    /// Files with several names, by device and inode: under which path they were sent.
    linked: HashMap<(u64, u64), Vec<ByteVec>>,
}

impl Walk<'_> {
    fn shown(&self) -> PathBuf {
        let mut path = self.root.to_path_buf();
        path.extend(self.path.iter().map(|name| std::ffi::OsStr::from_bytes(name.as_bytes())));
        path
    }

    fn refusal(&self, error: Errno) -> Refusal {
        Refusal::from_io(&self.shown().display().to_string(), &error.into())
    }

    fn has(&self, feature: u32) -> bool {
        self.features & feature != 0
    }

    /// An entry below the root cannot be read: a host that supports `left-out` gets it at the end, any other one a failure now.
    fn skip_entry(&mut self, error: Errno) -> Result<(), Refusal> {
        if !self.has(feature::LEFT_OUT) {
            return Err(self.refusal(error));
        }
        *self.summary.left_out_count.get_or_insert(0) += 1;
        let mut path = self.shown().into_os_string().into_encoded_bytes();
        path.truncate(MAX_LEFT_OUT_PATH);
        let named = self.summary.left_out.get_or_insert_default();
        if named.len() < MAX_LEFT_OUT {
            named.push(SkippedEntry { path: path.into(), reason: std::io::Error::from(error).to_string() });
        }
        Ok(())
    }

    /// Hands a piece on. An error ends the walk: the session has ended, and no client reads the error.
    fn give(&self, piece: Outbound) -> Result<(), Refusal> {
        self.pieces.blocking_send(piece).map_err(|_| Refusal::new(Fault::Other, "the session is closed"))
    }

    fn begin(&mut self, kind: EntryKind, stat: &Stat) -> Result<(), Refusal> {
        self.summary.entries += 1;
        let path = self.components();
        let mode = u16::try_from(stat.st_mode & 0o777).unwrap_or_default();
        #[allow(clippy::useless_conversion, reason = "the type differs between kernels")]
        let nanoseconds = i64::try_from(stat.st_mtime_nsec).unwrap_or_default();
        let mtime_ns = stat.st_mtime.saturating_mul(1_000_000_000).saturating_add(nanoseconds);
        let owner = self.has(feature::OWNERS).then_some(Owner { uid: stat.st_uid, gid: stat.st_gid });
        let stored = matches!(kind, EntryKind::File(_)).then(|| stored(stat));
        self.give(Outbound::Entry(Entry { path, kind, mode, mtime_ns, owner, stored }))
    }

    fn components(&self) -> Vec<ByteVec> {
        self.path.iter().map(|name| name.to_bytes().to_vec().into()).collect()
    }

    /// Sends an open file, as it is now: its size may differ from what was announced. The inner error: nothing of it could be
    /// read, and nothing was sent.
    fn file(&mut self, file: &OwnedFd) -> Result<Result<(), Errno>, Refusal> {
        let stat = match rustix::fs::fstat(file) {
            Ok(stat) => stat,
            Err(error) => return Ok(Err(error)),
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            self.summary.skipped += 1;
            return Ok(Ok(()));
        }
        if self.has(feature::LINKS) && stat.st_nlink > 1 && !self.path.is_empty() {
            let key = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.linked.get(&key) {
                self.begin(EntryKind::Link(first.clone()), &stat)?;
                self.give(Outbound::EntryEnd)?;
                return Ok(Ok(()));
            }
            if self.linked.len() < MAX_LINKED {
                self.linked.insert(key, self.components());
            }
        }
        let size = stat.st_size.cast_unsigned();
        let mut first = None;
        if !self.has(feature::HOLES) || !is_sparse(&stat) {
            // Some files of the kernel's can be opened and not read: that is known before they are announced.
            match next_frame(file, u64::MAX) {
                Ok(frame) => first = Some(frame),
                Err(error) => return Ok(Err(error)),
            }
        }
        self.begin(EntryKind::File(size), &stat)?;
        match first {
            Some(frame) => self.data(file, u64::MAX, Some(frame))?,
            None => self.extents(file, size)?,
        }
        self.give(Outbound::EntryEnd)?;
        Ok(Ok(()))
    }

    /// Sends what a file with holes holds.
    fn extents(&mut self, file: &OwnedFd, size: u64) -> Result<(), Refusal> {
        let mut at = 0;
        while at < size {
            match next_extent(file, at, size) {
                Extent::Hole(length) => {
                    self.give(Outbound::Hole(length))?;
                    at += length;
                }
                Extent::Data(length) => {
                    self.data(file, length, None)?;
                    at = at.saturating_add(length);
                }
            }
        }
        Ok(())
    }

    /// Sends the next `length` bytes of a file, or those up to its end; `first` was read already.
    fn data(&mut self, file: &OwnedFd, mut length: u64, first: Option<(Vec<u8>, bool)>) -> Result<(), Refusal> {
        let mut next = first.map(Ok);
        loop {
            let frame = next.take().unwrap_or_else(|| next_frame(file, length));
            let (frame, is_full) = frame.map_err(|error| self.refusal(error))?;
            let count = (frame.len() - HEAD) as u64;
            if count > 0 {
                self.summary.bytes += count;
                self.give(Outbound::Frame(frame))?;
            }
            length = length.saturating_sub(count);
            if !is_full || length == 0 {
                return Ok(());
            }
        }
    }

    /// Sends a directory and all below it, depth first. What cannot be read in it is left out, if the host wants that.
    fn tree(&mut self, root: &Path) -> Result<(), Refusal> {
        let flags = OPEN_FLAGS.difference(OFlags::NOFOLLOW).union(OFlags::DIRECTORY);
        let directory = rustix::fs::open(root, flags, Mode::empty()).map_err(|error| self.refusal(error))?;
        let root = self.directory(directory)?.map_err(|error| self.refusal(error))?;
        let mut open = vec![root];
        while let Some(directory) = open.last_mut() {
            match directory.next() {
                None => {
                    open.pop();
                    self.path.pop();
                }
                Some(Err(error)) => {
                    self.skip_entry(error)?;
                    open.pop();
                    self.path.pop();
                }
                Some(Ok(entry)) => {
                    let name = entry.file_name();
                    if name == c"." || name == c".." {
                        continue;
                    }
                    self.path.push(name.to_owned());
                    let parent = directory.fd().map_err(|error| self.refusal(error))?;
                    match self.entry(parent, name)? {
                        Ok(Some(inner)) => open.push(inner),
                        Ok(None) => drop(self.path.pop()),
                        Err(error) => {
                            self.skip_entry(error)?;
                            self.path.pop();
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn directory(&mut self, directory: OwnedFd) -> Result<Result<Dir, Errno>, Refusal> {
        if self.path.len() > MAX_DEPTH {
            return Err(Refusal::new(Fault::Invalid, format!("directories are nested deeper than {MAX_DEPTH}")));
        }
        let opened = rustix::fs::fstat(&directory).and_then(|stat| Ok((stat, Dir::new(directory)?)));
        let (stat, opened) = match opened {
            Ok(opened) => opened,
            Err(error) => return Ok(Err(error)),
        };
        self.begin(EntryKind::Directory, &stat)?;
        self.give(Outbound::EntryEnd)?;
        Ok(Ok(opened))
    }

    /// Sends what a directory holds under a name; gives a directory back to be walked. The inner error: it cannot be read.
    fn entry(&mut self, parent: impl AsFd, name: &CStr) -> Result<Result<Option<Dir>, Errno>, Refusal> {
        let stat = match rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            // Removed since its name was read.
            Err(Errno::NOENT) => return Ok(Ok(None)),
            Err(error) => return Ok(Err(error)),
        };
        if name.to_bytes().len() > MAX_COMPONENT {
            self.summary.skipped += 1;
            return Ok(Ok(None));
        }
        let open = |extra| match rustix::fs::openat(&parent, name, OPEN_FLAGS.union(extra), Mode::empty()) {
            Ok(file) => Ok(Some(file)),
            // Removed or replaced since it was looked at.
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::NXIO) => Ok(None),
            Err(error) => Err(error),
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => match open(OFlags::empty()) {
                Ok(Some(file)) => Ok(self.file(&file)?.map(|()| None)),
                Ok(None) => Ok(Ok(None)),
                Err(error) => Ok(Err(error)),
            },
            FileType::Directory => match open(OFlags::DIRECTORY) {
                Ok(Some(directory)) => Ok(self.directory(directory)?.map(Some)),
                Ok(None) => Ok(Ok(None)),
                Err(error) => Ok(Err(error)),
            },
            FileType::Symlink => {
                if let Ok(target) = rustix::fs::readlinkat(&parent, name, Vec::new()) {
                    self.begin(EntryKind::Symlink(target.into_bytes().into()), &stat)?;
                    self.give(Outbound::EntryEnd)?;
                }
                Ok(Ok(None))
            }
            _ => {
                self.summary.skipped += 1;
                Ok(Ok(None))
            }
        }
    }
}

/// The next bytes of a file, at most `most`, as a frame whose head is still to be filled in; and whether there may be more.
fn next_frame(file: &OwnedFd, most: u64) -> Result<(Vec<u8>, bool), Errno> {
    let most = usize::try_from(most).unwrap_or(usize::MAX).min(CHUNK);
    let mut frame = raw_frame(most);
    let is_exact = frame.capacity() == HEAD + most;
    loop {
        let left = HEAD + most - frame.len();
        if left == 0 {
            return Ok((frame, true));
        }
        let read = if is_exact {
            rustix::io::read(file, rustix::buffer::spare_capacity(&mut frame))
        } else {
            // More room than was requested: bytes of the next stretch must not get into it.
            let begin = frame.len();
            frame.resize(begin + left, 0);
            let read = rustix::io::read(file, &mut frame[begin..]);
            frame.truncate(begin + read.unwrap_or(0));
            read
        };
        match read {
            Ok(0) | Err(Errno::AGAIN) => return Ok((frame, false)),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}
