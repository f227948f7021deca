//! What commands wrote, kept whole for a while where an answer shows only both ends of it.
//!
//! Invariant: bounded in number and in bytes, and shown only to the caller whose command it was. It is in memory: it ends
//! with the server.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use nido_api::error::Result;

/// How much of one stream is kept, in bytes: its beginning, and [`TAIL`] of its end.
pub const HEAD: usize = 1 << 20;
/// How much of the end of a longer stream is kept, in bytes.
pub const TAIL: usize = 64 << 10;
/// How many streams are kept.
const OUTPUTS_MAX: usize = 64;
/// How many bytes they may have together.
const OUTPUT_TOTAL_BYTES_MAX: usize = 32 << 20;

/// One stream of a command that has ended.
#[derive(Debug)]
pub struct Output {
    /// Names it.
    pub id: String,
    /// Whose command it was.
    pub actor: String,
    /// Which stream, and of which VM.
    pub title: String,
    /// What it wrote; of very much the middle is missing, and a line states that.
    pub bytes: Vec<u8>,
}

/// The newest of them.
#[derive(Debug, Default)]
pub struct OutputStore(Mutex<VecDeque<Arc<Output>>>);

impl OutputStore {
    /// Keeps one, and drops the oldest if the store is full.
    pub fn keep(&self, actor: &str, title: String, bytes: Vec<u8>) -> Result<Arc<Output>> {
        let id = nido_files::random::id()?;
        let output = Arc::new(Output { id, actor: actor.into(), title, bytes });
        let mut kept = self.kept();
        kept.push_back(Arc::clone(&output));
        while kept.len() > OUTPUTS_MAX || kept.iter().map(|one| one.bytes.len()).sum::<usize>() > OUTPUT_TOTAL_BYTES_MAX
        {
            kept.pop_front();
        }
        Ok(output)
    }

    /// One, if it is this caller's.
    pub fn get(&self, actor: &str, id: &str) -> Option<Arc<Output>> {
        self.kept().iter().find(|one| one.id == id && one.actor == actor).cloned()
    }

    /// All of a caller's, the oldest first.
    pub fn of(&self, actor: &str) -> Vec<Arc<Output>> {
        self.kept().iter().filter(|one| one.actor == actor).cloned().collect()
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, VecDeque<Arc<Output>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream that is being read: as much of both ends as is kept.
#[derive(Debug, Default)]
pub struct OutputBuffer {
    head: Vec<u8>,
    tail: VecDeque<u8>,
    left_out: u64,
}

impl OutputBuffer {
    /// Takes the next piece in.
    pub fn add(&mut self, piece: &[u8]) {
        let (first, rest) = piece.split_at(piece.len().min(HEAD - self.head.len()));
        self.head.extend_from_slice(first);
        self.tail.extend(rest);
        if let Some(over) = self.tail.len().checked_sub(TAIL) {
            self.tail.drain(..over);
            self.left_out += over as u64;
        }
    }

    /// The stored part of it.
    pub fn bytes(self) -> Vec<u8> {
        let mut bytes = self.head;
        if self.left_out > 0 {
            bytes.extend_from_slice(format!("\n[... {} bytes left out ...]\n", self.left_out).as_bytes());
        }
        bytes.extend(self.tail);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_never_ends_takes_no_more_room() {
        let mut reading = OutputBuffer::default();
        for _ in 0..100 {
            reading.add(&[b'x'; 100_000]);
        }
        reading.add(b"end");
        let bytes = reading.bytes();
        assert!(bytes.len() < HEAD + TAIL + 100 && bytes.ends_with(b"xend"));
        let left_out = 10_000_003 - HEAD - TAIL;
        assert!(String::from_utf8(bytes).unwrap().contains(&format!("\n[... {left_out} bytes left out ...]\n")));
        let mut short = OutputBuffer::default();
        short.add(b"a");
        short.add(b"b");
        assert_eq!(short.bytes(), b"ab");
    }

    #[test]
    fn outputs_are_their_callers_and_the_oldest_go() {
        let outputs = OutputStore::default();
        let first = outputs.keep("a", String::new(), b"1".to_vec()).unwrap();
        assert!(outputs.get("a", &first.id).is_some() && outputs.get("b", &first.id).is_none());
        for _ in 0..OUTPUTS_MAX {
            outputs.keep("b", String::new(), vec![0; HEAD]).unwrap();
        }
        assert!(outputs.get("a", &first.id).is_none() && outputs.of("b").len() <= OUTPUT_TOTAL_BYTES_MAX / HEAD);
    }
}
