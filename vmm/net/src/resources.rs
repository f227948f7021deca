//! What all connections of a VM share: rates, and memory.
//!
//! Invariant: whatever the guest does, its connections hold no more memory than [`MEMORY_MAX`] and a part that is small for each.

use std::cell::{Cell, RefCell};
use std::time::Instant;

/// What the buffers of all connections may hold together, in bytes, beyond [`FREE`] for each.
const MEMORY_MAX: usize = 64 << 20;
/// What each connection may hold without a reservation, in bytes.
const FREE: usize = 32 << 10;

/// The memory of all connections.
#[derive(Debug, Default)]
pub struct Memory {
    used: Cell<usize>,
}

impl Memory {
    /// A connection that holds nothing yet.
    pub fn reserve(&self) -> Reservation<'_> {
        Reservation { memory: self, held: 0 }
    }
}

/// What one connection holds. Pages that were used once stay used, so it never shrinks.
#[derive(Debug)]
pub struct Reservation<'a> {
    memory: &'a Memory,
    held: usize,
}

impl Reservation<'_> {
    /// Takes note of what the connection holds; whether that is allowed.
    pub fn resize(&mut self, queued: usize) -> bool {
        let growth = queued.saturating_sub(FREE).saturating_sub(self.held);
        if growth == 0 {
            return true;
        }
        let used = self.memory.used.get() + growth;
        self.memory.used.set(used);
        self.held += growth;
        used <= MEMORY_MAX
    }

    /// Whether the connection may grow by what the host sends.
    pub fn allows(&self, queued: usize) -> bool {
        self.memory.used.get() < MEMORY_MAX || queued < FREE
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.memory.used.set(self.memory.used.get().saturating_sub(self.held));
    }
}

/// A limit of events in a second, with a second's worth at once.
#[derive(Debug)]
pub struct Rate {
    per_second: u32,
    state: RefCell<(f64, Instant)>,
}

impl Rate {
    /// A limit of which nothing is used.
    pub fn new(per_second: u32, now: Instant) -> Self {
        Self { per_second, state: RefCell::new((f64::from(per_second), now)) }
    }

    /// Whether one more is allowed now.
    pub fn take(&self, now: Instant) -> bool {
        let mut state = self.state.borrow_mut();
        let (left, then) = *state;
        let gained = now.saturating_duration_since(then).as_secs_f64() * f64::from(self.per_second);
        let left = (left + gained).min(f64::from(self.per_second));
        let allowed = left >= 1.0;
        *state = (if allowed { left - 1.0 } else { left }, now);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn memory_is_bounded_and_released() {
        let memory = Memory::default();
        let mut first = memory.reserve();
        assert!(first.resize(MEMORY_MAX + FREE));
        let mut second = memory.reserve();
        assert!(second.resize(FREE) && !second.allows(FREE) && second.allows(FREE - 1));
        assert!(!second.resize(FREE + 1));
        drop(first);
        assert!(second.resize(2 * FREE) && second.allows(FREE));
    }

    #[test]
    fn a_rate_refills_with_time() {
        let start = Instant::now();
        let rate = Rate::new(10, start);
        assert_eq!((0..20).filter(|_| rate.take(start)).count(), 10);
        let later = start + Duration::from_millis(500);
        assert_eq!((0..20).filter(|_| rate.take(later)).count(), 5);
    }
}
