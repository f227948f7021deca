//! All requests of one HTTP/1 connection, so that the host of each is checked, and not of the first only.
//!
//! ```text
//!            no body
//!           ┌──────┐   Content-Length
//!           v      │  ┌───────────────> Fixed ────────────────────────────────> Head
//!   start ─> Head ─┴──┤
//!                     └───────────────> ChunkSize <──> ChunkData, ChunkEnd
//!                        chunked            └────────> Trailers ──────────────> Head
//! ```
//!
//! A request that offers to change the protocol (`Upgrade`) is followed like others: a server may decline, and then the next
//! request follows. If it accepts, the bytes of the other protocol are not a request, and so invalid.
//!
//! Invariant: only bytes of a body, whose length no server can read in another way, pass without a check of a host.

use super::http::{Body, HttpHead, field_line, http_head, next_line};
use super::{HEAD_MAX, Peek};

/// The longest line with the size of a chunk, in bytes, with CRLF.
const CHUNK_LINE_MAX: usize = 256;
/// The most digits of the size of a chunk.
const CHUNK_DIGITS_MAX: usize = 15;

/// What the first of the pending bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A request begins. If its host is allowed, the caller forwards the first [`HttpHead::length`] bytes.
    Head(Box<HttpHead>),
    /// The caller forwards so many bytes, at least one: they belong to a body.
    Pass(usize),
    /// The pending bytes are kept until more have been received.
    NeedMore,
    /// The bytes are not valid, for this reason. So are all others after them.
    Invalid(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Head,
    Fixed(u64),
    ChunkSize,
    ChunkData(u64),
    ChunkEnd,
    /// So many bytes of trailers have been passed.
    Trailers(usize),
    Failed(&'static str),
}

/// Follows the requests of a connection. It keeps no bytes: the caller does, and removes what [`RequestStream::advance`] returns
/// from their beginning. At most [`HEAD_MAX`] bytes have to be kept.
#[derive(Debug, Default)]
pub struct RequestStream {
    state: State,
}

impl RequestStream {
    /// Reports what the first of the bytes are that the client has sent and the caller has not forwarded. The caller must remove
    /// the bytes of a head or of a body before the next call.
    pub fn advance(&mut self, pending: &[u8]) -> Step {
        if self.state == State::Head {
            return self.head(pending);
        }
        let mut passed = 0;
        while self.state != State::Head {
            match self.body(&pending[passed..]) {
                Ok(0) => break,
                Ok(count) => passed += count,
                Err(reason) => {
                    self.state = State::Failed(reason);
                    break;
                }
            }
        }
        match self.state {
            _ if passed > 0 => Step::Pass(passed),
            State::Failed(reason) => Step::Invalid(reason),
            _ => Step::NeedMore,
        }
    }

    fn head(&mut self, pending: &[u8]) -> Step {
        match http_head(pending) {
            Peek::NeedMore => Step::NeedMore,
            Peek::Invalid(reason) => {
                self.state = State::Failed(reason);
                Step::Invalid(reason)
            }
            Peek::Done(head) => {
                self.state = match head.body {
                    Body::None | Body::Length(0) => State::Head,
                    Body::Length(length) => State::Fixed(length),
                    Body::Chunked => State::ChunkSize,
                };
                Step::Head(Box::new(head))
            }
        }
    }

    /// How many bytes of a body's next part are there; none if it is incomplete.
    fn body(&mut self, bytes: &[u8]) -> Result<usize, &'static str> {
        match self.state {
            State::Head => Ok(0),
            State::Failed(reason) => Err(reason),
            State::Fixed(remaining) => {
                let count = available(remaining, bytes);
                self.state = match remaining - count as u64 {
                    0 => State::Head,
                    remaining => State::Fixed(remaining),
                };
                Ok(count)
            }
            State::ChunkSize => self.chunk_size(bytes),
            State::ChunkData(remaining) => {
                let count = available(remaining, bytes);
                self.state = match remaining - count as u64 {
                    0 => State::ChunkEnd,
                    remaining => State::ChunkData(remaining),
                };
                Ok(count)
            }
            State::ChunkEnd => match bytes {
                [] | [b'\r'] => Ok(0),
                [b'\r', b'\n', ..] => {
                    self.state = State::ChunkSize;
                    Ok(2)
                }
                _ => Err("a chunk is longer than its size"),
            },
            State::Trailers(seen) => self.trailer(bytes, seen),
        }
    }

    fn chunk_size(&mut self, bytes: &[u8]) -> Result<usize, &'static str> {
        let view = &bytes[..bytes.len().min(CHUNK_LINE_MAX)];
        let Some((line, rest)) = next_line(view)? else {
            return if bytes.len() < CHUNK_LINE_MAX { Ok(0) } else { Err("the size of a chunk is too long") };
        };
        let digits = line.iter().position(|byte| *byte == b';').unwrap_or(line.len());
        let size = parse_size(&line[..digits]).ok_or("the size of a chunk is malformed")?;
        self.state = if size == 0 { State::Trailers(0) } else { State::ChunkData(size) };
        Ok(view.len() - rest.len())
    }

    fn trailer(&mut self, bytes: &[u8], seen: usize) -> Result<usize, &'static str> {
        let limit = HEAD_MAX - seen;
        let view = &bytes[..bytes.len().min(limit)];
        let Some((line, rest)) = next_line(view)? else {
            return if bytes.len() < limit { Ok(0) } else { Err("the trailers of a request are too long") };
        };
        let count = view.len() - rest.len();
        if line.is_empty() {
            self.state = State::Head;
            return Ok(count);
        }
        let (name, _) = field_line(line)?;
        let is_forbidden = |field: &&[u8]| name.eq_ignore_ascii_case(field);
        if [&b"host"[..], b"content-length", b"transfer-encoding"].iter().any(is_forbidden) {
            return Err("a trailer of the request is not allowed");
        }
        self.state = State::Trailers(seen + count);
        Ok(count)
    }
}

fn available(remaining: u64, bytes: &[u8]) -> usize {
    usize::try_from(remaining).map_or(bytes.len(), |remaining| remaining.min(bytes.len()))
}

fn parse_size(digits: &[u8]) -> Option<u64> {
    let is_number = (1..=CHUNK_DIGITS_MAX).contains(&digits.len()) && digits.iter().all(u8::is_ascii_hexdigit);
    let text = std::str::from_utf8(digits).ok().filter(|_| is_number)?;
    u64::from_str_radix(text, 16).ok()
}
