//! A limit of a VM that was reached: the same record in events, webhooks, `info` and the results of commands.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// How many limits are reported with a VM.
pub const LIMITS_SHOWN: usize = 8;

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LimitKind {
    /// Memory of QEMU's process on the host, in bytes.
    Memory,
    /// Processes and threads of the VM on the host.
    Processes,
    /// Bytes of the VM's files on the host: its disk, its snapshots and its logs.
    Disk,
    /// Connections of the guest's network that are open at once, or opened in a second.
    Flows,
    /// Bytes that the guest has sent or received over its network.
    EgressBytes,
    /// Time, in milliseconds: `--ttl` or `--idle`.
    Time,
}

impl LimitKind {
    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Processes => "processes",
            Self::Disk => "disk",
            Self::Flows => "flows",
            Self::EgressBytes => "egress_bytes",
            Self::Time => "time",
        }
    }

    const fn is_bytes(self) -> bool {
        matches!(self, Self::Memory | Self::Disk)
    }
}

/// A limit that a VM reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LimitHit {
    /// What is limited.
    pub kind: LimitKind,
    /// The limit, in the unit of its kind. Absent if it is not one number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub limit: Option<u64>,
    /// What happened, in a sentence.
    pub message: String,
    /// What was counted or measured, by name, for example `oom_kill` or `used_bytes`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub evidence: BTreeMap<String, u64>,
    /// When it was last reached.
    pub at: Timestamp,
    /// How often that was recorded since the VM's start; once a minute at most.
    pub count: u64,
}

impl LimitHit {
    /// A limit that was reached now.
    #[must_use]
    pub fn new(kind: LimitKind, limit: Option<u64>, message: impl Into<String>) -> Self {
        Self { kind, limit, message: message.into(), evidence: BTreeMap::new(), at: Timestamp::now(), count: 1 }
    }

    /// The same with something that was counted or measured.
    #[must_use]
    pub fn with(mut self, name: &str, value: u64) -> Self {
        self.evidence.insert(name.into(), value);
        self
    }

    /// For people: `disk (limit 1024 MiB): …`.
    #[must_use]
    pub fn describe(&self) -> String {
        let limit = match (self.limit, self.kind) {
            (Some(bytes), kind) if kind.is_bytes() => format!(" (limit {} MiB)", bytes >> 20),
            (Some(bytes), LimitKind::EgressBytes) => format!(" (limit {bytes} bytes)"),
            (Some(ms), LimitKind::Time) => format!(" (limit {} s)", ms / 1000),
            (Some(limit), _) => format!(" (limit {limit})"),
            (None, _) => String::new(),
        };
        format!("{}{limit}: {}", self.kind.word(), self.message)
    }
}

/// Adds a hit to those that are reported with a VM: one for each kind and sentence, the last first.
pub fn add(hits: &mut Vec<LimitHit>, hit: &LimitHit) {
    let same = |known: &LimitHit| known.kind == hit.kind && known.message == hit.message;
    let before = hits.iter().position(same).map_or(0, |known| hits.remove(known).count);
    hits.insert(0, LimitHit { count: before.saturating_add(hit.count), ..hit.clone() });
    hits.truncate(LIMITS_SHOWN);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_hits_are_counted_and_the_list_is_bounded() {
        let mut hits = Vec::new();
        for number in 0..20 {
            add(&mut hits, &LimitHit::new(LimitKind::Flows, None, format!("number {number}")));
        }
        add(&mut hits, &LimitHit::new(LimitKind::Disk, Some(1), "full"));
        add(&mut hits, &LimitHit::new(LimitKind::Disk, Some(2), "full").with("used_bytes", 7));
        assert_eq!(hits.len(), LIMITS_SHOWN);
        assert_eq!((hits[0].count, hits[0].limit, hits[0].evidence["used_bytes"]), (2, Some(2), 7));
    }

    #[test]
    fn descriptions_have_units() {
        assert_eq!(LimitHit::new(LimitKind::Time, Some(3000), "over").describe(), "time (limit 3 s): over");
        let sent = LimitHit::new(LimitKind::EgressBytes, Some(1000), "sent").describe();
        assert_eq!(sent, "egress_bytes (limit 1000 bytes): sent");
        assert_eq!(LimitHit::new(LimitKind::Disk, Some(1 << 30), "full").describe(), "disk (limit 1024 MiB): full");
    }
}
