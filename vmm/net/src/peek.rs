//! What a connection of the guest is for, read from its first bytes: the server's name in a TLS ClientHello, and the `Host` of
//! HTTP/1 requests.
//!
//! ```text
//!   bytes so far ── client_hello ──> NeedMore | Done(ClientHello) | Invalid      first byte 0x16
//!                ── http_head ─────> NeedMore | Done(HttpHead)    | Invalid
//!                ── RequestStream::advance ──> each head of a connection, and what of its bodies passes
//! ```
//!
//! Invariants:
//! - The parsers are strict: what servers are known to read in different ways (two names, two lengths, bare line feeds) is
//!   invalid, so that the server cannot find another name in the bytes than the engine did.
//! - They keep nothing between calls: the caller calls again with all bytes so far. More bytes change `NeedMore` only: a result
//!   that is `Done` or `Invalid` stays the same.
//! - One call takes time linear in the bytes so far, which are at most [`HELLO_MAX`] or [`HEAD_MAX`].

mod hello;
mod http;
mod stream;

pub use hello::{ClientHello, HELLO_MAX, client_hello};
pub use http::{Body, HEAD_MAX, HttpHead, http_head};
pub use stream::{RequestStream, Step};

/// What the first bytes of a connection are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peek<T> {
    /// The beginning of a valid message.
    NeedMore,
    /// A complete message, perhaps with more bytes after it.
    Done(T),
    /// Not such a message, with the reason.
    Invalid(&'static str),
}

/// What a parser has found, `None` if it needs more bytes, or why the bytes are invalid.
type Parsed<T> = Result<Option<T>, &'static str>;

impl<T> From<Parsed<T>> for Peek<T> {
    fn from(result: Parsed<T>) -> Self {
        match result {
            Ok(Some(message)) => Self::Done(message),
            Ok(None) => Self::NeedMore,
            Err(reason) => Self::Invalid(reason),
        }
    }
}
