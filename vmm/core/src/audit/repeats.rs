//! Reads that repeat: the same caller, the same arguments, the same result. Pure, but for what writes the counts at the end.
//!
//! Invariant: of what repeats within a minute the first [`WRITTEN`] have a line of their own, and all further ones are counted
//! in one line (`reason='repeated:N'`). So no caller fills the log by requesting the same again and again. What is counted and not
//! yet written is lost if the process is killed.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::line::Record;
use super::log::Log;
use super::word;

/// How many of the same have lines of their own.
const WRITTEN: u64 = 8;
/// How long they are counted.
const WINDOW: Duration = Duration::from_secs(60);
/// How many different reads are counted at a time.
const CALLS_TRACKED_MAX: usize = 512;

/// What makes two reads the same.
type Key = [Vec<u8>; 6];

/// The reads of this process.
#[derive(Debug)]
pub struct Repeats {
    log: Log,
    seen: Mutex<HashMap<Key, RepeatCount>>,
}

#[derive(Debug)]
struct RepeatCount {
    since: Instant,
    written: u64,
    more: u64,
    record: Record,
}

impl Repeats {
    /// Whose lines go to this log.
    pub fn new(log: Log) -> Self {
        Self { log, seen: Mutex::default() }
    }

    /// The log.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Whether this one has a line of its own; and the lines about what was counted and is over.
    pub fn note(&self, record: &Record, now: Instant) -> (bool, Vec<Record>) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let key = key(record);
        let full = seen.len() >= CALLS_TRACKED_MAX && !seen.contains_key(&key);
        let mut over = Vec::new();
        seen.retain(|_, one| {
            let stays = !full && now.duration_since(one.since) < WINDOW;
            if !stays {
                over.extend(counted(one));
            }
            stays
        });
        let fresh = || RepeatCount { since: now, written: 0, more: 0, record: record.clone() };
        let one = seen.entry(key).or_insert_with(fresh);
        let own = one.written < WRITTEN;
        if own {
            one.written += 1;
        } else {
            one.more += 1;
        }
        (own, over)
    }

    /// The lines about everything that was counted.
    pub fn take(&self) -> Vec<Record> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.drain().filter_map(|(_, one)| counted(&one)).collect()
    }
}

impl Drop for Repeats {
    fn drop(&mut self) {
        for record in self.take() {
            if let Err(error) = self.log.append_soon(record) {
                tracing::warn!("{error}");
            }
        }
    }
}

fn key(record: &Record) -> Key {
    let Record { agent, tool, params, result, reason, actor, .. } = record;
    [agent, tool, params, result, reason, actor].map(Clone::clone)
}

fn counted(seen: &RepeatCount) -> Option<Record> {
    let reason = word(&format!("repeated:{}", seen.more));
    (seen.more > 0).then(|| Record { reason, ..seen.record.clone() })
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::audit::FrontEnd;

    fn record(tool: &str) -> Record {
        Record {
            time: Timestamp::UNIX_EPOCH,
            face: FrontEnd::Api,
            agent: Vec::new(),
            tool: word(tool),
            params: b"{}".to_vec(),
            result: word("success"),
            reason: Vec::new(),
            actor: word("token:ci#1"),
            id: word("1"),
            stage: word("outcome"),
            seq: 0,
        }
    }

    // A token that may only read asked for the same a thousand times a second, and every line about an act was gone in a minute.
    #[test]
    fn repeated_reads_are_counted_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let repeats = Repeats::new(Log::reads(dir.path().join("audit")));
        let now = Instant::now();
        let own = (0..1000).filter(|_| repeats.note(&record("vm_ls"), now).0).count();
        assert_eq!(own, 8);
        assert_eq!(repeats.note(&record("vm_info"), now), (true, Vec::new()));
        let (own, over) = repeats.note(&record("vm_ls"), now + WINDOW);
        assert!(own, "a minute later it begins anew");
        assert_eq!(over.iter().map(|line| &*line.reason).collect::<Vec<_>>(), [b"repeated:992"]);
        assert!(repeats.take().is_empty());
    }

    #[test]
    fn counts_are_written_at_exit_and_when_the_table_is_full() {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::reads(dir.path().join("audit"));
        let repeats = Repeats::new(log.clone());
        let now = Instant::now();
        for _ in 0..10 {
            repeats.note(&record("vm_ls"), now);
        }
        let over: Vec<_> =
            (0..CALLS_TRACKED_MAX).flat_map(|n| repeats.note(&record(&format!("t{n}")), now).1).collect();
        assert_eq!(over.len(), 1);
        assert_eq!(&*over[0].reason, b"repeated:2");
        for _ in 0..9 {
            repeats.note(&record("t1"), now);
        }
        drop(repeats);
        assert_eq!(log.check(None).unwrap().0.last_seq, Some(1));
    }
}
