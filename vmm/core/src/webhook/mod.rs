//! Webhooks: signed messages about events, delivered at least once, in order for each endpoint and VM, by a process that
//! lives only while there is something to deliver.
//!
//! ```text
//!  an event and its deliveries, in one transaction (store/outbox.rs)
//!     └─ its writer makes sure that a delivery worker runs (nido/webhooks.rs: deliver.lock)
//!          └─ nido/delivery.rs  takes what is due ── send.rs  one attempt ── verdict.rs, backoff.rs  what it means
//!                                                └─ message.rs, target.rs  what is sent, and where to
//! ```
//!
//! Invariant: nothing an endpoint writes is kept but the status of its answer.

mod backoff;
mod message;
mod send;
pub mod target;
mod verdict;

pub use backoff::{FailedDelivery, RETRY_AFTER_MAX_MS, next_attempt};
pub use send::{AttemptResult, Sender, resolve};
pub use verdict::Verdict;
