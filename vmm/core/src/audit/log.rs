//! The audit log's files: appended to, repaired, rotated.
//!
//! ```text
//!  mcp-audit.log      the newest lines; the writer holds mcp-audit.lock
//!  mcp-audit.log.1    what came before, up to .63; never written again
//! ```
//! and the same of `mcp-audit-reads.log`, up to `.3`, for what changes nothing, and of `mcp-audit-events.log`, up to `.15`, for what
//! happens to VMs: chains of their own. However much is read, and whatever guests do, what callers did stays.
//!
//! Invariants: a writer that is killed at any instant leaves complete lines and at most one partial line at the end, which the
//! next writer takes away; a line that was waited for is on the disk, and so is every line before it. The first line of
//! a file that is not the first one states which chain it follows, so it can be checked when its predecessors are gone.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nido_api::error::Result;
use nido_api::moment;
use nido_files::atomic_file;
use nido_files::lock::HeldLock;
use nido_files::private_dir::make_private_dir;

use super::line::{Line, NO_CHAIN, Record};
use super::{failed, word};

/// The newest lines about what changes something, or was refused.
pub const LOG: &str = "mcp-audit.log";
/// The newest lines about what changes nothing.
pub const READ_LOG: &str = "mcp-audit-reads.log";
/// The newest lines about what happened to VMs.
pub const EVENT_LOG: &str = "mcp-audit-events.log";
/// When a new file is begun, in bytes.
const LIMIT_BYTES: u64 = 16 << 20;
/// How many older files are kept: 1 GiB.
const KEEP: u32 = 63;
/// The same of reads: 64 MiB.
const KEEP_READS: u32 = 3;
/// The same of events: 256 MiB.
const KEEP_EVENTS: u32 = 15;
/// How long to wait for other writers, each of whom needs less than a millisecond.
const LOCK_LIMIT: Duration = Duration::from_secs(10);
/// How much of a file's end is looked at first.
const TAIL: u64 = 16 << 10;
/// The operation by which the first line of a file names the chain it follows.
pub(super) const ROTATE: &str = "audit_rotate";

/// The log in a directory.
#[derive(Debug, Clone)]
pub struct Log {
    directory: PathBuf,
    name: &'static str,
    limit_bytes: u64,
    keep: u32,
}

/// The end of a file, or of the whole log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogTail {
    /// The last line's number.
    pub seq: u64,
    /// The chain up to and with it.
    pub chain: String,
}

impl Log {
    /// The log in that directory, whether it is there already or not.
    #[must_use]
    pub fn at(directory: PathBuf) -> Self {
        Self::with_limits(directory, LIMIT_BYTES, KEEP)
    }

    /// The log of reads, next to it.
    #[must_use]
    pub fn reads(directory: PathBuf) -> Self {
        Self { name: READ_LOG, ..Self::with_limits(directory, LIMIT_BYTES, KEEP_READS) }
    }

    /// The log of events, next to it.
    #[must_use]
    pub fn events(directory: PathBuf) -> Self {
        Self { name: EVENT_LOG, ..Self::with_limits(directory, LIMIT_BYTES, KEEP_EVENTS) }
    }

    /// As [`Self::at`]: a new file is begun before one gets longer than `limit_bytes`, and `keep` older ones are kept.
    #[must_use]
    pub fn with_limits(directory: PathBuf, limit_bytes: u64, keep: u32) -> Self {
        Self { directory, name: LOG, limit_bytes, keep }
    }

    /// Where it is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes a record, with the time and the next number, and waits until it is on the disk. Returns its number and the chain.
    ///
    /// # Errors
    /// `audit_failed`.
    pub fn append(&self, record: Record) -> Result<LogTail> {
        let (file, last) = self.write(record)?;
        // Others may write meanwhile: this covers their lines, too.
        file.sync_data().map_err(|e| failed(self.file(0).display(), e))?;
        Ok(last)
    }

    /// As [`Self::append`], but does not wait for the disk: a power cut may take the line, and whatever comes behind it, but
    /// nothing that was waited for.
    ///
    /// # Errors
    /// `audit_failed`.
    pub fn append_soon(&self, record: Record) -> Result<LogTail> {
        self.write(record).map(|(_, last)| last)
    }

    fn write(&self, record: Record) -> Result<(File, LogTail)> {
        self.make_directory().map_err(|e| failed(self.directory.display(), e))?;
        let written = self.locked(|| self.append_locked(record));
        written.map_err(|e| failed(self.file(0).display(), e))
    }

    /// Runs something while no process writes.
    pub(super) fn locked<T>(&self, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let lock = self.directory.join(self.name).with_extension("lock");
        let held = HeldLock::take_blocking(&lock, Instant::now() + LOCK_LIMIT)?;
        let _held = held.ok_or_else(|| io::Error::new(ErrorKind::TimedOut, "another process keeps it locked"))?;
        act()
    }

    pub(super) fn make_directory(&self) -> io::Result<()> {
        make_private_dir(&self.directory)?;
        let meta = std::fs::metadata(&self.directory)?;
        if meta.uid() != rustix::process::geteuid().as_raw() || meta.mode() & 0o022 != 0 {
            return Err(io::Error::new(
                ErrorKind::PermissionDenied,
                "the directory belongs to another user, or others can write to it",
            ));
        }
        Ok(())
    }

