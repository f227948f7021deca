//! The guest's clock: set after everything that paused the guest or suspended the host.
//!
//! Invariant: a guest whose agent cannot set it is left as it is; nothing waits for the clock.

use std::time::Duration;

use nido_engine::guest::{GuestError, Session};
use tokio::time::Instant;

use super::readiness::AgentRoute;

/// How long the guest may take.
const CLOCK_SET_TIMEOUT: Duration = Duration::from_secs(30);

/// Sets the guest's clock to the host's.
pub(super) async fn set_clock(agent_route: AgentRoute) {
    let deadline = Instant::now() + CLOCK_SET_TIMEOUT;
    let set = async {
        let mut session =
            Session::open(agent_route.stream(deadline).await?, agent_route.guest.token(), deadline).await?;
        let now = i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX);
        session.set_clock(now, deadline).await
    };
    match set.await {
        Ok(()) => {}
        // An agent of an older template does not know the request, and closes the session.
        Err(GuestError::Guest(failed)) => tracing::info!("the guest's clock was not set: {:?}", failed.fault),
        Err(error) => tracing::warn!("the guest's clock was not set: {error}"),
    }
}
