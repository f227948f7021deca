//! The audit log's entries for calls of tools: the attempt before it, the outcome after it.

use std::sync::Arc;

use nido_api::Caller;
use nido_api::error::{Error, Result};
use nido_core::audit::{Audited, Ending};
use serde_json::Value;

use crate::answer::{ToolResult, plain};
use crate::app::App;
use crate::call_context::CallContext;
use crate::tools::Tool;

/// The entry of one call.
#[derive(Debug)]
pub enum AuditEntry {
    /// The attempt stands in the log, and waits for its outcome.
    Open(Box<Audited>),
    /// It only reads: one line is enough, when it has read.
    Read(&'static str, Value),
}

/// Writes the attempt down. It is synced to the disk, which may take its time.
pub async fn begin(call: &CallContext, tool: &'static Tool, arguments: Value) -> Result<AuditEntry> {
    if tool.op.is_read() {
        return Ok(AuditEntry::Read(tool.name(), arguments));
    }
    let (nido, who) = (Arc::clone(call.app.unreconciled()), call.who.clone());
    let begun = tokio::task::spawn_blocking(move || nido.audit_begin(&who, tool.name(), &arguments)).await;
    let begun = begun.map_err(|e| Error::internal(format!("the audit log broke down: {e}")))?;
    begun.map(|audited| AuditEntry::Open(Box::new(audited)))
}

/// Writes down that it was not allowed.
pub async fn denied(app: &App, who: &Caller, tool: &str, arguments: Value, reason: &'static str) -> Result<()> {
    let (nido, who, tool) = (Arc::clone(app.unreconciled()), who.clone(), tool.to_owned());
    let written = tokio::task::spawn_blocking(move || nido.audit_denied(&who, &tool, &arguments, reason)).await;
    written.map_err(|e| Error::internal(format!("the audit log broke down: {e}")))?
}

/// Writes down how it ended; `word` says whether it was approved, or why no approval was needed.
pub async fn end_with(
    entry: AuditEntry,
    call: &CallContext,
    outcome: &Result<&ToolResult, &Error>,
    word: &'static str,
) -> Result<()> {
    let (ending, reason) = match outcome {
        Ok(result) => {
            let words = [word, result.word.as_str()].into_iter().filter(|word| !word.is_empty());
            (Ending::Success, words.collect::<Vec<_>>().join(","))
        }
        Err(error) => (Ending::from(*error), call.notes().reason.unwrap_or(error.code().slug()).into()),
    };
    end(call, entry, ending, reason).await
}

/// What was done has been done: that only the line about it is missing goes to the server's own log. What was only looked at is
/// not shown without its line.
pub async fn end(call: &CallContext, entry: AuditEntry, ending: Ending, reason: String) -> Result<()> {
    let (nido, who) = (Arc::clone(call.app.unreconciled()), call.who.clone());
    let ended = tokio::task::spawn_blocking(move || match entry {
        AuditEntry::Open(audited) => {
            if let Err(error) = audited.end_as(ending, &reason) {
                tracing::error!("{}", plain(error.message()));
            }
            Ok(())
        }
        AuditEntry::Read(tool, arguments) => nido.audit_looked(&who, tool, &arguments, ending, &reason),
    });
    ended.await.map_err(|e| Error::internal(format!("the audit log broke down: {e}")))?
}