    /// Returns the file, which is not synced yet, and where it ends.
    fn append_locked(&self, mut record: Record) -> io::Result<(File, LogTail)> {
        let path = self.file(0);
        let mut file = open(&path)?;
        let (mut length, last) = end(&file)?;
        if length < file.metadata()?.len() {
            file.set_len(length)?;
        }
        let last = last.map_or_else(|| self.last_of_older(), Ok)?;
        record.time = moment::now();
        record.seq = last.seq + 1;
        let (mut text, mut chain) = record.render(&last.chain);
        if length > 0 && length + text.len() as u64 >= self.limit_bytes {
            // Nothing may be on the disk without what comes before it.
            file.sync_data()?;
            self.rotate()?;
            (file, length) = (open(&path)?, 0);
        }
        if length == 0 && last.seq > 0 {
            let (first, opened) = opening(&record, &last).render(&last.chain);
            record.seq += 1;
            (text, chain) = record.render(&opened);
            text = format!("{first}\n{text}");
        }
        text.push('\n');
        nido_files::failpoint!("audit.appending", io)?;
        if let Err(error) = file.write_all(text.as_bytes()) {
            // A full disk must not leave half a line.
            file.set_len(length)?;
            return Err(error);
        }
        nido_files::failpoint!("audit.appended");
        if length == 0 {
            atomic_file::sync_parent(&path)?;
        }
        Ok((file, LogTail { seq: record.seq, chain }))
    }

    /// Where the older files end.
    fn last_of_older(&self) -> io::Result<LogTail> {
        let none = LogTail { seq: 0, chain: NO_CHAIN.into() };
        let Some(newest) = self.older()?.into_iter().min() else { return Ok(none) };
        let (_, last) = end(&File::open(self.file(newest))?)?;
        last.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "an older file of it is empty"))
    }

    /// Renames the files one further.
    fn rotate(&self) -> io::Result<()> {
        let (gone, moves) = moves(&self.older()?, self.keep);
        if let Some(gone) = gone {
            std::fs::remove_file(self.file(gone))?;
        }
        for (from, to) in moves {
            std::fs::rename(self.file(from), self.file(to))?;
        }
        Ok(())
    }

    /// The numbers of the older files, in no order.
    fn older(&self) -> io::Result<Vec<u32>> {
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix(self.name)?.strip_prefix('.')?.parse().ok());
            // Only names that nido gives.
            numbers.extend(number.filter(|n| *n > 0 && self.file(*n).file_name() == Some(&name)));
        }
        Ok(numbers)
    }

    /// All files that are there, the oldest first.
    pub(super) fn files(&self) -> io::Result<Vec<PathBuf>> {
        let mut numbers = self.older()?;
        numbers.sort_unstable_by(|a, b| b.cmp(a));
        numbers.extend(self.file(0).exists().then_some(0));
        Ok(numbers.into_iter().map(|number| self.file(number)).collect())
    }

    fn file(&self, number: u32) -> PathBuf {
        self.directory.join(if number == 0 { self.name.to_owned() } else { format!("{}.{number}", self.name) })
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(path)
}

/// The first line of a file that continues another one.
fn opening(next: &Record, last: &LogTail) -> Record {
    Record {
        agent: Vec::new(),
        tool: word(ROTATE),
        params: serde_json::json!({ "previous": last.chain }).to_string().into_bytes(),
        result: word("success"),
        reason: Vec::new(),
        id: word(&last.chain[..16]),
        stage: word("outcome"),
        ..next.clone()
    }
}

/// Which older file goes, and which are renamed to which number, in this order; 0 is the newest. Pure. Wherever it is interrupted, each
/// line is in exactly one file, and the order of the numbers is that of the lines.
pub(super) fn moves(older: &[u32], keep: u32) -> (Option<u32>, Vec<(u32, u32)>) {
    let free = (1..=keep).find(|number| !older.contains(number));
    let hole = free.unwrap_or(keep);
    (if free.is_none() { Some(keep) } else { None }, (0..hole).rev().map(|number| (number, number + 1)).collect())
}

/// How long a file is up to its last line end, and its last line.
fn end(file: &File) -> io::Result<(u64, Option<LogTail>)> {
    let length = file.metadata()?.len();
    let mut look = TAIL;
    loop {
        let from = length.saturating_sub(look);
        let mut tail = vec![0; usize::try_from(length - from).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut tail, from)?;
        match last_line(&tail) {
            Some((before, line)) if before > 0 || from == 0 => {
                let parsed = Line::parse(line).ok_or_else(|| {
                    io::Error::new(ErrorKind::InvalidData, "its last line was altered; see 'nido audit verify'")
                })?;
                let whole = from + (before + line.len() + 1) as u64;
                return Ok((whole, Some(LogTail { seq: parsed.record.seq, chain: parsed.chain })));
            }
            None if from == 0 => return Ok((0, None)),
            _ => look = look.saturating_mul(4),
        }
    }
}

/// The last line that has an end, and how many bytes stand before it. Pure.
fn last_line(tail: &[u8]) -> Option<(usize, &[u8])> {
    let stop = tail.iter().rposition(|b| *b == b'\n')?;
    let start = tail[..stop].iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
    Some((start, &tail[start..stop]))
}
