//! The limit of processes in the guest: set before the first command, asked again while it runs.
//!
//! Invariant: a VM with such a limit does not become ready without it. What the guest reports of it is not trusted: it is a count,
//! and one hit a minute is recorded whatever it is.

use std::time::Duration;

use nido_api::{LimitHit, LimitKind};
use nido_engine::guest::{GuestError, Session};
use tokio::time::Instant;

use super::readiness::{AgentRoute, Readiness};
use super::state::{Report, Supervisor};

/// How long the guest may take to say how many processes it has refused. Under a full load it takes seconds.
const REPORT_TIMEOUT: Duration = Duration::from_secs(20);
/// What a hit of the limit means.
const REFUSED: &str = "a command in the guest could not start a process: all commands have as many as they may have";

/// Puts the limit in force. Returns why the guest is not ready if that fails; a guest that was ready before has it already.
pub(super) async fn install(route: &AgentRoute, limit: u32, was_ready: bool, deadline: Instant) -> Option<Readiness> {
    let error = request(route, limit, deadline).await.err()?;
    let why = match error {
        GuestError::Guest(failed) => format!("{:?}", failed.fault),
        GuestError::Gone | GuestError::Protocol(_) => {
            "its agent does not know such limits, because the template's warm image is of an earlier nido".into()
        }
        error => error.to_string(),
    };
    let why = format!("the guest did not limit its processes: {why}");
    tracing::warn!("{why}");
    (!was_ready).then_some(Readiness::NotRenewed(why))
}

async fn request(route: &AgentRoute, limit: u32, deadline: Instant) -> Result<u64, GuestError> {
    let mut session = Session::open(route.stream(deadline).await?, route.guest.token(), deadline).await?;
    session.limit_processes(limit, deadline).await
}

impl Supervisor {
    /// Asks a guest that is ready whether it has refused processes, unless the last question is still open.
    pub(super) fn check_process_limit(&mut self) {
        let Some(limit) = self.row.spec.max_processes else { return };
        if self.process_refusals.is_asked || !self.lifecycle.is_ready() || self.is_being_saved() {
            return;
        }
        self.process_refusals.is_asked = true;
        let (route, reports) = (self.agent_route(), self.reports.0.clone());
        tokio::spawn(async move {
            let count = request(&route, limit, Instant::now() + REPORT_TIMEOUT).await;
            let count = count.inspect_err(|error| tracing::debug!("the guest's count of processes: {error}"));
            let _ = reports.send(Report::ProcessesRefused(count.ok())).await;
        });
    }

    /// The guest has answered, or not.
    pub(super) fn on_processes_refused(&mut self, count: Option<u64>) {
        self.process_refusals.is_asked = false;
        let refused = count.map_or(0, |count| self.process_refusals.since(count));
        if refused > 0 {
            let limit = self.row.spec.max_processes.map(u64::from);
            self.on_limit_hit(LimitHit::new(LimitKind::Processes, limit, REFUSED).with("refused", refused));
        }
    }
}
