//! Whether a VM's time to live is over. Pure.
//!
//! The store has its end as wall-clock time. That clock also counts while the host is off, and it can be set. So the guardian notes
//! the same end on a clock that cannot be set, when it first sees it.
//!
//! Invariant: the earlier of both ends counts: a wall clock that is put back does not extend a time to live.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use nido_store::RowFacts;
use rustix::time::{ClockId, clock_gettime};

/// A moment, on two clocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    /// Wall-clock time, in milliseconds.
    pub wall_ms: i64,
    /// Time since the host was booted, also while it slept. This clock cannot be set.
    pub since_boot: Duration,
}

impl Moment {
    pub fn now() -> Self {
        Self {
            wall_ms: Timestamp::now().as_millisecond(),
            since_boot: clock_gettime(ClockId::Boottime).try_into().unwrap_or_default(),
        }
    }
}

/// The end of a time to live.
#[derive(Debug, Clone, Copy)]
struct Expiry {
    /// As in the store: a VM that is started again has another.
    wall_ms: i64,
    /// Its latest end.
    since_boot: Duration,
}

/// The ends that were seen, by VM.
#[derive(Debug, Default)]
pub(super) struct Expiries(HashMap<String, Expiry>);

impl Expiries {
    /// Whether the time to live of a VM is over.
    pub fn is_over(&mut self, id: &str, expires_ms: Option<i64>, now: Moment) -> bool {
        let Some(wall_ms) = expires_ms else { return false };
        let left = Duration::from_millis(u64::try_from(wall_ms.saturating_sub(now.wall_ms)).unwrap_or(0));
        let seen = Expiry { wall_ms, since_boot: now.since_boot.saturating_add(left) };
        let noted = self.0.get(id).filter(|noted| noted.wall_ms == wall_ms).copied().unwrap_or(seen);
        self.0.insert(id.to_owned(), noted);
        noted.since_boot <= now.since_boot || wall_ms <= now.wall_ms
    }

    /// Removes those of VMs that are gone.
    pub fn retain(&mut self, rows: &[RowFacts]) {
        self.0.retain(|id, _| rows.iter().any(|row| row.id == *id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(wall_s: i64, since_boot_s: u64) -> Moment {
        Moment { wall_ms: wall_s * 1000, since_boot: Duration::from_secs(since_boot_s) }
    }

    #[test]
    fn the_earlier_end_of_both_clocks_counts() {
        let (mut expiries, end) = (Expiries::default(), Some(1_060_000));
        assert!(!expiries.is_over("a", end, at(1000, 10)));
        // Put back by half an hour, then forward, then back again.
        for (now, expected) in [
            (at(-800, 69), false),
            (at(-799, 70), true),
            (at(1060, 30), true),
            (at(1059, 30), false),
            (at(-800, 70), true),
        ] {
            assert_eq!(expiries.is_over("a", end, now), expected, "{now:?}");
        }
    }

    #[test]
    fn a_vm_that_is_started_again_has_another_end() {
        let mut expiries = Expiries::default();
        assert!(expiries.is_over("a", Some(1_000_000), at(1001, 10)));
        assert!(!expiries.is_over("a", Some(1_060_000), at(1001, 10)));
        assert!(expiries.is_over("a", Some(1_060_000), at(0, 69)));
        assert!(!expiries.is_over("a", None, at(2000, 100)));
    }

    #[test]
    fn the_end_of_a_vm_that_is_gone_is_not_kept() {
        let mut expiries = Expiries::default();
        expiries.is_over("a", Some(1_000_000), at(0, 0));
        expiries.retain(&[]);
        assert!(expiries.0.is_empty());
    }
}
