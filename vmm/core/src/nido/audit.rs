//! The audit log of a home: written by every front end before and after an operation, shown, checked, signed.

use std::collections::VecDeque;

use nido_api::error::{Error, Result};
use nido_api::operation;
use nido_api::{
    AuditAgainst, AuditCheckpoint, AuditFilter, AuditList, AuditLog, AuditReads, AuditRecord, AuditVerdict,
};
use nido_engine::host::facts;
use nido_engine::space_reserve::SpaceReserve;
use nido_files::random;

use super::Nido;
use super::create::SPACE_RESERVE_BYTES;
use crate::audit::checkpoint::{Key, check_signature};
use crate::audit::line::Line;
use crate::audit::log::{Log, LogTail};
use crate::audit::read::unreadable;
use crate::audit::{self, AuditOutcome, Audited, Caller};

/// What the store calls the log of what is done.
pub(super) const WRITE_LOG_HEAD: &str = "acts";

impl Nido {
    /// The log of what is done. Where it is, is written into the home before anything is written there.
    pub(super) fn audit_log(&self) -> Result<Log> {
        let place = self.home().keep_audit_place();
        let place = place.map_err(|e| Error::io("cannot record the path of the audit log", e))?;
        Ok(Log::at(place))
    }

    /// Uses what is kept for a full disk, if this one is. Whether there is more space now.
    fn release_space(&self) -> bool {
        let is_full = facts::disk_free_bytes(self.home().root()).is_ok_and(|free| free < SPACE_RESERVE_BYTES);
        is_full && SpaceReserve::of(self.home()).release()
    }

    /// The store knows a line, so that a log that was emptied is noticed.
    fn audit_written(&self, last: &LogTail) {
        if let Err(error) = self.store().audit_head_written(WRITE_LOG_HEAD, last.seq, &last.chain) {
            tracing::warn!("cannot record the last line of the audit log: {error}");
        }
    }

    /// Records that `caller` asks for `tool` with these arguments, which are redacted, and waits until that is on the
    /// disk, which blocks the thread for some milliseconds. The operation must not be done if this fails. How it ended goes to
    /// [`Audited::end`].
    ///
    /// # Errors
    /// `audit_failed`.
    pub fn audit_begin(&self, caller: &Caller, tool: &str, arguments: &serde_json::Value) -> Result<Audited> {
        // What happened before this was requested precedes it.
        if let Err(error) = self.audit_events() {
            tracing::warn!("{error}");
        }
        let begin = || Audited::begin(self.audit_log()?, caller, tool, arguments, &random::id()?);
        let audited = match begin() {
            // What gives space back is not refused because the disk is full.
            Err(_) if operation::find(tool).is_some_and(|known| known.frees_space) && self.release_space() => begin()?,
            begun => begun?,
        };
        self.audit_written(audited.attempt());
        Ok(audited)
    }

    /// Records that `caller` was not allowed what it asked for. `reason` is a word, such as `not_in_allowlist`.
    ///
    /// # Errors
    /// `audit_failed`.
    pub fn audit_denied(&self, caller: &Caller, tool: &str, arguments: &serde_json::Value, reason: &str) -> Result<()> {
        let last = audit::denied(&self.audit_log()?, caller, tool, arguments, &random::id()?, reason)?;
        self.audit_written(&last);
        Ok(())
    }

    /// Records that `caller` looked at something with `tool`, and how that ended: one line, without waiting for the disk. The
    /// answer must be withheld if this fails. What changes anything, or reaches into a guest, goes to [`Self::audit_begin`].
    ///
    /// # Errors
    /// `audit_failed`.
    pub fn audit_read_access(
        &self,
        caller: &Caller,
        tool: &str,
        arguments: &serde_json::Value,
        ending: AuditOutcome,
        reason: &str,
    ) -> Result<()> {
        self.audit_log()?;
        audit::record_read(&self.reads, caller, tool, arguments, &random::id()?, (ending, reason))
    }

    /// Records how often this process was asked to show the same, where that was only counted.
    pub fn audit_flush(&self) {
        for record in self.reads.take() {
            if let Err(error) = self.reads.log().append_soon(record) {
                tracing::warn!("{error}");
            }
        }
    }

