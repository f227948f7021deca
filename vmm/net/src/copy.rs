//! Copies between the guest and the host until a connection ends.
//!
//! Invariants: the end of one direction leaves the other open; a reset on one side becomes a reset on the other; nothing of the
//! guest's passes its gate unchecked.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use nido_api::egress::DenialReason;
use smoltcp::socket::tcp::State;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::gate::{Admission, Gate};
use crate::intercept::Interception;
use crate::peek::HELLO_MAX;
use crate::resources::Reservation;
use crate::shared::Shared;
use crate::stack::Stack;
use crate::tasks::{FlowKey, Packets};

/// How many packets of the guest's are taken between two looks at the host's side.
const PACKET_BURST: usize = 32;
/// How many bytes wait for the gate.
const PENDING_MAX: usize = HELLO_MAX;
/// The buffer between a connection and the task that adds credentials, in bytes.
const INTERCEPTION_BUFFER: usize = 32 << 10;
/// How long the guest may take to send what the gate checks, once it has begun.
const GATE_TIMEOUT: Duration = Duration::from_secs(10);

/// The host's end of a connection.
#[derive(Debug)]
pub enum HostEnd {
    /// A connection of the host.
    Tcp(TcpStream),
    /// A task of the engine.
    Task(DuplexStream),
}

impl HostEnd {
    /// Ends it with a reset.
    fn reset(self) {
        if let Self::Tcp(stream) = self {
            let _ = rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
        }
    }

