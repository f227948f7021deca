//! The receiving half of a copy out of a guest: reads a tree as frames and checks it, entry by entry.
//!
//! Invariant: what [`Receiver`] hands on obeys the protocol and the limits: the root first and once, names that are
//! names, permission bits only, bytes only inside a file.

use std::io::Write;
use std::path::Path;

use minicbor::bytes::ByteVec;
use nido_guest_agent::wire::{self, EntryKind, MAX_LEFT_OUT, MAX_LEFT_OUT_PATH, ToHost, check_path, kind};

use super::wire::Wire;
use super::{CopyTotals, Limits, Progress, SkippedEntry};
use crate::guest::error::GuestError;
use crate::guest::session::unexpected;

/// Longest path of an entry below the root, in bytes, separators included: what one system call takes.
const MAX_PATH: usize = 4095;
/// The most holes of one copy: of 64 KiB each at least, so more than the limit of bytes has room for.
const MAX_HOLES: u64 = 4_000_000;
/// How much of the reason is kept why an entry was left out, in bytes.
const MAX_REASON: usize = 200;
/// Longest target of a symlink, in bytes.
const MAX_TARGET: usize = 4095;

/// One checked entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    /// Components joined by `/`; empty for the root.
    pub path: Vec<u8>,
    pub kind: ItemKind,
    /// The nine permission bits.
    pub mode: u16,
    pub mtime_ns: i64,
    /// User and group by number, if they were requested.
    pub owner: Option<(u32, u32)>,
    /// How many bytes it takes in the guest, if the guest reports it. A claim.
    pub stored: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ItemKind {
    /// So long when it was opened; more or less may come.
    File(u64),
    Directory,
    Symlink(Vec<u8>),
    /// Another name of a file that came before: its path, as [`Item::path`].
    Link(Vec<u8>),
}

/// A piece of a file.
#[derive(Debug, Clone, Copy)]
pub(super) enum FileChunk<'a> {
    Bytes(&'a [u8]),
    /// So many zeros that take no room.
    Hole(u64),
}

/// Reads a tree.
pub(super) struct Receiver<F> {
    wire: Wire,
    limits: Limits,
    progress: Progress,
    skipped: u64,
    holes: u64,
    /// Bytes of holes that were written as zeros.
    zeros: u64,
    left_out_count: u64,
    left_out: Vec<SkippedEntry>,
    report: F,
}

impl<F: FnMut(Progress)> Receiver<F> {
    pub fn new(wire: Wire, limits: Limits, report: F) -> Self {
        let (progress, left_out) = (Progress::default(), Vec::new());
        Self { wire, limits, progress, skipped: 0, holes: 0, zeros: 0, left_out_count: 0, left_out, report }
    }

    /// The next entry; none at the end of the tree.
    pub fn item(&mut self) -> Result<Option<Item>, GuestError> {
        let entry = match self.wire.answer("to send the next file")? {
            ToHost::Entry(entry) => entry,
            ToHost::TreeEnd(_) if self.progress.entries == 0 => return Err(GuestError::breach("an empty tree")),
            ToHost::TreeEnd(summary) => {
                self.skipped = summary.skipped;
                self.left_out_count = summary.left_out_count.unwrap_or_default();
                self.left_out =
                    summary.left_out.unwrap_or_default().into_iter().take(MAX_LEFT_OUT).map(named).collect();
                (self.report)(self.progress);
                return Ok(None);
            }
            other => return Err(unexpected(other)),
        };
        let is_root = self.progress.entries == 0;
        self.progress.entries += 1;
        if self.progress.entries > self.limits.entries {
            return Err(GuestError::LimitExceeded { what: "files", limit: self.limits.entries });
        }
        check_path(&entry.path)?;
        if entry.path.is_empty() != is_root {
            return Err(GuestError::breach("a tree with no root, or with two"));
        }
        let path = joined(&entry.path)?;
        let kind = match entry.kind {
            EntryKind::File(size) => {
                self.progress.of = Some(size).filter(|_| is_root);
                ItemKind::File(size)
            }
            EntryKind::Directory => ItemKind::Directory,
            EntryKind::Symlink(_) if is_root => return Err(GuestError::breach("a tree whose root is a symlink")),
            EntryKind::Symlink(target) => ItemKind::Symlink(checked_target(target.into())?),
            EntryKind::Link(_) if is_root => return Err(GuestError::breach("a tree whose root is a hard link")),
            EntryKind::Link(target) => {
                check_path(&target)?;
                ItemKind::Link(joined(&target)?)
            }
        };
        let owner = entry.owner.map(|owner| (owner.uid, owner.gid));
        let (mode, mtime_ns, stored) = (entry.mode & 0o777, entry.mtime_ns, entry.stored);
        Ok(Some(Item { path, kind, mode, mtime_ns, owner, stored }))
    }

