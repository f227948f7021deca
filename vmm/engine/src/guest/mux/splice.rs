//! Joins one client of `agent.sock` to one stream of the channel, both ways, half-closes kept.
//!
//! Buffers exist only while bytes are on their way, so an idle session costs the supervisor next to nothing.
//!
//! Invariant: it ends when both ways have ended, or when the client has disconnected; then the agent is notified, whatever
//! state the stream was in.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::{AsyncWrite, Stream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWrite as _, Interest};
use tokio::net::UnixStream;
use tokio::time::{Sleep, sleep};

use super::{OpenStream, SPLIT};
use crate::guest::transport::watch;

/// Size of the buffer for a client that sends little, in bytes.
const SMALL: usize = 4096;
/// How long data of a disconnected client may still take.
const HALF_CLOSED_TIMEOUT: Duration = Duration::from_secs(10);

/// Watches for the moment when the other end of a socket is gone entirely, which reading cannot tell from half-closed.
#[derive(Debug)]
pub(in crate::guest) struct HangUp(AsyncFd<OwnedFd>);

impl HangUp {
    /// Watches `socket`, through a descriptor of its own.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        // A hang-up is always reported; priority data does not exist here, so nothing else is.
        Ok(Self(watch(socket.as_fd().try_clone_to_owned()?, Interest::PRIORITY)?))
    }

    /// Whether it is gone at this moment.
    pub fn is_now(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.0.get_ref().as_fd(), PollFlags::empty())];
        poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().contains(PollFlags::HUP)
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.0.poll_read_ready(cx).map(|_| ())
    }

    /// Returns when it is gone.
    pub async fn wait(&self) {
        poll_fn(|cx| self.poll(cx)).await;
    }
}

/// Runs until the splice has ended. `on_bytes` gets the bytes moved into the guest and out of it.
pub(super) async fn splice(client: UnixStream, stream: OpenStream, on_bytes: impl Fn(usize, usize)) -> io::Result<()> {
    let gone = HangUp::of(&client)?;
    let mut splice = Splice { client, stream, up: Upload::default(), down: Download::default() };
    let mut linger: Option<Pin<Box<Sleep>>> = None;
    poll_fn(|cx| {
        let up = splice.poll_up(cx, &on_bytes);
        if let Poll::Ready(Err(error)) = splice.poll_down(cx, &on_bytes) {
            return Poll::Ready(Err(error));
        }
        if splice.down.done && up.is_ready() {
            return Poll::Ready(Ok(()));
        }
        if gone.poll(cx).is_pending() {
            return Poll::Pending;
        }
        if !splice.down.done {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        // The guest has finished, and notifying the client of that makes a half-closed client look gone.
        ready!(linger.get_or_insert_with(|| Box::pin(sleep(HALF_CLOSED_TIMEOUT))).as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    })
    .await
}

struct Splice {
    client: UnixStream,
    stream: OpenStream,
    up: Upload,
    down: Download,
}

/// From the client into the guest.
#[derive(Default)]
struct Upload {
    buffer: Vec<u8>,
    at: usize,
    end: usize,
    eof: bool,
    done: bool,
}

/// From the guest to the client.
#[derive(Default)]
struct Download {
    packet: Option<yamux::Packet>,
    at: usize,
    ended: bool,
    done: bool,
}

impl Splice {
    /// Ready once no more will go this way.
    fn poll_up(&mut self, cx: &mut Context<'_>, on_bytes: &impl Fn(usize, usize)) -> Poll<()> {
        let up = &mut self.up;
        while !up.done {
            if up.at < up.end {
                match ready!(Pin::new(&mut *self.stream).poll_write(cx, &up.buffer[up.at..up.end])) {
                    Ok(count) => {
                        up.at += count;
                        on_bytes(count, 0);
                    }
                    // The agent reads no more; what it has sent is still to be delivered.
                    Err(_) => up.finish(),
                }
            } else if up.eof {
                let _ = ready!(Pin::new(&mut *self.stream).poll_close(cx));
                up.finish();
            } else {
                ready!(up.poll_read(cx, &self.client));
            }
        }
        Poll::Ready(())
    }

    fn poll_down(&mut self, cx: &mut Context<'_>, on_bytes: &impl Fn(usize, usize)) -> Poll<io::Result<()>> {
        let down = &mut self.down;
        while !down.done {
            if let Some(packet) = &down.packet {
                let rest = &packet.as_ref()[down.at..];
                if rest.is_empty() {
                    down.packet = None;
                    continue;
                }
                let count = ready!(Pin::new(&mut self.client).poll_write(cx, rest))?;
                down.at += count;
                on_bytes(0, count);
            } else if down.ended {
                let _ = ready!(Pin::new(&mut self.client).poll_shutdown(cx));
                down.done = true;
            } else {
                match ready!(Pin::new(&mut *self.stream).poll_next(cx)) {
                    Some(packet) => (down.packet, down.at) = (Some(packet?), 0),
                    None => down.ended = true,
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Upload {
    fn finish(&mut self) {
        *self = Self { done: true, ..Self::default() };
    }

    /// Reads what the client has; gives the buffer back while it has nothing.
    fn poll_read(&mut self, cx: &mut Context<'_>, client: &UnixStream) -> Poll<()> {
        if self.buffer.is_empty() {
            ready!(client.poll_read_ready(cx)).unwrap_or_default();
            self.buffer.resize(SMALL, 0);
        }
        match client.try_read(&mut self.buffer) {
            Ok(0) => self.eof = true,
            Ok(count) => {
                (self.at, self.end) = (0, count);
                if count == SMALL {
                    self.grow();
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.buffer = Vec::new(),
            Err(_) => self.eof = true,
        }
        Poll::Ready(())
    }

    /// A client that fills the small buffer has more to send.
    fn grow(&mut self) {
        self.buffer.resize(SPLIT, 0);
    }
}
