//! Slots for connections, on either side of the channel. Pure.
//!
//! If all are taken, a half-closed connection that has been silent for a while is replaced: one end has announced that it
//! sends no more, and the other may never close. Invariant: never more slots than the limit are taken.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long a half-closed connection may be silent before another one may have its place.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(1);

/// Connections that are open. `T` is what ends one.
#[derive(Debug)]
pub struct ConnectionTable<T> {
    limit: usize,
    next: u64,
    open: BTreeMap<u64, Entry<T>>,
}

#[derive(Debug)]
struct Entry<T> {
    end: T,
    /// When the last byte came, if one direction is closed.
    half_closed: Option<Instant>,
}

impl<T> ConnectionTable<T> {
    /// So many places.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { limit, next: 0, open: BTreeMap::new() }
    }

    /// Takes a place: gives its number, and what ends the connection that had to make room for it. None if all are in use.
    pub fn enter(&mut self, end: T, now: Instant) -> Option<(u64, Option<T>)> {
        let mut evicted = None;
        if self.open.len() >= self.limit {
            let silent = self.open.iter().filter_map(|(number, entry)| Some((entry.half_closed?, *number)));
            let (since, number) = silent.min()?;
            if now.saturating_duration_since(since) < SILENCE_TIMEOUT {
                return None;
            }
            evicted = self.open.remove(&number).map(|entry| entry.end);
        }
        let number = self.next;
        self.next += 1;
        self.open.insert(number, Entry { end, half_closed: None });
        Some((number, evicted))
    }

    /// One direction is closed, and a byte has come in this moment, or the end of the other direction.
    pub fn half_closed(&mut self, number: u64, now: Instant) {
        if let Some(entry) = self.open.get_mut(&number) {
            entry.half_closed = Some(now);
        }
    }

    /// Gives a place back. One that was taken away is gone already.
    pub fn release(&mut self, number: u64) {
        self.open.remove(&number);
    }

    /// How many places are taken.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.open.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_half_closed_connection_makes_room_and_no_other_does() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut places = ConnectionTable::new(2);
        assert_eq!(places.enter('a', start), Some((0, None)));
        assert_eq!(places.enter('b', start), Some((1, None)));
        assert_eq!(places.enter('c', at(100)), None, "both are whole");
        places.half_closed(0, at(100));
        places.half_closed(1, at(101));
        assert_eq!(places.enter('c', at(100)), None, "not silent yet");
        places.half_closed(0, at(102));
        assert_eq!(places.enter('c', at(110)), Some((2, Some('b'))), "the one that has been silent longest");
        places.release(1);
        assert_eq!(places.taken(), 2);
        places.release(0);
        assert_eq!(places.enter('d', at(110)), Some((3, None)));
        assert_eq!(places.enter('e', at(110)), None);
    }
}