    /// Hands the bytes of a file to `take`, until the entry ends; for what is no file there are none.
    pub fn body(
        &mut self,
        is_file: bool,
        mut take: impl FnMut(FileChunk<'_>) -> Result<(), GuestError>,
    ) -> Result<(), GuestError> {
        loop {
            let frame = self.wire.next("to send more of a file")?;
            if frame.kind != kind::FILE_DATA || !is_file {
                match frame.must_be_message()? {
                    ToHost::EntryEnd => return Ok(()),
                    ToHost::Hole(length) if is_file => {
                        self.holes += 1;
                        if self.holes > MAX_HOLES {
                            return Err(GuestError::LimitExceeded { what: "holes", limit: MAX_HOLES });
                        }
                        take(FileChunk::Hole(length))?;
                    }
                    other => return Err(unexpected(other)),
                }
                continue;
            }
            self.progress.bytes += frame.payload.len() as u64;
            if self.progress.bytes > self.limits.bytes {
                return Err(GuestError::LimitExceeded { what: "bytes", limit: self.limits.bytes });
            }
            take(FileChunk::Bytes(frame.payload))?;
            (self.report)(self.progress);
        }
    }

    /// What was copied, after the end of the tree.
    pub fn copied(&self, path: Vec<u8>) -> CopyTotals {
        let Progress { entries, bytes, of: _ } = self.progress;
        let (left_out_count, left_out) = (self.left_out_count, self.left_out.clone());
        CopyTotals { entries, bytes, skipped: self.skipped, left_out_count, left_out, path }
    }

    /// Hands the bytes of a file to a writer, holes as zeros; those count like bytes.
    pub fn body_to(&mut self, mut write: impl FnMut(&[u8]) -> Result<(), GuestError>) -> Result<(), GuestError> {
        let (mut zeros, most) = (self.zeros, self.limits.bytes);
        let done = self.body(true, |piece| match piece {
            FileChunk::Bytes(bytes) => write(bytes),
            FileChunk::Hole(mut length) => {
                zeros = length.saturating_add(zeros);
                if zeros > most {
                    return Err(GuestError::LimitExceeded { what: "bytes", limit: most });
                }
                while length > 0 {
                    let count = length.min(ZEROS.len() as u64);
                    write(&ZEROS[..usize::try_from(count).unwrap_or(ZEROS.len())])?;
                    length -= count;
                }
                Ok(())
            }
        });
        self.zeros = zeros;
        done
    }

    /// Copies a tree that is one file to a writer.
    pub fn copy_to(mut self, writer: impl Write) -> Result<CopyTotals, GuestError> {
        match self.item()? {
            Some(Item { kind: ItemKind::File(_), .. }) => self.rest_of_file_to(writer),
            _ => Err(GuestError::IsDirectory),
        }
    }

    /// Copies one file as it is, or a directory as an archive.
    pub fn file_or_archive_to(mut self, writer: impl Write) -> Result<CopyTotals, GuestError> {
        match self.item()? {
            Some(Item { kind: ItemKind::File(_), .. }) => self.rest_of_file_to(writer),
            first => self.archive_from(first, writer, None),
        }
    }

    fn rest_of_file_to(mut self, mut writer: impl Write) -> Result<CopyTotals, GuestError> {
        let failed = |error| GuestError::host(Path::new("the output"), error);
        self.body_to(|bytes| writer.write_all(bytes).map_err(failed))?;
        if self.item()?.is_some() {
            return Err(GuestError::breach("something inside a file"));
        }
        writer.flush().map_err(failed)?;
        Ok(self.copied(Vec::new()))
    }
}

/// Zeros of a hole, for writers.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// The components of a path, joined.
fn joined(path: &[ByteVec]) -> Result<Vec<u8>, GuestError> {
    let path = path.iter().map(|c| c.as_slice()).collect::<Vec<_>>().join(&b'/');
    if path.len() > MAX_PATH {
        return Err(GuestError::LimitExceeded { what: "bytes of a path", limit: MAX_PATH as u64 });
    }
    Ok(path)
}

/// The guest's error for an entry that it could not read, truncated.
fn named(left_out: wire::SkippedEntry) -> SkippedEntry {
    let wire::SkippedEntry { path, mut reason } = left_out;
    let mut path = Vec::from(path);
    path.truncate(MAX_LEFT_OUT_PATH);
    reason.truncate(reason.floor_char_boundary(MAX_REASON));
    SkippedEntry { path, reason }
}

fn checked_target(target: Vec<u8>) -> Result<Vec<u8>, GuestError> {
    if target.is_empty() || target.len() > MAX_TARGET || target.contains(&0) {
        return Err(GuestError::breach("a symlink with an impossible target"));
    }
    Ok(target)
}
