//! The socket under the multiplexer. It joins a frame's head and body into one write (QEMU would pass the twelve bytes
//! of a head to the guest on their own), and it can slip in a reset of a stream, which yamux cannot be asked for once
//! the stream's sending side was closed.
//!
//! Invariant: a reset goes out between two frames, never inside one.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::io::{AsyncRead, AsyncWrite};
use tokio::io::ReadBuf;
use tokio::net::UnixStream;

use super::{Resets, SPLIT};

/// Length of a yamux frame's head.
const HEAD: usize = 12;
/// Bytes taken in before they must be written, enough for one whole data frame.
const OUT: usize = SPLIT + HEAD;

/// The channel's socket as yamux sees it.
#[derive(Debug)]
pub(super) struct ChannelIo {
    socket: UnixStream,
    out: Vec<u8>,
    sent: usize,
    cut: FramePosition,
    resets: Resets,
}

impl ChannelIo {
    pub fn new(socket: UnixStream, resets: Resets) -> Self {
        Self { socket, out: Vec::with_capacity(OUT), sent: 0, cut: FramePosition::default(), resets }
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.out.len() {
            let write = tokio::io::AsyncWrite::poll_write(Pin::new(&mut self.socket), cx, &self.out[self.sent..]);
            self.sent += ready!(write)?;
        }
        (self.sent, _) = (0, self.out.clear());
        Poll::Ready(Ok(()))
    }

    fn add_resets(&mut self) {
        if !self.cut.is_between() {
            return;
        }
        for id in self.resets.take() {
            self.out.extend_from_slice(&reset(id));
        }
    }
}

/// The frame that resets a stream: version 0, type 0 (data), flag 8 (RST), the stream, length 0.
fn reset(id: u32) -> [u8; HEAD] {
    let mut frame = [0; HEAD];
    frame[3] = 8;
    frame[4..8].copy_from_slice(&id.to_be_bytes());
    frame
}

/// Where in the sequence of frames the writing stands.
#[derive(Debug, Default)]
struct FramePosition {
    head: [u8; HEAD],
    have: usize,
    body_left: usize,
}

impl FramePosition {
    fn is_between(&self) -> bool {
        self.have == 0 && self.body_left == 0
    }

    fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.body_left > 0 {
                let count = bytes.len().min(self.body_left);
                self.body_left -= count;
                bytes = &bytes[count..];
                continue;
            }
            let count = bytes.len().min(HEAD - self.have);
            self.head[self.have..self.have + count].copy_from_slice(&bytes[..count]);
            self.have += count;
            bytes = &bytes[count..];
            if self.have == HEAD {
                self.have = 0;
                let [_, kind, _, _, _, _, _, _, a, b, c, d] = self.head;
                // Only data frames have a body; in the others the same field means something else.
                self.body_left = if kind == 0 { u32::from_be_bytes([a, b, c, d]) as usize } else { 0 };
            }
        }
    }
}

impl AsyncRead for ChannelIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buf = ReadBuf::new(into);
        ready!(tokio::io::AsyncRead::poll_read(Pin::new(&mut self.socket), cx, &mut buf))?;
        Poll::Ready(Ok(buf.filled().len()))
    }
}

impl AsyncWrite for ChannelIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.add_resets();
        if self.out.len() >= OUT {
            ready!(self.poll_drain(cx))?;
        }
        let count = bytes.len().min(OUT.saturating_sub(self.out.len()));
        self.out.extend_from_slice(&bytes[..count]);
        self.cut.feed(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.add_resets();
        self.poll_drain(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        tokio::io::AsyncWrite::poll_shutdown(Pin::new(&mut self.socket), cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frame_boundaries_are_found_in_any_sequence_of_writes() {
        let mut data = [0; HEAD + 5];
        data[11] = 5;
        let mut update = [0; HEAD];
        (update[1], update[11]) = (1, 200);
        let frames: Vec<u8> = data.iter().chain(&update).chain(&data).copied().collect();
        let ends = [HEAD + 5, 2 * HEAD + 5, 3 * HEAD + 10];
        for step in 1..frames.len() {
            let mut cut = FramePosition::default();
            let mut at = 0;
            for piece in frames.chunks(step) {
                cut.feed(piece);
                at += piece.len();
                assert_eq!(cut.is_between(), ends.contains(&at), "step {step} at {at}");
            }
        }
    }
}
