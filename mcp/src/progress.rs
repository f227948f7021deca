//! Progress of a call, sent to a client that requested it.
//!
//! Invariant: the progress that a client receives only grows. Messages come at most every [`GAP`], and the last one before the
//! result.

use std::sync::Arc;
use std::time::Duration;

use nido_api::StartStage;
use rmcp::model::{ProgressNotificationParam, ProgressToken};
use rmcp::{Peer, RoleServer};
use tokio::sync::{Mutex, watch};
use tokio::time::timeout;

/// The shortest time between two messages.
const GAP: Duration = Duration::from_millis(250);
/// How long the last message may take; a client that does not read must not delay the result.
const LAST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(1);

/// How far it has come.
#[derive(Debug, Clone, Default)]
struct Step {
    done: f64,
    total: Option<f64>,
    message: String,
}

/// Where work reports its progress.
#[derive(Debug, Clone)]
pub struct Progress {
    steps: watch::Sender<Step>,
    /// What the client has not received yet. One receiver for the whole call: a step that work reports before the client is
    /// served is sent nevertheless.
    unsent: Arc<Mutex<watch::Receiver<Step>>>,
}

impl Progress {
    pub fn new() -> Self {
        let (steps, unsent) = watch::channel(Step::default());
        Self { steps, unsent: Arc::new(Mutex::new(unsent)) }
    }

    /// Reports a step, unless it is not more than the last one.
    pub fn report(&self, done: f64, total: Option<f64>, message: impl Into<String>) {
        let message = message.into();
        self.steps.send_if_modified(|step| {
            let more = done > step.done;
            if more {
                *step = Step { done, total, message };
            }
            more
        });
    }

    /// A start continues.
    pub fn stage(&self, stage: StartStage) {
        let (done, words) = match stage {
            StartStage::Preparing => (1.0, "preparing disk and configuration"),
            StartStage::Launching => (2.0, "starting QEMU"),
            StartStage::Booting => (3.0, "the guest boots"),
            StartStage::Ready => (4.0, "ready"),
        };
        self.report(done, Some(4.0), words);
    }

    /// How far it has come: in words, and of a hundred.
    pub fn now(&self) -> (String, Option<u8>) {
        let step = self.steps.borrow();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100")]
        let percent = step.total.map(|total| (step.done / total * 100.0).clamp(0.0, 100.0) as u8);
        (step.message.clone(), percent)
    }

    /// Sends each step, until it is dropped.
    pub async fn pass_on(&self, peer: Peer<RoleServer>, token: ProgressToken) {
        let mut unsent = self.unsent.lock().await;
        while unsent.changed().await.is_ok() {
            let step = unsent.borrow_and_update().clone();
            if peer.notify_progress(message(step, token.clone())).await.is_err() {
                return;
            }
            tokio::time::sleep(GAP).await;
        }
    }

    /// Sends the last step, if it has not been sent. [`Self::pass_on`] must not be in progress.
    pub async fn send_last(&self, peer: &Peer<RoleServer>, token: ProgressToken) {
        let sending = async {
            let mut unsent = self.unsent.lock().await;
            if unsent.has_changed().unwrap_or(false) {
                let step = unsent.borrow_and_update().clone();
                let _ = peer.notify_progress(message(step, token)).await;
            }
        };
        let _ = timeout(LAST_MESSAGE_TIMEOUT, sending).await;
    }
}

fn message(step: Step, token: ProgressToken) -> ProgressNotificationParam {
    let message = ProgressNotificationParam::new(token, step.done).with_message(step.message);
    match step.total {
        Some(total) => message.with_total(total),
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reported_progress_only_grows() {
        let progress = Progress::new();
        let mut seen = progress.steps.subscribe();
        let mut told = |done| {
            progress.report(done, None, "");
            seen.has_changed().unwrap() && (seen.borrow_and_update().done - done).abs() < f64::EPSILON
        };
        assert_eq!([1.0, 1.0, 0.5, 2.0].map(&mut told), [true, false, false, true]);
    }

    // The progress of a call that ended quickly was lost on a busy machine.
    #[test]
    fn a_step_that_is_reported_before_the_client_is_served_is_not_lost() {
        let progress = Progress::new();
        progress.report(1.0, None, "");
        let mut unsent = progress.unsent.blocking_lock();
        assert!(unsent.has_changed().unwrap());
        unsent.borrow_and_update();
        assert!(!unsent.has_changed().unwrap());
    }
}
