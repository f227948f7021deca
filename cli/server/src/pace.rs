//! How slow a client may be: one that sends its body drop by drop, or does not read its answer, must not keep a connection, a
//! file or a guest's command for ever.
//!
//! ```text
//!  request:   no byte for `silence`, or a JSON body not whole within `whole`   ──> 408
//!  answer:    nothing can be written for `unread`   ──> the connection ends, and with it what it was for
//! ```
//!
//! Invariant: only the client's own time counts, not that of whatever is done with what it sent.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use futures::{StreamExt, stream};
use nido_vmm::error::{Code, Error};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep, timeout_at};

use super::App;
use super::ask::media_type;

/// How long clients are waited for.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For the next byte of a body.
    pub silence: Duration,
    /// For all of a JSON body.
    pub whole: Duration,
    /// For a client to read some of its answer.
    pub unread: Duration,
    /// For what goes on when the server ends.
    pub finish: Duration,
}

impl Patience {
    /// In proportion to the time for the next byte of a body.
    pub const fn of(silence: Duration) -> Self {
        let twice = silence.saturating_mul(2);
        Self { silence, whole: twice, unread: twice, finish: silence }
    }
}

impl Default for Patience {
    fn default() -> Self {
        Self::of(Duration::from_secs(30))
    }
}

/// A body that came too slowly.
#[derive(Debug)]
struct Slow;

impl std::fmt::Display for Slow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the body came too slowly")
    }
}

impl std::error::Error for Slow {}

/// Gives the body of a request its limits.
pub async fn pace(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    if body.is_end_stream() {
        return next.run(Request::from_parts(parts, body)).await;
    }
    let patience = app.patience;
    let is_json = media_type(&parts.headers).as_deref() == Some("application/json");
    let end = is_json.then(|| Instant::now() + patience.whole);
    let pieces = stream::unfold(Some(body.into_data_stream()), move |pieces| async move {
        let mut pieces = pieces?;
        let limit = Instant::now() + patience.silence;
        match timeout_at(end.map_or(limit, |end| end.min(limit)), pieces.next()).await {
            Ok(piece) => Some((piece?, Some(pieces))),
            Err(_) => Some((Err(axum::Error::new(Slow)), None)),
        }
    });
    next.run(Request::from_parts(parts, Body::from_stream(pieces))).await
}

/// Why a body could not be read.
pub fn broken(error: &axum::Error) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(one) = cause {
        if one.is::<Slow>() {
            return Error::new(Code::RequestTimeout, Slow.to_string()).hint("send it again, without pauses");
        }
        cause = one.source();
    }
    Error::new(Code::Interrupted, "the client has hung up")
}

/// Reads a whole body of at most `limit` bytes.
///
/// # Errors
/// `body_too_large`, `request_timeout`, `interrupted`.
pub async fn read(body: Body, limit: usize) -> Result<Bytes, Error> {
    let mut pieces = body.into_data_stream();
    let mut whole = Vec::new();
    while let Some(piece) = pieces.next().await {
        whole.extend_from_slice(&piece.map_err(|error| broken(&error))?);
        if whole.len() > limit {
            return Err(Error::new(Code::BodyTooLarge, format!("the body is longer than {limit} bytes")));
        }
    }
    Ok(whole.into())
}

/// A connection that ends when nothing can be written to it for a while.
#[derive(Debug)]
pub struct Watched<S> {
    stream: S,
    unread: Duration,
    /// Runs while something waits to be written; once it has run out nothing more is.
    waits: Option<Pin<Box<Sleep>>>,
}

impl<S> Watched<S> {
    pub const fn new(stream: S, unread: Duration) -> Self {
        Self { stream, unread, waits: None }
    }

    /// Passes on how a write went; one that waits for too long fails.
    fn watch<T>(&mut self, cx: &mut Context<'_>, wrote: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if wrote.is_ready() {
            self.waits = None;
            return wrote;
        }
        let waits = self.waits.get_or_insert_with(|| Box::pin(sleep(self.unread)));
        ready!(waits.as_mut().poll(cx));
        // It stays run out: polled again it would panic, so it is made anew, without a wait.
        *waits = Box::pin(sleep(Duration::ZERO));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.watch(cx, wrote)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.watch(cx, wrote)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wrote = Pin::new(&mut self.stream).poll_flush(cx);
        self.watch(cx, wrote)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wrote = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.watch(cx, wrote)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_reads_now_and_then_is_waited_for_and_who_does_not_is_not() {
        let (here, mut there) = tokio::io::duplex(4);
        let mut here = Watched::new(here, Duration::from_secs(60));
        let reader = tokio::spawn(async move {
            let mut four = [0; 4];
            for _ in 0..5 {
                sleep(Duration::from_secs(59)).await;
                there.read_exact(&mut four).await.unwrap();
            }
            // It is still there, and reads no more.
            (there, Instant::now())
        });
        here.write_all(&[7; 20]).await.unwrap();
        let (_there, stopped) = reader.await.unwrap();
        here.write_all(&[7; 4]).await.unwrap();
        let error = here.write_all(&[7; 1]).await.unwrap_err();
        assert_eq!((error.kind(), stopped.elapsed().as_secs()), (io::ErrorKind::TimedOut, 60));
        // Nor is it waited for again.
        here.write_all(&[7; 1]).await.unwrap_err();
        assert_eq!(stopped.elapsed().as_secs(), 60);
    }

    #[tokio::test]
    async fn what_is_too_long_or_too_slow_is_told_apart() {
        let code = |body: Body| async { read(body, 3).await.map_err(|error| error.code()) };
        assert_eq!(code(Body::from("abc")).await.unwrap(), "abc");
        assert_eq!(code(Body::from("abcd")).await, Err(Code::BodyTooLarge));
        let failing = |error| Body::from_stream(stream::once(async { Err::<Bytes, _>(axum::Error::new(error)) }));
        assert_eq!(code(failing(Slow)).await, Err(Code::RequestTimeout));
        let gone = Body::from_stream(stream::once(async { Err::<Bytes, _>(io::Error::other("gone")) }));
        assert_eq!(code(gone).await, Err(Code::Interrupted));
    }
}
