//! How far a call has come, told to a client that asked to be told.
//!
//! Invariant: what a client sees only ever grows, and comes at most every [`GAP`].

use std::time::Duration;

use nido_api::StartStage;
use rmcp::model::{ProgressNotificationParam, ProgressToken};
use rmcp::{Peer, RoleServer};
use tokio::sync::watch;

/// The shortest time between two messages.
const GAP: Duration = Duration::from_millis(250);

/// How far it has come.
#[derive(Debug, Clone, Default)]
struct Step {
    done: f64,
    total: Option<f64>,
    message: String,
}

/// Where work tells how far it has come.
#[derive(Debug, Clone)]
pub struct Progress(watch::Sender<Step>);

impl Progress {
    pub fn new() -> Self {
        Self(watch::channel(Step::default()).0)
    }

    /// What is not more than what was told before is not told.
    pub fn tell(&self, done: f64, total: Option<f64>, message: impl Into<String>) {
        let message = message.into();
        self.0.send_if_modified(|step| {
            let more = done > step.done;
            if more {
                *step = Step { done, total, message };
            }
            more
        });
    }

    /// A start goes on.
    pub fn stage(&self, stage: StartStage) {
        let (done, words) = match stage {
            StartStage::Preparing => (1.0, "preparing disk and configuration"),
            StartStage::Launching => (2.0, "starting QEMU"),
            StartStage::Booting => (3.0, "the guest boots"),
            StartStage::Ready => (4.0, "ready"),
        };
        self.tell(done, Some(4.0), words);
    }

    /// How far it has come: in words, and of a hundred.
    pub fn now(&self) -> (String, Option<u8>) {
        let step = self.0.borrow();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100")]
        let percent = step.total.map(|total| (step.done / total * 100.0).clamp(0.0, 100.0) as u8);
        (step.message.clone(), percent)
    }

    /// Passes on what is told, for as long as somebody tells.
    pub async fn pass_on(&self, peer: Peer<RoleServer>, token: ProgressToken) {
        let mut steps = self.0.subscribe();
        while steps.changed().await.is_ok() {
            let step = steps.borrow_and_update().clone();
            let mut message = ProgressNotificationParam::new(token.clone(), step.done).with_message(step.message);
            if let Some(total) = step.total {
                message = message.with_total(total);
            }
            if peer.notify_progress(message).await.is_err() {
                return;
            }
            tokio::time::sleep(GAP).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_only_grows() {
        let progress = Progress::new();
        let mut seen = progress.0.subscribe();
        let mut told = |done| {
            progress.tell(done, None, "");
            seen.has_changed().unwrap() && (seen.borrow_and_update().done - done).abs() < f64::EPSILON
        };
        assert_eq!([1.0, 1.0, 0.5, 2.0].map(&mut told), [true, false, false, true]);
    }
}
