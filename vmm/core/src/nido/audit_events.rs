//! Copies the events of the store to the audit log, so that ends without a caller and refusals of the network are in a chain, too.
//!
//! ```text
//!  any process ── transition ──> event in the store
//!  audit_begin, before each attempt ┐
//!  nido watch, every 2 s            ├──> events that were not copied ──> mcp-audit-events.log
//!  receipt, audit show              ┘
//! ```
//!
//! Invariant: an event that is in the store before an operation is requested is in the log before the operation's attempt, unless the
//! log of events cannot be written.

use nido_api::error::Result;

use super::Nido;
use super::audit::WRITE_LOG_HEAD;
use crate::audit::event_record::record;
use crate::audit::log::Log;

impl Nido {
    /// Copies the events that were not copied yet, and waits until they are on the disk.
    ///
    /// # Errors
    /// `audit_failed`, and those of the store.
    pub(super) fn audit_events(&self) -> Result<()> {
        let store = self.store();
        if !store.has_uncopied_events()? {
            return Ok(());
        }
        let log = Log::events(self.audit_log()?.directory().to_owned());
        // The last one waits for the disk, and so for those before it: the store is not ahead of the log after a power cut.
        store.copy_events(WRITE_LOG_HEAD, |event, acts, is_last| {
            let record = record(event, acts)?;
            if is_last { log.append(record) } else { log.append_soon(record) }.map(drop)
        })
    }

    /// The same, where the home can be written.
    pub(super) fn audit_events_if_writable(&self) -> Result<()> {
        if self.is_read_only() { Ok(()) } else { self.audit_events() }
    }
}
