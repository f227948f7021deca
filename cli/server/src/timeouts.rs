//! Timeouts for slow clients. A client that sends its body too slowly, or does not read its response, must not hold a connection,
//! a file or a command in a guest.
//!
//! ```text
//!  request:    no byte for `body_idle`, or a JSON body not complete within `body_total`   ──> 408
//!  response:   nothing can be written for `write_stall`   ──> the connection is closed, and its request is cancelled
//! ```
//!
//! Invariant: only the client's own time counts, not the time that the server takes to process the body.

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
use nido_api::error::{Code, Error};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep, timeout_at};

use super::App;
use super::media_type::media_type;

/// How long the server waits for clients.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// For the next byte of a request body.
    pub body_idle: Duration,
    /// For a complete JSON body.
    pub body_total: Duration,
    /// For a client to read part of its response.
    pub write_stall: Duration,
    /// For open requests when the server shuts down.
    pub shutdown: Duration,
}

impl Timeouts {
    /// All timeouts, in proportion to the one for the next byte of a body.
    pub const fn from_body_idle(body_idle: Duration) -> Self {
        let twice = body_idle.saturating_mul(2);
        Self { body_idle, body_total: twice, write_stall: twice, shutdown: body_idle }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self::from_body_idle(Duration::from_secs(30))
    }
}

/// A body that came too slowly.
#[derive(Debug)]
struct SlowBody;

impl std::fmt::Display for SlowBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the body came too slowly")
    }
}

impl std::error::Error for SlowBody {}

/// Applies the timeouts to the body of a request.
pub async fn limit_body_time(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    if body.is_end_stream() {
        return next.run(Request::from_parts(parts, body)).await;
    }
    let timeouts = app.timeouts;
    let is_json = media_type(&parts.headers).as_deref() == Some("application/json");
    let end = is_json.then(|| Instant::now() + timeouts.body_total);
    let pieces = stream::unfold(Some(body.into_data_stream()), move |pieces| async move {
        let mut pieces = pieces?;
        let limit = Instant::now() + timeouts.body_idle;
        match timeout_at(end.map_or(limit, |end| end.min(limit)), pieces.next()).await {
            Ok(piece) => Some((piece?, Some(pieces))),
            Err(_) => Some((Err(axum::Error::new(SlowBody)), None)),
        }
    });
    next.run(Request::from_parts(parts, Body::from_stream(pieces))).await
}

/// Why a body could not be read.
pub fn body_error(error: &axum::Error) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(one) = cause {
        if one.is::<SlowBody>() {
            return Error::new(Code::RequestTimeout, SlowBody.to_string()).hint("send it again without pauses");
        }
        cause = one.source();
    }
    Error::new(Code::Interrupted, "the client has disconnected")
}

/// Reads a whole body of at most `limit` bytes.
///
/// # Errors
/// `body_too_large`, `request_timeout`, `interrupted`.
pub async fn read_body(body: Body, limit: usize) -> Result<Bytes, Error> {
    let mut pieces = body.into_data_stream();
    let mut whole = Vec::new();
    while let Some(piece) = pieces.next().await {
        whole.extend_from_slice(&piece.map_err(|error| body_error(&error))?);
        if whole.len() > limit {
            return Err(Error::new(Code::BodyTooLarge, format!("the body is longer than {limit} bytes")));
        }
    }
    Ok(whole.into())
}

/// A connection whose writes fail once none has succeeded for `write_stall`.
#[derive(Debug)]
pub struct WriteTimeoutStream<S> {
    stream: S,
    write_stall: Duration,
    /// Runs while a write is pending. Once it has expired, every write fails.
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S> WriteTimeoutStream<S> {
    pub const fn new(stream: S, write_stall: Duration) -> Self {
        Self { stream, write_stall, timer: None }
    }

    /// Returns the result of a write; one that is pending for too long fails.
    fn watch<T>(&mut self, cx: &mut Context<'_>, wrote: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if wrote.is_ready() {
            self.timer = None;
            return wrote;
        }
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(self.write_stall)));
        ready!(timer.as_mut().poll(cx));
        // It stays expired: polling it again would panic, so it is replaced by one without a wait.
        *timer = Box::pin(sleep(Duration::ZERO));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WriteTimeoutStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WriteTimeoutStream<S> {
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
    async fn writes_fail_once_the_client_stops_reading() {
        let (here, mut there) = tokio::io::duplex(4);
        let mut here = WriteTimeoutStream::new(here, Duration::from_secs(60));
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
    async fn read_body_distinguishes_too_long_too_slow_and_disconnected() {
        let code = |body: Body| async { read_body(body, 3).await.map_err(|error| error.code()) };
        assert_eq!(code(Body::from("abc")).await.unwrap(), "abc");
        assert_eq!(code(Body::from("abcd")).await, Err(Code::BodyTooLarge));
        let failing = |error| Body::from_stream(stream::once(async { Err::<Bytes, _>(axum::Error::new(error)) }));
        assert_eq!(code(failing(SlowBody)).await, Err(Code::RequestTimeout));
        let gone = Body::from_stream(stream::once(async { Err::<Bytes, _>(io::Error::other("gone")) }));
        assert_eq!(code(gone).await, Err(Code::Interrupted));
    }
}
