//! Many streams over the one virtio-serial port: agreement on a beginning ([`agree`]), then yamux, driven by one task.
//!
//! Invariant: what a hostile guest can make the host hold is bounded: [`MAX_STREAMS`] streams, each with yamux's first
//! window of 256 KiB, which never grows; streams that the guest opens are refused, and too many of them end it all.

mod agree;
mod io;
mod splice;

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use yamux::{Config, Connection, Mode};

use self::agree::PreambleEnd;
use self::io::ChannelIo;
pub(super) use self::splice::HangUp;
use super::error::GuestError;

/// Largest piece of one stream between two others', in bytes. The agent's way out of a half-received frame
/// (`wire::sync::FILLER`) is as long.
pub(super) const SPLIT: usize = 64 * 1024;
/// How many streams yamux accepts: more than are ever given out, because exceeding it ends the connection, and a
/// stream counts until yamux has noticed that it is gone.
const MAX_STREAMS: usize = 2 * nido_guest_agent::wire::MAX_SESSIONS;
/// How many streams a guest may try to open before it is taken for broken.
const MAX_UNKNOWN_STREAMS: u32 = 16;
/// Requests to the driver on their way.
const REQUESTS: usize = 128;

/// Streams to be reset, by number.
#[derive(Debug, Clone, Default)]
struct Resets(Arc<Mutex<Vec<u32>>>);

impl Resets {
    fn add(&self, id: u32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(id);
    }

    fn take(&self) -> Vec<u32> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A request to the driver.
enum Request {
    Open(oneshot::Sender<yamux::Stream>),
    Reset(u32),
    End,
}

/// A channel that has been agreed on. Clones speak to the same one; when the last is dropped the channel is closed.
#[derive(Debug, Clone)]
pub(super) struct Mux {
    requests: mpsc::Sender<Request>,
    ended: watch::Receiver<Option<String>>,
}

impl Mux {
    /// Agrees with the agent behind a fresh connection from QEMU, and starts the task that drives the streams.
    ///
    /// # Errors
    /// [`GuestError::Gone`], [`GuestError::Timeout`].
    pub async fn start(socket: UnixStream, deadline: Instant) -> Result<Self, GuestError> {
        agree::agree(&socket, PreambleEnd::Begun, deadline).await?;
        let mut config = Config::default();
        config.set_max_num_streams(MAX_STREAMS);
        config.set_max_connection_receive_window(Some(MAX_STREAMS * yamux::DEFAULT_CREDIT as usize));
        config.set_split_send_size(SPLIT);
        let resets = Resets::default();
        let connection = Connection::new(ChannelIo::new(socket, resets.clone()), config, Mode::Client);
        let (requests, asked) = mpsc::channel(REQUESTS);
        let (end, ended) = watch::channel(None);
        let mut driver = Driver { connection, asked, opening: None, resets, unknown_streams: 0 };
        tokio::spawn(async move {
            let reason = std::future::poll_fn(|cx| driver.poll(cx)).await;
            drop(driver);
            end.send_replace(Some(reason));
        });
        Ok(Self { requests, ended })
    }

    /// Opens a stream to the agent.
    ///
    /// # Errors
    /// [`GuestError::Gone`].
    pub async fn open(&self) -> Result<OpenStream, GuestError> {
        let (give, given) = oneshot::channel();
        self.requests.send(Request::Open(give)).await.map_err(|_| GuestError::Gone)?;
        let stream = given.await.map_err(|_| GuestError::Gone)?;
        Ok(OpenStream { stream: Some(stream), requests: self.requests.clone() })
    }

    /// Joins a client to a fresh stream, until both have ended.
    ///
    /// # Errors
    /// [`GuestError::Gone`].
    pub async fn serve(&self, client: UnixStream, on_bytes: impl Fn(usize, usize)) -> Result<(), GuestError> {
        let stream = self.open().await?;
        splice::splice(client, stream, on_bytes).await.map_err(|e| GuestError::stream(&e))
    }

