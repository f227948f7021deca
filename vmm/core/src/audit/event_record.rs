//! An event of the store as a line of the log of events. Pure.

use jiff::Timestamp;
use nido_api::error::{Error, Result};
use nido_api::sanitize::head;
use nido_api::{Event, EventDetails, FrontEnd};
use serde::{Deserialize, Serialize};

use super::line::Record;
use super::{AuditOutcome, word};

/// The caller of what no caller requested.
pub const ACTOR: &str = "nido";
/// How much of a sentence is kept, in bytes: QEMU's and the guest's words may be in it.
const MESSAGE_BYTES_MAX: usize = 512;

/// What a line of the log of events has as `params`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EventParams {
    /// The event's cursor in the store: a writer that was killed may have copied an event twice.
    pub cursor: u64,
    /// When it happened; the line's time is that of the copy.
    pub at: Timestamp,
    /// The number of the last attempt in `acts` when it was copied. Whatever was requested after the event has a greater one.
    pub acts: u64,
    /// The VM's name at that time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_name: Option<String>,
    /// Its details.
    pub details: EventDetails,
}

/// The line of an event. What a guest printed is left out. Parameters are never shortened: a receipt is made of them.
pub fn record(event: &Event, acts: u64) -> Result<Record> {
    let mut details = event.details.clone();
    details.last_log_entries.clear();
    details.message = details.message.map(|text| head(&text, MESSAGE_BYTES_MAX).to_owned());
    let vm_name = event.vm_name.as_ref().map(ToString::to_string);
    let params = EventParams { cursor: event.cursor, at: event.timestamp, acts, vm_name, details };
    let params = serde_json::to_vec(&params).map_err(|e| Error::internal(e.to_string()))?;
    Ok(Record {
        time: Timestamp::UNIX_EPOCH,
        face: FrontEnd::Host,
        agent: Vec::new(),
        tool: word(event.event.word()),
        params,
        result: word(AuditOutcome::Success.word()),
        reason: Vec::new(),
        actor: word(ACTOR),
        id: word(&format!("{:016x}", event.cursor)),
        stage: word("outcome"),
        seq: 0,
    })
}
