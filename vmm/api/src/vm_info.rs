//! What is reported about a VM.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{ForwardSpec, LeaseId, NetChoice};
use crate::name::{TemplateName, VmName};
use crate::state::{FailureCause, StateCause, VmState};

/// Everything nido tells about a VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VmInfo {
    /// Its name.
    pub name: VmName,
    /// Its id: never reused, names its directory.
    pub id: String,
    /// Its state.
    pub status: VmState,
    /// Why it is paused or stopped; absent where that is not known, and in other states.
    #[serde(default)]
    pub status_cause: Option<StateCause>,
    /// The cause in a sentence, with what to do about it; absent if a user asked for it.
    #[serde(default)]
    pub status_detail: Option<String>,
    /// The template it was made from.
    pub template: TemplateName,
    /// Machine type, once decided.
    pub machine: Option<String>,
    /// Why that machine type and accelerator.
    pub machine_reason: Option<String>,
    /// `kvm` or `tcg`, once decided.
    pub accel: Option<String>,
    /// `hardware` or `emulation`, once decided.
    pub isolation: Option<String>,
    /// Whether it may have VMs of its own.
    pub nested: bool,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual size of the disk in bytes.
    pub disk_bytes: u64,
    /// Network.
    pub net: NetChoice,
    /// An address at which this host reaches the guest: that of its forwards. `null` without one.
    pub ip_address: Option<String>,
    /// A command that opens an ssh session through a forward of the guest's port 22; `null` without one.
    pub ssh_command: Option<String>,
    /// Published ports.
    pub forwards: Vec<ForwardSpec>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Whether it vanishes when stopped.
    pub ephemeral: bool,
    /// The session that it was made for: it is destroyed when that is over. Absent if it was made for none.
    #[serde(default)]
    pub lease: Option<LeaseId>,
    /// The guest agent.
    pub agent: AgentInfo,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it was last started.
    pub started_at: Option<Timestamp>,
    /// When its life ends.
    pub expires_at: Option<Timestamp>,
    /// When it will have been idle for too long, as things stand.
    pub idle_at: Option<Timestamp>,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// How long its last start took.
    pub timings: Option<Timings>,
    /// What the user ought to know, e.g. that there is no hardware isolation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// The warning of a VM whose guest was not given the time it needed to power off.
pub const PLUG_PULLED: &str =
    "the guest did not power off in time, so its plug was pulled: what it had not written to its disk is lost";

/// The guest agent as seen from the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AgentInfo {
    /// It has answered since the last start.
    pub ready: bool,
    /// Its version.
    pub version: Option<String>,
    /// `vsock` or `virtio-serial`.
    pub transport: Option<String>,
}

/// Why a VM failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Failure {
    /// For programs.
    pub cause: FailureCause,
    /// For people: one sentence.
    pub message: String,
    /// Last lines of the console or of QEMU's own output.
    pub log_tail: Vec<String>,
}

/// How long the last start took. Milliseconds since nido was asked.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Timings {
    /// How it came to life.
    pub path: StartPath,
    /// Until QEMU answered on its monitor.
    #[serde(serialize_with = "in_microseconds")]
    pub qemu_ms: f64,
    /// Until the machine's state was there; for a boot the same as `qemu_ms`.
    #[serde(serialize_with = "in_microseconds")]
    pub load_ms: f64,
    /// From there until the guest was ready: to the agent's first answer, or the end of its renewal.
    #[serde(serialize_with = "in_microseconds")]
    pub agent_ms: f64,
    /// All of it.
    #[serde(serialize_with = "in_microseconds")]
    pub total_ms: f64,
}

/// Milliseconds with three decimals: what is behind them is the error of floating point.
fn in_microseconds<S: serde::Serializer>(ms: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((ms * 1000.0).round() / 1000.0)
}

/// How a VM came to life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum StartPath {
    /// Booted.
    Cold,
    /// Forked: it went on from a saved guest.
    Fork,
    /// Claimed: a fork that was waiting for it.
    Pool,
    /// Restored: it went on from a snapshot of its own.
    Restore,
}

/// How a fork of a running VM ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ForkResult {
    /// The VM that was copied. It runs on.
    pub vm: VmName,
    /// The copies, in the order they were named.
    pub copies: Vec<VmInfo>,
}

/// The answer of a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VmList {
    /// In order of creation.
    pub vms: Vec<VmInfo>,
}
