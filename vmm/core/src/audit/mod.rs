//! The audit log: callers, operations and results, in lines that form a hash chain.
//!
//! ```text
//!  front end -- audit_begin --> attempt, on the disk --> the operation --> outcome, on the disk
//!              |                                      (none: killed on the way)
//!              +-- cannot be written: the act is refused
//!
//!  front end -- a read -- audit_read_access --> outcome, queued for the disk --> the result
//!                                      +-- cannot be written: the answer is withheld
//!
//!  line.rs    a line: rendered, parsed, chained          [pure]
//!  redact.rs  what of the arguments may be recorded  [pure]
//!  log.rs     the files: appended to, repaired, rotated; two logs, one for what changes something, one for what is only read
//!  oversized_arguments.rs   arguments that are too long for a line
//!  repeats.rs reads that repeat are counted
//!  read.rs    the files: read
//!  check.rs   verifies the hash chain                [pure]
//!  event_record.rs    an event, as a line                [pure]
//!  receipt/   the lines about one VM, signed; built and verified [pure]
//!  checkpoint.rs  a signed statement about the last line, to be kept elsewhere
//! ```
//!
//! What it shows and what it cannot: `docs/audit.md`.

pub(crate) mod check;
pub mod checkpoint;
pub(crate) mod event_record;
pub mod line;
pub mod log;
pub(crate) mod read;
pub mod receipt;
pub use nido_api::redact;
mod oversized_arguments;
pub(crate) mod repeats;
#[cfg(test)]
mod tests;

use std::time::Instant;

use jiff::Timestamp;
use nido_api::error::{Code, Error, Hint, Result};
use nido_api::sanitize::head;

use self::line::Record;
use self::log::{Log, LogTail};
use self::repeats::Repeats;
pub use nido_api::{Caller, FrontEnd};

/// The longest text of any kind but arguments, in bytes; more is truncated.
const FIELD_BYTES_MAX: usize = 256;

/// What became of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuditOutcome {
    /// It was done.
    Success,
    /// It failed.
    Error,
    /// It was not allowed.
    Denied,
    /// Unknown: it was interrupted.
    Unknown,
}

impl From<&Error> for AuditOutcome {
    /// How an operation that failed like this ended: the same for every front end.
    fn from(error: &Error) -> Self {
        Self::of_code(error.code())
    }
}

impl AuditOutcome {
    /// The same, where only the error's code is known.
    #[must_use]
    pub const fn of_code(code: Code) -> Self {
        match code {
            Code::Denied | Code::Unauthorized | Code::ApprovalRequired => Self::Denied,
            _ => Self::Error,
        }
    }

    /// The word in a line.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Error => "error",
            Self::Denied => "denied",
            Self::Unknown => "unknown",
        }
    }
}

/// An operation whose attempt is recorded and whose outcome is not yet.
///
/// Dropped without an end, it writes that the outcome is unknown (`result='unknown' reason='interrupted'`).
#[derive(Debug)]
pub struct Audited {
    log: Log,
    record: Record,
    attempt: LogTail,
    ended: bool,
}

impl Audited {
    /// Writes the attempt down and waits until it is on the disk.
    pub(crate) fn begin(
        log: Log,
        caller: &Caller,
        tool: &str,
        arguments: &serde_json::Value,
        id: &str,
    ) -> Result<Self> {
        let record = act(&log, caller, tool, arguments, id, "attempt")?;
        let record = Record { result: b"pending".to_vec(), ..record };
        let attempt = log.append(record.clone())?;
        Ok(Self { log, record, attempt, ended: false })
    }

    /// The line of the attempt.
    pub(crate) fn attempt(&self) -> &LogTail {
        &self.attempt
    }

    /// Records what became of it: `success`, or `error` or `denied` with the error's code.
    ///
    /// # Errors
    /// `audit_failed`; the operation has been done nevertheless.
    pub fn end<T>(self, outcome: &Result<T>) -> Result<()> {
        match outcome {
            Ok(_) => self.end_as(AuditOutcome::Success, ""),
            Err(error) => self.end_as(AuditOutcome::from(error), error.code().slug()),
        }
    }

    /// Writes the outcome, and a word for its reason.
    ///
    /// # Errors
    /// As [`Self::end`].
    pub fn end_as(mut self, ending: AuditOutcome, reason: &str) -> Result<()> {
        self.write(ending, reason)
    }

    fn write(&mut self, ending: AuditOutcome, reason: &str) -> Result<()> {
        self.ended = true;
        let (result, reason, stage) = (word(ending.word()), word(reason), word("outcome"));
        self.log.append(Record { result, reason, stage, ..self.record.clone() }).map(drop)
    }
}

impl Drop for Audited {
    fn drop(&mut self) {
        if !self.ended
            && let Err(error) = self.write(AuditOutcome::Unknown, "interrupted")
        {
            tracing::warn!("{error}");
        }
    }
}

/// Records that something was not allowed; it needs no attempt, for nothing is done.
pub(crate) fn denied(
    log: &Log,
    caller: &Caller,
    tool: &str,
    arguments: &serde_json::Value,
    id: &str,
    reason: &str,
) -> Result<LogTail> {
    let record = act(log, caller, tool, arguments, id, "outcome")?;
    log.append(Record { result: word(AuditOutcome::Denied.word()), reason: word(reason), ..record })
}

/// Records that something was looked at, and what came of it. It changes nothing, so it needs no attempt and the disk is not
/// waited for. What repeats is counted.
pub(crate) fn record_read(
    repeats: &Repeats,
    caller: &Caller,
    tool: &str,
    arguments: &serde_json::Value,
    id: &str,
    (ending, reason): (AuditOutcome, &str),
) -> Result<()> {
    let record = record(caller, tool, redact::params(arguments), id, "outcome");
    let record = Record { result: word(ending.word()), reason: word(reason), ..record };
    let (own, over) = repeats.note(&record, Instant::now());
    for record in over.into_iter().chain(own.then_some(record)) {
        repeats.log().append_soon(record)?;
    }
    Ok(())
}

/// A record about something that is done or refused: arguments that do not fit into it are kept next to it, and are on the disk before
/// it is.
fn act(log: &Log, caller: &Caller, tool: &str, arguments: &serde_json::Value, id: &str, stage: &str) -> Result<Record> {
    let (params, whole) = redact::params_and_whole(arguments);
    if let Some(whole) = whole {
        log.keep_whole(&whole)?;
    }
    Ok(record(caller, tool, params, id, stage))
}

/// A record without its result; time and number come when it is written.
fn record(caller: &Caller, tool: &str, params: String, id: &str, stage: &str) -> Record {
    Record {
        time: Timestamp::UNIX_EPOCH,
        face: caller.face,
        agent: word(caller.agent.as_deref().unwrap_or_default()),
        tool: word(tool),
        params: params.into_bytes(),
        result: Vec::new(),
        reason: Vec::new(),
        actor: word(&caller.actor),
        id: word(id),
        stage: word(stage),
        seq: 0,
    }
}

fn word(text: &str) -> Vec<u8> {
    head(text, FIELD_BYTES_MAX).as_bytes().to_vec()
}

/// The audit log cannot be used, and so nothing is done.
fn failed(what: impl std::fmt::Display, source: std::io::Error) -> Error {
    Error::new(Code::AuditFailed, format!("the audit log cannot be written: {what}: {source}"))
        .hint(Hint::host("make it writable, then try again: operations that must be audited are refused without it"))
        .because(source)
}
