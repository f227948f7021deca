//! How many processes the guest has refused for its limit, since the last time it was asked.

/// What is known of the guest's count.
#[derive(Debug, Default)]
pub(super) struct ProcessRefusals {
    /// The last count. Absent after a take-over: what happened before was recorded by the supervisor before.
    seen: Option<u64>,
    /// The guest has not answered the last question yet.
    pub(super) is_asked: bool,
}

impl ProcessRefusals {
    /// Of a guest that starts, or that had a supervisor before.
    pub(super) fn new(was_supervised: bool) -> Self {
        Self { seen: (!was_supervised).then_some(0), is_asked: false }
    }

    /// How many were refused since the last count.
    pub(super) fn since(&mut self, count: u64) -> u64 {
        // The guest has booted again, and counts from zero.
        let before = self.seen.replace(count).unwrap_or(count);
        count.checked_sub(before).unwrap_or(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_refused_is_counted_from_the_start_or_from_a_take_over() {
        let mut started = ProcessRefusals::new(false);
        assert_eq!([3, 3, 5, 1].map(|count| started.since(count)), [3, 0, 2, 1]);
        let mut taken_over = ProcessRefusals::new(true);
        assert_eq!([3, 4].map(|count| taken_over.since(count)), [0, 1]);
    }
}
