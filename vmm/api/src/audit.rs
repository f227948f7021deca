//! The audit log, as it is asked for and answered. What the words mean: `docs/audit.md`.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Face;
use crate::error::{Code, Error};
use crate::name::VmName;

/// Which of the two logs a line is in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum AuditLog {
    /// What changes something, reaches into a guest, or was refused.
    #[default]
    Acts,
    /// What changes nothing.
    Reads,
}

/// One line of the audit log. Bytes that are no text are shown as `\xNN`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditRecord {
    /// The log it is in.
    #[serde(default)]
    pub log: AuditLog,
    /// The line's number in that log. Grows by one with every line.
    pub seq: u64,
    /// When, to the second.
    pub time: Timestamp,
    /// Which face was asked.
    pub face: Face,
    /// Who really called: `uid:1000`, `token:ci#ID`.
    pub actor: String,
    /// What the client says it is. A claim.
    pub agent: Option<String>,
    /// The operation, for example `vm_exec`.
    pub tool: String,
    /// Its arguments, redacted; of those that were too long both ends, with `cut: {bytes, sha256}`.
    pub params: serde_json::Value,
    /// `attempt` or `outcome`.
    pub stage: String,
    /// `pending` of an attempt; `success`, `error`, `denied` or `unknown` of an outcome.
    pub result: String,
    /// A word that says why: an error's code, `exit_code:3`.
    pub reason: Option<String>,
    /// What attempt and outcome of an operation share.
    pub id: String,
    /// The chain up to and with this line: SHA-256 in hexadecimal.
    pub chain: String,
}

/// Which lines are asked for; what is absent does not matter.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AuditFilter {
    /// Of this log; of both if absent, unless [`Self::after`] is given, which then counts the lines of `acts`.
    pub log: Option<AuditLog>,
    /// Those of this time and later.
    pub since: Option<Timestamp>,
    /// Of this operation.
    pub tool: Option<String>,
    /// Of this caller.
    pub actor: Option<String>,
    /// With this result.
    pub result: Option<String>,
    /// About the VM of this name, as far as the arguments name one.
    pub vm: Option<VmName>,
    /// Only so many, the last ones.
    pub tail: Option<usize>,
    /// Only those behind this number, the first ones: at most [`Self::limit`].
    pub after: Option<u64>,
    /// How many lines behind [`Self::after`]; all if absent.
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
            && self.vm.as_ref().is_none_or(|vm| names(&record.params, vm.as_str()))
    }
}

/// Whether arguments name this VM.
fn names(params: &serde_json::Value, vm: &str) -> bool {
    ["name", "vm", "vm_name", "names", "copies"].iter().any(|key| match params.get(key) {
        Some(serde_json::Value::String(name)) => name == vm,
        Some(serde_json::Value::Array(names)) => names.iter().any(|name| name == vm),
        // The VM of a run, as it is spawned.
        Some(serde_json::Value::Object(spec)) => spec.get("name").is_some_and(|name| name == vm),
        _ => false,
    })
}

/// Some lines, the oldest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditList {
    /// Them.
    pub records: Vec<AuditRecord>,
    /// There are more: the `cursor` of the next page.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(nullable = false)]
    pub next_cursor: Option<u64>,
    /// How many lines nido cannot have written; `audit_verify` says where the first is.
    pub damaged: u64,
}

/// Whether the audit log hangs together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditVerdict {
    /// Nothing is wrong.
    pub ok: bool,
    /// How many files there are.
    pub files: u64,
    /// How many lines were looked at.
    pub lines: u64,
    /// The first number that is kept; 1 unless rotation has dropped files. Absent in an empty log.
    pub first_seq: Option<u64>,
    /// The last number.
    pub last_seq: Option<u64>,
    /// The chain up to and with the last line.
    pub chain: Option<String>,
    /// The last line is begun and not ended: its writer was killed. The next one takes it away.
    pub half_line: bool,
    /// The log of what changes nothing; everything above is about the one of what does.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(nullable = false)]
    pub reads: Option<AuditReads>,
    /// The checkpoint that was compared.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(nullable = false)]
    pub against: Option<AuditAgainst>,
    /// The first thing that is wrong.
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

/// What was looked at of the log of what changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditReads {
    /// How many files there are.
    pub files: u64,
    /// How many lines were looked at.
    pub lines: u64,
    /// The first number that is kept.
    pub first_seq: Option<u64>,
    /// The last number.
    pub last_seq: Option<u64>,
    /// The last line is begun and not ended.
    pub half_line: bool,
}

/// What is wrong with an audit log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditTrouble {
    /// The file's name, within the log's directory. Absent where something is missing altogether.
    pub file: Option<String>,
    /// The line in that file, from 1.
    pub line: Option<u64>,
    /// The number the line should have.
    pub seq: Option<u64>,
    /// What is wrong, in a sentence.
    pub message: String,
}

/// A checkpoint that the log was compared with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditAgainst {
    /// The number it speaks of.
    pub seq: u64,
    /// When it was made.
    pub time: Timestamp,
    /// The key that was trusted: the one in the checkpoint.
    pub public_key: String,
    /// Whether this log's own key is the same. `false` also where there is none any more.
    pub own_key: bool,
}

/// A signed statement about the audit log, to be kept where whoever can write the log cannot write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AuditCheckpoint {
    /// Of this document: 1.
    pub format: u32,
    /// The last line's number.
    pub seq: u64,
    /// The chain up to and with that line: SHA-256 in hexadecimal.
    pub chain: String,
    /// When this was made.
    pub time: Timestamp,
    /// The first line that was kept then.
    pub head: AuditHead,
    /// Ed25519, 32 bytes in hexadecimal.
    pub public_key: String,
    /// Ed25519 over the lines that [`Self::statement`] makes; 64 bytes in hexadecimal.
    pub signature: String,
}

/// The first line of an audit log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AuditHead {
    /// Its number.
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
