//! Frames on a byte stream: reading them without losing bytes when a wait is given up, writing each in one go.
//!
//! Invariant: nothing is allocated for a payload before its head has passed the limit in force, which is
//! [`GREETING_LIMIT`] until the token has been checked.

use std::io;

use nido_guest_agent::wire::{self, HEAD, Head, ToGuest, ToHost, WireError, kind};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};

/// Largest frame accepted before the token was checked, in bytes.
pub const GREETING_LIMIT: usize = 1024;
/// How much is read ahead, in bytes: heads and small messages. Larger payloads bypass this buffer.
const READ_AHEAD: usize = 4096;

/// The reading half of a session's stream.
pub type Source = Box<dyn AsyncRead + Send + Unpin>;
/// The writing half of a session's stream.
pub type Sink = Box<dyn AsyncWrite + Send + Unpin>;

/// What came in.
#[derive(Debug)]
pub enum Incoming {
    /// A message.
    Message(ToGuest),
    /// A frame of raw bytes and its kind.
    Raw(u8, Vec<u8>),
}

/// Why no further frame can be read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The bytes are not this protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// Reads frames. [`FrameReader::next`] may be dropped at any await: what was read stays here.
pub struct FrameReader {
    stream: BufReader<Source>,
    head: [u8; HEAD],
    have: usize,
    payload: Vec<u8>,
    limit: usize,
}

impl FrameReader {
    /// Wraps the reading half of a fresh session.
    pub fn new(stream: Source) -> Self {
        let stream = BufReader::with_capacity(READ_AHEAD, stream);
        Self { stream, head: [0; HEAD], have: 0, payload: Vec::new(), limit: GREETING_LIMIT }
    }

    /// From here on frames may have the size the protocol allows.
    pub fn lift_greeting_limit(&mut self) {
        self.limit = usize::MAX;
    }

    /// The next frame; `None` at the end of the stream, wherever in a frame it comes.
    ///
    /// # Errors
    /// The stream fails, or what it carries is not a frame of this protocol.
    pub async fn next(&mut self) -> Result<Option<Incoming>, FrameError> {
        while self.have < HEAD {
            match self.stream.read(&mut self.head[self.have..]).await? {
                0 => return Ok(None),
                count => self.have += count,
            }
        }
        let head = Head::parse(self.head)?;
        if head.length > self.limit {
            return Err(WireError::TooLong { length: head.length, limit: self.limit }.into());
        }
        self.payload.reserve_exact(head.length.saturating_sub(self.payload.len()));
        while self.payload.len() < head.length {
            let missing = head.length - self.payload.len();
            let mut rest = (&mut self.stream).take(missing as u64);
            if rest.read_buf(&mut self.payload).await? == 0 {
                return Ok(None);
            }
        }
        self.have = 0;
        let payload = std::mem::take(&mut self.payload);
        match head.kind {
            kind::MESSAGE => Ok(Some(Incoming::Message(wire::decode(&payload)?))),
            raw => Ok(Some(Incoming::Raw(raw, payload))),
        }
    }

    /// Gives the stream back, with what has been read ahead of it. Only between frames.
    pub fn into_stream(self) -> BufReader<Source> {
        self.stream
    }
}

/// Writes frames.
pub struct FrameWriter {
    stream: Sink,
}

impl FrameWriter {
    /// Wraps the writing half of a session.
    pub fn new(stream: Sink) -> Self {
        Self { stream }
    }

    /// Sends a message.
    ///
    /// # Errors
    /// The stream fails, or the message is too large for one frame.
    pub async fn send(&mut self, message: &ToHost) -> io::Result<()> {
        let frame = wire::encode(message).map_err(io::Error::other)?;
        self.stream.write_all(&frame).await?;
        self.stream.flush().await
    }

    /// Sends a frame of raw bytes that was begun with [`raw_frame`].
    ///
    /// # Errors
    /// The stream fails.
    pub async fn send_raw(&mut self, kind: u8, frame: &mut [u8]) -> io::Result<()> {
        let length = frame.len() - HEAD;
        frame[..HEAD].copy_from_slice(&Head { kind, length }.bytes());
        self.stream.write_all(frame).await?;
        self.stream.flush().await
    }

    /// Closes the writing side; what was sent still arrives.
    pub async fn close(&mut self) {
        // The other side may be gone already; there is nobody left to tell.
        let _ = self.stream.shutdown().await;
    }

    /// Gives the stream back.
    pub fn into_stream(self) -> Sink {
        self.stream
    }
}

/// An empty raw frame: room for its head, and capacity for `payload` bytes behind it.
pub fn raw_frame(payload: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEAD + payload);
    frame.resize(HEAD, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(bytes: &'static [u8]) -> FrameReader {
        FrameReader::new(Box::new(bytes))
    }

    fn block_on<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    #[test]
    fn a_large_frame_before_the_token_is_refused() {
        let mut greeting = reader(&[kind::MESSAGE, 0, 4, 1]);
        let refused = block_on(greeting.next());
        assert!(matches!(refused, Err(FrameError::Wire(WireError::TooLong { length: 1025, limit: 1024 }))));
    }

    #[test]
    fn a_cut_frame_is_the_end() {
        assert!(block_on(reader(&[kind::STDIN, 0, 0, 9, 1, 2]).next()).unwrap().is_none());
        assert!(block_on(reader(&[kind::STDIN, 0]).next()).unwrap().is_none());
    }

    #[test]
    fn giving_up_a_wait_loses_nothing() {
        block_on(async {
            let (mut host, guest) = tokio::io::duplex(64);
            let mut frames = FrameReader::new(Box::new(guest));
            for part in [&[kind::STDIN, 0][..], &[0, 3, b'a'], b"b"] {
                host.write_all(part).await.unwrap();
                let mut wait = Box::pin(frames.next());
                assert!(futures::poll!(&mut wait).is_pending());
            }
            host.write_all(b"c").await.unwrap();
            let Some(Incoming::Raw(kind::STDIN, bytes)) = frames.next().await.unwrap() else { panic!("no frame") };
            assert_eq!(bytes, b"abc");
        });
    }
}
