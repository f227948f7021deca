//! A session's frames for blocking code: copying files is system calls all the way, and does them on a thread of its
//! own without a hop per piece.
//!
//! Invariant: every wait ends, by [`STALL_TIMEOUT`] at the latest or as soon as the stream is shut down from outside, which is
//! how a copy is cancelled.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nido_guest_agent::wire::ToHost;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::guest::error::GuestError;
use crate::guest::frames::{Frame, FrameBuffer};
use crate::guest::session::unexpected;
use crate::guest::transport;

/// How long the guest may be silent, or take nothing, in the middle of a copy.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a failed stream is searched for the agent's last message.
const FINAL_REPLY_TIMEOUT: Duration = Duration::from_secs(2);

/// An open session, blocking.
pub(super) struct Wire {
    fd: Arc<OwnedFd>,
    frames: FrameBuffer,
}

impl Wire {
    pub fn new(fd: Arc<OwnedFd>, frames: FrameBuffer) -> Self {
        Self { fd, frames }
    }

    /// The next frame.
    pub fn next(&mut self, what: &'static str) -> Result<Frame<'_>, GuestError> {
        while !self.frames.is_whole()? {
            if !self.read()? {
                self.wait(PollFlags::IN, STALL_TIMEOUT, what)?;
            }
        }
        Ok(self.frames.pop())
    }

    /// The next frame, which must be a message.
    pub fn answer(&mut self, what: &'static str) -> Result<ToHost, GuestError> {
        Ok(self.next(what)?.must_be_message()?)
    }

    /// Sends everything. A message of the agent meanwhile can only be a failure.
    pub fn send(&mut self, mut bytes: &[u8]) -> Result<(), GuestError> {
        self.check()?;
        while !bytes.is_empty() {
            match transport::send(&*self.fd, bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if self
                        .wait(PollFlags::IN | PollFlags::OUT, STALL_TIMEOUT, "to take more of a copy")?
                        .contains(PollFlags::IN)
                    {
                        self.check()?;
                    }
                }
                Err(_) => return Err(self.final_reply()),
            }
        }
        Ok(())
    }

    /// Fails if the agent has sent a message, or has disconnected.
    fn check(&mut self) -> Result<(), GuestError> {
        while !self.frames.is_whole()? {
            if !self.read()? {
                return Ok(());
            }
        }
        Err(unexpected(self.frames.pop().must_be_message()?))
    }

    /// Why the stream failed: the agent's reason if it gave one.
    fn final_reply(&mut self) -> GuestError {
        loop {
            match self.check() {
                Err(error) => return error,
                Ok(()) if self.wait(PollFlags::IN, FINAL_REPLY_TIMEOUT, "to report why it stopped").is_ok() => {}
                Ok(()) => return GuestError::Gone,
            }
        }
    }

    /// Reads what is there; false if there is nothing yet.
    fn read(&mut self) -> Result<bool, GuestError> {
        loop {
            match rustix::io::read(&*self.fd, self.frames.spare()) {
                Ok(0) => return Err(GuestError::Gone),
                Ok(count) => {
                    self.frames.filled(count);
                    return Ok(true);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(GuestError::stream(&error.into())),
            }
        }
    }

    fn wait(&self, what_for: PollFlags, limit: Duration, what: &'static str) -> Result<PollFlags, GuestError> {
        let limit = Timespec { tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX), tv_nsec: 0 };
        let mut fds = [PollFd::from_borrowed_fd(self.fd.as_fd(), what_for)];
        match poll(&mut fds, Some(&limit)) {
            Ok(0) => Err(GuestError::Timeout { what }),
            Ok(_) | Err(Errno::INTR) => Ok(fds[0].revents()),
            Err(error) => Err(GuestError::stream(&error.into())),
        }
    }
}
