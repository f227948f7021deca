//! TCP ports of the guest on this side: a listener whose connections are carried through the agent, and the same for
//! one pair of streams (`nido proxy`).
//!
//! It works without any network card in the guest, and a connection is made only when the guest answers. A half-closed
//! connection stays half-closed.
//!
//! Invariant: never more than [`CONNECTIONS`] at once for one VM; a further one takes the place of a half-closed one that is
//! silent, or is closed at once.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use nido_guest_agent::connection_table::ConnectionTable;
use nido_guest_agent::wire::{Connect, MAX_TUNNELS, ToGuest, ToHost};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::client::Guest;
use super::error::GuestError;
use super::session::{Session, unexpected};
use super::transport::Stream;

/// How many connections all forwards of one VM carry at once. A few of the guest's places are left to `nido proxy`.
pub const CONNECTIONS: usize = MAX_TUNNELS - 16;
/// How long the guest may take to accept one connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// Bytes held per way of a connection.
const BUFFER: usize = 64 * 1024;
/// Pause after the listener could not accept (out of descriptors, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A raw connection to a TCP port inside the guest. Shutting it down for writing half-closes it; dropping it closes it.
#[derive(Debug)]
pub struct Tunnel {
    stream: Stream,
    /// Bytes that came along with the reply.
    early: Vec<u8>,
    at: usize,
}

impl Tunnel {
    pub(crate) fn new(session: Session) -> Result<Self, GuestError> {
        let link = Arc::into_inner(session.link).ok_or(GuestError::Gone)?;
        Ok(Self { stream: link.stream, early: session.frames.into_rest(), at: 0 })
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.at == self.early.len() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let count = buf.remaining().min(self.early.len() - self.at);
        buf.put_slice(&self.early[self.at..self.at + count]);
        self.at += count;
        if self.at == self.early.len() {
            (self.early, self.at) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Guest {
    /// Connects to a TCP port inside the guest.
    ///
    /// # Errors
    /// Those of [`Self::session`]; [`GuestError::Guest`] with
    /// [`Fault::Unreachable`](nido_guest_agent::wire::Fault::Unreachable) if nothing listens there.
    pub async fn connect(&self, to: &Connect, deadline: Instant) -> Result<Tunnel, GuestError> {
        let connect = async {
            let mut session = self.begin(&ToGuest::Connect(to.clone()), deadline).await?;
            match session.answer(deadline, "to connect").await? {
                ToHost::Connected => Tunnel::new(session),
                other => Err(unexpected(other)),
            }
        };
        connect.await.map_err(|error| match error {
            GuestError::Busy => GuestError::TunnelsBusy,
            other => other,
        })
    }

    /// Carries every connection that `listener` gets to `to` inside the guest, as long as there are `places`. Runs until
    /// dropped, which closes all of them. What `enter` gives is held as long as its connection.
    ///
    /// A connection that the guest does not accept is closed; the others continue.
    pub async fn forward<U: Send + 'static>(
        &self,
        listener: TcpListener,
        to: Connect,
        places: &Connections,
        enter: impl Fn() -> U,
    ) {
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            match listener.accept().await {
                Ok((client, _)) => {
                    let Some(place) = places.enter() else {
                        tracing::warn!(port = to.port, "refused a connection: the limit of {CONNECTIONS} is reached");
                        continue;
                    };
                    let (guest, to, use_of_vm) = (self.clone(), to.clone(), enter());
                    connections.spawn(async move {
                        if let Err(error) = guest.carry(client, &to, &place).await {
                            tracing::info!(port = to.port, "a forwarded connection failed: {error}");
                        }
                        drop((place, use_of_vm));
                    });
                }
                Err(error) => {
                    tracing::warn!("cannot accept a connection to forward: {error}");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn carry(&self, client: TcpStream, to: &Connect, place: &ForwardSlot) -> Result<(), GuestError> {
        let tunnel = self.connect(to, Instant::now() + CONNECT_LIMIT).await?;
        // Small messages of an interactive protocol must not wait for each other.
        let _ = client.set_nodelay(true);
        let ((from_client, to_client), (from_guest, to_guest)) = (client.into_split(), tokio::io::split(tunnel));
        let is_half_closed = AtomicBool::new(false);
        let copied = async {
            tokio::try_join!(
                pass(from_client, to_guest, &is_half_closed, place),
                pass(from_guest, to_client, &is_half_closed, place)
            )
        };
        tokio::select! {
            copied = copied => copied.map(drop).map_err(|e| GuestError::stream(&e)),
            () = place.ended.notified() => Ok(()),
        }
    }
}

/// Carries one direction to its end, and passes that on.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    is_half_closed: &AtomicBool,
    place: &ForwardSlot,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        if is_half_closed.load(Ordering::Relaxed) {
            place.half_closed();
        }
        to.write_all(&buffer[..count]).await?;
        to.flush().await?;
    }
    to.shutdown().await?;
    is_half_closed.store(true, Ordering::Relaxed);
    place.half_closed();
    Ok(())
}

/// The places of all forwarded connections of one VM. Clones share them.
#[derive(Debug, Clone)]
pub struct Connections(Arc<Mutex<ConnectionTable<Arc<Notify>>>>);

impl Default for Connections {
    fn default() -> Self {
        Self::new(CONNECTIONS)
    }
}

impl Connections {
    /// So many places.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Mutex::new(ConnectionTable::new(limit))))
    }

    fn places(&self) -> MutexGuard<'_, ConnectionTable<Arc<Notify>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self) -> Option<ForwardSlot> {
        let ended = Arc::new(Notify::new());
        let (number, evicted) = self.places().enter(ended.clone(), std::time::Instant::now())?;
        if let Some(evicted) = evicted {
            evicted.notify_one();
        }
        Some(ForwardSlot { of: self.clone(), number, ended })
    }
}

/// The place of one connection.
#[derive(Debug)]
struct ForwardSlot {
    of: Connections,
    number: u64,
    ended: Arc<Notify>,
}

impl ForwardSlot {
    fn half_closed(&self) {
        self.of.places().half_closed(self.number, std::time::Instant::now());
    }
}

impl Drop for ForwardSlot {
    fn drop(&mut self) {
        self.of.places().release(self.number);
    }
}

/// Carries `input` into the tunnel and what comes back to `output`, until the guest has closed its side: a closed
/// input is passed on and waited out, an input that stays open does not hold the end up.
///
/// # Errors
/// [`GuestError::Gone`] if a side fails.
pub async fn proxy<R, W>(tunnel: Tunnel, mut input: R, mut output: W) -> Result<(), GuestError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let (mut from_guest, mut to_guest) = tokio::io::split(tunnel);
    let inward = async {
        let copied = tokio::io::copy(&mut input, &mut to_guest).await;
        let closed = to_guest.shutdown().await;
        copied.and(closed)
    };
    let outward = async {
        tokio::io::copy(&mut from_guest, &mut output).await?;
        output.flush().await
    };
    let outcome = until_second(inward, outward).await;
    outcome.map_err(|e| GuestError::stream(&e))
}

/// Runs both; ends with the second, whose outcome it gives. The first one's failure shows in the second's stream.
async fn until_second(
    first: impl Future<Output = io::Result<()>>,
    second: impl Future<Output = io::Result<()>>,
) -> io::Result<()> {
    tokio::pin!(first, second);
    tokio::select! {
        outcome = &mut second => return outcome,
        outcome = &mut first => if let Err(error) = outcome {
            tracing::debug!("the connection to the guest failed: {error}");
        },
    }
    second.await
}
