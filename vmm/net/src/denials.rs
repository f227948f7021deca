//! What was refused: counted for each destination, and reported at a rate that the guest cannot raise.
//!
//! Invariants: at most [`KEYS_MAX`] destinations are remembered; each is reported when it first occurs, and then once a minute at
//! most.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nido_api::egress::{Denial, DenialReason, DeniedProtocol};

/// How many destinations are remembered.
const KEYS_MAX: usize = 100;
/// How long a destination that was reported is not reported again.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// A destination that was refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Refused {
    /// By which protocol.
    pub protocol: DeniedProtocol,
    /// The domain name, if one was involved.
    pub name: Option<String>,
    /// The address, if it came to that.
    pub address: Option<IpAddr>,
    /// The port.
    pub port: Option<u16>,
    /// Why.
    pub reason: DenialReason,
}

struct Counted {
    denial: Denial,
    reported: Instant,
}

/// What was refused.
#[derive(Default)]
pub struct Denials {
    counted: HashMap<Refused, Counted>,
    /// Refusals of destinations that are not remembered.
    others: u64,
    total: u64,
}

impl Denials {
    /// Counts a refusal. `Some` if it is to be reported.
    pub fn count(&mut self, refused: Refused, now: Instant) -> Option<Denial> {
        self.total += 1;
        // Where a name is known, its addresses are one destination.
        let address = refused.address;
        let key = Refused { address: if refused.name.is_some() { None } else { address }, ..refused };
        if let Some(counted) = self.counted.get_mut(&key) {
            counted.denial.count += 1;
            counted.denial.last_at = Timestamp::now();
            if now.saturating_duration_since(counted.reported) < REPORT_INTERVAL {
                return None;
            }
            counted.reported = now;
            return Some(counted.denial.clone());
        }
        if self.counted.len() >= KEYS_MAX {
            self.others += 1;
            return None;
        }
        let at = Timestamp::now();
        let mut denial = Denial {
            protocol: key.protocol,
            name: key.name.clone(),
            address,
            port: key.port,
            reason: key.reason,
            count: 1,
            first_at: at,
            last_at: at,
            rule: None,
        };
        denial.rule = denial.remedy();
        self.counted.insert(key, Counted { denial: denial.clone(), reported: now });
        Some(denial)
    }

    /// What was refused, the most frequent first; and how many refusals are not among it.
    #[must_use]
    pub fn list(&self) -> (Vec<Denial>, u64) {
        let mut denials: Vec<_> = self.counted.values().map(|counted| counted.denial.clone()).collect();
        denials.sort_by(|a, b| (b.count, a.first_at).cmp(&(a.count, b.first_at)));
        (denials, self.others)
    }

    /// How often something was refused.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(port: u16) -> Refused {
        Refused {
            protocol: DeniedProtocol::Tcp,
            name: None,
            address: Some([1, 1, 1, 1].into()),
            port: Some(port),
            reason: DenialReason::AddressNotLearned,
        }
    }

    #[test]
    fn a_destination_is_reported_first_and_then_once_a_minute() {
        let (mut denials, start) = (Denials::default(), Instant::now());
        assert!(denials.count(refused(1), start).is_some());
        assert!(denials.count(refused(1), start + Duration::from_secs(59)).is_none());
        let again = denials.count(refused(1), start + Duration::from_secs(60)).unwrap();
        assert_eq!(again.count, 3);
        assert!(denials.count(refused(1), start + Duration::from_secs(61)).is_none());
    }

    #[test]
    fn a_scan_is_bounded() {
        let (mut denials, start) = (Denials::default(), Instant::now());
        let reported = (1..=10_000).filter(|port| denials.count(refused(*port), start).is_some()).count();
        let (listed, others) = denials.list();
        assert_eq!((reported, listed.len(), others, denials.total()), (KEYS_MAX, KEYS_MAX, 9900, 10_000));
    }
}
