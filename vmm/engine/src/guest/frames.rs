//! Cuts the bytes of a session into frames. Pure: the callers, blocking or not, do the reading.
//!
//! Invariant: the one buffer grows only for a frame whose head has been checked, so never beyond
//! [`wire::MAX_RAW`] plus a head; frames are lent out of it, not copied.

use nido_guest_agent::wire::{self, HEAD, Head, ToHost, WireError, kind};

/// Size of the buffer before a large frame has come, in bytes.
const FIRST: usize = 16 * 1024;

/// One frame, lent from the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// One of [`wire::kind`].
    pub kind: u8,
    /// What it carries.
    pub payload: &'a [u8],
}

impl Frame<'_> {
    /// The message in this frame; `None` if it carries raw bytes.
    pub fn message(self) -> Result<Option<ToHost>, WireError> {
        if self.kind == kind::MESSAGE { wire::decode(self.payload).map(Some) } else { Ok(None) }
    }

    /// The message in this frame, where nothing else is allowed.
    pub fn must_be_message(self) -> Result<ToHost, WireError> {
        self.message()?.ok_or_else(|| WireError::Malformed(format!("a frame of kind {:#04x} here", self.kind)))
    }
}

/// Bytes that were read and not yet taken as frames.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl FrameBuffer {
    /// Length of the frame at the front, head included, if its head is there.
    fn front(&self) -> Result<Option<usize>, WireError> {
        let Some(head) = self.bytes[self.start..self.end].first_chunk::<HEAD>() else { return Ok(None) };
        Ok(Some(HEAD + Head::parse(*head)?.length))
    }

    /// Whether [`Self::pop`] has a frame to give.
    ///
    /// # Errors
    /// The head at the front does not belong to this protocol, or is too long.
    pub fn is_whole(&self) -> Result<bool, WireError> {
        Ok(self.front()?.is_some_and(|length| self.end - self.start >= length))
    }

    /// Takes the frame at the front. Empty unless [`Self::is_whole`].
    pub fn pop(&mut self) -> Frame<'_> {
        let length = self.front().ok().flatten().unwrap_or(HEAD).min(self.end - self.start);
        let at = self.start;
        self.start += length;
        let frame = &self.bytes[at..at + length];
        Frame { kind: frame.first().copied().unwrap_or(0), payload: frame.get(HEAD..).unwrap_or_default() }
    }

    /// Where the next bytes go: room for the rest of the frame at the front at least, never empty. Read into it, then
    /// call [`Self::filled`].
    pub fn spare(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        let wanted = self.front().ok().flatten().unwrap_or(HEAD).max(self.end - self.start + 1);
        if self.start + wanted > self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            let size = wanted.max(FIRST);
            if size > self.bytes.len() {
                self.bytes.resize(size, 0);
            }
        }
        &mut self.bytes[self.end..]
    }

    /// Records how many bytes were read into [`Self::spare`].
    pub fn filled(&mut self, count: usize) {
        self.end = (self.end + count).min(self.bytes.len());
    }

    /// The remaining bytes, for a stream that continues as raw bytes.
    pub fn into_rest(mut self) -> Vec<u8> {
        self.bytes.truncate(self.end);
        self.bytes.drain(..self.start);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn raw(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = Head { kind, length: payload.len() }.bytes().to_vec();
        frame.extend_from_slice(payload);
        frame
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_anything_grows() {
        let mut buffer = FrameBuffer::default();
        buffer.spare()[..4].copy_from_slice(&[kind::STDOUT, 0xff, 0xff, 0xff]);
        buffer.filled(4);
        assert!(matches!(buffer.is_whole(), Err(WireError::TooLong { .. })));
        assert_eq!(buffer.bytes.len(), FIRST);
    }

    #[test]
    fn an_unknown_kind_is_refused() {
        let mut buffer = FrameBuffer::default();
        buffer.spare()[..4].copy_from_slice(&[0x77, 0, 0, 0]);
        buffer.filled(4);
        assert_eq!(buffer.is_whole(), Err(WireError::UnknownKind(0x77)));
    }

    proptest! {
        #[test]
        fn frames_are_unchanged_by_the_buffer(
            payloads in proptest::collection::vec((any::<u8>(), 0usize..40_000), 0..6),
            step in 1usize..50_000,
            rest in proptest::collection::vec(any::<u8>(), 0..3),
        ) {
            let payloads: Vec<Vec<u8>> = payloads.into_iter().map(|(byte, length)| vec![byte; length]).collect();
            let mut stream: Vec<u8> = payloads.iter().flat_map(|p| raw(kind::STDOUT, p)).collect();
            stream.extend_from_slice(&rest);
            let (mut buffer, mut out, mut at) = (FrameBuffer::default(), Vec::new(), 0);
            loop {
                while buffer.is_whole().unwrap() {
                    out.push(buffer.pop().payload.to_vec());
                }
                if at == stream.len() {
                    break;
                }
                let spare = buffer.spare();
                prop_assert!(!spare.is_empty());
                let count = spare.len().min(step).min(stream.len() - at);
                spare[..count].copy_from_slice(&stream[at..at + count]);
                buffer.filled(count);
                at += count;
            }
            prop_assert_eq!(out, payloads);
            prop_assert_eq!(buffer.into_rest(), rest);
        }
    }

    #[test]
    fn fuzz_frames_of_the_guest() {
        let messages = [
            ToHost::Started(7),
            ToHost::Welcome(wire::Welcome { version: 1, nonce: 2, agent: "nido".into(), features: Some(1) }),
            ToHost::PoweringOff,
        ];
        let mut seeds: Vec<Vec<u8>> = messages.iter().map(|message| wire::encode(message).unwrap()).collect();
        seeds.push(raw(kind::STDOUT, b"output"));
        seeds.push(seeds.concat());
        nido_fuzz::fuzz("frames-of-the-guest", &seeds, |input| {
            let (mut buffer, mut rest, mut taken) = (FrameBuffer::default(), input, 0);
            loop {
                while let Ok(true) = buffer.is_whole() {
                    let frame = buffer.pop();
                    taken += HEAD + frame.payload.len();
                    let _ = frame.message();
                }
                if buffer.is_whole().is_err() || rest.is_empty() {
                    break;
                }
                let spare = buffer.spare();
                let count = spare.len().min(rest.len()).min(1000);
                spare[..count].copy_from_slice(&rest[..count]);
                rest = &rest[count..];
                buffer.filled(count);
                assert!(
                    buffer.bytes.len() <= FIRST.max(wire::MAX_RAW.max(wire::MAX_MESSAGE) + HEAD),
                    "{}",
                    buffer.bytes.len()
                );
            }
            assert_eq!(taken + buffer.into_rest().len() + rest.len(), input.len());
        });
    }
}
