//! The audit log, as it is requested and answered. What the words mean: `docs/audit.md`.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::FrontEnd;
use crate::error::{Code, Error};
use crate::name::VmName;

/// One of the three audit logs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum AuditLog {
    /// Writes: operations that change something or reach into a guest, and refused requests.
    #[default]
    Acts,
    /// Reads: operations that change nothing.
    Reads,
    /// Events: what happened to VMs, whether or not a caller requested it.
    Events,
}

/// One line of the audit log. Bytes that are not UTF-8 are shown as `\xNN`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditRecord {
    /// The log that contains it.
    #[serde(default)]
    pub log: AuditLog,
    /// The line's sequence number in that log. Each line has the next one.
    pub seq: u64,
    /// Time, to the second.
    pub time: Timestamp,
    /// The front end that received the request.
    pub face: FrontEnd,
    /// The authenticated caller: `uid:1000`, `token:ci#ID`.
    pub actor: String,
    /// The name that the client gave itself. Not verified.
    pub agent: Option<String>,
    /// The operation, for example `vm_exec`.
    pub tool: String,
    /// Its arguments, redacted. Long ones are shortened to both ends, with `cut: {bytes, sha256}`.
    pub params: serde_json::Value,
    /// `attempt` or `outcome`.
    pub stage: String,
    /// `pending` for an attempt; `success`, `error`, `denied` or `unknown` for an outcome.
    pub result: String,
    /// Details of the result: an error code, or `exit_code:3`.
    pub reason: Option<String>,
    /// Id that the attempt and the outcome of an operation share.
    pub id: String,
    /// Hash chain up to and including this line: SHA-256 in hexadecimal.
    pub chain: String,
}

/// Filters for lines of the audit log; absent ones match every line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AuditFilter {
    /// The log; absent: acts and reads, or with [`Self::after`], which counts the lines of one log, `acts`.
    pub log: Option<AuditLog>,
    /// Lines from this time on.
    pub since: Option<Timestamp>,
    /// Lines of this operation.
    pub tool: Option<String>,
    /// Lines of this caller.
    pub actor: Option<String>,
    /// Lines with this result.
    pub result: Option<String>,
    /// Lines about the VM of this name, as far as the arguments name one.
    pub vm: Option<VmName>,
    /// At most this many, the last ones.
    pub tail: Option<usize>,
    /// The first lines after this sequence number: at most [`Self::limit`].
    pub after: Option<u64>,
    /// How many lines after [`Self::after`]; all if absent.
    pub limit: Option<usize>,
}

impl AuditFilter {
    /// Whether a line is among those asked for, [`Self::tail`] apart.
    #[must_use]
    pub fn wants(&self, record: &AuditRecord) -> bool {
        let is = |wanted: &Option<String>, what: &str| wanted.as_deref().is_none_or(|wanted| wanted == what);
        self.since.is_none_or(|since| record.time >= since)
            && self.after.is_none_or(|after| record.seq > after)
            && is(&self.tool, &record.tool)
            && is(&self.actor, &record.actor)
            && is(&self.result, &record.result)
            && self.vm.as_ref().is_none_or(|vm| names_vm(&record.params, vm.as_str()))
    }
}

/// Whether the arguments of a line name this VM.
#[must_use]
pub fn names_vm(params: &serde_json::Value, vm: &str) -> bool {
    ["name", "vm", "vm_name", "names", "copies"].iter().any(|key| match params.get(key) {
        Some(serde_json::Value::String(name)) => name == vm,
        Some(serde_json::Value::Array(names)) => names.iter().any(|name| name == vm),
        // The VM of a run, as it is spawned.
        Some(serde_json::Value::Object(spec)) => spec.get("name").is_some_and(|name| name == vm),
        _ => false,
    })
}

/// Lines of the audit log, the oldest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditList {
    /// The lines.
    pub records: Vec<AuditRecord>,
    /// The `cursor` of the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(nullable = false)]
    pub next_cursor: Option<u64>,
    /// Number of lines that nido cannot have written; `audit_verify` names the first one.
    pub damaged: u64,
}

/// Result of a verification of the audit log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditVerdict {
    /// Whether both hash chains are valid.
    pub ok: bool,
    /// Number of files.
    pub files: u64,
    /// Number of lines that were verified.
    pub lines: u64,
    /// The first sequence number that is kept; 1 unless rotation has removed files. Absent for an empty log.
    pub first_seq: Option<u64>,
    /// The last sequence number.
    pub last_seq: Option<u64>,
    /// Hash chain up to and including the last line.
    pub chain: Option<String>,
    /// The last line is incomplete, because its writer was killed. The next writer removes it.
    pub half_line: bool,
    /// The log of reads; all other fields are about the log of writes.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(nullable = false)]
    pub reads: Option<AuditReads>,
    /// The log of events.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(nullable = false)]
    pub events: Option<AuditReads>,
    /// The checkpoint that was compared.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(nullable = false)]
    pub against: Option<AuditAgainst>,
    /// The first problem.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(nullable = false)]
    pub trouble: Option<AuditTrouble>,
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

/// Result of a verification of the log of reads or of events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditReads {
    /// Number of files.
    pub files: u64,
    /// Number of lines that were verified.
    pub lines: u64,
    /// The first sequence number that is kept.
    pub first_seq: Option<u64>,
    /// The last sequence number.
    pub last_seq: Option<u64>,
    /// The last line is incomplete.
    pub half_line: bool,
}

/// A problem in the audit log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditTrouble {
    /// The file's name in the log's directory. Absent if lines or files are missing.
    pub file: Option<String>,
    /// The line in that file, from 1.
    pub line: Option<u64>,
    /// The expected sequence number.
    pub seq: Option<u64>,
    /// The problem in one sentence.
    pub message: String,
}

/// A checkpoint that the log was compared with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditAgainst {
    /// The sequence number of its line.
    pub seq: u64,
    /// When it was created.
    pub time: Timestamp,
    /// The key that was trusted: the one in the checkpoint.
    pub public_key: String,
    /// Whether it is the key of this log. `false` also if this log has no key any more.
    pub own_key: bool,
}

/// A signed statement about the audit log. Store it where no process that can write the log can change it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AuditCheckpoint {
    /// Version of this document: 1.
    pub format: u32,
    /// The last line's sequence number.
    pub seq: u64,
    /// Hash chain up to and including that line: SHA-256 in hexadecimal.
    pub chain: String,
    /// When it was created.
    pub time: Timestamp,
    /// The first line that was kept then.
    pub head: AuditHead,
    /// Ed25519 public key, 32 bytes in hexadecimal.
    pub public_key: String,
    /// Ed25519 signature of the lines of [`Self::statement`]; 64 bytes in hexadecimal.
    pub signature: String,
}

/// The first line of an audit log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AuditHead {
    /// Its sequence number.
    pub seq: u64,
    /// SHA-256 of the line without its line end, in hexadecimal.
    pub sha256: String,
}

impl AuditCheckpoint {
    /// What is signed.
    #[must_use]
    pub fn statement(&self) -> String {
        let Self { format, seq, chain, time, head, public_key, signature: _ } = self;
        let AuditHead { seq: head_seq, sha256 } = head;
        format!(
            "nido audit checkpoint {format}\nseq {seq}\nchain {chain}\ntime {time}\nhead {head_seq} {sha256}\nkey {public_key}\n"
        )
    }
}