    /// Ends it, and every stream in it, even if it is in use. The connection itself stays if its owner holds it.
    pub async fn end(&self) {
        // Gone already is as good.
        let _ = self.requests.send(Request::End).await;
        self.ended().await;
    }

    /// Waits for the end of the channel; gives the reason.
    pub async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        let reason = ended.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        reason.unwrap_or_else(|| "its task has ended".into())
    }
}

/// Sends a hello and a request in one message to an agent whose multiplexer has not started; returns the whole reply.
///
/// # Errors
/// [`GuestError::Gone`], [`GuestError::Timeout`].
pub(super) async fn bootstrap_request(
    socket: &UnixStream,
    words: &[u8],
    deadline: Instant,
) -> Result<Vec<u8>, GuestError> {
    agree::bootstrap_request(socket, words, deadline).await
}

/// Leaves the agent behind `socket`, whose multiplexer has been ended, waiting for the host's next word.
///
/// # Errors
/// [`GuestError::Gone`], [`GuestError::Timeout`].
pub(super) async fn close_for_save(socket: &UnixStream, deadline: Instant) -> Result<(), GuestError> {
    agree::agree(socket, PreambleEnd::Answered, deadline).await
}

/// The one task's state.
struct Driver {
    connection: Connection<ChannelIo>,
    asked: mpsc::Receiver<Request>,
    opening: Option<oneshot::Sender<yamux::Stream>>,
    resets: Resets,
    unknown_streams: u32,
}

impl Driver {
    /// Moves everything along; ready with the reason once the channel has ended.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<String> {
        loop {
            if self.opening.is_none() {
                match self.asked.poll_recv(cx) {
                    Poll::Ready(Some(Request::Open(give))) => self.opening = Some(give),
                    Poll::Ready(Some(Request::Reset(id))) => {
                        self.resets.add(id);
                        continue;
                    }
                    Poll::Ready(Some(Request::End)) => return Poll::Ready("it was ended".into()),
                    Poll::Ready(None) => return Poll::Ready("no session uses it any more".into()),
                    Poll::Pending => {}
                }
            }
            if self.opening.is_some() {
                match self.connection.poll_new_outbound(cx) {
                    Poll::Ready(Ok(stream)) => {
                        // If the requester has gone, the stream is dropped, and yamux resets it.
                        let _ = self.opening.take().map(|give| give.send(stream));
                        continue;
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(error.to_string()),
                    Poll::Pending => {}
                }
            }
            match self.connection.poll_next_inbound(cx) {
                Poll::Ready(Some(Ok(_stray))) => {
                    self.unknown_streams += 1;
                    if self.unknown_streams > MAX_UNKNOWN_STREAMS {
                        return Poll::Ready("the guest kept opening streams".into());
                    }
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(error.to_string()),
                Poll::Ready(None) => return Poll::Ready("the other side closed it".into()),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

/// An open stream. Dropping it makes the agent notice: yamux resets a stream that is still open, but sends nothing
/// about one whose sending side was closed before, and the agent would wait for ever to be rid of its bytes.
#[derive(Debug)]
pub(super) struct OpenStream {
    /// Absent only while it is dropped.
    stream: Option<yamux::Stream>,
    requests: mpsc::Sender<Request>,
}

impl Deref for OpenStream {
    type Target = yamux::Stream;

    #[allow(clippy::expect_used)]
    fn deref(&self) -> &yamux::Stream {
        self.stream.as_ref().expect("present until dropped")
    }
}

impl DerefMut for OpenStream {
    #[allow(clippy::expect_used)]
    fn deref_mut(&mut self) -> &mut yamux::Stream {
        self.stream.as_mut().expect("present until dropped")
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        let Some(stream) = self.stream.take() else { return };
        let reset = stream.is_write_closed().then(|| stream.id().val());
        drop(stream);
        if let Some(id) = reset {
            // Full only if the driver is gone or stuck, and then so is the channel.
            let _ = self.requests.try_send(Request::Reset(id));
        }
    }
}
