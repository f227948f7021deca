//! The guest's first reply: reaching the agent, the identity reset of a guest that was loaded, the first command of a clone.

use std::sync::Arc;

use nido_engine::guest::{AgentAddress, Channel, Guest, GuestError, Session, Stream, connect};
use nido_files::random;
use nido_guest_agent::wire::{ENTROPY_LEN, Exec, IdentityReset, Pong};
use tokio::time::Instant as TokioInstant;

/// How long a clone's first command may take, in milliseconds.
const WARM_WITHIN_MS: u64 = 10_000;

/// The guest agent's first reply, or why there is none.
pub(super) enum Readiness {
    /// It is there.
    Yes(Pong),
    /// It did not answer in time.
    Late,
    /// It is there, and there can be no session with it.
    Refused(GuestError),
    /// It could not be made a machine of its own.
    NotRenewed(String),
}

/// How the supervisor itself reaches the agent.
pub(super) struct AgentRoute {
    pub guest: Guest,
    pub channel: Option<Arc<Channel>>,
}

impl AgentRoute {
    pub(super) async fn stream(&self, deadline: TokioInstant) -> Result<Stream, GuestError> {
        match (&self.channel, self.guest.endpoint()) {
            (Some(channel), _) => channel.stream(deadline).await,
            (None, endpoint @ (AgentAddress::Vsock { .. } | AgentAddress::Serial { .. })) => {
                connect(endpoint, deadline).await
            }
        }
    }
}

/// Resets the guest's identity. Tries each token: a supervisor that was killed may have replaced the first one.
pub(super) async fn reset_identity(
    agent_route: &AgentRoute,
    tokens: &[Vec<u8>],
    identity_reset: IdentityReset,
    deadline: TokioInstant,
) -> Readiness {
    let mut refused = None;
    for token in tokens {
        match reset_identity_once(agent_route, token, identity_reset.clone(), deadline).await {
            Ok(pong) => return Readiness::Yes(pong),
            Err(GuestError::TokenRefused) => {
                refused = Some(Readiness::NotRenewed(GuestError::TokenRefused.to_string()));
            }
            Err(GuestError::Timeout { .. } | GuestError::Unreachable(_)) => return Readiness::Late,
            Err(error @ GuestError::VersionMismatch { .. }) => return Readiness::Refused(error),
            Err(error) => return Readiness::NotRenewed(error.to_string()),
        }
    }
    refused.unwrap_or(Readiness::Late)
}

async fn reset_identity_once(
    agent_route: &AgentRoute,
    token: &[u8],
    mut identity_reset: IdentityReset,
    deadline: TokioInstant,
) -> Result<Pong, GuestError> {
    let entropy = random::bytes::<ENTROPY_LEN>().map_err(|e| GuestError::Unreachable(e.to_string()))?;
    identity_reset.entropy = entropy.to_vec().into();
    identity_reset.time_ns = i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX);
    if let Some(channel) = &agent_route.channel
        && let Some(answer) = Session::reset_identity_by_bootstrap(channel, token, &identity_reset, deadline).await
    {
        return answer;
    }
    Session::reset(agent_route.stream(deadline).await?, token, identity_reset, deadline).await
}

/// Has the guest run a command that does nothing. Under emulation what runs for the first time after a load is slow:
/// the command that claims the clone must not wait for that. A failure is ignored.
pub(super) async fn warm(agent_route: &AgentRoute, deadline: TokioInstant) {
    let work = async {
        let session = Session::open(agent_route.stream(deadline).await?, agent_route.guest.token(), deadline).await?;
        let argv = ["sh", "-c", "true"].map(|word| word.as_bytes().to_vec().into()).to_vec();
        let request = Exec { argv, timeout_ms: Some(WARM_WITHIN_MS), ..Exec::default() };
        let mut running = session.exec(request, deadline).await?;
        while running.events.next().await?.is_some() {}
        // The agent replies when it has prepared what the next command needs: a clone is paused when it is idle.
        if let Some(mut session) = running.events.finish() {
            session.ping(deadline).await?;
        }
        Ok::<_, GuestError>(())
    };
    if let Err(error) = work.await {
        tracing::warn!("the clone's first command failed: {error}");
    }
}
