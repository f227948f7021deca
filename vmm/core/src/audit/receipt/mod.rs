//! Receipts: the lines of the audit logs about one VM, in one signed document. Pure.
//!
//! ```text
//!  subject.rs   which VM, and from which line to which one its name was its own
//!  segment.rs   consecutive lines of a log: those of the VM whole, the others as hashes; built, and verified
//!  facts.rs     what the lines of the VM state: template, network, creation, deletion
//!  verify.rs    a receipt, without the home
//! ```
//!
//! Invariants: the bytes of a receipt are one rendering of its content, and every byte is covered by the signature; its facts are
//! derived from its lines again when it is verified.

mod facts;
mod segment;
mod subject;
pub mod verify;

use nido_api::AuditReceipt;
use nido_api::error::{Error, Result};

pub(crate) use self::facts::{Facts, facts, shortened_arguments};
pub(crate) use self::segment::SegmentBuilder;
pub(crate) use self::subject::{OwnActs, Subject, Subjects, is_event_of};
use super::checkpoint::Key;

/// Puts key and signature into a receipt.
pub(crate) fn sign(mut receipt: AuditReceipt, key: &Key) -> Result<AuditReceipt> {
    receipt.public_key = key.public();
    receipt.signature = key.signature(&statement(&receipt)?);
    Ok(receipt)
}

/// The text that is signed: the document without its signature, as JSON without white space, with sorted keys (RFC 8785).
pub(crate) fn statement(receipt: &AuditReceipt) -> Result<String> {
    let mut value = serde_json::to_value(receipt).map_err(|e| Error::internal(e.to_string()))?;
    if let Some(fields) = value.as_object_mut() {
        fields.remove("signature");
    }
    value.sort_all_objects();
    Ok(value.to_string())
}

/// The bytes of a receipt.
///
/// # Errors
/// None is expected.
pub fn render(receipt: &AuditReceipt) -> Result<String> {
    Ok(serde_json::to_string_pretty(receipt).map_err(|e| Error::internal(e.to_string()))? + "\n")
}
