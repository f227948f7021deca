//! Points in time as nido stores and returns them: in whole milliseconds.

use jiff::Timestamp;

/// Now.
#[must_use]
pub fn now() -> Timestamp {
    in_ms(Timestamp::now())
}

/// A moment without what is finer than a millisecond.
#[must_use]
pub fn in_ms(moment: Timestamp) -> Timestamp {
    Timestamp::from_millisecond(moment.as_millisecond()).unwrap_or(moment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_finer_than_a_millisecond() {
        assert_eq!(in_ms("2026-05-04T12:44:35.891234567Z".parse().unwrap()).to_string(), "2026-05-04T12:44:35.891Z");
        assert_eq!(now().as_nanosecond() % 1_000_000, 0);
    }
}
