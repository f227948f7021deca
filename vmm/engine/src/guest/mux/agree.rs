//! The host's part of agreeing where a session of the virtio-serial port begins (`wire::sync`).
//!
//! QEMU reads from its end only while the guest has the port open, so a PROBE sent early simply waits there. Hence a
//! further one is sent only once the earlier ones have been read, and a guest that boots finds one or two of them, not
//! seconds' worth. A guest that reads and does not reply may be stuck inside a frame of an older session: filler
//! bytes get it out.
//!
//! A machine that is about to be saved gets no GO: its agent is left waiting for one ([`PreambleEnd::Answered`]), so that each
//! machine that resumes from there agrees with its own host at once.
//!
//! A guest that has just been loaded replies at once, and has no pending output: its first request is a
//! hello and an order in one piece ([`bootstrap_request`]).
//!
//! Invariant: GO follows the ACK to a PROBE that was sent exactly once, so no second ACK can come behind it and be
//! taken for the start of the multiplexed stream.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nido_files::random;
use nido_guest_agent::wire::sync::{Block, FILLER, Kind, Scanner};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::set_socket_send_buffer_size;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep_until};

use crate::guest::error::GuestError;

/// Pause before the second PROBE, growing by half each time up to the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// After so many PROBEs that were read without a reply, filler bytes are sent.
const UNANSWERED_PROBES_MAX: u32 = 5;
/// Send buffer while a session runs, in bytes; the kernel doubles it. What lies in it delays every other stream, and
/// QEMU takes 4 KiB at a time anyway.
const SEND_BUFFER: usize = 128 * 1024;

/// How far the preamble goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PreambleEnd {
    /// The agent waits for our next message.
    Answered,
    /// The multiplexed stream begins.
    Begun,
}

/// Runs the preamble on a connection from QEMU. After [`PreambleEnd::Begun`] the next byte either way is the multiplexer's.
///
/// # Errors
/// [`GuestError::Gone`] if QEMU closed the connection, [`GuestError::Timeout`].
pub(super) async fn agree(socket: &UnixStream, until: PreambleEnd, deadline: Instant) -> Result<(), GuestError> {
    // With the smallest buffer "writable" means "what was sent before has been read".
    set_socket_send_buffer_size(socket, 1).map_err(|e| GuestError::stream(&e.into()))?;
    let mut talk = Negotiation::new()?;
    let mut pause = PAUSE.0;
    let mut tick = Instant::now() + pause;
    loop {
        tokio::select! {
            ready = socket.readable() => {
                ready.map_err(|e| GuestError::stream(&e))?;
                if talk.read(socket)? {
                    break;
                }
            }
            ready = socket.writable(), if !talk.out.is_empty() => {
                ready.map_err(|e| GuestError::stream(&e))?;
                write_some(socket, &mut talk.out)?;
            }
            () = sleep_until(tick) => {
                pause = (pause * 3 / 2).min(PAUSE.1);
                tick = Instant::now() + pause;
                if talk.out.is_empty() && was_read(socket) {
                    talk.probe_again();
                }
            }
            () = sleep_until(deadline) => return Err(GuestError::Timeout { what: "to open its channel" }),
        }
    }
    if until == PreambleEnd::Answered {
        return Ok(());
    }
    while !talk.out.is_empty() {
        let ready = tokio::time::timeout_at(deadline, socket.writable()).await;
        ready.map_err(|_| GuestError::Timeout { what: "to open its channel" })?.map_err(|e| GuestError::stream(&e))?;
        write_some(socket, &mut talk.out)?;
    }
    set_socket_send_buffer_size(socket, SEND_BUFFER).map_err(|e| GuestError::stream(&e.into()))
}

/// Sends a hello and a request in one message to an agent that waits for its host's first one, and waits for the whole reply.
/// Any number may follow one another, before [`agree`].
///
/// # Errors
/// [`GuestError::Gone`] if QEMU closed the connection, [`GuestError::Timeout`].
pub(super) async fn bootstrap_request(
    socket: &UnixStream,
    words: &[u8],
    deadline: Instant,
) -> Result<Vec<u8>, GuestError> {
    let length = u16::try_from(words.len()).map_err(|_| GuestError::breach("a bootstrap reply that is too long"))?;
    let nonce = random::bytes().map_err(|e| GuestError::Unreachable(e.to_string()))?;
    let mut out = Block { kind: Kind::Letter(length), nonce }.bytes().to_vec();
    out.extend_from_slice(words);
    let exchange = async {
        while !out.is_empty() {
            socket.writable().await.map_err(|e| GuestError::stream(&e))?;
            write_some(socket, &mut out)?;
        }
        let mut reply = Reply::new(nonce);
        loop {
            socket.readable().await.map_err(|e| GuestError::stream(&e))?;
            if let Some(words) = reply.read(socket)? {
                return Ok(words);
            }
        }
    };
    tokio::time::timeout_at(deadline, exchange)
        .await
        .unwrap_or(Err(GuestError::Timeout { what: "to reply to a bootstrap request" }))
}

