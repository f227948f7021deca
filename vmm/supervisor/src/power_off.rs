//! Asking a guest to power off: a task beside the loop, with a deadline.

use std::time::Duration;

use nido_engine::guest::Guest;
use nido_engine::qemu::{Monitor, MonitorError};
use nido_guest_agent::wire::Power;
use qapi::qmp::RunState;
use tokio::time::Instant as TokioInstant;

use super::qmp::QMP_TIMEOUT;

/// How long the agent may take to report that it powers off, before the power button is pressed.
const AGENT_TIMEOUT: Duration = Duration::from_secs(30);
/// The same of an agent that was not there yet when it was asked first.
const AGENT_RESTART_TIMEOUT: Duration = Duration::from_secs(5);
/// How long after that it is asked again.
const RETRY_DELAY: Duration = Duration::from_secs(2);

/// A guest that is asked to power off.
pub(super) struct PowerOff {
    pub guest: Guest,
    pub monitor: Monitor,
    /// Its agent has replied before.
    pub ready: bool,
    pub deadline: TokioInstant,
}

impl PowerOff {
    /// Asks until the agent replies that it does, QEMU is gone, or the time is up. Once is not enough: while the guest boots it
    /// ignores the power button, and while its disk is frozen the agent does not reply.
    pub(super) async fn request(self) {
        let mut may_answer = self.ready;
        while TokioInstant::now() < self.deadline {
            // A paused guest never powers off; one that was paused by a full disk may be paused again.
            if !matches!(self.monitor.query_status(QMP_TIMEOUT).await, Ok(RunState::running)) {
                let _ = self.monitor.cont(QMP_TIMEOUT).await;
            }
            // The agent syncs and powers off; where it does not answer, the power button is what is left.
            let patience = if self.ready { AGENT_TIMEOUT } else { AGENT_RESTART_TIMEOUT };
            let within = self.deadline.min(TokioInstant::now() + patience);
            if may_answer && self.guest.power(Power::Off, within).await.is_ok() {
                return;
            }
            if matches!(self.monitor.system_powerdown(QMP_TIMEOUT).await, Err(MonitorError::QemuGone)) {
                return;
            }
            may_answer = true;
            tokio::time::sleep_until(self.deadline.min(TokioInstant::now() + RETRY_DELAY)).await;
        }
    }
}
