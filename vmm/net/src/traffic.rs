//! The bytes that a guest has sent and received since its start: counted, limited, and kept in a file from which the next engine
//! continues.
//!
//! Invariants: once a limit is reached, it stays reached; a process that is killed loses at most `UNWRITTEN_MAX` bytes of a count
//! that is limited, and `UNLIMITED_UNWRITTEN_MAX` of one that is only shown. The guest's own end of a byte counts: what the name server gets and returns is part of it, headers are not.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

/// How many bytes may pass before a count with a limit is written again.
const UNWRITTEN_MAX: u64 = 16 << 10;
/// The same without limits: writing more often would slow a fast connection down.
const UNLIMITED_UNWRITTEN_MAX: u64 = 1 << 20;

/// How many bytes have passed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Bytes that the guest has sent.
    pub sent: u64,
    /// Bytes that it has received.
    pub received: u64,
}

/// A limit of bytes that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteLimit {
    /// Whether it is that of the bytes that the guest sends; else of those that it receives.
    pub of_sent: bool,
    /// The limit.
    pub limit: u64,
    /// What had passed by then.
    pub count: Count,
}

/// Where the count is kept: a file of [`TrafficFile::LENGTH`] bytes, which is overwritten in place.
#[derive(Debug, Clone)]
pub struct TrafficFile {
    file: Arc<File>,
}

impl TrafficFile {
    /// The length of the file, in bytes. All of it is within one page, so a process that is killed has written it or not.
    pub const LENGTH: usize = 64;

    /// A file that is open for writing.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self { file: Arc::new(file) }
    }

    /// Replaces the count.
    ///
    /// # Errors
    /// Of the file.
    pub fn write(&self, count: Count) -> io::Result<()> {
        self.file.write_all_at(&encode(count), 0)
    }
}

/// The content of the file.
fn encode(count: Count) -> Vec<u8> {
    let text = format!("traffic 1 {} {}", count.sent, count.received);
    format!("{text:<width$}\n", width = TrafficFile::LENGTH - 1).into_bytes()
}

/// The count in the content of a file; `None` if it is damaged or of another format.
#[must_use]
pub fn decode(content: &[u8]) -> Option<Count> {
    let text = std::str::from_utf8(content).ok()?;
    let mut words = text.strip_suffix('\n')?.split_ascii_whitespace();
    let (Some("traffic"), Some("1")) = (words.next(), words.next()) else { return None };
    let count = Count { sent: words.next()?.parse().ok()?, received: words.next()?.parse().ok()? };
    words.next().is_none().then_some(count)
}

/// What has passed, and what may.
#[derive(Debug)]
pub struct Traffic {
    sent: Cell<u64>,
    received: Cell<u64>,
    sent_max: Option<u64>,
    received_max: Option<u64>,
    unwritten: Cell<u64>,
    file: Option<TrafficFile>,
    has_failed: Cell<bool>,
}

impl Traffic {
    /// Continues a count, within limits.
    pub fn new(from: Count, sent_max: Option<u64>, received_max: Option<u64>, file: Option<TrafficFile>) -> Self {
        Self {
            sent: Cell::new(from.sent),
            received: Cell::new(from.received),
            sent_max,
            received_max,
            unwritten: Cell::new(0),
            file,
            has_failed: Cell::new(false),
        }
    }

    /// How many bytes more the guest may send.
    pub fn sent_left(&self) -> usize {
        left(self.sent_max, self.sent.get())
    }

    /// How many bytes more it may receive.
    pub fn received_left(&self) -> usize {
        left(self.received_max, self.received.get())
    }

    /// The guest has sent so many bytes.
    pub fn add_sent(&self, bytes: usize) {
        self.sent.set(self.sent.get().saturating_add(bytes as u64));
        self.passed(bytes);
    }

    /// It has received so many bytes.
    pub fn add_received(&self, bytes: usize) {
        self.received.set(self.received.get().saturating_add(bytes as u64));
        self.passed(bytes);
    }

