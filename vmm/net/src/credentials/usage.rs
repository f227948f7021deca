//! Which secrets were used, and how often: reported at a rate that the guest cannot raise.
//!
//! ```text
//!  use ── first, or a minute after the last report ──> reported ── recorded ──> the value may leave
//!      └─ within a minute ──> counted ── the minute is over, or the VM ends ──> reported with the number
//! ```
//!
//! Invariants: no use returns `true` before one report about the same secret, host and header is recorded; each is reported once a
//! minute at most; a request that the guest cancels changes nothing of this.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nido_api::SecretUse;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::{sleep, timeout};

/// How long a use that was reported is not reported again.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);
/// How long the record of a use may take.
const RECORD_TIMEOUT: Duration = Duration::from_secs(10);
/// How often counts are checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// Uses of a secret that are to be recorded.
#[derive(Debug)]
pub struct UseReport {
    /// The secret, the host and the header.
    pub used: SecretUse,
    /// How many requests, since the report before.
    pub requests: u64,
    /// Whether it is recorded, so that a `kill -9` does not lose it. Dropped: it is not.
    pub recorded: oneshot::Sender<bool>,
}

/// When a use was reported, and how often it occurred since.
#[derive(Debug, Clone, Copy)]
struct Counted {
    reported: Instant,
    requests: u64,
}

/// What was used: at most one entry for each use of the VM's specification.
#[derive(Debug, Default)]
struct Counts(HashMap<SecretUse, Counted>);

impl Counts {
    /// Counts a use. `Some` if it has to be reported first: how many requests there are to report.
    fn add(&mut self, used: &SecretUse, now: Instant) -> Option<u64> {
        let Some(counted) = self.0.get_mut(used) else { return Some(1) };
        if now.saturating_duration_since(counted.reported) >= REPORT_INTERVAL {
            return Some(counted.requests + 1);
        }
        counted.requests += 1;
        None
    }

    /// What was counted until now is recorded.
    fn reported(&mut self, used: SecretUse, now: Instant) {
        self.0.insert(used, Counted { reported: now, requests: 0 });
    }

    /// What was counted and not reported for at least so long.
    fn older(&self, age: Duration, now: Instant) -> Vec<(SecretUse, u64)> {
        let is_due = |counted: &Counted| counted.requests > 0 && now.saturating_duration_since(counted.reported) >= age;
        self.0.iter().filter(|(_, counted)| is_due(counted)).map(|(used, one)| (used.clone(), one.requests)).collect()
    }
}

/// The uses of one VM.
#[derive(Debug)]
pub struct Usage {
    counts: Arc<Mutex<Counts>>,
    reports: mpsc::Sender<UseReport>,
}

impl Usage {
    pub fn new(reports: mpsc::Sender<UseReport>) -> Self {
        Self { counts: Arc::default(), reports }
    }

    /// Counts a use; `false` if it cannot be recorded.
    pub async fn record(&self, used: &SecretUse) -> bool {
        let (counts, reports, used) = (Arc::clone(&self.counts), self.reports.clone(), used.clone());
        // A task of its own: it ends also if the guest cancels its request, so that it is not reported again and again.
        let recording = tokio::spawn(timeout(RECORD_TIMEOUT, async move {
            // Held until it is recorded: of many requests at once, one is reported.
            let mut counts = counts.lock().await;
            let now = Instant::now();
            let Some(requests) = counts.add(&used, now) else { return true };
            let is_recorded = send(&reports, used.clone(), requests).await;
            if is_recorded {
                counts.reported(used, now);
            }
            is_recorded
        }));
        matches!(recording.await, Ok(Ok(true)))
    }

    /// What was counted and not reported.
    pub async fn take(&self) -> Vec<(SecretUse, u64)> {
        let mut counts = self.counts.lock().await;
        let now = Instant::now();
        let taken = counts.older(Duration::ZERO, now);
        taken.iter().for_each(|(used, _)| counts.reported(used.clone(), now));
        taken
    }

    /// Reports what was counted for a minute, again and again.
    pub async fn report_counts(&self) {
        loop {
            sleep(CHECK_INTERVAL).await;
            let mut counts = self.counts.lock().await;
            let now = Instant::now();
            for (used, requests) in counts.older(REPORT_INTERVAL, now) {
                // One that fails is repeated.
                if timeout(RECORD_TIMEOUT, send(&self.reports, used.clone(), requests)).await == Ok(true) {
                    counts.reported(used, now);
                }
            }
        }
    }
}

/// Whether a report is recorded.
async fn send(reports: &mpsc::Sender<UseReport>, used: SecretUse, requests: u64) -> bool {
    let (recorded, is_recorded) = oneshot::channel();
    reports.send(UseReport { used, requests, recorded }).await.is_ok() && is_recorded.await.unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used() -> SecretUse {
        "key@example.com".parse().unwrap()
    }

    #[test]
    fn a_use_is_reported_first_and_then_once_a_minute_with_its_number() {
        let (mut counts, start) = (Counts::default(), Instant::now());
        let minute = start + REPORT_INTERVAL;
        assert_eq!(counts.add(&used(), start), Some(1));
        // It was not recorded: the next one has to be.
        assert_eq!(counts.add(&used(), start), Some(1));
        counts.reported(used(), start);
        assert_eq!((counts.add(&used(), start), counts.add(&used(), start)), (None, None));
        assert_eq!(counts.older(REPORT_INTERVAL, start), []);
        assert_eq!(counts.older(REPORT_INTERVAL, minute), [(used(), 2)]);
        assert_eq!(counts.add(&used(), minute), Some(3));
        counts.reported(used(), minute);
        assert_eq!(counts.older(Duration::ZERO, minute), [], "nothing is left to report");
    }

    #[tokio::test]
    async fn many_uses_at_once_are_one_report_and_none_passes_before_it_is_recorded() {
        let (reports, mut received) = mpsc::channel(16);
        let usage = Arc::new(Usage::new(reports));
        let tasks: Vec<_> = (0..8)
            .map(|_| {
                let usage = Arc::clone(&usage);
                tokio::spawn(async move { usage.record(&used()).await })
            })
            .collect();
        let report = received.recv().await.unwrap();
        assert!(tasks.iter().all(|task| !task.is_finished()), "a use passed before it was recorded");
        report.recorded.send(true).unwrap();
        for task in tasks {
            assert!(task.await.unwrap());
        }
        assert!(received.try_recv().is_err());
        assert_eq!(usage.take().await, [(used(), 7)]);
        assert_eq!(usage.take().await, []);
    }

    #[tokio::test]
    async fn a_use_that_is_not_recorded_is_refused_and_the_next_is_reported_again() {
        let (reports, mut received) = mpsc::channel(1);
        let usage = Arc::new(Usage::new(reports));
        for reply in [Some(false), None, Some(true)] {
            let task = tokio::spawn({
                let usage = Arc::clone(&usage);
                async move { usage.record(&used()).await }
            });
            let report = received.recv().await.unwrap();
            assert_eq!(report.requests, 1);
            // `None`: the supervisor ends before it has recorded the use.
            match reply {
                Some(reply) => report.recorded.send(reply).unwrap(),
                None => drop(report),
            }
            assert_eq!(task.await.unwrap(), reply == Some(true));
        }
        drop(received);
        assert!(usage.record(&used()).await, "within a minute it is only counted");
        assert!(!usage.record(&"other@example.com".parse().unwrap()).await);
    }
}
