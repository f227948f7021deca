//! Events: what happened to VMs, snapshots and templates, in the order in which it happened.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{NetChoice, SecretUse, Timings};
use crate::egress::{Denial, EgressRule, PresetRules};
use crate::error::{Code, Error};
use crate::limit_hit::{LimitHit, LimitKind};
use crate::name::{SnapshotName, TemplateName, VmName};
use crate::state::{FailureCause, StateCause};

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum EventKind {
    /// A VM was made, or a clone of the pool became one.
    VmCreated,
    /// A VM runs, and its agent has answered for the first time since this start.
    VmStarted,
    /// A VM ended as requested, or powered itself off.
    VmStopped,
    /// A VM is gone.
    VmDeleted,
    /// A VM ended, or could not start, without having been asked to.
    VmCrashed,
    /// A VM's CPUs are paused.
    VmPaused,
    /// They were resumed.
    VmResumed,
    /// A VM's time is up, to live or to be idle; it is being stopped.
    VmExpired,
    /// A VM reached a limit: the first time for each limit, then once a minute at most.
    VmLimitHit,
    /// A VM's network refused what its guest tried to reach: the first time for each destination, then once a minute at most.
    NetDenied,
    /// A secret was put into requests of a VM: the first time for each use, then once a minute at most, with their number.
    SecretUsed,
    /// A snapshot is whole.
    SnapshotCreated,
    /// A VM is as it was in a snapshot.
    SnapshotRestored,
    /// A template is there: built, imported, or made of a VM. Also when one is replaced.
    TemplateCreated,
    /// A template is gone.
    TemplateDeleted,
}

impl EventKind {
    /// Every kind.
    pub const ALL: [Self; 15] = [
        Self::VmCreated,
        Self::VmStarted,
        Self::VmStopped,
        Self::VmDeleted,
        Self::VmCrashed,
        Self::VmPaused,
        Self::VmResumed,
        Self::VmExpired,
        Self::VmLimitHit,
        Self::NetDenied,
        Self::SecretUsed,
        Self::SnapshotCreated,
        Self::SnapshotRestored,
        Self::TemplateCreated,
        Self::TemplateDeleted,
    ];

    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::VmCreated => "vm.created",
            Self::VmStarted => "vm.started",
            Self::VmStopped => "vm.stopped",
            Self::VmDeleted => "vm.deleted",
            Self::VmCrashed => "vm.crashed",
            Self::VmPaused => "vm.paused",
            Self::VmResumed => "vm.resumed",
            Self::VmExpired => "vm.expired",
            Self::VmLimitHit => "vm.limit_hit",
            Self::NetDenied => "net.denied",
            Self::SecretUsed => "secret.used",
            Self::SnapshotCreated => "snapshot.created",
            Self::SnapshotRestored => "snapshot.restored",
            Self::TemplateCreated => "template.created",
            Self::TemplateDeleted => "template.deleted",
        }
    }
}

impl std::fmt::Display for EventKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.word())
    }
}

impl std::str::FromStr for EventKind {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|kind| kind.word() == word).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|kind| kind.word()).collect();
            Error::new(Code::SpecInvalid, format!("there is no event '{}'", word.escape_debug()))
                .hint(format!("one of {}", known.join(", ")))
        })
    }
}

impl TryFrom<String> for EventKind {
    type Error = Error;

    fn try_from(word: String) -> Result<Self, Error> {
        word.parse()
    }
}

impl utoipa::PartialSchema for EventKind {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        let words = utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .enum_values(Some(Self::ALL.map(Self::word)))
            .description(Some("What happened."));
        words.into()
    }
}

impl utoipa::ToSchema for EventKind {}

impl From<EventKind> for String {
    fn from(kind: EventKind) -> Self {
        kind.word().into()
    }
}

/// An event. Cursors increase and are never reused in a home; there may be gaps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Event {
    /// Its position. To continue after it, pass it as `since` or in the header `Last-Event-ID`.
    pub cursor: u64,
    /// Type of the event.
    pub event: EventKind,
    /// Time.
    pub timestamp: Timestamp,
    /// The VM's name at that time; absent for events of templates.
    pub vm_name: Option<VmName>,
    /// Details.
    pub details: EventDetails,
}

