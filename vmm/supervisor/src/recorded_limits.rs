//! When limits that the VM reached were recorded: at a rate that its guest cannot raise. Pure.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use nido_api::egress::{Denial, DenialReason};
use nido_api::{LimitHit, LimitKind};
use nido_net::ByteLimit;

/// How long a limit that was recorded is not recorded again.
const RECORD_INTERVAL: Duration = Duration::from_secs(60);

/// When each limit was last recorded. Sentences are nido's own, so there are few.
#[derive(Debug, Default)]
pub(super) struct RecordedLimits(HashMap<(LimitKind, String), Instant>);

impl RecordedLimits {
    /// Whether a hit is to be recorded, which it then is.
    pub(super) fn is_due(&mut self, hit: &LimitHit, now: Instant) -> bool {
        let key = (hit.kind, hit.message.clone());
        if self.0.get(&key).is_some_and(|last| now.saturating_duration_since(*last) < RECORD_INTERVAL) {
            return false;
        }
        self.0.insert(key, now);
        true
    }
}

/// The limit that a refusal of the network is about, if it is one.
pub(super) fn of_denial(denial: &Denial) -> Option<LimitHit> {
    let message = match denial.reason {
        DenialReason::ConnectionLimit => "the VM has as many connections as it may have",
        DenialReason::RateLimit => "the VM opens connections, or resolves names, faster than it may",
        _ => return None,
    };
    Some(LimitHit::new(LimitKind::Flows, None, message).with("refused", denial.count))
}

/// The limit of bytes that was reached.
pub(super) fn of_bytes(reached: &ByteLimit) -> LimitHit {
    let message = if reached.of_sent {
        "the guest has sent as many bytes as it may: its network is closed"
    } else {
        "the guest has received as many bytes as it may: its network is closed"
    };
    LimitHit::new(LimitKind::EgressBytes, Some(reached.limit), message)
        .with("sent_bytes", reached.count.sent)
        .with("received_bytes", reached.count.received)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_recorded_once_a_minute() {
        let (mut recorded, start) = (RecordedLimits::default(), Instant::now());
        let hit = LimitHit::new(LimitKind::Flows, None, "too many");
        assert!(recorded.is_due(&hit, start));
        assert!(!recorded.is_due(&hit, start + Duration::from_secs(59)));
        assert!(recorded.is_due(&LimitHit::new(LimitKind::Disk, None, "too many"), start));
        assert!(recorded.is_due(&hit, start + Duration::from_secs(60)));
    }
}
