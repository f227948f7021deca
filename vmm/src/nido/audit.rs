//! The audit log of a home: written by every face before and after it acts, shown, checked, signed.

use std::collections::VecDeque;

use super::{Nido, new_id};
use crate::api::{AuditAgainst, AuditCheckpoint, AuditFilter, AuditList, AuditRecord, AuditVerdict};
use crate::audit::checkpoint::{Key, check_signature};
use crate::audit::line::Line;
use crate::audit::log::Log;
use crate::audit::read::unreadable;
use crate::audit::{self, Audited, Caller, Ending};
use crate::error::{Code, Error, Result};

impl Nido {
    fn audit_log(&self) -> Log {
        Log::at(self.home().audit())
    }

    /// Writes down that `caller` asks for `tool` with these arguments, which are redacted, and waits until that is on the
    /// disk, which blocks the thread for some milliseconds. The operation must not be done if this fails. How it ended goes to
    /// [`Audited::end`].
    ///
    /// # Errors
    /// `audit_failed`.
    pub fn audit_begin(&self, caller: &Caller, tool: &str, arguments: &serde_json::Value) -> Result<Audited> {
        Audited::begin(self.audit_log(), caller, tool, arguments, &new_id()?)
    }

    /// Writes down that `caller` was not allowed what it asked for. `reason` is a word, such as `not_in_allowlist`.
    ///
    /// # Errors
    /// `audit_failed`.
    pub fn audit_denied(&self, caller: &Caller, tool: &str, arguments: &serde_json::Value, reason: &str) -> Result<()> {
        audit::denied(&self.audit_log(), caller, tool, arguments, &new_id()?, reason)
    }

    /// Writes down that `caller` looked at something with `tool`, and how that ended: one line, without waiting for the disk. The
    /// answer must be withheld if this fails. What changes anything, or reaches into a guest, goes to [`Self::audit_begin`].
    ///
    /// # Errors
    /// `audit_failed`.
    pub fn audit_looked(
        &self,
        caller: &Caller,
        tool: &str,
        arguments: &serde_json::Value,
        ending: Ending,
        reason: &str,
    ) -> Result<()> {
        audit::looked(&self.audit_log(), caller, tool, arguments, &new_id()?, (ending, reason))
    }

    /// The lines that a filter wants, the oldest first.
    ///
    /// # Errors
    /// `internal` if the files cannot be read.
    pub fn audit_show(&self, filter: &AuditFilter) -> Result<AuditList> {
        let mut records = VecDeque::new();
        let mut damaged = 0;
        let files = self.audit_log().open_all().map_err(unreadable)?;
        let read = files.each(|_, text, whole| {
            match Line::parse(text) {
                Some(line) => {
                    let record = AuditRecord::from(line);
                    if filter.wants(&record) {
                        records.push_back(record);
                    }
                    if filter.tail.is_some_and(|tail| records.len() > tail) {
                        records.pop_front();
                    }
                }
                None => damaged += u64::from(whole),
            }
            true
        });
        read.map_err(unreadable)?;
        Ok(AuditList { records: records.into(), damaged })
    }

    /// Whether the lines hang together, and, given a checkpoint, whether they still are those it was made of. That something
    /// is wrong is an answer, not an error.
    ///
    /// # Errors
    /// `audit_broken` if the checkpoint itself is not as it was signed; `internal` if the files cannot be read.
    pub fn audit_verify(&self, against: Option<&AuditCheckpoint>) -> Result<AuditVerdict> {
        against.map(check_signature).transpose()?;
        let log = self.audit_log();
        let (mut verdict, _) = log.check(against)?;
        verdict.against = against.map(|checkpoint| AuditAgainst {
            seq: checkpoint.seq,
            time: checkpoint.time,
            public_key: checkpoint.public_key.clone(),
            own_key: Key::existing(&log).is_some_and(|key| key.public() == checkpoint.public_key),
        });
        Ok(verdict)
    }

    /// Signs the last line's number and chain. The key is made the first time.
    ///
    /// # Errors
    /// `audit_broken` if the log does not hold together, `path_not_found` if it is empty, `internal`.
    pub fn audit_checkpoint(&self) -> Result<AuditCheckpoint> {
        self.audit_log().checkpoint()
    }
}

impl AuditVerdict {
    /// What is wrong, as a failure.
    #[must_use]
    pub fn error(&self) -> Option<Error> {
        let trouble = self.trouble.as_ref()?;
        let place = match (&trouble.file, trouble.line) {
            (Some(file), Some(line)) => format!("{file}, line {line}"),
            _ => "the audit log".into(),
        };
        let seq = trouble.seq.map(|seq| format!(" (number {seq})")).unwrap_or_default();
        let error = Error::new(Code::AuditBroken, format!("{place}{seq}: {}", trouble.message));
        Some(error.hint("keep the files as they are and find out who wrote to them"))
    }
}

impl From<Line> for AuditRecord {
    fn from(line: Line) -> Self {
        let Line { record, chain } = line;
        let some = |text: String| (!text.is_empty()).then_some(text);
        let params = shown(&record.params);
        Self {
            seq: record.seq,
            time: record.time,
            face: record.face,
            actor: shown(&record.actor),
            agent: some(shown(&record.agent)),
            tool: shown(&record.tool),
            params: serde_json::from_str(&params).unwrap_or_else(|_| params.into()),
            stage: shown(&record.stage),
            result: shown(&record.result),
            reason: some(shown(&record.reason)),
            id: shown(&record.id),
            chain,
        }
    }
}

/// Bytes as text; those that are none as `\xNN`.
fn shown(bytes: &[u8]) -> String {
    bytes.utf8_chunks().fold(String::new(), |text, chunk| {
        let invalid: String = chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")).collect();
        text + chunk.valid() + &invalid
    })
}
