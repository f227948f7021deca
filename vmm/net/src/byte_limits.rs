//! The limits of bytes, as all connections keep them: what passes is counted, and once a limit is reached nothing passes any more.

use std::time::{Duration, Instant};

use nido_api::egress::DenialReason;

use crate::shared::Shared;

/// How long a limit of bytes that was reported is not reported again.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

impl Shared {
    /// The guest has sent so many bytes.
    pub fn count_sent(&self, bytes: usize) {
        self.traffic.add_sent(bytes);
        self.end_at_byte_limit();
    }

    /// It has received so many bytes.
    pub fn count_received(&self, bytes: usize) {
        self.traffic.add_received(bytes);
        self.end_at_byte_limit();
    }

    /// Ends all connections once a limit of bytes is reached.
    fn end_at_byte_limit(&self) {
        if self.is_over_byte_limit() {
            self.tcp.retain(|_| false);
            self.udp.retain(|_| false);
        }
    }

    /// Whether nothing passes any more, which is then reported.
    pub fn is_over_byte_limit(&self) -> bool {
        let Some(reached) = self.traffic.reached() else { return false };
        let now = Instant::now();
        let last = self.byte_limit_reported.get();
        let is_due = last.is_none_or(|last| now.saturating_duration_since(last) >= REPORT_INTERVAL);
        if is_due && self.byte_limits.try_send(reached).is_ok() {
            self.byte_limit_reported.set(Some(now));
        }
        true
    }

    /// Whether one more connection, or pair of ends, may begin.
    ///
    /// # Errors
    /// Why not.
    pub fn admit_flow(&self, open: usize, most: usize) -> Result<(), DenialReason> {
        if self.is_over_byte_limit() {
            return Err(DenialReason::ByteLimit);
        }
        if open >= most {
            return Err(DenialReason::ConnectionLimit);
        }
        if self.new_flows.take(Instant::now()) { Ok(()) } else { Err(DenialReason::RateLimit) }
    }
}
