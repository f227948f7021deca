//! Whether the host's clock was set, or the host slept. Pure, but for reading the clocks.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// How far the host's clocks may diverge before the guest's clock is set.
const CLOCK_JUMP_MIN: Duration = Duration::from_millis(500);

/// The host's clocks against each other: the wall clock is set, and while the host sleeps only some of them run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HostClocks {
    wall_ns: i128,
    boot_ns: i128,
}

impl HostClocks {
    /// As they are now.
    pub(super) fn now() -> Self {
        let read = |clock| {
            let time = clock_gettime(clock);
            i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
        };
        let base = read(ClockId::Monotonic);
        Self { wall_ns: read(ClockId::Realtime) - base, boot_ns: read(ClockId::Boottime) - base }
    }

    /// Whether they have moved against each other since the last time that they had, as they are `now`.
    pub(super) fn jumped(&mut self, now: Self) -> bool {
        let far = |a: i128, b: i128| a.abs_diff(b) > CLOCK_JUMP_MIN.as_nanos();
        let jumped = far(self.wall_ns, now.wall_ns) || far(self.boot_ns, now.boot_ns);
        if jumped {
            *self = now;
        }
        jumped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_set_and_a_host_that_slept_are_jumps() {
        let start = HostClocks { wall_ns: 5_000_000_000, boot_ns: 0 };
        let mut clocks = start;
        assert!(!clocks.jumped(HostClocks { wall_ns: 5_400_000_000, ..start }));
        assert!(clocks.jumped(HostClocks { wall_ns: 5_600_000_000, ..start }), "slow drift adds up");
        assert!(!clocks.jumped(HostClocks { wall_ns: 5_600_000_000, ..start }));
        assert!(clocks.jumped(HostClocks { wall_ns: 65_600_000_000, boot_ns: 60_000_000_000 }), "the host slept");
        assert!(clocks.jumped(HostClocks { wall_ns: 0, boot_ns: 60_000_000_000 }), "the clock was put back");
    }

    #[test]
    fn the_hosts_clocks_do_not_drift() {
        let mut clocks = HostClocks::now();
        assert!(!clocks.jumped(HostClocks::now()));
    }
}
