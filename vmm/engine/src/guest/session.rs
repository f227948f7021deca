//! One session with a guest agent: the greeting, and requests one after another.
//!
//! ```text
//!  Stream -- hello (version, token, nonce) [+ first request] ->
//!         <- welcome (version, nonce) | refused --
//!         -- request ->  <- replies --   ... again and again; closing cancels
//! ```
//!
//! Invariant: nothing is taken for a reply before a welcome has repeated this session's own nonce, and a frame leaves
//! complete even if its sender stopped waiting.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use nido_files::random;
use nido_guest_agent::wire::{self, Head, Hello, IdentityReset, Pong, Power, Refusal, Refused, ToGuest, ToHost};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::channel::Channel;
use super::deadline::in_time;
use super::error::GuestError;
use super::frames::{Frame, FrameBuffer};
use super::transport::Stream;

/// Longest version text of an agent's that is kept, in bytes.
const MAX_AGENT_TEXT: usize = 128;
/// How long the sending of a small message may take: the agent always reads.
pub const SEND_LIMIT: Duration = Duration::from_secs(10);

/// An open session. Dropping it closes it, which cancels whatever runs in it.
#[derive(Debug)]
pub struct Session {
    pub(crate) link: Arc<Link>,
    pub(crate) frames: FrameBuffer,
    agent: String,
}

impl Session {
    /// Opens a session on a fresh stream.
    ///
    /// # Errors
    /// [`GuestError::Timeout`], [`GuestError::VersionMismatch`], [`GuestError::TokenRefused`], [`GuestError::Busy`],
    /// [`GuestError::Gone`], [`GuestError::Protocol`].
    pub async fn open(stream: Stream, token: &[u8], deadline: Instant) -> Result<Self, GuestError> {
        Self::open_with(stream, token, None, deadline).await
    }

    /// Opens a session and sends its first request along with the hello, which saves a round trip.
    pub async fn open_with(
        stream: Stream,
        token: &[u8],
        first: Option<&ToGuest>,
        deadline: Instant,
    ) -> Result<Self, GuestError> {
        let mut frames = FrameBuffer::default();
        let Greeting { agent, .. } = greet(&stream, &mut frames, token, first, deadline).await?;
        Ok(Self { link: Arc::new(Link { stream, outbox: Mutex::default() }), frames, agent })
    }

    /// The agent's own version, for people. The guest's text: escape it before showing it.
    #[must_use]
    pub fn agent(&self) -> &str {
        &self.agent
    }

    /// Sends a ping.
    ///
    /// # Errors
    /// As for any request: [`GuestError::Timeout`], [`GuestError::Gone`], [`GuestError::Protocol`],
    /// [`GuestError::Guest`].
    pub async fn ping(&mut self, deadline: Instant) -> Result<Pong, GuestError> {
        self.link.send(&ToGuest::Ping).await?;
        self.pong(deadline).await
    }

    pub(crate) async fn pong(&mut self, deadline: Instant) -> Result<Pong, GuestError> {
        match self.answer(deadline, "to reply to a ping").await? {
            ToHost::Pong(pong) => Ok(checked(pong)),
            other => Err(unexpected(other)),
        }
    }

    /// Has the guest go down in an orderly way; returns once it confirms.
    ///
    /// # Errors
    /// As for [`Self::ping`].
    pub async fn power(&mut self, power: Power, deadline: Instant) -> Result<(), GuestError> {
        self.link.send(&ToGuest::Power(power)).await?;
        self.powering_off(deadline).await
    }