    /// The lines of both logs that a filter wants, the oldest first.
    ///
    /// # Errors
    /// `internal` if the files cannot be read.
    pub fn audit_show(&self, filter: &AuditFilter) -> Result<AuditList> {
        // Numbers are those of one log: a page is of one.
        if filter.log == Some(AuditLog::Events) {
            self.audit_events_if_writable()?;
        }
        let only = filter.log.or(filter.after.map(|_| AuditLog::Acts));
        let mut shown = AuditList { records: Vec::new(), next_cursor: None, damaged: 0 };
        for (log, of) in [
            (Log::at(self.home().audit()), AuditLog::Acts),
            (Log::reads(self.home().audit()), AuditLog::Reads),
            (Log::events(self.home().audit()), AuditLog::Events),
        ] {
            // Events are no requests: they are shown where they are asked for.
            if only.map_or(of != AuditLog::Events, |only| only == of) {
                let part = shown_of(&log, of, filter)?;
                shown.records.extend(part.records);
                shown.damaged += part.damaged;
                shown.next_cursor = shown.next_cursor.or(part.next_cursor);
            }
        }
        // Within a second each log keeps its own order.
        shown.records.sort_by_key(|record| record.time);
        let left_out = filter.tail.map_or(0, |tail| shown.records.len().saturating_sub(tail));
        shown.records.drain(..left_out);
        Ok(shown)
    }

    /// Whether the hash chains of both logs are intact, whether the one of what was done still has what the store knows of it, and, given a
    /// checkpoint, whether it still is the one that was signed. That something is wrong is an answer, not an error.
    ///
    /// # Errors
    /// `audit_broken` if the checkpoint itself is not as it was signed; `internal` if the files cannot be read.
    pub fn audit_verify(&self, against: Option<&AuditCheckpoint>) -> Result<AuditVerdict> {
        against.map(check_signature).transpose()?;
        let log = Log::at(self.home().audit());
        // Asked before the log is read: lines that come meanwhile are no reason to miss any.
        let known = self.store().audit_head(WRITE_LOG_HEAD)?;
        let (mut verdict, _) = log.check_known(against, known)?;
        let (reads, _) = Log::reads(self.home().audit()).check(None)?;
        let (events, _) = Log::events(self.home().audit()).check(None)?;
        verdict.ok &= reads.ok && events.ok;
        verdict.trouble = verdict.trouble.or_else(|| reads.trouble.clone()).or_else(|| events.trouble.clone());
        verdict.reads = Some(part(&reads));
        verdict.events = Some(part(&events)).filter(|events| events.files > 0);
        verdict.against = against.map(|checkpoint| AuditAgainst {
            seq: checkpoint.seq,
            time: checkpoint.time,
            public_key: checkpoint.public_key.clone(),
            own_key: Key::existing(&log).is_some_and(|key| key.public() == checkpoint.public_key),
        });
        Ok(verdict)
    }

    /// Signs the number and chain of the last line about what was done. The key is made the first time.
    ///
    /// # Errors
    /// `audit_broken` if the log does not hold together, `path_not_found` if it is empty, `internal`.
    pub fn audit_checkpoint(&self) -> Result<AuditCheckpoint> {
        self.audit_log()?.checkpoint()
    }
}

/// What a verdict says about a log other than that of writes.
fn part(verdict: &AuditVerdict) -> AuditReads {
    let AuditVerdict { files, lines, first_seq, last_seq, half_line, .. } = *verdict;
    AuditReads { files, lines, first_seq, last_seq, half_line }
}

/// The lines of one log that a filter wants.
fn shown_of(log: &Log, of: AuditLog, filter: &AuditFilter) -> Result<AuditList> {
    let mut records = VecDeque::new();
    let mut damaged = 0;
    let most = filter.limit.filter(|_| filter.after.is_some());
    let mut next_cursor = None;
    let files = log.open_all().map_err(unreadable)?;
    let read = files.each(|_, text, whole| {
        match Line::parse(text) {
            Some(line) => {
                let record = AuditRecord { log: of, ..AuditRecord::from(line) };
                if filter.wants(&record) {
                    if most.is_some_and(|most| records.len() >= most) {
                        next_cursor = records.back().map(|last: &AuditRecord| last.seq).or(filter.after);
                        return false;
                    }
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
    Ok(AuditList { records: records.into(), next_cursor, damaged })
}

impl From<Line> for AuditRecord {
    fn from(line: Line) -> Self {
        let Line { record, chain } = line;
        let some = |text: String| (!text.is_empty()).then_some(text);
        let params = shown(&record.params);
        Self {
            log: AuditLog::Acts,
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

/// Bytes as text; those that are not UTF-8 as `\xNN`.
fn shown(bytes: &[u8]) -> String {
    bytes.utf8_chunks().fold(String::new(), |text, chunk| {
        let invalid: String = chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")).collect();
        text + chunk.valid() + &invalid
    })
}
