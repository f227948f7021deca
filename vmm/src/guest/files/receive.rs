//! The receiving half of a copy out of a guest: reads a tree as frames and checks it, entry by entry.
//!
//! Invariant: what [`Receiver`] hands on obeys the protocol and the limits: the root first and once, names that are
//! names, permission bits only, bytes only inside a file.

use std::io::Write;
use std::path::Path;

use nido_guest_agent::wire::{EntryKind, Failed, Fault, ToHost, check_path, kind};

use super::wire::Wire;
use super::{Copied, Limits, Progress};
use crate::guest::error::GuestError;
use crate::guest::session::unexpected;

/// Longest path of an entry below the root, in bytes, separators included: what one system call takes.
const MAX_PATH: usize = 4095;
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
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ItemKind {
    /// So long when it was opened; more or less may come.
    File(u64),
    Directory,
    Symlink(Vec<u8>),
}

/// Reads a tree.
pub(super) struct Receiver<F> {
    wire: Wire,
    limits: Limits,
    progress: Progress,
    skipped: u64,
    report: F,
}

impl<F: FnMut(Progress)> Receiver<F> {
    pub fn new(wire: Wire, limits: Limits, report: F) -> Self {
        Self { wire, limits, progress: Progress::default(), skipped: 0, report }
    }

    /// The next entry; none at the end of the tree.
    pub fn item(&mut self) -> Result<Option<Item>, GuestError> {
        let entry = match self.wire.answer("to send the next file")? {
            ToHost::Entry(entry) => entry,
            ToHost::TreeEnd(_) if self.progress.entries == 0 => return Err(GuestError::breach("an empty tree")),
            ToHost::TreeEnd(summary) => {
                self.skipped = summary.skipped;
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
        let path = entry.path.iter().map(|c| c.as_slice()).collect::<Vec<_>>().join(&b'/');
        if path.len() > MAX_PATH {
            return Err(GuestError::LimitExceeded { what: "bytes of a path", limit: MAX_PATH as u64 });
        }
        let kind = match entry.kind {
            EntryKind::File(size) => {
                self.progress.of = Some(size).filter(|_| is_root);
                ItemKind::File(size)
            }
            EntryKind::Directory => ItemKind::Directory,
            EntryKind::Symlink(_) if is_root => return Err(GuestError::breach("a tree whose root is a symlink")),
            EntryKind::Symlink(target) => ItemKind::Symlink(checked_target(target.into())?),
        };
        Ok(Some(Item { path, kind, mode: entry.mode & 0o777, mtime_ns: entry.mtime_ns }))
    }

    /// Hands the bytes of a file to `take`, until the entry ends; for what is no file there are none.
    pub fn body(
        &mut self,
        is_file: bool,
        mut take: impl FnMut(&[u8]) -> Result<(), GuestError>,
    ) -> Result<(), GuestError> {
        loop {
            let frame = self.wire.next("to send more of a file")?;
            if frame.kind != kind::FILE_DATA || !is_file {
                return match frame.must_be_message()? {
                    ToHost::EntryEnd => Ok(()),
                    other => Err(unexpected(other)),
                };
            }
            self.progress.bytes += frame.payload.len() as u64;
            if self.progress.bytes > self.limits.bytes {
                return Err(GuestError::LimitExceeded { what: "bytes", limit: self.limits.bytes });
            }
            take(frame.payload)?;
            (self.report)(self.progress);
        }
    }

    /// What was copied, after the end of the tree.
    pub fn copied(&self, path: Vec<u8>) -> Copied {
        let Progress { entries, bytes, of: _ } = self.progress;
        Copied { entries, bytes, skipped: self.skipped, path }
    }

    /// Copies a tree that is one file to a writer.
    pub fn copy_to(mut self, mut writer: impl Write) -> Result<Copied, GuestError> {
        let failed = |error| GuestError::host(Path::new("the output"), error);
        match self.item()? {
            Some(Item { kind: ItemKind::File(_), .. }) => {}
            _ => {
                let message = "it is not a file".into();
                return Err(GuestError::Guest(Failed { fault: Fault::WrongType, message }));
            }
        }
        self.body(true, |bytes| writer.write_all(bytes).map_err(failed))?;
        if self.item()?.is_some() {
            return Err(GuestError::breach("something inside a file"));
        }
        writer.flush().map_err(failed)?;
        Ok(self.copied(Vec::new()))
    }
}

fn checked_target(target: Vec<u8>) -> Result<Vec<u8>, GuestError> {
    if target.is_empty() || target.len() > MAX_TARGET || target.contains(&0) {
        return Err(GuestError::breach("a symlink with an impossible target"));
    }
    Ok(target)
}