    fn poll_read(&mut self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Task(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }

    fn poll_write(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Task(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_shutdown(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Task(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// Accepts a connection whose first packet this is, and copies until it ends.
pub async fn copy(shared: &Rc<Shared>, key: FlowKey, syn: Vec<u8>, packets: Packets, host: HostEnd, gate: Gate) {
    let mut stack = Stack::new(key.remote);
    stack.receive(syn);
    let mut copy = Copy {
        shared,
        key,
        stack,
        host,
        packets,
        gate,
        pending: Vec::new(),
        admitted: 0,
        pending_since: None,
        timer: Box::pin(sleep_until(Instant::now())),
        memory: shared.memory.reserve(),
        sent: false,
        received: false,
    };
    let end = copy.run().await;
    match end {
        End::Closed => return,
        End::GuestReset => {}
        End::HostReset | End::Revoked => copy.reset_guest().await,
        End::OutOfMemory => {
            shared.deny_connection(key.remote, DenialReason::ConnectionLimit, None);
            copy.reset_guest().await;
        }
        End::OverByteLimit => {
            shared.deny_connection(key.remote, DenialReason::ByteLimit, None);
            copy.reset_guest().await;
        }
        End::Refused(reason, name) => {
            shared.deny_connection(key.remote, reason, name);
            copy.reset_guest().await;
        }
    }
    copy.host.reset();
}

/// Why copying ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    /// Both directions ended.
    Closed,
    /// The guest's end was reset.
    GuestReset,
    /// The host's end was reset.
    HostReset,
    /// All connections together hold too much.
    OutOfMemory,
    /// A limit of bytes is reached.
    OverByteLimit,
    /// The rules no longer allow it.
    Revoked,
    /// Its first bytes are not what the rules allow.
    Refused(DenialReason, Option<String>),
}

struct Copy<'a> {
    shared: &'a Rc<Shared>,
    key: FlowKey,
    stack: Stack,
    host: HostEnd,
    packets: Packets,
    gate: Gate,
    /// What the guest has sent and the host has not got, while there is a gate.
    pending: Vec<u8>,
    /// How much of it may pass.
    admitted: usize,
    /// Since when the gate waits for more.
    pending_since: Option<Instant>,
    timer: Pin<Box<Sleep>>,
    memory: Reservation<'a>,
    /// The host has sent everything.
    sent: bool,
    /// The host has got everything.
    received: bool,
}

impl Copy<'_> {
    async fn run(&mut self) -> End {
        loop {
            self.stack.poll();
            for frame in self.stack.take_frames() {
                self.shared.port.send(&frame).await;
            }
            if let Some(end) = self.end() {
                return end;
            }
            if !self.memory.resize(self.stack.queued()) {
                return End::OutOfMemory;
            }
            let deadline = self.pending_since.map(|since| since + GATE_TIMEOUT);
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return End::Refused(DenialReason::SniMissing, None);
            }
            let wake = self.stack.poll_at().map(Instant::from_std).into_iter().chain(deadline).min();
            if let Some(wake) = wake {
                self.timer.as_mut().reset(wake);
            }
            if let Err(end) = poll_fn(|context| self.advance(context, wake)).await {
                return end;
            }
        }
    }

    /// How the connection ended, if it did.
    fn end(&self) -> Option<End> {
        match self.stack.state() {
            // A connection that was reset before it was accepted waits for another.
            State::Listen => Some(End::GuestReset),
            State::Closed if self.sent && self.received => Some(End::Closed),
            State::Closed if !self.stack.can_receive() => Some(End::GuestReset),
            State::TimeWait if self.received => Some(End::Closed),
            _ => None,
        }
    }

    /// Moves what can be moved; ready when something was, or time is over.
    fn advance(&mut self, context: &mut Context<'_>, wake: Option<Instant>) -> Poll<Result<(), End>> {
        let mut moved = self.take_packets(context)?;
        moved |= if self.gate.is_open() && self.pending.is_empty() {
            self.send(context)?
        } else {
            self.send_admitted(context)?
        };
        moved |= self.end_of_guest(context);
        moved |= self.receive(context)?;
        if moved || wake.is_some() && self.timer.as_mut().poll(context).is_ready() {
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    }

    fn take_packets(&mut self, context: &mut Context<'_>) -> Result<bool, End> {
        let mut taken = 0;
        while taken < PACKET_BURST {
            match self.packets.poll_next(context) {
                Poll::Ready(Some(packet)) => self.stack.receive(packet),
                Poll::Ready(None) => return Err(End::Revoked),
                Poll::Pending => break,
            }
            taken += 1;
        }
        Ok(taken > 0)
    }

    /// Passes on what the guest has sent.
    fn send(&mut self, context: &mut Context<'_>) -> Result<bool, End> {
        let mut moved = false;
        while self.stack.can_receive() {
            let left = self.sent_left()?;
            let host = &mut self.host;
            let written = self.stack.take(|bytes| match host.poll_write(context, &bytes[..bytes.len().min(left)]) {
                Poll::Ready(Ok(count)) => (count, Poll::Ready(Ok(count))),
                other => (0, other),
            });
            match written.map_err(|_| End::GuestReset)? {
                Poll::Ready(Ok(count)) => self.shared.count_sent(count),
                Poll::Ready(Err(_)) => return Err(End::HostReset),
                Poll::Pending => return Ok(moved),
            }
            moved = true;
        }
        Ok(moved)
    }

    /// How many bytes more the guest may send.
    fn sent_left(&self) -> Result<usize, End> {
        match self.shared.traffic.sent_left() {
            0 => Err(End::OverByteLimit),
            left => Ok(left),
        }
    }

    /// Passes on what the guest has sent, as far as the gate admits it.
    fn send_admitted(&mut self, context: &mut Context<'_>) -> Result<bool, End> {
        let mut moved = false;
        loop {
            while self.admitted > 0 {
                let length = self.admitted.min(self.sent_left()?);
                match self.host.poll_write(context, &self.pending[..length]) {
                    Poll::Ready(Ok(count)) => {
                        self.pending.drain(..count);
                        self.admitted -= count;
                        self.shared.count_sent(count);
                    }
                    Poll::Ready(Err(_)) => return Err(End::HostReset),
                    Poll::Pending => return Ok(moved),
                }
                moved = true;
            }
            if self.gate.is_open() {
                return Ok(moved);
            }
            let room = PENDING_MAX - self.pending.len();
            let pending = &mut self.pending;
            if room > 0 && self.stack.can_receive() {
                let take = |bytes: &mut [u8]| {
                    let count = bytes.len().min(room);
                    pending.extend(&bytes[..count]);
                    (count, ())
                };
                self.stack.take(take).map_err(|_| End::GuestReset)?;
                moved = true;
                if self.stack.can_receive() && self.pending.len() < PENDING_MAX {
                    continue;
                }
            }
            let (shared, remote) = (self.shared, self.key.remote);
            match self.gate.admit(&self.pending, |name| shared.is_allowed(remote, name)) {
                Admission::Pass(count) => (self.admitted, self.pending_since) = (count, None),
                Admission::Named(name) => {
                    self.intercept(&name)?;
                    (self.admitted, self.pending_since) = (self.pending.len(), None);
                }
                Admission::Refused(reason, name) => return Err(End::Refused(reason, name)),
                Admission::NeedMore => {
                    if !self.pending.is_empty() {
                        self.pending_since.get_or_insert_with(Instant::now);
                    }
                    return Ok(moved);
                }
            }
        }
    }

    /// Puts the task that adds credentials between the guest and the host, if requests to this name get any.
    fn intercept(&mut self, name: &str) -> Result<(), End> {
        let known = self.shared.credentials.clone().filter(|known| known.has_host(name));
        let Some(credentials) = known else { return Ok(()) };
        let Some(slot) = credentials.slot() else {
            return Err(End::Refused(DenialReason::ConnectionLimit, Some(name.to_owned())));
        };
        let (ours, theirs) = tokio::io::duplex(INTERCEPTION_BUFFER);
        if let HostEnd::Tcp(stream) = std::mem::replace(&mut self.host, HostEnd::Task(ours)) {
            let (shared, host) = (Rc::clone(self.shared), name.to_owned());
            let connection = Interception { shared, credentials, remote: self.key.remote, host };
            spawn_local(async move {
                connection.run(theirs, stream).await;
                drop(slot);
            });
        }
        Ok(())
    }

    /// Ends the direction to the host when the guest has ended it, and everything has passed.
    fn end_of_guest(&mut self, context: &mut Context<'_>) -> bool {
        let is_over = self.stack.is_received() && self.pending.is_empty() && self.stack.state() != State::Closed;
        if self.received || !is_over {
            return false;
        }
        self.received = self.host.poll_shutdown(context).is_ready();
        self.received
    }

    fn receive(&mut self, context: &mut Context<'_>) -> Result<bool, End> {
        let mut moved = false;
        while !self.sent && self.stack.can_send() && self.memory.allows(self.stack.queued()) {
            let left = match self.shared.traffic.received_left() {
                0 => return Err(End::OverByteLimit),
                left => left,
            };
            let host = &mut self.host;
            let read = self.stack.fill(|room| {
                let length = room.len().min(left);
                let mut buffer = ReadBuf::new(&mut room[..length]);
                match host.poll_read(context, &mut buffer) {
                    Poll::Ready(Ok(())) => (buffer.filled().len(), Poll::Ready(Ok(buffer.filled().len()))),
                    Poll::Ready(Err(error)) => (0, Poll::Ready(Err(error))),
                    Poll::Pending => (0, Poll::Pending),
                }
            });
            match read.map_err(|_| End::GuestReset)? {
                Poll::Ready(Ok(0)) => {
                    self.sent = true;
                    self.stack.close();
                }
                Poll::Ready(Ok(count)) => self.shared.count_received(count),
                Poll::Ready(Err(_)) => return Err(End::HostReset),
                Poll::Pending => return Ok(moved),
            }
            moved = true;
        }
        Ok(moved)
    }

    async fn reset_guest(&mut self) {
        self.stack.abort();
        self.stack.poll();
        for frame in self.stack.take_frames() {
            self.shared.port.send(&frame).await;
        }
    }
}
