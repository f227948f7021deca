//! When a delivery that failed is attempted again, and when no more.

/// How long after each failed attempt comes the next, in milliseconds; the last one again and again.
const DELAYS_MS: [i64; 11] =
    [1_000, 5_000, 30_000, 120_000, 600_000, 1_800_000, 3_600_000, 7_200_000, 14_400_000, 21_600_000, 21_600_000];
/// How long after it was queued a delivery is given up, in milliseconds: 3 days.
pub const DELIVERY_LIFETIME_MS: i64 = 3 * 24 * 3600 * 1000;
/// So many attempts are made even if it is older than that: it waited behind another one, or the host was off. They take
/// about a quarter of an hour.
pub const ATTEMPTS_MIN: u32 = 6;
/// The longest `Retry-After` that is respected, in milliseconds: a day.
pub const RETRY_AFTER_MAX_MS: i64 = 24 * 3600 * 1000;
/// How far a delay may be from the table's value, as a part of it.
const JITTER: f64 = 0.2;

/// A delivery that has just failed.
#[derive(Debug, Clone, Copy)]
pub struct FailedDelivery {
    /// How often it was attempted, this attempt included.
    pub attempts: u32,
    /// When it was queued, in milliseconds since 1970.
    pub queued_ms: i64,
    /// Now.
    pub now_ms: i64,
    /// How long the endpoint wants to be left alone, in milliseconds.
    pub retry_after_ms: Option<i64>,
}

/// When it is attempted again, in milliseconds since 1970; `None`: it is given up. `chance` is a random number from 0 to 1.
#[must_use]
pub fn next_attempt(failed: &FailedDelivery, chance: f64) -> Option<i64> {
    let FailedDelivery { attempts, queued_ms, now_ms, retry_after_ms } = *failed;
    let end = queued_ms.saturating_add(DELIVERY_LIFETIME_MS);
    let early = attempts < ATTEMPTS_MIN;
    if now_ms >= end && !early {
        return None;
    }
    let step = usize::try_from(attempts.saturating_sub(1)).unwrap_or(usize::MAX).min(DELAYS_MS.len() - 1);
    let part = 1.0 - JITTER + 2.0 * JITTER * chance.clamp(0.0, 1.0);
    #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // hours in milliseconds
    let delay = (DELAYS_MS[step] as f64 * part) as i64;
    let asked = retry_after_ms.unwrap_or(0).clamp(0, RETRY_AFTER_MAX_MS);
    let next = now_ms.saturating_add(delay.max(asked));
    // The last attempt is made when the time is up, not hours before.
    Some(if early { next } else { next.min(end) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn failed(attempts: u32, age_ms: i64) -> FailedDelivery {
        FailedDelivery { attempts, queued_ms: 0, now_ms: age_ms, retry_after_ms: None }
    }

    #[test]
    fn an_endpoint_gets_about_twenty_attempts_in_three_days() {
        let (mut now, mut attempts) = (0, 0);
        loop {
            attempts += 1;
            match next_attempt(&failed(attempts, now), 0.5) {
                Some(next) => now = next,
                None => break,
            }
        }
        assert_eq!(now, DELIVERY_LIFETIME_MS);
        assert!((15..30).contains(&attempts), "{attempts}");
    }

    #[test]
    fn an_old_delivery_is_retried_for_a_quarter_of_an_hour() {
        let (mut now, mut attempts) = (DELIVERY_LIFETIME_MS * 2, 0);
        let began = now;
        loop {
            attempts += 1;
            match next_attempt(&failed(attempts, now), 0.5) {
                Some(next) => now = next,
                None => break,
            }
        }
        assert_eq!(attempts, ATTEMPTS_MIN);
        assert!((600_000..1_200_000).contains(&(now - began)));
    }

    proptest! {
        #[test]
        fn the_next_attempt_is_neither_at_once_nor_never(
            attempts in 1..u32::MAX, age in 0..DELIVERY_LIFETIME_MS * 2, chance in 0.0..=1.0f64, asked in proptest::option::of(any::<i64>())
        ) {
            let failed = FailedDelivery { retry_after_ms: asked, ..failed(attempts, age) };
            match next_attempt(&failed, chance) {
                None => prop_assert!(age >= DELIVERY_LIFETIME_MS && attempts >= ATTEMPTS_MIN),
                Some(next) => {
                    prop_assert!(next > age);
                    prop_assert!(next - age <= RETRY_AFTER_MAX_MS);
                    let asked = asked.unwrap_or(0).clamp(0, RETRY_AFTER_MAX_MS);
                    prop_assert!(next >= age + asked || next == DELIVERY_LIFETIME_MS);
                    prop_assert!(next - age >= 800 || next == DELIVERY_LIFETIME_MS);
                }
            }
        }

        #[test]
        fn chance_moves_it_by_a_fifth(attempts in 1..12u32) {
            let at = |chance| next_attempt(&failed(attempts, 0), chance).unwrap();
            prop_assert!(at(0.0) < at(1.0));
            prop_assert!((at(1.0) as f64 / at(0.0) as f64) < 1.51);
        }
    }
}
