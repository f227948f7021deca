//! The rate of the CPU's time-stamp counter, in kHz.
//!
//! A guest under emulation reads the host's counter, and on the leanest machine type it has no second clock to
//! calibrate against, so nido passes it. Invariant: a rate that varies between two measurements is never reported.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Measurements that differ by more than this many parts in a million are noise, not a rate.
const TOLERANCE_PPM: u64 = 200;
/// The span of one measurement. The kernel derives `CLOCK_MONOTONIC_RAW` from the counter itself, so the error is only
/// that of reading the two ends (tens of nanoseconds).
const SPAN: Duration = Duration::from_millis(10);

/// Measures the counter against `CLOCK_MONOTONIC_RAW`, in about 20 ms. `None`: no steady counter here.
pub fn measure_khz() -> Option<u32> {
    (0..3).find_map(|_| agreed(span_khz()?, span_khz()?))
}

/// The mean of two measurements that agree.
fn agreed(first: u64, second: u64) -> Option<u32> {
    let apart = first.abs_diff(second);
    let mean = first.midpoint(second);
    (mean > 0 && apart * 1_000_000 / mean <= TOLERANCE_PPM).then(|| u32::try_from(mean).ok()).flatten()
}

fn span_khz() -> Option<u64> {
    let (ticks_before, ns_before) = reading()?;
    std::thread::sleep(SPAN);
    let (ticks_after, ns_after) = reading()?;
    let ticks = u128::from(ticks_after.checked_sub(ticks_before)?);
    let ns = u128::from(ns_after.checked_sub(ns_before)?);
    u64::try_from((ticks * 1_000_000 + ns / 2).checked_div(ns)?).ok()
}

/// Counter and clock at the same moment: the tightest of several readings.
fn reading() -> Option<(u64, u64)> {
    (0..16)
        .filter_map(|_| {
            let before = counter()?;
            let ns = raw_ns();
            let after = counter()?;
            Some((after.checked_sub(before)?, before.midpoint(after), ns))
        })
        .min()
        .map(|(_, ticks, ns)| (ticks, ns))
}

fn raw_ns() -> u64 {
    let now = clock_gettime(ClockId::MonotonicRaw);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::unnecessary_wraps)]
fn counter() -> Option<u64> {
    // SAFETY: `rdtsc` reads a register and exists on every x86-64 CPU.
    Some(unsafe { core::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_measurements_that_agree_are_a_rate() {
        assert_eq!(agreed(2_300_000, 2_300_002), Some(2_300_001));
        assert_eq!(agreed(2_300_000, 2_400_000), None);
        assert_eq!(agreed(0, 0), None);
    }
}
