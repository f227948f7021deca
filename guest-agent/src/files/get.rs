//! The disk's side of `Get`: walks a tree and reads its files.
//!
//! Invariant: nothing is opened that could block or be a device. Names are opened relative to their directory and
//! without following symlinks, so a tree that changes while it is read cannot lead the walk elsewhere.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nido_guest_agent::wire::{Entry, EntryKind, Fault, Get, HEAD, MAX_COMPONENT, MAX_DEPTH, Summary};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::{CHUNK, Outbound, resolve};
use crate::agent::Refusal;
use crate::framing::raw_frame;
use crate::passwd;

/// Opens without waiting for anybody (a FIFO's writer, a tape) and without following a symlink.
const QUIETLY: OFlags = OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

/// Reads a tree. Ends early, without an error, when nobody takes the pieces any more.
///
/// # Errors
/// What the host is to be told.
pub fn read_tree(request: &Get, pieces: &mpsc::Sender<Outbound>) -> Result<Summary, Refusal> {
    let home = passwd::find("0").ok().flatten().map_or("/root".into(), |root| root.home);
    let root = resolve(&request.path, &home)?;
    let mut walk = Walk { pieces, summary: Summary::default(), path: Vec::new(), root: &root };
    // Only the root may be a symlink that is followed; what it is, is known before it is opened for reading.
    let stat = rustix::fs::stat(&root).map_err(|error| walk.refusal(error))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let flags = QUIETLY.difference(OFlags::NOFOLLOW);
            let file = rustix::fs::open(&root, flags, Mode::empty()).map_err(|error| walk.refusal(error))?;
            walk.file(&file)?;
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
}

impl Walk<'_> {
    fn refusal(&self, error: Errno) -> Refusal {
        use std::os::unix::ffi::OsStrExt;
        let mut path = self.root.to_path_buf();
        path.extend(self.path.iter().map(|name| std::ffi::OsStr::from_bytes(name.as_bytes())));
        Refusal::from_io(&path.display().to_string(), &error.into())
    }

    /// Hands a piece on. An error ends the walk: the session has gone, and nobody reads what it says.
    fn give(&self, piece: Outbound) -> Result<(), Refusal> {
        self.pieces.blocking_send(piece).map_err(|_| Refusal::new(Fault::Other, "the session is closed"))
    }

    fn begin(&mut self, kind: EntryKind, stat: &Stat) -> Result<(), Refusal> {
        self.summary.entries += 1;
        let path = self.path.iter().map(|name| name.to_bytes().to_vec().into()).collect();
        let mode = u16::try_from(stat.st_mode & 0o777).unwrap_or_default();
        #[allow(clippy::useless_conversion, reason = "the type differs between kernels")]
        let nanoseconds = i64::try_from(stat.st_mtime_nsec).unwrap_or_default();
        let mtime_ns = stat.st_mtime.saturating_mul(1_000_000_000).saturating_add(nanoseconds);
        self.give(Outbound::Entry(Entry { path, kind, mode, mtime_ns }))
    }

    /// Sends an open file, as it is now: its size may differ from what was announced.
    fn file(&mut self, file: &OwnedFd) -> Result<(), Refusal> {
        let stat = rustix::fs::fstat(file).map_err(|error| self.refusal(error))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            self.summary.skipped += 1;
            return Ok(());
        }
        self.begin(EntryKind::File(stat.st_size.cast_unsigned()), &stat)?;
        loop {
            let mut frame = raw_frame(CHUNK);
            let full = loop {
                match rustix::io::read(file, rustix::buffer::spare_capacity(&mut frame)) {
                    Ok(0) | Err(Errno::AGAIN) => break false,
                    Ok(_) if frame.len() == frame.capacity() => break true,
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(self.refusal(error)),
                }
            };
            if frame.len() > HEAD {
                self.summary.bytes += (frame.len() - HEAD) as u64;
                self.give(Outbound::Frame(frame))?;
            }
            if !full {
                return self.give(Outbound::EntryEnd);
            }
        }
    }

    /// Sends a directory and all below it, depth first.
    fn tree(&mut self, root: &Path) -> Result<(), Refusal> {
        let flags = QUIETLY.difference(OFlags::NOFOLLOW).union(OFlags::DIRECTORY);
        let directory = rustix::fs::open(root, flags, Mode::empty()).map_err(|error| self.refusal(error))?;
        let mut open = vec![self.directory(directory)?];
        while let Some(directory) = open.last_mut() {
            match directory.next() {
                None => {
                    open.pop();
                    self.path.pop();
                }
                Some(Err(error)) => return Err(self.refusal(error)),
                Some(Ok(entry)) => {
                    let name = entry.file_name();
                    if name == c"." || name == c".." {
                        continue;
                    }
                    self.path.push(name.to_owned());
                    let parent = directory.fd().map_err(|error| self.refusal(error))?;
                    match self.entry(parent, name)? {
                        Some(inner) => open.push(inner),
                        None => drop(self.path.pop()),
                    }
                }
            }
        }
        Ok(())
    }

    fn directory(&mut self, directory: OwnedFd) -> Result<Dir, Refusal> {
        if self.path.len() > MAX_DEPTH {
            return Err(Refusal::new(Fault::Invalid, format!("directories are nested deeper than {MAX_DEPTH}")));
        }
        let stat = rustix::fs::fstat(&directory).map_err(|error| self.refusal(error))?;
        self.begin(EntryKind::Directory, &stat)?;
        self.give(Outbound::EntryEnd)?;
        Dir::new(directory).map_err(|error| self.refusal(error))
    }

    /// Sends what a directory holds under a name; gives a directory back to be walked.
    fn entry(&mut self, parent: impl AsFd, name: &CStr) -> Result<Option<Dir>, Refusal> {
        let stat = match rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            // Removed since its name was read.
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(self.refusal(error)),
        };
        if name.to_bytes().len() > MAX_COMPONENT {
            self.summary.skipped += 1;
            return Ok(None);
        }
        let open = |extra| match rustix::fs::openat(&parent, name, QUIETLY.union(extra), Mode::empty()) {
            Ok(file) => Ok(Some(file)),
            // Removed or replaced since it was looked at.
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::NXIO) => Ok(None),
            Err(error) => Err(error),
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                if let Some(file) = open(OFlags::empty()).map_err(|error| self.refusal(error))? {
                    self.file(&file)?;
                }
                Ok(None)
            }
            FileType::Directory => {
                let directory = open(OFlags::DIRECTORY).map_err(|error| self.refusal(error))?;
                directory.map(|directory| self.directory(directory)).transpose()
            }
            FileType::Symlink => {
                if let Ok(target) = rustix::fs::readlinkat(&parent, name, Vec::new()) {
                    self.begin(EntryKind::Symlink(target.into_bytes().into()), &stat)?;
                    self.give(Outbound::EntryEnd)?;
                }
                Ok(None)
            }
            _ => {
                self.summary.skipped += 1;
                Ok(None)
            }
        }
    }
}
