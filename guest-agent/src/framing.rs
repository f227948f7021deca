//! Frames on a byte stream: reading them without losing bytes when a wait is given up, writing each in one go.
//!
//! Raw bytes are handed on in the pieces in which they came, not gathered into frames: they are a stream, and each
//! gathering would be a copy. Invariant: nothing is allocated for a message before its head has passed the limit in
//! force, which is [`GREETING_LIMIT`] until the token has been checked.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nido_guest_agent::wire::{self, HEAD, Head, ToGuest, ToHost, WireError, kind};
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};

use crate::mux_stream::{Chunk, Sink, Source};

/// Largest frame accepted before the token was checked, in bytes.
pub const GREETING_LIMIT: usize = 1024;

/// What came in.
#[derive(Debug)]
pub enum Incoming {
    /// A message.
    Message(ToGuest),
    /// Raw bytes of a kind: a frame or a part of one, never empty.
    Raw(u8, Chunk),
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

/// Reads frames. [`FrameReader::next`] may be dropped at any await: what was read stays here. Once the framing is
/// over (a forwarded connection), it can be read as bytes.
pub struct FrameReader {
    source: Source,
    /// What was received and not yet used.
    piece: Chunk,
    /// The head being read, and how much of it there is.
    head: [u8; HEAD],
    have: usize,
    /// The message being read.
    message: Vec<u8>,
    limit: usize,
}

impl FrameReader {
    /// Wraps the reading half of a fresh session.
    pub fn new(source: Source) -> Self {
        Self { source, piece: Chunk::default(), head: [0; HEAD], have: 0, message: Vec::new(), limit: GREETING_LIMIT }
    }

    /// From here on frames may have the size the protocol allows.
    pub fn lift_greeting_limit(&mut self) {
        self.limit = usize::MAX;
    }

    /// The next message or piece of raw bytes; `None` at the end of the stream, wherever in a frame it comes.
    ///
    /// # Errors
    /// The stream fails, or what it carries is not a frame of this protocol.
    pub async fn next(&mut self) -> Result<Option<Incoming>, FrameError> {
        loop {
            if self.have == HEAD {
                if let Some(incoming) = self.take_payload()? {
                    return Ok(Some(incoming));
                }
            } else if !self.piece.is_empty() {
                self.take_head()?;
                continue;
            }
            if self.have < HEAD || self.piece.is_empty() {
                match self.source.next().await? {
                    Some(piece) => self.piece = piece,
                    None => return Ok(None),
                }
            }
        }
    }

    /// Ready once the other side has closed the stream with nothing left to read. May be dropped without loss.
    pub async fn closed(&mut self) {
        if self.piece.is_empty() {
            match self.source.next().await {
                Ok(Some(piece)) => self.piece = piece,
                Ok(None) | Err(_) => return,
            }
        }
        std::future::pending::<()>().await;
    }

    fn take_head(&mut self) -> Result<(), FrameError> {
        let part = self.piece.split_off_front(HEAD - self.have);
        self.head[self.have..self.have + part.as_ref().len()].copy_from_slice(part.as_ref());
        self.have += part.as_ref().len();
        if self.have == HEAD {
            let head = Head::parse(self.head)?;
            if head.length > self.limit {
                return Err(WireError::TooLong { length: head.length, limit: self.limit }.into());
            }
            if head.length == 0 && head.kind != kind::MESSAGE {
                self.have = 0;
            }
        }
        Ok(())
    }

