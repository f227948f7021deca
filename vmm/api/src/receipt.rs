//! Receipts: what the audit logs hold about one VM, in one signed file that is verified without the home. The format: `docs/audit.md`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{AuditLog, NetChoice, SecretUse};
use crate::egress::AllowEntry;
use crate::name::{SnapshotName, TemplateName, VmName};

/// What the audit logs hold about one VM, signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditReceipt {
    /// [`Self::KIND`].
    pub kind: String,
    /// Version of this document.
    pub format: u32,
    /// The version of nido that wrote it.
    pub nido: String,
    /// Name of the host.
    pub host: String,
    /// When it was written.
    pub time: Timestamp,
    /// The VM.
    pub vm: ReceiptVm,
    /// Its starts from saved memory, the oldest first. Absent: none.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub starts: Vec<ReceiptStart>,
    /// The networks and rules that it had, the oldest first.
    pub network: Vec<ReceiptNetwork>,
    /// The whole arguments of changes of rules that lines show shortened, as JSON, by the SHA-256 that the line states. Absent:
    /// none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub arguments: BTreeMap<String, String>,
    /// The secrets that its requests got. Absent: none, or by an earlier version of nido.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub secrets: Vec<ReceiptSecret>,
    /// The snapshots that it has.
    pub snapshots: Vec<ReceiptSnapshot>,
    /// The log of writes, from the VM's first line to the log's last.
    pub acts: ReceiptSegment,
    /// The log of events, likewise.
    pub events: ReceiptSegment,
    /// Ed25519 public key, 32 bytes in hexadecimal.
    pub public_key: String,
    /// Ed25519 signature of all other fields; 64 bytes in hexadecimal.
    pub signature: String,
}

impl AuditReceipt {
    /// What a receipt calls itself.
    pub const KIND: &str = "nido audit receipt";
    /// The version of the document.
    pub const FORMAT: u32 = 1;
}

/// The VM of a receipt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptVm {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: VmName,
    /// When it was created; absent if the event is not kept.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub created_at: Option<Timestamp>,
    /// When it was deleted; absent if it exists.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub deleted_at: Option<Timestamp>,
    /// Its template.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub template: Option<TemplateName>,
    /// SHA-256 of each part of the template, as recorded with the creation; empty if that is not kept.
    pub parts: BTreeMap<String, String>,
}

/// A start from saved memory: a warm image, or a VM that was copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptStart {
    /// When the guest was ready.
    pub at: Timestamp,
    /// The number of the line in the log of events.
    pub seq: u64,
    /// SHA-256 of the memory, the devices' state and the disk's layers.
    pub image: BTreeMap<String, String>,
}

/// A network and rules, from one moment on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptNetwork {
    /// Since when.
    pub since: Timestamp,
    /// The log that has the line.
    pub log: AuditLog,
    /// The number of the line.
    pub seq: u64,
    /// The network.
    pub net: NetChoice,
    /// The rules, and the presets by name. The rules of a preset are in the event of the creation.
    pub allow: Vec<AllowEntry>,
}

/// A secret that requests of the VM got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptSecret {
    /// Its name, the host that got it, and the header.
    pub secret: SecretUse,
    /// How many requests were recorded.
    pub requests: u64,
    /// When it was first recorded.
    pub first_at: Timestamp,
    /// When it was last recorded.
    pub last_at: Timestamp,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptSnapshot {
    /// Its name.
    pub name: SnapshotName,
    /// When it was taken.
    pub created_at: Timestamp,
    /// SHA-256 of each of its files, when the receipt was written.
    pub files: BTreeMap<String, String>,
}

/// Consecutive lines of a log.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptSegment {
    /// The number of the first line.
    pub first_seq: u64,
    /// The chain before it.
    pub previous: String,
    /// The lines.
    pub lines: Vec<ReceiptLine>,
    /// The chain up to and including the last line.
    pub chain: String,
}

/// A line of a log, as far as a receipt reveals it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ReceiptLine {
    /// A line about the VM, whole.
    Line(String),
    /// A line about something else: its hash, from which the chain continues.
    Hidden(HiddenLine),
    /// The same, of a line that an earlier version of nido wrote: its chain, which is not verified.
    Unlinked(UnlinkedLine),
}

/// The hash of a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HiddenLine {
    /// SHA-256 of the line up to and including its number, in hexadecimal.
    pub sha256: String,
}

/// The chain of a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnlinkedLine {
    /// The chain up to and including it.
    pub chain: String,
}

/// Result of the verification of a receipt that is valid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReceiptVerdict {
    /// The VM.
    pub vm: ReceiptVm,
    /// When the receipt was written.
    pub time: Timestamp,
    /// The key that it was verified with.
    pub public_key: String,
    /// Whether that key was given by the caller. Otherwise it is the one in the receipt, which any program can make.
    pub trusted_key: bool,
    /// How many lines are about the VM.
    pub lines: u64,
    /// How many lines in between are only known by their hash.
    pub hidden: u64,
    /// How many lines in between do not link the chain, because an earlier version of nido wrote them.
    pub unlinked: u64,
    /// The secrets that its requests got.
    pub secrets: Vec<ReceiptSecret>,
    /// The number of the line that a checkpoint signs, if one was given and matches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<u64>,
    /// What the receipt does not prove, in sentences.
    pub not_proven: Vec<String>,
}