/// Details of an event. Fields that do not apply to its type are absent, except the first two.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct EventDetails {
    /// The guest's last known address.
    pub ip_address: Option<String>,
    /// Of a crash: the last lines of the console or of QEMU's output. Written by the guest; do not trust them.
    pub last_log_entries: Vec<String>,
    /// The VM's id, which is never reused.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub vm_id: Option<String>,
    /// The VM's template, or the template of the event.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub template: Option<TemplateName>,
    /// The snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub snapshot: Option<SnapshotName>,
    /// Of a crash: the cause, for programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub cause: Option<FailureCause>,
    /// Of a pause or stop: the cause, for programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub status_cause: Option<StateCause>,
    /// The cause of a crash, pause or stop in a sentence; absent if a user requested it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub message: Option<String>,
    /// Of an end: time since the VM's start was requested, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub ran_ms: Option<u64>,
    /// The limit that was reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub limit: Option<Limit>,
    /// Of a limit that was reached: which one, and the evidence.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub limit_hit: Option<LimitHit>,
    /// Of a start: how long it took.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub timings: Option<Timings>,
    /// Of a refusal by the network: what was refused. The domain name was chosen by the guest; do not trust it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub denial: Option<Denial>,
    /// Of the use of a secret: its name, the host that got it, and the header.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub secret: Option<SecretUse>,
    /// Of the use of a secret: how many requests got it since the event before about the same use, that of this event included.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub secret_requests: Option<u64>,
    /// Of a start from saved memory (a warm image, or a VM that was copied): SHA-256 of the memory, the devices' state and the
    /// disk's layers, in hexadecimal. That of the memory is over its blocks that are not all zero. Absent: the guest booted, or was
    /// restored.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub image: BTreeMap<String, String>,
    /// Of a creation: what the VM was made from, and its network.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub source: Option<VmSource>,
}

/// What a VM was made from, and what its network allowed when it was created.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct VmSource {
    /// SHA-256 of each part of the template, in hexadecimal, by the part's name.
    pub parts: BTreeMap<String, String>,
    /// The network.
    pub net: NetChoice,
    /// Its rules, without those of presets.
    pub allow: Vec<EgressRule>,
    /// Its presets. Absent: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub presets: Vec<PresetRules>,
    /// Secrets that its requests may get. Absent: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<SecretUse>,
}

/// A limit on the life of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// `--ttl`.
    Ttl,
    /// `--idle`.
    Idle,
    /// The session that the VM was created for has ended.
    Session,
}

impl Limit {
    /// The hit of a limit of time. `None` if what ended the VM was none.
    #[must_use]
    pub fn hit(self, ttl_ms: Option<u64>, idle_ms: Option<u64>) -> Option<LimitHit> {
        match self {
            Self::Ttl => Some(LimitHit::new(LimitKind::Time, ttl_ms, "its time to live is over")),
            Self::Idle => Some(LimitHit::new(LimitKind::Time, idle_ms, "it was idle for too long")),
            Self::Session => None,
        }
    }
}

/// Filters for events.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EventsRequest {
    /// Events after this cursor; 0 is all that are kept.
    pub since: u64,
    /// Events of these types; empty means all.
    pub kinds: Vec<EventKind>,
    /// Events of the VM of this name.
    pub vm: Option<VmName>,
}

impl EventsRequest {
    /// Whether events that this cursor has not seen are gone, or never were: it is older than `oldest`, the first that is kept,
    /// or newer than `last`, the last one. 0 is the beginning, wherever that is.
    #[must_use]
    pub const fn gap(&self, oldest: u64, last: u64) -> bool {
        self.since != 0 && (self.since.saturating_add(1) < oldest || self.since > last)
    }

    /// Whether an event is among those asked for.
    #[must_use]
    pub fn wants(&self, event: &Event) -> bool {
        event.cursor > self.since
            && (self.kinds.is_empty() || self.kinds.contains(&event.event))
            && self.vm.as_ref().is_none_or(|vm| event.vm_name.as_ref() == Some(vm))
    }
}

/// Events, the oldest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct EventList {
    /// The events.
    pub events: Vec<Event>,
    /// The cursor to continue from.
    pub cursor: u64,
    /// The oldest event that is kept, or the next one if none is. Older cursors are rejected with `cursor_expired`.
    pub oldest: u64,
}
