//! Webhooks: signed messages about events, delivered at least once, in order for each endpoint and VM, by a process that
//! lives only while there is something to deliver.
//!
//! ```text
//!  an event and its deliveries, in one transaction (store/outbox.rs)
//!     └─ whoever wrote it sees to it that one deliverer lives (nido/webhooks.rs: deliver.lock)
//!          └─ deliver.rs  takes what is due ── send.rs  one attempt ── verdict.rs, backoff.rs  what it means
//!                                                └─ message.rs, sign.rs, target.rs  what is sent, and where to
//! ```
//!
//! Invariant: nothing an endpoint writes is kept but the status of its answer.

mod backoff;
pub(crate) mod deliver;
mod message;
mod send;
mod sign;
pub mod target;
mod verdict;

pub use message::{Body, TEST_EVENT, encode as encode_body};
pub use send::{Sender, resolve};
pub use sign::Secret;
pub use verdict::Verdict;

/// The header `webhook-id` of an event's message to an endpoint: the same at every attempt, and in no other home.
#[must_use]
pub fn message_id(webhook_id: &str, cursor: u64) -> String {
    format!("msg_{webhook_id}_{cursor}")
}
