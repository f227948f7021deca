//! One VM's guest agent as the rest of nido sees it: where it is, its token, and one method per thing it can do.
//!
//! Each call opens its own connection and session, so calls never wait for each other; the hello and the request
//! travel together.
//!
//! Invariant: dropping the future of a call, or what it returned, cancels the work in the guest.

use std::fmt;
use std::time::Duration;

use nido_guest_agent::wire::{Pong, Power, ToGuest};
use tokio::time::Instant;

use super::error::GuestError;
use super::session::Session;
use super::transport::{AgentAddress, Stream, connect};

/// How long the first ping may take, while a guest starts; each further one twice as long.
const FIRST_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);

/// A VM's guest agent.
#[derive(Clone, PartialEq, Eq)]
pub struct Guest {
    endpoint: AgentAddress,
    token: Vec<u8>,
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Guest {
    /// The agent behind `endpoint`, with the VM's token ([`TOKEN_LEN`](nido_guest_agent::wire::TOKEN_LEN) bytes).
    #[must_use]
    pub fn new(endpoint: AgentAddress, token: Vec<u8>) -> Self {
        Self { endpoint, token }
    }

    /// Where it is.
    #[must_use]
    pub fn endpoint(&self) -> &AgentAddress {
        &self.endpoint
    }

    /// Opens a session, for several requests one after another.
    ///
    /// # Errors
    /// [`GuestError::Unreachable`] and the errors of [`Session::open`].
    pub async fn session(&self, deadline: Instant) -> Result<Session, GuestError> {
        Session::open(self.dial(deadline).await?, &self.token, deadline).await
    }

    /// Sends one ping.
    ///
    /// # Errors
    /// Those of [`Self::session`] and [`Session::ping`].
    pub async fn ping(&self, deadline: Instant) -> Result<Pong, GuestError> {
        self.begin(&ToGuest::Ping, deadline).await?.pong(deadline).await
    }

    /// Waits for the first reply of a guest that is starting. A connection that stays silent is given up and
    /// another one made.
    ///
    /// # Errors
    /// The last error when the deadline passes; at once one that trying again cannot cure.
    pub async fn wait_ready(&self, deadline: Instant) -> Result<Pong, GuestError> {
        let mut limit = FIRST_ATTEMPT_TIMEOUT;
        loop {
            match self.ping(deadline.min(Instant::now() + limit)).await {
                Err(error) if error.may_pass() && Instant::now() < deadline => {
                    tracing::debug!("the guest agent does not reply yet: {error}");
                    let pause = Duration::from_millis(5).min(deadline.saturating_duration_since(Instant::now()));
                    tokio::time::sleep(pause).await;
                }
                outcome => return outcome,
            }
            limit *= 2;
        }
    }

    /// Has the guest go down in an orderly way; returns once it confirms.
    ///
    /// # Errors
    /// Those of [`Self::session`] and [`Session::power`].
    pub async fn power(&self, power: Power, deadline: Instant) -> Result<(), GuestError> {
        self.begin(&ToGuest::Power(power), deadline).await?.powering_off(deadline).await
    }

    /// Opens a session whose first request has been sent.
    pub async fn begin(&self, request: &ToGuest, deadline: Instant) -> Result<Session, GuestError> {
        Session::open_with(self.dial(deadline).await?, &self.token, Some(request), deadline).await
    }

    /// The token that its agent accepts.
    #[must_use]
    pub fn token(&self) -> &[u8] {
        &self.token
    }

    pub(crate) async fn dial(&self, deadline: Instant) -> Result<Stream, GuestError> {
        connect(&self.endpoint, deadline).await
    }
}
