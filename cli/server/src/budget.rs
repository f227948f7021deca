//! The memory budget of responses. The output of commands is held as JSON until the client has read it.
//!
//! ```text
//!  exec, runs: each piece of output ──> Reservation::grow ──> an extension of the response ──> its body, until that is sent
//! ```
//!
//! Invariant: dropping a reservation releases it, so a request that fails keeps none.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::{Body, HttpBody as _};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures::StreamExt as _;

/// For all responses that are being built or sent, in bytes.
const TOTAL: usize = 384 << 20;

/// The bytes that are left.
#[derive(Debug, Clone)]
pub struct Budget(Arc<AtomicUsize>);

impl Default for Budget {
    fn default() -> Self {
        Self(Arc::new(AtomicUsize::new(TOTAL)))
    }
}

impl Budget {
    /// An empty reservation.
    pub fn hold(&self) -> Reservation {
        Reservation { left: Arc::clone(&self.0), bytes: 0 }
    }
}

/// A part of the budget.
#[derive(Debug)]
pub struct Reservation {
    left: Arc<AtomicUsize>,
    bytes: usize,
}

impl Reservation {
    /// Reserves more; returns whether the budget allowed it.
    pub fn grow(&mut self, bytes: usize) -> bool {
        let take = |left: usize| left.checked_sub(bytes);
        let taken = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok();
        self.bytes += if taken { bytes } else { 0 };
        taken
    }

    /// Attaches the reservation to a response, until its body has been sent.
    pub fn leave_to(self, response: &mut Response) {
        if self.bytes > 0 {
            response.extensions_mut().insert(Arc::new(self));
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.left.fetch_add(self.bytes, Ordering::SeqCst);
    }
}

/// Moves the reservation of a response into its body.
pub fn until_sent(mut response: Response) -> Response {
    let Some(held) = response.extensions_mut().remove::<Arc<Reservation>>() else { return response };
    if let Some(length) = response.body().size_hint().exact() {
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    response.map(|body| {
        Body::from_stream(body.into_data_stream().map(move |piece| {
            let _until_then = &held;
            piece
        }))
    })
}

/// How long bytes are as a string of JSON, or as base64 where they are not UTF-8.
pub fn json_length(bytes: &[u8]) -> usize {
    if std::str::from_utf8(bytes).is_err() {
        return bytes.len().div_ceil(3) * 4;
    }
    let of = |byte: &u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 8 | 12 => 2,
        0..0x20 => 6,
        _ => 1,
    };
    bytes.iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fifty answers of 25 MiB each, read slowly, took more than a gibibyte of memory.
    #[tokio::test]
    async fn a_reservation_is_released_with_its_body() {
        let budget = Budget(Arc::new(AtomicUsize::new(10)));
        let (mut first, mut second) = (budget.hold(), budget.hold());
        assert!(first.grow(6) && !second.grow(5) && second.grow(4) && !first.grow(1));
        drop(second);
        let mut response = Response::new(Body::from("text"));
        first.leave_to(&mut response);
        let response = until_sent(response);
        assert_eq!(response.headers()[header::CONTENT_LENGTH], "4");
        assert!(!budget.hold().grow(5));
        assert_eq!(axum::body::to_bytes(response.into_body(), 9).await.unwrap(), "text");
        assert!(budget.hold().grow(10));
    }

    #[test]
    fn the_length_of_json_is_that_of_its_escapes() {
        for text in ["plain", "a\"b\\c\n\r\t\u{8}\u{c}", "\0\u{1b}[0m", "grün"] {
            assert_eq!(json_length(text.as_bytes()) + 2, serde_json::to_string(text).unwrap().len(), "{text:?}");
        }
        assert_eq!(json_length(b"\xff\x00"), 4);
    }
}
