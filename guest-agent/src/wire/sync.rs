//! Agreement on where a session of the virtio-serial channel begins.
//!
//! The channel is one byte stream without an end, and what an older supervisor or a template left in it may still
//! arrive. So before yamux starts, both sides agree on a fresh nonce:
//!
//! ```text
//!  host                         agent
//!   PROBE nonce  (repeated) ->          skips everything that is not a PROBE
//!               <- ACK nonce            skips everything that is not ACK with its nonce
//!   GO nonce  ->                        answers further PROBEs; on GO with the same nonce yamux starts
//!   yamux (host = client)  <->  yamux (agent = server)
//! ```
//!
//! Or, to a guest that has just been loaded, the hello and the `IdentityReset` of a session in one piece, and the answers to
//! them: setting up the multiplexer would cost it more than the request.
//!
//! ```text
//!   LETTER nonce length, hello and identity-reset frame  ->
//!               <- REPLY nonce length, the frames that answer them; further blocks may follow
//! ```
//!
//! A block is 32 bytes: magic (8), kind (1), length of what follows (3, big-endian; zero but in LETTER and REPLY),
//! nonce (16), checksum (4, big-endian FNV-1a of the 28 before it). The magic's first byte is no yamux version, so a PROBE inside a live yamux session ends that session, and the
//! agent looks for blocks again. An agent that waits inside the body of a half-sent yamux frame is woken by
//! [`FILLER`] bytes, which the host sends when no ACK comes.

/// First bytes of a block.
pub const MAGIC: [u8; 8] = *b"\xffNIDO\r\n\x01";
/// Length of a block.
pub const BLOCK: usize = 32;
/// The most that may follow a LETTER or a REPLY, in bytes.
pub const BOOTSTRAP_REQUEST_MAX: usize = 4096;
/// How many filler bytes (each `0xff`) the host sends ahead of a PROBE when earlier ones stayed unanswered.
pub const FILLER: usize = 64 * 1024;

/// The type of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Host: are you there?
    Probe,
    /// Agent: I am.
    Ack,
    /// Host: we begin.
    Go,
    /// Host: here are a hello and an order, so many bytes.
    Letter(u16),
    /// Agent: this is the reply, so many bytes.
    Reply(u16),
}

impl Kind {
    fn number(self) -> u8 {
        match self {
            Self::Probe => 1,
            Self::Ack => 2,
            Self::Go => 3,
            Self::Letter(_) => 4,
            Self::Reply(_) => 5,
        }
    }

    fn parse(number: u8, length: [u8; 3]) -> Option<Self> {
        let length = u16::from_be_bytes([length[1], length[2]]);
        let kind = match number {
            1 => Self::Probe,
            2 => Self::Ack,
            3 => Self::Go,
            4 => Self::Letter(length),
            5 => Self::Reply(length),
            _ => return None,
        };
        (usize::from(length) <= BOOTSTRAP_REQUEST_MAX).then_some(kind)
    }
}

/// One block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// Its type.
    pub kind: Kind,
    /// Which attempt it belongs to.
    pub nonce: [u8; 16],
}

fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, &byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

impl Block {
    /// The 32 bytes of this block.
    #[must_use]
    pub fn bytes(self) -> [u8; BLOCK] {
        let mut out = [0; BLOCK];
        out[..8].copy_from_slice(&MAGIC);
        out[8] = self.kind.number();
        if let Kind::Letter(length) | Kind::Reply(length) = self.kind {
            out[10..12].copy_from_slice(&length.to_be_bytes());
        }
        out[12..28].copy_from_slice(&self.nonce);
        let sum = checksum(&out[..28]);
        out[28..].copy_from_slice(&sum.to_be_bytes());
        out
    }

    fn parse(bytes: &[u8; BLOCK]) -> Option<Self> {
        let kind = Kind::parse(bytes[8], [bytes[9], bytes[10], bytes[11]])?;
        let nonce = bytes[12..28].try_into().ok()?;
        let block = Self { kind, nonce };
        (block.bytes() == *bytes).then_some(block)
    }
}

/// Finds blocks in a stream of arbitrary bytes. Holds at most one block's worth of bytes.
#[derive(Debug, Default)]
pub struct Scanner {
    held: Vec<u8>,
}

impl Scanner {
    /// Takes one byte; gives the block that it completes, if any. Feed byte by byte so that nothing behind a GO is
    /// swallowed.
    pub fn push(&mut self, byte: u8) -> Option<Block> {
        self.held.push(byte);
        loop {
            let known = self.held.len().min(MAGIC.len());
            if self.held[..known] != MAGIC[..known] {
                self.drop_to_next_candidate();
                continue;
            }
            if self.held.len() < BLOCK {
                return None;
            }
            let whole: [u8; BLOCK] = self.held[..BLOCK].try_into().ok()?;
            if let Some(block) = Block::parse(&whole) {
                self.held.clear();
                return Some(block);
            }
            self.drop_to_next_candidate();
        }
    }

    fn drop_to_next_candidate(&mut self) {
        let next = self.held.iter().skip(1).position(|&b| b == MAGIC[0]).map_or(self.held.len(), |i| i + 1);
        self.held.drain(..next);
    }
}
