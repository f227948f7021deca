//! What an answer of an endpoint means.

use jiff::Timestamp;
use jiff::fmt::rfc2822;

/// What is to be done about a delivery after an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The endpoint took it.
    Delivered,
    /// The endpoint is permanently gone: nothing more is sent to it.
    Gone,
    /// It is attempted again.
    Again {
        /// Why, in a few words. Nothing that the endpoint wrote is in them.
        why: String,
        /// How long the endpoint wants to be left alone, in milliseconds.
        retry_after_ms: Option<i64>,
    },
}

/// What an answer with this status and this `Retry-After` means.
#[must_use]
pub fn verdict(status: u16, retry_after: Option<&str>, now: Timestamp) -> Verdict {
    match status {
        200..=299 => Verdict::Delivered,
        410 => Verdict::Gone,
        300..=399 => Verdict::Again {
            why: format!("the endpoint responded {status}, and redirects are not followed"),
            retry_after_ms: None,
        },
        _ => Verdict::Again {
            why: format!("the endpoint responded {status}"),
            retry_after_ms: retry_after.and_then(|text| wait_ms(text, now)),
        },
    }
}

/// `Retry-After` in milliseconds: seconds, or a date. What is neither counts as absent.
fn wait_ms(text: &str, now: Timestamp) -> Option<i64> {
    let text = text.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than fit are a very long time.
        return Some(text.parse::<i64>().unwrap_or(i64::MAX).saturating_mul(1000));
    }
    let at = rfc2822::DateTimeParser::new().parse_timestamp(text).ok()?;
    Some((at.as_millisecond() - now.as_millisecond()).max(0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn again(status: u16, retry_after: &str) -> Option<i64> {
        let now = "2026-01-04T14:30:00Z".parse().unwrap();
        match verdict(status, Some(retry_after), now) {
            Verdict::Again { retry_after_ms, .. } => retry_after_ms,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn endpoints_are_left_alone_as_long_as_they_ask() {
        assert_eq!(again(429, "120"), Some(120_000));
        assert_eq!(again(503, " 1 "), Some(1000));
        assert_eq!(again(503, "Sun, 04 Jan 2026 14:31:00 GMT"), Some(60_000));
        assert_eq!(again(429, "Sun, 04 Jan 2026 14:00:00 GMT"), Some(0));
        assert_eq!(again(429, "99999999999999999999999"), Some(i64::MAX));
        for nonsense in ["", "soon", "-5", "1.5", "Sun, 99 Jan"] {
            assert_eq!(again(429, nonsense), None, "{nonsense}");
        }
        assert_eq!(again(302, "5"), None);
    }

    proptest! {
        #[test]
        fn every_answer_means_something(status in 100..=999u16, after in proptest::option::of(".{0,40}")) {
            let verdict = verdict(status, after.as_deref(), Timestamp::UNIX_EPOCH);
            prop_assert_eq!(verdict == Verdict::Delivered, (200..300).contains(&status));
            prop_assert_eq!(verdict == Verdict::Gone, status == 410);
        }
    }
}
