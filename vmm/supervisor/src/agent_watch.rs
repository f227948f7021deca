//! Waiting for the agent's first reply.
//!
//! Invariant: until the identity of a loaded guest has been reset, only this supervisor can reach it.

use std::time::Duration;

use nido_engine::guest::{Guest, Link};
use nido_guest_agent::wire::IdentityReset;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant as TokioInstant;

use super::launch::RunningQemu;
use super::loaded_guest::{has_link_to_hold, switch_link};
use super::readiness::{AgentRoute, Readiness, reset_identity, warm};
use super::state::Supervisor;
use super::{process_limit, trust};

/// What the guest of a VM that is used gets before its first command.
struct GuestSetup {
    certificate: Option<String>,
    process_limit: Option<u32>,
    was_ready: bool,
}

impl GuestSetup {
    /// Installs it. Returns why the guest is not ready if that fails.
    async fn install(self, route: &AgentRoute, deadline: TokioInstant) -> Option<Readiness> {
        if let Some(certificate) = self.certificate
            && let Some(failure) = trust::install(route, &certificate, self.was_ready, deadline).await
        {
            return Some(failure);
        }
        process_limit::install(route, self.process_limit?, self.was_ready, deadline).await
    }
}

/// Waits for the first reply of a guest that boots.
async fn wait_for_boot(guest: &Guest, link: Option<watch::Receiver<Link>>, deadline: TokioInstant) -> Readiness {
    if let Some(mut link) = link {
        // Dialling before the channel is up would only wait in its queue.
        let _ = tokio::time::timeout_at(deadline, link.wait_for(|link| *link == Link::Up)).await;
    }
    let pong = guest.wait_ready(deadline).await;
    match pong.inspect_err(|e| tracing::warn!("the guest agent does not reply: {e}")) {
        Ok(pong) => Readiness::Yes(pong),
        Err(error) if error.may_pass() => Readiness::Late,
        Err(error) => Readiness::Refused(error),
    }
}

impl Supervisor {
    /// Waits for the guest's first reply, on a task of its own.
    pub(super) fn watch_for_agent(&self, running: &RunningQemu) -> oneshot::Receiver<Readiness> {
        self.watch_for_agent_within(self.lifecycle.ready_within(), running)
    }

    pub(super) fn watch_for_agent_within(
        &self,
        within: Duration,
        running: &RunningQemu,
    ) -> oneshot::Receiver<Readiness> {
        let (done, awake) = oneshot::channel();
        let deadline = TokioInstant::now() + within;
        let link = self.channel.as_ref().map(|channel| channel.link());
        let guest = self.guest.clone();
        let door = self.channel.clone();
        // No client uses a clone before it is claimed.
        let opens = self.lifecycle.role().opens_to_clients();
        let saved = self.row.identity_reset_token().filter(|_| !self.lifecycle.is_ready());
        let identity_reset = saved.map(|token| (nido_api::hex::decode(token), self.identity_reset()));
        let held = (identity_reset.is_some() && has_link_to_hold(&self.row, &self.machine))
            .then(|| running.monitor().cloned().ok())
            .flatten();
        let setup = opens.then(|| GuestSetup {
            certificate: self.certificate.clone(),
            process_limit: self.row.spec.max_processes,
            was_ready: self.lifecycle.is_ready(),
        });
        tokio::spawn(async move {
            let mut answer = match identity_reset {
                Some((token, identity_reset)) => {
                    let tokens = [token, guest.token().to_vec()];
                    let agent_route = AgentRoute { guest: guest.clone(), channel: door.clone() };
                    let mut answer = reset_identity(&agent_route, &tokens, identity_reset, deadline).await;
                    if let (Readiness::Yes(_), Some(monitor)) = (&answer, held)
                        && let Err(error) = switch_link(&monitor, true).await
                    {
                        answer = Readiness::NotRenewed(error.to_string());
                    }
                    door.iter().for_each(|channel| channel.end_bootstrap());
                    answer
                }
                None => {
                    door.iter().for_each(|door| door.open(true));
                    wait_for_boot(&guest, link, deadline).await
                }
            };
            if let (Readiness::Yes(_), Some(setup)) = (&answer, setup) {
                let route = AgentRoute { guest: guest.clone(), channel: door.clone() };
                answer = setup.install(&route, deadline).await.unwrap_or(answer);
            }
            if !opens && matches!(answer, Readiness::Yes(_)) {
                warm(&AgentRoute { guest: guest.clone(), channel: door.clone() }, deadline).await;
            }
            if opens && matches!(answer, Readiness::Yes(_)) {
                door.iter().for_each(|door| door.open(true));
            }
            let _ = done.send(answer);
        });
        awake
    }

    /// What makes the guest a machine of its own; the random bytes and the time are put in when it is sent.
    fn identity_reset(&self) -> IdentityReset {
        IdentityReset {
            token: self.guest.token().to_vec().into(),
            entropy: Vec::new().into(),
            time_ns: 0,
            hostname: self.row.spec.name.to_string(),
            identity: self.row.id.clone(),
            network: crate::context::guest_network(self.row.spec.net),
            disk_grown: self.row.parts.frozen.last().is_some_and(|frozen| frozen.virtual_bytes < self.row.disk_bytes),
        }
    }
}
