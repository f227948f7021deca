//! TCP ports of the guest on this side: a listener whose connections are carried through the agent, and the same for
//! one pair of streams (`nido proxy`).
//!
//! It works without any network card in the guest, and a connection is made only when the guest answers. A half-closed
//! connection stays half-closed.
//!
//! Invariant: never more than the given number of connections at once; further ones wait in the listener's queue.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use nido_guest_agent::wire::Connect;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::client::Guest;
use super::error::GuestError;
use super::session::Session;
use super::transport::Stream;

/// How many connections one forward carries at once, unless told otherwise.
pub const CONNECTIONS: usize = 32;
/// How long the guest may take to answer one connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// Bytes held per way of a connection.
const BUFFER: usize = 64 * 1024;
/// Pause after the listener could not accept (out of descriptors, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A raw connection to a TCP port inside the guest. Shutting it down for writing half-closes it; dropping it closes it.
#[derive(Debug)]
pub struct Tunnel {
    stream: Stream,
    /// Bytes that came along with the answer.
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
    /// Carries every connection that `listener` gets to `to` inside the guest, at most `limit` at once. Runs until
    /// dropped, which closes all of them. What `enter` gives is held as long as its connection.
    ///
    /// A connection that the guest does not answer is closed; the rest goes on.
    pub async fn forward<U: Send + 'static>(
        &self,
        listener: TcpListener,
        to: Connect,
        limit: usize,
        enter: impl Fn() -> U,
    ) {
        let places = Arc::new(Semaphore::new(limit));
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            // Closed by nobody, so this cannot fail; if it ever did there would be nothing left to do.
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((client, _)) => {
                    let (guest, to, use_of_vm) = (self.clone(), to.clone(), enter());
                    connections.spawn(async move {
                        if let Err(error) = guest.carry(client, &to).await {
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

    async fn carry(&self, mut client: TcpStream, to: &Connect) -> Result<(), GuestError> {
        let mut tunnel = self.connect(to, Instant::now() + CONNECT_LIMIT).await?;
        // Small messages of an interactive protocol must not wait for each other.
        let _ = client.set_nodelay(true);
        tokio::io::copy_bidirectional_with_sizes(&mut client, &mut tunnel, BUFFER, BUFFER)
            .await
            .map_err(|e| GuestError::stream(&e))?;
        Ok(())
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
            tracing::debug!("the way into the guest failed: {error}");
        },
    }
    second.await
}
