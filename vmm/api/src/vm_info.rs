//! What is reported about a VM.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::egress::NetworkInfo;
use super::{EgressRule, ForwardSpec, LeaseId, NetChoice, NetLimits, PresetRules, SecretUse, SecretVariable};
use crate::host_limits::HostLimits;
use crate::limit_hit::LimitHit;
use crate::name::{TemplateName, VmName};
use crate::restart::RestartPolicy;
use crate::state::{FailureCause, StateCause, VmState};

/// A VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VmInfo {
    /// Its name.
    pub name: VmName,
    /// Its id: never reused, and the name of its directory.
    pub id: String,
    /// Its state.
    pub status: VmState,
    /// Why it is paused or stopped; absent if unknown, and in other states.
    #[serde(default)]
    pub status_cause: Option<StateCause>,
    /// The cause in a sentence, with what to do about it; absent if a user requested it.
    #[serde(default)]
    pub status_detail: Option<String>,
    /// Its template.
    pub template: TemplateName,
    /// Machine type, once selected.
    pub machine: Option<String>,
    /// Why that machine type and accelerator.
    pub machine_reason: Option<String>,
    /// `kvm` or `tcg`, once selected.
    pub accel: Option<String>,
    /// `hardware` or `emulation`, once selected.
    pub isolation: Option<String>,
    /// The layers that confine QEMU's process on the host: `namespaces`, `landlock`, `seccomp`, `no-capabilities`. Empty until the
    /// machine is selected, and for a VM that an earlier version started.
    #[serde(default)]
    pub confinement: Vec<String>,
    /// What QEMU and the VM's supervisor may use on the host, as the kernel has it. Absent: no limits.
    #[serde(default, skip_serializing_if = "HostLimits::is_empty")]
    pub host_limits: HostLimits,
    /// Whether it can run VMs itself.
    pub nested: bool,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual size of the disk in bytes.
    pub disk_bytes: u64,
    /// How many bytes its files on the host may have: its disk, its snapshots and its logs. Absent: no quota.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub disk_quota_bytes: Option<u64>,
    /// How many processes and threads all commands in the guest may have together. Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub max_processes: Option<u32>,
    /// Network.
    pub net: NetChoice,
    /// Rules of the network: with `restricted` all that the guest reaches, with `nat` what it reaches in addition. Absent: no rules.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<EgressRule>,
    /// Limits of the network. Absent: the defaults.
    #[serde(default, skip_serializing_if = "NetLimits::is_empty")]
    pub net_limits: NetLimits,
    /// Presets of the network, with the rules that they add. Absent: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub presets: Vec<PresetRules>,
    /// Secrets that its requests get, and the hosts that get them: `NAME@HOST:HEADER`. Absent: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<SecretUse>,
    /// Variables of commands that have the placeholder of a secret: `VARIABLE=NAME`. Absent: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secret_env: Vec<SecretVariable>,
    /// The address at which this host reaches the guest: that of its published ports. `null` if it has none.
    pub ip_address: Option<String>,
    /// A command that opens an SSH session through the published port 22; `null` without one.
    pub ssh_command: Option<String>,
    /// Published ports.
    pub forwards: Vec<ForwardSpec>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Whether it is deleted when it stops.
    pub ephemeral: bool,
    /// Whether it is started again when it has ended. Absent: no.
    #[serde(default, skip_serializing_if = "RestartPolicy::is_no")]
    pub restart: RestartPolicy,
    /// How often its restart policy started it since a user did. Absent: never.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub restarts: u32,
    /// The session that it was created for: it is deleted when that ends. Absent if it belongs to none.
    #[serde(default)]
    pub lease: Option<LeaseId>,
    /// The guest agent.
    pub agent: AgentInfo,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it was last started.
    pub started_at: Option<Timestamp>,
    /// When its time to live is over.
    pub expires_at: Option<Timestamp>,
    /// When it will have been idle for too long, if it is not used until then.
    pub idle_at: Option<Timestamp>,
    /// What its network has done. Absent in lists, and for a VM that does not run or has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub network: Option<NetworkInfo>,
    /// Limits that it has reached since its start, the last first; 8 at most. Absent: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 8)]
    pub limits_hit: Vec<LimitHit>,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// Duration of its last start.
    pub timings: Option<Timings>,
    /// Warnings, for example that there is no hardware isolation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // the shape serde wants
const fn is_zero(count: &u32) -> bool {
    *count == 0
}

/// The warning of a VM whose guest was not given the time it needed to power off.
pub const QEMU_KILLED_WARNING: &str =
    "the guest did not power off in time, so QEMU was terminated: data that was not yet on its disk is lost";

/// State of the guest agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AgentInfo {
    /// Whether it has replied since the last start.
    pub ready: bool,
    /// Its version.
    pub version: Option<String>,
    /// `vsock` or `virtio-serial`.
    pub transport: Option<String>,
}

/// Why a VM failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Failure {
    /// The cause, for programs.
    pub cause: FailureCause,
    /// One sentence for people.
    pub message: String,
    /// Last lines of the console or of QEMU's output.
    pub log_tail: Vec<String>,
}

/// Duration of the last start, in milliseconds since the request.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Timings {
    /// How it started.
    pub path: StartPath,
    /// Until QEMU replied on its monitor.
    #[serde(serialize_with = "in_microseconds")]
    pub qemu_ms: f64,
    /// Until the machine's state was loaded; for a boot the same as `qemu_ms`.
    #[serde(serialize_with = "in_microseconds")]
    pub load_ms: f64,
    /// From then until the guest was ready: until the guest agent's first reply, or the end of its identity reset.
    #[serde(serialize_with = "in_microseconds")]
    pub agent_ms: f64,
    /// In total.
    #[serde(serialize_with = "in_microseconds")]
    pub total_ms: f64,
}

/// Milliseconds with three decimals: what is behind them is the error of floating point.
fn in_microseconds<S: serde::Serializer>(ms: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((ms * 1000.0).round() / 1000.0)
}

/// How a VM started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum StartPath {
    /// Cold boot.
    Cold,
    /// Forked from a warm image.
    Fork,
    /// Taken from the pool.
    Pool,
    /// Restored from one of its snapshots.
    Restore,
}

/// Result of a fork of a running VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ForkResult {
    /// The VM that was copied. It keeps running.
    pub vm: VmName,
    /// The copies, in the order of the request.
    pub copies: Vec<VmInfo>,
    /// For how long the CPUs of the VM that was copied were paused, in milliseconds. Absent if they did not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub paused_ms: Option<u64>,
}

/// A list of VMs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VmList {
    /// In order of creation.
    pub vms: Vec<VmInfo>,
}