    pub(crate) async fn powering_off(&mut self, deadline: Instant) -> Result<(), GuestError> {
        match self.answer(deadline, "to begin its power-off").await? {
            ToHost::PoweringOff => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Has the guest hold its root file system still.
    ///
    /// # Errors
    /// As for [`Self::ping`].
    pub async fn freeze(&mut self, deadline: Instant) -> Result<(), GuestError> {
        self.link.send(&ToGuest::Freeze).await?;
        match self.answer(deadline, "to freeze its file systems").await? {
            ToHost::Frozen => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Unfreezes the root file system.
    ///
    /// # Errors
    /// As for [`Self::ping`].
    pub async fn thaw(&mut self, deadline: Instant) -> Result<(), GuestError> {
        self.link.send(&ToGuest::Thaw).await?;
        match self.answer(deadline, "to unfreeze its file systems").await? {
            ToHost::Thawed => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Has the guest set its clock.
    ///
    /// # Errors
    /// As for [`Self::ping`]; [`GuestError::Guest`] or [`GuestError::Gone`] from an agent without this request.
    pub async fn set_clock(&mut self, time_ns: i64, deadline: Instant) -> Result<(), GuestError> {
        self.link.send(&ToGuest::SetClock(time_ns)).await?;
        match self.answer(deadline, "to set its clock").await? {
            ToHost::ClockSet => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Has the guest limit the processes of all commands together; how many it has refused since it got its identity.
    ///
    /// # Errors
    /// As for [`Self::ping`]; [`GuestError::Guest`] or [`GuestError::Gone`] from an agent without this request.
    pub async fn limit_processes(&mut self, limit: u32, deadline: Instant) -> Result<u64, GuestError> {
        self.link.send(&ToGuest::LimitProcesses(limit)).await?;
        match self.answer(deadline, "to limit its processes").await? {
            ToHost::ProcessesRefused(refused) => Ok(refused),
            other => Err(unexpected(other)),
        }
    }

    /// Resets the identity of a loaded guest, over a fresh stream. `token` is the one it was saved with.
    ///
    /// # Errors
    /// Those of [`Self::open`], and [`GuestError::Guest`] if a step failed: then the guest must not be used.
    pub async fn reset(
        stream: Stream,
        token: &[u8],
        reset: IdentityReset,
        deadline: Instant,
    ) -> Result<Pong, GuestError> {
        let mut session = Self::open_with(stream, token, Some(&ToGuest::ResetIdentity(reset)), deadline).await?;
        reset_reply(session.answer(deadline, "to reset its identity").await?)
    }

    /// Does the same with a bootstrap request; `None` if the multiplexer has started.
    ///
    /// # Errors
    /// As for [`Self::reset`].
    pub async fn reset_identity_by_bootstrap(
        channel: &Channel,
        token: &[u8],
        reset: &IdentityReset,
        deadline: Instant,
    ) -> Option<Result<Pong, GuestError>> {
        let (nonce, words) = match opening(token, Some(&ToGuest::ResetIdentity(reset.clone()))) {
            Ok(opening) => opening,
            Err(error) => return Some(Err(error)),
        };
        let answer = channel.bootstrap_request(words, deadline).await?;
        Some(answer.and_then(|words| {
            let (welcome, rest) = wire::decode_first(&words)?;
            welcomed(welcome, nonce)?;
            reset_reply(wire::decode_first(rest)?.0)
        }))
    }

    /// The next message, where no raw frame is allowed.
    pub async fn answer(&mut self, deadline: Instant, what: &'static str) -> Result<ToHost, GuestError> {
        let frame = next_frame(&self.link.stream, &mut self.frames);
        Ok(in_time(frame, deadline, what).await?.must_be_message()?)
    }
}

/// Runs the greeting.
pub async fn greet(
    stream: &Stream,
    frames: &mut FrameBuffer,
    token: &[u8],
    first: Option<&ToGuest>,
    deadline: Instant,
) -> Result<Greeting, GuestError> {
    let (nonce, bytes) = opening(token, first)?;
    let exchange = async {
        // A refusal may come, and the stream end, while the request is still on its way: so read in any case.
        let sent = write_all(stream, &bytes).await;
        match next_frame(stream, frames).await?.must_be_message()? {
            // A peer that rejects the hello need not read the rest.
            refused @ ToHost::Refused(_) => Ok(refused),
            answer => sent.map(|()| answer),
        }
    };
    welcomed(in_time(exchange, deadline, "to reply to the greeting").await?, nonce)
}

/// What opens a session, with its nonce.
fn opening(token: &[u8], first: Option<&ToGuest>) -> Result<(u64, Vec<u8>), GuestError> {
    let nonce = random::bytes().map_err(|e| GuestError::Unreachable(e.to_string()))?;
    let nonce = u64::from_le_bytes(nonce);
    let hello = Hello { oldest: wire::VERSION_OLDEST, newest: wire::VERSION, token: token.to_vec().into(), nonce };
    let mut bytes = GuestError::encode(&ToGuest::Hello(hello))?;
    if let Some(first) = first {
        bytes.extend_from_slice(&GuestError::encode(first)?);
    }
    Ok((nonce, bytes))
}

/// The agent's description of itself in its welcome.
#[derive(Debug)]
pub struct Greeting {
    /// Its own version, for people.
    pub agent: String,
    /// What it understands: bits of [`wire::feature`].
    pub features: u32,
}

/// Whether the reply to a hello opens the session.
fn welcomed(answer: ToHost, nonce: u64) -> Result<Greeting, GuestError> {
    match answer {
        ToHost::Welcome(welcome) if welcome.nonce != nonce => Err(GuestError::breach("a welcome for another hello")),
        ToHost::Welcome(welcome) if !(wire::VERSION_OLDEST..=wire::VERSION).contains(&welcome.version) => {
            Err(GuestError::VersionMismatch { host: wire::VERSION, guest: welcome.version })
        }
        ToHost::Welcome(mut welcome) => {
            welcome.agent.truncate(welcome.agent.floor_char_boundary(MAX_AGENT_TEXT));
            Ok(Greeting { agent: welcome.agent, features: welcome.features.unwrap_or_default() })
        }
        ToHost::Refused(refused) => Err(refusal(&refused)),
        other => Err(unexpected(other)),
    }
}

fn reset_reply(answer: ToHost) -> Result<Pong, GuestError> {
    match answer {
        ToHost::IdentityReset(pong) => Ok(checked(pong)),
        other => Err(unexpected(other)),
    }
}

/// A reply to a ping without impossible values.
fn checked(mut pong: Pong) -> Pong {
    pong.agent.truncate(pong.agent.floor_char_boundary(MAX_AGENT_TEXT));
    pong.address = pong.address.filter(|text| text.parse::<IpAddr>().is_ok());
    pong
}

fn refusal(refused: &Refused) -> GuestError {
    match refused.reason {
        Refusal::Version => GuestError::VersionMismatch { host: wire::VERSION, guest: refused.newest },
        Refusal::Token => GuestError::TokenRefused,
        Refusal::Busy => GuestError::Busy,
        Refusal::NoHello => GuestError::breach("it did not recognize the hello"),
    }
}

/// What a message is that does not belong here: a failure, or a breach of the protocol.
pub fn unexpected(message: ToHost) -> GuestError {
    match message {
        ToHost::Failed(failed) => GuestError::failed(failed),
        ToHost::Refused(refused) => refusal(&refused),
        _ => GuestError::breach("a reply that does not belong to the request"),
    }
}

/// Reads until a whole frame is there. Dropping the future loses nothing.
pub async fn next_frame<'a>(stream: &Stream, frames: &'a mut FrameBuffer) -> Result<Frame<'a>, GuestError> {
    while !frames.is_whole()? {
        match stream.read(frames.spare()).await {
            Ok(0) => return Err(GuestError::Gone),
            Ok(count) => frames.filled(count),
            Err(error) => return Err(GuestError::stream(&error)),
        }
    }
    Ok(frames.pop())
}

async fn write_all(stream: &Stream, mut bytes: &[u8]) -> Result<(), GuestError> {
    while !bytes.is_empty() {
        let count = stream.write(bytes).await.map_err(|e| GuestError::stream(&e))?;
        bytes = &bytes[count..];
    }
    Ok(())
}

/// The sending side of a session, shared by everyone who may send.
#[derive(Debug)]
pub struct Link {
    pub stream: Stream,
    outbox: Mutex<Outbox>,
}

/// The frame that is on its way.
#[derive(Debug, Default)]
struct Outbox {
    frame: Vec<u8>,
    sent: usize,
}

impl Link {
    /// Sends one message.
    pub async fn send(&self, message: &ToGuest) -> Result<(), GuestError> {
        let frame = GuestError::encode(message)?;
        let sending = self.send_frame(|outbox| *outbox = frame);
        in_time(sending, Instant::now() + SEND_LIMIT, "to take a message").await
    }

    /// Sends one frame of raw bytes. Waits as long as the agent does not read.
    pub async fn send_raw(&self, kind: u8, payload: &[u8]) -> Result<(), GuestError> {
        self.send_frame(|outbox| {
            outbox.extend_from_slice(&Head { kind, length: payload.len() }.bytes());
            outbox.extend_from_slice(payload);
        })
        .await
    }

    /// Once `fill` has run, the frame will leave whole: if this future is dropped, the next sender finishes it first.
    async fn send_frame(&self, fill: impl FnOnce(&mut Vec<u8>)) -> Result<(), GuestError> {
        let mut outbox = self.outbox.lock().await;
        self.flush(&mut outbox).await?;
        (outbox.sent, _) = (0, outbox.frame.clear());
        fill(&mut outbox.frame);
        self.flush(&mut outbox).await
    }

    async fn flush(&self, outbox: &mut Outbox) -> Result<(), GuestError> {
        while outbox.sent < outbox.frame.len() {
            let sent = self.stream.write(&outbox.frame[outbox.sent..]).await;
            outbox.sent += sent.map_err(|e| GuestError::stream(&e))?;
        }
        Ok(())
    }
}
