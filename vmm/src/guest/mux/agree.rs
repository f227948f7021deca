//! The host's part of agreeing where a session of the virtio-serial port begins (`wire::sync`).
//!
//! QEMU reads from its end only while the guest has the port open, so a PROBE sent early simply waits there. Hence a
//! further one is sent only once the earlier ones have been read, and a guest that boots finds one or two of them, not
//! seconds' worth. A guest that reads and does not answer may be stuck inside a frame of an older session: filler
//! bytes get it out.
//!
//! A machine that is about to be saved gets no GO: its agent is left waiting for one ([`Until::Answered`]), so that each
//! machine that goes on from there agrees with its own host at once.
//!
//! Invariant: GO follows the ACK to a PROBE that was sent exactly once, so no second ACK can come behind it and be
//! taken for the start of the multiplexed stream.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nido_guest_agent::wire::sync::{Block, FILLER, Kind, Scanner};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::set_socket_send_buffer_size;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep_until};

use crate::guest::error::GuestError;

/// Pause before the second PROBE, growing by half each time up to the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// So many PROBEs that were read and not answered call for filler bytes.
const PATIENCE: u32 = 5;
/// Send buffer while a session runs, in bytes; the kernel doubles it. What lies in it delays every other stream, and
/// QEMU takes 4 KiB at a time anyway.
const SEND_BUFFER: usize = 128 * 1024;

/// How far the preamble goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// The agent waits for our next word.
    Answered,
    /// The multiplexed stream begins.
    Begun,
}

/// Runs the preamble on a connection from QEMU. After [`Until::Begun`] the next byte either way is the multiplexer's.
///
/// # Errors
/// [`GuestError::Gone`] if QEMU closed the connection, [`GuestError::Timeout`].
pub(super) async fn agree(socket: &UnixStream, until: Until, deadline: Instant) -> Result<(), GuestError> {
    // With the smallest buffer "writable" means "what was sent before has been read".
    set_socket_send_buffer_size(socket, 1).map_err(|e| GuestError::stream(&e.into()))?;
    let mut talk = Talk::new()?;
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
                talk.write(socket)?;
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
    if until == Until::Answered {
        return Ok(());
    }
    while !talk.out.is_empty() {
        let ready = tokio::time::timeout_at(deadline, socket.writable()).await;
        ready.map_err(|_| GuestError::Timeout { what: "to open its channel" })?.map_err(|e| GuestError::stream(&e))?;
        talk.write(socket)?;
    }
    set_socket_send_buffer_size(socket, SEND_BUFFER).map_err(|e| GuestError::stream(&e.into()))
}

/// Whether the other side has read what was sent so far, with [`agree`]'s small send buffer.
fn was_read(socket: &UnixStream) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::OUT)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|count| count > 0)
}

/// What was said so far.
struct Talk {
    nonce: [u8; 16],
    /// How often the nonce was sent.
    sent: u32,
    unanswered: u32,
    scanner: Scanner,
    out: Vec<u8>,
}

impl Talk {
    fn new() -> Result<Self, GuestError> {
        let mut talk = Self { nonce: [0; 16], sent: 0, unanswered: 0, scanner: Scanner::default(), out: Vec::new() };
        talk.begin()?;
        Ok(talk)
    }

    /// Starts over with a nonce that was never sent.
    fn begin(&mut self) -> Result<(), GuestError> {
        getrandom::fill(&mut self.nonce).map_err(|e| GuestError::Unreachable(format!("no random numbers: {e}")))?;
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
        if self.unanswered.is_multiple_of(PATIENCE) {
            self.out.resize(FILLER, 0xff);
        }
        self.probe();
    }

    /// Reads what is there; true once GO is due and queued.
    fn read(&mut self, socket: &UnixStream) -> Result<bool, GuestError> {
        let mut bytes = [0; 4096];
        let count = match socket.try_read(&mut bytes) {
            Ok(0) => return Err(GuestError::Gone),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(GuestError::stream(&error)),
        };
        for &byte in &bytes[..count] {
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

    fn write(&mut self, socket: &UnixStream) -> Result<(), GuestError> {
        match socket.try_write(&self.out) {
            Ok(count) => drop(self.out.drain(..count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(GuestError::stream(&error)),
        }
        Ok(())
    }
}
