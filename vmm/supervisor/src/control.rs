//! What is said over a supervisor's control socket: one JSON line asks, JSON lines answer, the last one ends it.
//!
//! A connection that asked for a [`Request::Lease`] counts as activity for as long as it stays open: the kernel closes it
//! when its holder ends, so no lease outlives a killed client.

use nido_api::error::Problem;
use nido_api::name::SnapshotName;
use nido_api::{ForwardSpec, StartStage, StopRequest, VmSpec};
use nido_images::Bake;
use serde::{Deserialize, Serialize};

/// Longest line either side accepts, in bytes.
pub const MAX_LINE: usize = 64 * 1024;

/// What can be asked of a supervisor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Say when the agent is ready, or why it will not be. Answers stages on the way.
    Ready,
    /// Stop the VM; answered when QEMU is gone and the store says so.
    Stop(StopRequest),
    /// Terminate QEMU and keep the VM, even an ephemeral one: it is about to be restored. Same reply as for a stop.
    StopKept,
    /// Pause the CPUs.
    Pause,
    /// Resume the CPUs.
    Resume,
    /// Take a snapshot; answered when it is whole.
    Snapshot {
        /// Its name.
        name: SnapshotName,
        /// The VM that gets it, if it is not this one: a VM of the same home, by its id.
        into: Option<String>,
    },
    /// Count as activity until this connection closes.
    Lease,
    /// Listen on a port of the host.
    ForwardAdd {
        /// Which; a host port of 0 takes a free one.
        forward: ForwardSpec,
    },
    /// Stop listening.
    ForwardRemove {
        /// Which.
        forward: ForwardSpec,
    },
    /// Claim a clone that waits in a pool. The replies are stages, the first one when it has been claimed.
    Claim(Box<ClaimOrder>),
    /// Delete an unclaimed clone; the reply follows when it is deleted.
    Retire,
    /// Say how things are.
    Status,
}

/// What a clone becomes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClaimOrder {
    /// What was asked for. It fits the clone.
    pub spec: VmSpec,
    /// Virtual size of its disk; no smaller than the clone's.
    pub disk_bytes: u64,
    /// Why this machine.
    pub reason: String,
    /// What the user ought to know.
    pub warnings: Vec<String>,
    /// How long ago the user asked, in milliseconds.
    pub asked_ms_ago: f64,
    /// How long the guest may take to become ready, in milliseconds.
    pub ready_within_ms: Option<u64>,
    /// This attempt to claim a clone; empty from an older nido.
    #[serde(default)]
    pub ticket: String,
    /// Who owns it then.
    #[serde(default)]
    pub owner: Option<String>,
    /// How many VMs that owner may have.
    #[serde(default)]
    pub max_vms: Option<u32>,
}

/// What a supervisor answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// Not the end: how far a start has come.
    Stage {
        /// The stage.
        stage: StartStage,
    },
    /// Done.
    Done,
    /// The forward as it stands now.
    Forward {
        /// With the port that was taken.
        forward: ForwardSpec,
    },
    /// How things are.
    Status {
        /// For how long nothing has used the VM; absent while something does.
        idle_ms: Option<u64>,
    },
    /// The guest has been saved, and the VM is gone.
    Baked {
        /// What was saved.
        bake: Box<Bake>,
    },
    /// It could not be done.
    Failed {
        /// Why.
        problem: Problem,
    },
}
