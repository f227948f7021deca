//! The message to a webhook's endpoint: its body and its id.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Event, EventDetails};
use crate::error::{Error, Result};

/// The event of a test message.
pub const WEBHOOK_TEST: &str = "webhook.test";

/// The body of a message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WebhookBody {
    /// What happened: an [`super::EventKind`], or [`WEBHOOK_TEST`].
    pub event: String,
    /// When.
    pub timestamp: Timestamp,
    /// The VM, by the name it had; none for what happens to templates.
    pub vm_name: Option<String>,
    /// More about it.
    pub details: EventDetails,
}

impl WebhookBody {
    /// Of an event.
    #[must_use]
    pub fn of(event: &Event) -> Self {
        let Event { cursor: _, event, timestamp, vm_name, details } = event;
        Self {
            event: event.word().into(),
            timestamp: *timestamp,
            vm_name: vm_name.as_ref().map(ToString::to_string),
            details: details.clone(),
        }
    }

    /// Of a test.
    #[must_use]
    pub fn test(now: Timestamp) -> Self {
        Self { event: WEBHOOK_TEST.into(), timestamp: now, vm_name: None, details: EventDetails::default() }
    }
}

/// The body of a message about an event, as it is kept until it is delivered.
///
/// # Errors
/// `internal`.
pub fn encode_webhook_body(body: &WebhookBody) -> Result<String> {
    serde_json::to_string(body).map_err(|e| Error::internal(format!("an event cannot be written: {e}")))
}

/// The header `webhook-id` of an event's message to an endpoint: the same at every attempt, and in no other home.
#[must_use]
pub fn webhook_message_id(webhook_id: &str, cursor: u64) -> String {
    format!("msg_{webhook_id}_{cursor}")
}
