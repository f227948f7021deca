//! When a VM's time is up: pure.
//!
//! Idle means that no exec, copy or forwarded connection is open. A running exec is activity, however quiet; asking for
//! the VM's status is not.

use std::time::{Duration, Instant};

/// The limits of one VM, and what has been seen of its use.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    expires_at: Option<Instant>,
    /// The latest end of its time to live: a wall clock that is put back does not extend it.
    expires_by: Option<Instant>,
    idle: Option<Duration>,
    users: usize,
    quiet_since: Instant,
}

/// Which limit was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitReached {
    /// Its life is over.
    Ttl,
    /// No client has used it for too long.
    Idle,
}

impl Limits {
    /// Limits that begin to count at `now`.
    #[must_use]
    pub const fn new(now: Instant, expires_at: Option<Instant>, idle: Option<Duration>) -> Self {
        Self { expires_at, expires_by: expires_at, idle, users: 0, quiet_since: now }
    }

    /// Sets the end of its time to live as the wall clock has it now. That clock also counts while the host sleeps, and it can be set:
    /// the earlier of both ends counts.
    pub fn expire_at(&mut self, expires_at: Option<Instant>) {
        self.expires_at = expires_at.into_iter().chain(self.expires_by).min();
    }

    /// So many sessions are open now.
    pub fn used_by(&mut self, users: usize, now: Instant) {
        if self.users > 0 || users > 0 {
            self.quiet_since = now;
        }
        self.users = users;
    }

    /// It was in use until now.
    pub const fn used(&mut self, now: Instant) {
        self.quiet_since = now;
    }

    /// When its time to live ends.
    #[must_use]
    pub const fn expires_at(&self) -> Option<Instant> {
        self.expires_at
    }

    /// Since when nothing has used it.
    #[must_use]
    pub const fn quiet_since(&self) -> Instant {
        self.quiet_since
    }

    /// For how long nothing has used it; `None` while something does.
    #[must_use]
    pub fn idle_for(&self, now: Instant) -> Option<Duration> {
        (self.users == 0).then(|| now.saturating_duration_since(self.quiet_since))
    }

    /// When to look again.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let idle = self.idle.filter(|_| self.users == 0).map(|idle| self.quiet_since + idle);
        match (self.expires_at, idle) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// The limit that is reached at `now`.
    #[must_use]
    pub fn reached(&self, now: Instant) -> Option<LimitReached> {
        if self.expires_at.is_some_and(|at| now >= at) {
            return Some(LimitReached::Ttl);
        }
        let idle_for = self.idle_for(now)?;
        self.idle.is_some_and(|idle| idle_for >= idle).then_some(LimitReached::Idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    // A time to live was extended when the wall clock was put back.
    #[test]
    fn a_wall_clock_that_is_set_never_extends_a_time_to_live() {
        let start = Instant::now();
        let end = start + Duration::from_secs(60);
        let mut limits = Limits::new(start, Some(end), None);
        for (wall, expected) in [(30, 30), (3600, 60), (59, 59), (61, 60)] {
            limits.expire_at(Some(start + Duration::from_secs(wall)));
            assert_eq!(limits.expires_at(), Some(start + Duration::from_secs(expected)), "{wall}");
        }
        let mut unlimited = Limits::new(start, None, None);
        unlimited.expire_at(None);
        assert_eq!(unlimited.expires_at(), None);
    }

    #[test]
    fn an_open_session_is_activity_however_long() {
        let start = Instant::now();
        let mut limits = Limits::new(start, None, Some(10 * S));
        limits.used_by(1, start + 5 * S);
        assert_eq!(limits.reached(start + 500 * S), None);
        assert_eq!(limits.next_deadline(), None);
        limits.used_by(0, start + 500 * S);
        assert_eq!(limits.reached(start + 509 * S), None);
        assert_eq!(limits.reached(start + 510 * S), Some(LimitReached::Idle));
        assert_eq!(limits.next_deadline(), Some(start + 510 * S));
    }

    #[test]
    fn a_life_ends_even_in_use() {
        let start = Instant::now();
        let mut limits = Limits::new(start, Some(start + 3 * S), Some(10 * S));
        limits.used_by(2, start);
        assert_eq!(limits.reached(start + 2 * S), None);
        assert_eq!(limits.reached(start + 3 * S), Some(LimitReached::Ttl));
    }

    #[test]
    fn without_limits_there_is_no_deadline() {
        let limits = Limits::new(Instant::now(), None, None);
        assert_eq!(limits.next_deadline(), None);
        assert_eq!(limits.reached(Instant::now() + 1_000_000 * S), None);
    }
}