/// What has arrived of a reply to a bootstrap request. Holds no more than the longest one.
struct Reply {
    nonce: [u8; 16],
    scanner: Scanner,
    length: Option<usize>,
    words: Vec<u8>,
}

impl Reply {
    fn new(nonce: [u8; 16]) -> Self {
        Self { nonce, scanner: Scanner::default(), length: None, words: Vec::new() }
    }

    /// Reads what is there; gives the reply once it is whole. Earlier bytes belong to an older session.
    fn read(&mut self, socket: &UnixStream) -> Result<Option<Vec<u8>>, GuestError> {
        for &byte in &read_some(socket)? {
            if self.length.is_some() {
                self.words.push(byte);
            } else if let Some(Block { kind: Kind::Reply(length), nonce }) = self.scanner.push(byte)
                && nonce == self.nonce
            {
                self.length = Some(length.into());
            }
            if self.length == Some(self.words.len()) {
                return Ok(Some(std::mem::take(&mut self.words)));
            }
        }
        Ok(None)
    }
}

/// Reads what is there; empty if nothing is.
fn read_some(socket: &UnixStream) -> Result<Vec<u8>, GuestError> {
    let mut bytes = vec![0; 4096];
    match socket.try_read(&mut bytes) {
        Ok(0) => Err(GuestError::Gone),
        Ok(count) => {
            bytes.truncate(count);
            Ok(bytes)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Vec::new()),
        Err(error) => Err(GuestError::stream(&error)),
    }
}

/// Writes what fits of `out`, and takes it off its front.
fn write_some(socket: &UnixStream, out: &mut Vec<u8>) -> Result<(), GuestError> {
    match socket.try_write(out) {
        Ok(count) => drop(out.drain(..count)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(error) => return Err(GuestError::stream(&error)),
    }
    Ok(())
}

/// Whether the other side has read what was sent so far, with [`agree`]'s small send buffer.
fn was_read(socket: &UnixStream) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::OUT)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|count| count > 0)
}

/// The messages so far.
struct Negotiation {
    nonce: [u8; 16],
    /// How often the nonce was sent.
    sent: u32,
    unanswered: u32,
    scanner: Scanner,
    out: Vec<u8>,
}

impl Negotiation {
    fn new() -> Result<Self, GuestError> {
        let mut talk = Self { nonce: [0; 16], sent: 0, unanswered: 0, scanner: Scanner::default(), out: Vec::new() };
        talk.begin()?;
        Ok(talk)
    }

    /// Starts over with a nonce that was never sent.
    fn begin(&mut self) -> Result<(), GuestError> {
        self.nonce = random::bytes().map_err(|e| GuestError::Unreachable(e.to_string()))?;
        (self.sent, self.unanswered) = (0, 0);
        self.probe();
        Ok(())
    }

    fn probe(&mut self) {
        self.out.extend_from_slice(&Block { kind: Kind::Probe, nonce: self.nonce }.bytes());
        self.sent += 1;
    }

    fn probe_again(&mut self) {
        self.unanswered += 1;
        if self.unanswered.is_multiple_of(UNANSWERED_PROBES_MAX) {
            self.out.resize(FILLER, 0xff);
        }
        self.probe();
    }

    /// Reads what is there; true once GO is due and queued.
    fn read(&mut self, socket: &UnixStream) -> Result<bool, GuestError> {
        for &byte in &read_some(socket)? {
            let Some(block) = self.scanner.push(byte) else { continue };
            if (block != Block { kind: Kind::Ack, nonce: self.nonce }) {
                continue;
            }
            if self.sent == 1 {
                self.out.clear();
                self.out.extend_from_slice(&Block { kind: Kind::Go, nonce: self.nonce }.bytes());
                return Ok(true);
            }
            self.begin()?;
        }
        Ok(false)
    }
}
