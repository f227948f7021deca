//! A VM's row: what it holds.

use jiff::Timestamp;
use nido_api::machine::Machine;
use nido_api::name::SnapshotName;
use nido_api::state::{StateCause, VmState};
use nido_api::{AgentInfo, EgressRule, Failure, ForwardSpec, LeaseId, LimitHit, Timings, VmSpec, moment};
use serde::{Deserialize, Serialize};

/// What of its template a VM uses. The parts are content-addressed, so a newer template of the same name changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootParts {
    /// Hash of the kernel.
    pub vmlinux: String,
    /// Hash of the initial file system: [`Self::initramfs_base`] and an agent.
    pub initramfs: String,
    /// Hash of the initial file system without an agent. VMs that an earlier version made have none.
    #[serde(default)]
    pub initramfs_base: Option<String>,
    /// Hash of the agent in the initial file system, if it is known.
    #[serde(default)]
    pub agent: Option<String>,
    /// Hash of the disk the overlay stands on.
    pub root: String,
    /// Virtual size of that disk.
    pub root_bytes: u64,
    /// Hash of the list of packages.
    pub packages: String,
    /// Who is process 1.
    pub init: nido_images::Init,
    /// Kernel command line of the template.
    pub append: String,
    /// What the guests that it was forked from had written to their disks: layers on `root`, the lowest first.
    #[serde(default)]
    pub frozen: Vec<BackingLayer>,
    /// Rules of its template that bound those of the VM; no bound if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow: Option<Vec<EgressRule>>,
}

/// The disk of a bake: a layer between another disk and its forks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackingLayer {
    /// Its hash.
    pub sha256: String,
    /// Its virtual size: that of the disk the baked guest saw.
    pub virtual_bytes: u64,
}

/// What a VM is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// For its user.
    Use,
    /// To be saved once it is ready, and then deleted.
    Bake,
    /// To wait, paused, until a command claims it.
    Pool,
}

impl Purpose {
    const ALL: [Self; 3] = [Self::Use, Self::Bake, Self::Pool];

    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Use => "use",
            Self::Bake => "bake",
            Self::Pool => "pool",
        }
    }

    /// The purpose that a word stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|purpose| purpose.word() == word)
    }
}

/// How a start brings the guest to life.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Origin {
    /// Its kernel boots.
    #[default]
    Boot,
    /// It was forked from a bake.
    Fork(StoredBake),
    /// It was restored from one of its snapshots.
    Restore {
        /// Its name.
        snapshot: SnapshotName,
        /// The token the saved agent expects, in hexadecimal.
        token: String,
    },
}

/// A bake as a start needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredBake {
    /// Hash of the memory image.
    pub memory: String,
    /// Hash of the device state.
    pub state: String,
    /// The token the saved agent expects, in hexadecimal.
    pub token: String,
    /// The guest was saved in the middle of what it did, sessions with its agent included: its identity is reset as that of one that is
    /// restored from a snapshot.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub live: bool,
}

/// One VM as the store knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct VmRow {
    /// Its id.
    pub id: String,
    /// What was requested. Its `forwards` are those of its creation; [`VmRow::forwards`] counts.
    pub spec: VmSpec,
    /// Its state.
    pub state: VmState,
    /// Why it is paused or stopped.
    pub cause: Option<StateCause>,
    /// What of its template it uses.
    pub parts: BootParts,
    /// Virtual size of its disk.
    pub disk_bytes: u64,
    /// Its vsock address.
    pub cid: Option<u32>,
    /// When it was created.
    pub created_at: Timestamp,
    /// The machine of its last start.
    pub machine: Option<Machine>,
    /// When it was last started.
    pub started_at: Option<Timestamp>,
    /// When its life ends.
    pub expires_at: Option<Timestamp>,
    /// The agent since the last start.
    pub agent: AgentInfo,
    /// The guest's address.
    pub ip_address: Option<String>,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// Limits that it has reached since its start, the last first.
    pub limits_hit: Vec<LimitHit>,
    /// How long its last start took.
    pub timings: Option<Timings>,
    /// Its files are being removed.
    pub deleting: bool,
    /// Published ports.
    pub forwards: Vec<ForwardSpec>,
    /// What it is there for.
    pub purpose: Purpose,
    /// How it was last started.
    pub origin: Origin,
    /// The operation that makes it, until that has ended well: if it is over before, the VM is removed.
    pub made_by: Option<LeaseId>,
    /// Who made it: [`nido_api::Caller::owner`]. Absent for what nido made for itself, or before owners were kept.
    pub owner: Option<String>,
    /// Why the row cannot be read whole. Its state is [`VmState::Unknown`] then, and fields may have defaults.
    pub unreadable: Option<String>,
}

impl VmRow {
    /// The token of the saved guest that it resumes from, if its identity is reset then. One that is loaded only to
    /// be saved again is not.
    #[must_use]
    pub fn identity_reset_token(&self) -> Option<&str> {
        match &self.origin {
            Origin::Fork(StoredBake { token, .. }) | Origin::Restore { token, .. } => {
                (self.purpose != Purpose::Bake).then_some(token)
            }
            Origin::Boot => None,
        }
    }

    /// A VM as it is created.
    #[must_use]
    pub fn new(id: String, spec: VmSpec, purpose: Purpose, state: VmState, parts: BootParts, disk_bytes: u64) -> Self {
        Self {
            purpose,
            origin: Origin::Boot,
            owner: None,
            id,
            forwards: spec.forwards.clone(),
            spec,
            state,
            cause: None,
            parts,
            disk_bytes,
            cid: None,
            created_at: moment::now(),
            machine: None,
            started_at: None,
            expires_at: None,
            agent: AgentInfo::default(),
            ip_address: None,
            failure: None,
            limits_hit: Vec::new(),
            timings: None,
            deleting: false,
            made_by: None,
            unreadable: None,
        }
    }
}
