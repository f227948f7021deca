//! The two halves of a session's byte stream, and the pieces in which bytes come out of it.
//!
//! Invariant: bytes from the multiplexer are used in the buffer in which it received them.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use futures::{AsyncWrite as _, Stream as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How much is asked of a plain stream at once, in bytes.
const READ: usize = 64 * 1024;

/// The writing half.
pub type Sink = Box<dyn AsyncWrite + Send + Unpin>;

/// The reading half.
pub struct Source(Kind);

enum Kind {
    Mux(SharedStream),
    Bytes {
        stream: Box<dyn AsyncRead + Send + Unpin>,
        /// What the next bytes are read into; empty until then.
        spare: Vec<u8>,
    },
}

/// Both halves of a plain stream.
pub fn split<S: AsyncRead + AsyncWrite + Send + 'static>(stream: S) -> (Source, Sink) {
    let (source, sink) = tokio::io::split(stream);
    (Source::of_bytes(source), Box::new(sink))
}

/// Both halves of a stream of the multiplexer.
pub fn split_mux(stream: yamux::Stream) -> (Source, Sink) {
    let shared = SharedStream(Arc::new(Mutex::new(stream)));
    (Source(Kind::Mux(shared.clone())), Box::new(shared))
}

impl Source {
    /// A plain stream's reading half.
    pub fn of_bytes(stream: impl AsyncRead + Send + Unpin + 'static) -> Self {
        Self(Kind::Bytes { stream: Box::new(stream), spare: Vec::new() })
    }

    /// The next bytes; `None` at the end. May be dropped at any time without loss.
    ///
    /// # Errors
    /// The stream fails.
    pub async fn next(&mut self) -> io::Result<Option<Chunk>> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// See [`Source::next`].
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Option<Chunk>>> {
        match &mut self.0 {
            Kind::Mux(shared) => {
                let packet = ready!(shared.with(|stream| stream.poll_next(context))).transpose()?;
                Poll::Ready(Ok(packet.map(|packet| Chunk::new(Bytes::Packet(packet)))))
            }
            Kind::Bytes { stream, spare } => {
                spare.resize(READ, 0);
                let mut space = ReadBuf::new(spare);
                ready!(Pin::new(stream).poll_read(context, &mut space))?;
                let bytes = match space.filled() {
                    [] => return Poll::Ready(Ok(None)),
                    few if few.len() < READ / 8 => few.to_vec(),
                    many => {
                        let count = many.len();
                        let mut bytes = std::mem::take(spare);
                        bytes.truncate(count);
                        bytes
                    }
                };
                Poll::Ready(Ok(Some(Chunk::new(Bytes::Read(bytes)))))
            }
        }
    }
}

#[derive(Debug)]
enum Bytes {
    Packet(yamux::Packet),
    Read(Vec<u8>),
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Packet(packet) => packet.as_ref(),
            Self::Read(bytes) => bytes,
        }
    }
}

/// Some bytes that were received, or a part of them.
#[derive(Debug, Default)]
pub struct Chunk {
    /// Absent only if there is nothing in the range.
    bytes: Option<Arc<Bytes>>,
    range: Range<usize>,
}

impl Chunk {
    fn new(bytes: Bytes) -> Self {
        let range = 0..bytes.as_ref().len();
        Self { bytes: Some(Arc::new(bytes)), range }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Takes up to `most` bytes off its front.
    pub fn split_off_front(&mut self, most: usize) -> Self {
        let count = most.min(self.range.len());
        let front = self.range.start..self.range.start + count;
        self.range.start += count;
        if self.is_empty() {
            return Self { bytes: std::mem::take(self).bytes, range: front };
        }
        Self { bytes: self.bytes.clone(), range: front }
    }
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        let whole = self.bytes.as_ref().map_or(&[][..], |bytes| (**bytes).as_ref());
        &whole[self.range.clone()]
    }
}

/// A stream of the multiplexer, in both halves. Both are polled by the runtime's one thread, so the lock is never
/// waited for.
#[derive(Clone)]
struct SharedStream(Arc<Mutex<yamux::Stream>>);

impl SharedStream {
    fn with<T>(&self, act: impl FnOnce(Pin<&mut yamux::Stream>) -> T) -> T {
        act(Pin::new(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl AsyncWrite for SharedStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_write(context, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_close(context))
    }
}