    /// What has passed.
    pub fn count(&self) -> Count {
        Count { sent: self.sent.get(), received: self.received.get() }
    }

    /// The limit that was reached, if one was.
    pub fn reached(&self) -> Option<ByteLimit> {
        let count = self.count();
        let of = |of_sent, limit: Option<u64>, passed: u64| {
            let limit = limit.filter(|limit| passed >= *limit)?;
            Some(ByteLimit { of_sent, limit, count })
        };
        of(true, self.sent_max, count.sent).or_else(|| of(false, self.received_max, count.received))
    }

    fn passed(&self, bytes: usize) {
        let unwritten = self.unwritten.get().saturating_add(bytes as u64);
        self.unwritten.set(unwritten);
        let is_limited = self.sent_max.or(self.received_max).is_some();
        let most = if is_limited { UNWRITTEN_MAX } else { UNLIMITED_UNWRITTEN_MAX };
        if unwritten >= most || self.reached().is_some() {
            self.write();
        }
    }

    fn write(&self) {
        self.unwritten.set(0);
        let Some(Err(error)) = self.file.as_ref().map(|file| file.write(self.count())) else { return };
        // The count in memory stays right.
        if !self.has_failed.replace(true) {
            tracing::error!("the count of the network's bytes cannot be written: {error}");
        }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        if self.unwritten.get() > 0 {
            self.write();
        }
    }
}

fn left(limit: Option<u64>, passed: u64) -> usize {
    limit.map_or(usize::MAX, |limit| usize::try_from(limit.saturating_sub(passed)).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_counts_are_read_back_and_damaged_ones_are_not() {
        for count in [Count::default(), Count { sent: u64::MAX, received: u64::MAX }] {
            assert_eq!(encode(count).len(), TrafficFile::LENGTH);
            assert_eq!(decode(&encode(count)), Some(count));
        }
        for damaged in
            ["", "traffic 1 2 3", "traffic 2 2 3\n", "traffic 1 2\n", "traffic 1 2 3 4\n", "traffic 1 -2 3\n"]
        {
            assert_eq!(decode(damaged.as_bytes()), None, "{damaged}");
        }
    }

    #[test]
    fn a_count_without_limits_is_written_less_often() {
        let path = std::env::temp_dir().join(format!("nido-traffic-unlimited-{}", std::process::id()));
        let file = TrafficFile::new(File::create(&path).unwrap());
        let traffic = Traffic::new(Count::default(), None, None, Some(file));
        let stored = || decode(&std::fs::read(&path).unwrap());
        traffic.add_sent(1 << 19);
        assert_eq!(stored(), None);
        traffic.add_received(1 << 19);
        assert_eq!(stored(), Some(Count { sent: 1 << 19, received: 1 << 19 }));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_count_that_is_continued_lacks_at_most_what_was_not_written() {
        let path = std::env::temp_dir().join(format!("nido-traffic-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        let traffic = Traffic::new(Count::default(), Some(100_000), None, Some(TrafficFile::new(file)));
        let stored = || decode(&std::fs::read(&path).unwrap());
        for _ in 0..9 {
            traffic.add_sent(10_000);
            let written = stored().map_or(0, |count| count.sent);
            assert!(traffic.count().sent - written < UNWRITTEN_MAX, "{written}");
        }
        assert_eq!((traffic.reached(), traffic.sent_left()), (None, 10_000));
        traffic.add_received(5);
        traffic.add_sent(10_000);
        let count = Count { sent: 100_000, received: 5 };
        assert_eq!(traffic.reached(), Some(ByteLimit { of_sent: true, limit: 100_000, count }));
        assert_eq!((stored(), traffic.sent_left(), traffic.received_left()), (Some(count), 0, usize::MAX));
        traffic.add_received(1);
        drop(traffic);
        assert_eq!(stored(), Some(Count { received: 6, ..count }));
        std::fs::remove_file(path).unwrap();
    }
}