    /// What can be handed on of the frame whose head was read.
    fn take_payload(&mut self) -> Result<Option<Incoming>, FrameError> {
        let head = Head::parse(self.head)?;
        if head.kind != kind::MESSAGE {
            if self.piece.is_empty() {
                return Ok(None);
            }
            let part = self.piece.split_off_front(head.length);
            let length = head.length - part.as_ref().len();
            self.head = Head { kind: head.kind, length }.bytes();
            if length == 0 {
                self.have = 0;
            }
            return Ok(Some(Incoming::Raw(head.kind, part)));
        }
        self.message.reserve_exact(head.length - self.message.len());
        let part = self.piece.split_off_front(head.length - self.message.len());
        self.message.extend_from_slice(part.as_ref());
        if self.message.len() < head.length {
            return Ok(None);
        }
        self.have = 0;
        let message = std::mem::take(&mut self.message);
        Ok(Some(Incoming::Message(wire::decode(&message)?)))
    }
}

impl AsyncRead for FrameReader {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let reader = self.get_mut();
        if reader.piece.is_empty() {
            match ready!(reader.source.poll_next(context))? {
                Some(piece) => reader.piece = piece,
                None => return Poll::Ready(Ok(())),
            }
        }
        into.put_slice(reader.piece.split_off_front(into.remaining()).as_ref());
        Poll::Ready(Ok(()))
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
        // The other side may have disconnected already; there is no receiver.
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
    use proptest::prelude::*;

    use super::*;

    fn reader(bytes: &'static [u8]) -> FrameReader {
        FrameReader::new(Source::of_bytes(bytes))
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
        assert!(block_on(reader(&[kind::MESSAGE, 0, 0, 9, 1, 2]).next()).unwrap().is_none());
        assert!(block_on(reader(&[kind::STDIN, 0]).next()).unwrap().is_none());
    }

    #[test]
    fn giving_up_a_wait_loses_nothing() {
        block_on(async {
            let (mut host, guest) = tokio::io::duplex(64);
            let mut frames = FrameReader::new(Source::of_bytes(guest));
            let ping = wire::encode(&ToGuest::Signal(15)).unwrap();
            let (most, last) = ping.split_at(ping.len() - 1);
            for part in most.chunks(1) {
                host.write_all(part).await.unwrap();
                let mut wait = Box::pin(frames.next());
                assert!(futures::poll!(&mut wait).is_pending());
            }
            host.write_all(last).await.unwrap();
            let Some(Incoming::Message(ToGuest::Signal(15))) = frames.next().await.unwrap() else { panic!("lost") };
        });
    }

    proptest! {
        #[test]
        fn frames_do_not_depend_on_chunk_sizes(
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..20),
            cut in 1usize..40,
        ) {
            let mut sent = Vec::new();
            for (number, payload) in payloads.iter().enumerate() {
                sent.extend(Head { kind: kind::FILE_DATA, length: payload.len() }.bytes());
                sent.extend(payload);
                sent.extend(wire::encode(&ToGuest::Signal(number as u8)).unwrap());
            }
            let (mut host, guest) = tokio::io::duplex(cut);
            let received = block_on(async {
                let write = async { host.write_all(&sent).await.unwrap(); drop(host) };
                let read = async {
                    let mut frames = FrameReader::new(Source::of_bytes(guest));
                    let mut received = vec![Vec::new()];
                    while let Some(incoming) = frames.next().await.unwrap() {
                        match incoming {
                            Incoming::Raw(kind::FILE_DATA, piece) => {
                                assert!(!piece.is_empty());
                                received.last_mut().unwrap().extend_from_slice(piece.as_ref());
                            }
                            Incoming::Message(ToGuest::Signal(number)) => {
                                assert_eq!(usize::from(number) + 1, received.len());
                                received.push(Vec::new());
                            }
                            other => panic!("{other:?}"),
                        }
                    }
                    received
                };
                futures::future::join(write, read).await.1
            });
            prop_assert_eq!(&received[..payloads.len()], &payloads[..]);
        }

        #[test]
        fn any_bytes_end_in_frames_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut frames = FrameReader::new(Source::of_bytes(io::Cursor::new(bytes)));
            frames.lift_greeting_limit();
            block_on(async { while let Ok(Some(_)) = frames.next().await {} });
        }
    }
}
