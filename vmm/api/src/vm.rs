//! VMs: what is asked for, and what is told about them.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{ForwardSpec, LeaseId};
use crate::error::{Code, Error};
use crate::name::{TemplateName, VmName};
use crate::state::{FailureCause, StateCause, VmState};

/// Which machine type is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum MachineChoice {
    /// nido decides, and says why in `machine_reason`.
    #[default]
    Auto,
    /// The small, quick one.
    Microvm,
    /// An i440FX PC.
    Pc,
    /// A Q35 PC with PCI Express.
    Q35,
}

impl MachineChoice {
    /// The word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Microvm => "microvm",
            Self::Pc => "pc",
            Self::Q35 => "q35",
        }
    }
}

/// Which accelerator is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum AccelChoice {
    /// KVM if it is proven to work, else TCG with a warning.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Software emulation. No isolation promise.
    Tcg,
}

impl AccelChoice {
    /// The word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// Which network is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum NetChoice {
    /// QEMU's user network: out to wherever the host can reach (its loopback included), nothing in.
    #[default]
    Nat,
    /// No network card. Exec, files and forwards work all the same.
    None,
}

impl NetChoice {
    /// The word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nat => "nat",
            Self::None => "none",
        }
    }
}

/// What a VM shall be. Everything but the name has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Its name.
    pub name: VmName,
    /// The template it is made from; `sandbox` if absent.
    #[serde(default = "default_template")]
    pub template: TemplateName,
    /// Virtual CPUs.
    #[serde(default = "default_cpus")]
    pub cpus: u32,
    /// Memory in MiB.
    #[serde(default = "default_memory_mib")]
    pub memory_mib: u32,
    /// Size of the disk in bytes; the template's if absent.
    #[serde(default)]
    pub disk_bytes: Option<u64>,
    /// Network.
    #[serde(default)]
    pub net: NetChoice,
    /// Machine type.
    #[serde(default)]
    pub machine: MachineChoice,
    /// Accelerator.
    #[serde(default)]
    pub accel: AccelChoice,
    /// Refuse to run without hardware isolation.
    #[serde(default)]
    pub require_isolation: bool,
    /// Give the guest virtualization of its own.
    #[serde(default)]
    pub nested: bool,
    /// Ports published on the host's loopback.
    #[serde(default)]
    pub forwards: Vec<ForwardSpec>,
    /// Longest life after a start, in milliseconds. The VM is stopped then (and deleted if ephemeral).
    #[serde(default)]
    #[schema(minimum = 1)]
    pub ttl_ms: Option<u64>,
    /// Longest time without an exec, a copy or a forwarded connection, in milliseconds.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub idle_ms: Option<u64>,
    /// Vanish when stopped.
    #[serde(default)]
    pub ephemeral: bool,
    /// Free labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The session it is made for. It is destroyed when that is over, and so it is ephemeral, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseId>,
}

fn default_template() -> TemplateName {
    #[allow(clippy::unwrap_used)] // a constant that the tests parse
    "sandbox".parse().unwrap()
}

/// The CPUs of a VM if nothing else is requested.
#[must_use]
pub const fn default_cpus() -> u32 {
    1
}

/// The memory of a VM if nothing else is requested, in MiB.
#[must_use]
pub const fn default_memory_mib() -> u32 {
    512
}

impl VmSpec {
    /// A VM of that name with every default.
    #[must_use]
    pub fn named(name: VmName) -> Self {
        Self {
            name,
            template: default_template(),
            cpus: default_cpus(),
            memory_mib: default_memory_mib(),
            disk_bytes: None,
            net: NetChoice::default(),
            machine: MachineChoice::default(),
            accel: AccelChoice::default(),
            require_isolation: false,
            nested: false,
            forwards: Vec::new(),
            ttl_ms: None,
            idle_ms: None,
            ephemeral: false,
            labels: BTreeMap::new(),
            lease: None,
        }
    }
}

/// A VM that is to be made, and started unless that is not wanted. Everything but the name has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SpawnRequest {
    /// Its name.
    pub name: VmName,
    /// The template it is made from.
    #[serde(default = "default_template")]
    #[schema(default = "sandbox")]
    pub template: TemplateName,
    /// Virtual CPUs.
    #[serde(default = "default_cpus")]
    #[schema(minimum = 1, maximum = 64)]
    pub cpus: u32,
    /// Memory in MiB.
    #[serde(default = "default_memory_mib")]
    #[schema(minimum = 128)]
    pub memory_mib: u32,
    /// Size of the disk in bytes; the template's if absent.
    #[serde(default)]
    pub disk_bytes: Option<u64>,
    /// Network.
    #[serde(default)]
    pub net: NetChoice,
    /// Machine type.
    #[serde(default)]
    pub machine: MachineChoice,
    /// Accelerator.
    #[serde(default)]
    pub accel: AccelChoice,
    /// Refuse to run without hardware isolation.
    #[serde(default)]
    pub require_isolation: bool,
    /// Give the guest virtualization of its own.
    #[serde(default)]
    pub nested: bool,
    /// Ports published on the host's loopback.
    #[serde(default)]
    pub forwards: Vec<ForwardSpec>,
    /// Longest life after a start, in milliseconds. The VM is stopped then (and deleted if ephemeral).
    #[serde(default)]
    #[schema(minimum = 1)]
    pub ttl_ms: Option<u64>,
    /// Longest time without an exec, a copy or a forwarded connection, in milliseconds.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub idle_ms: Option<u64>,
    /// Vanish when stopped.
    #[serde(default)]
    pub ephemeral: bool,
    /// Free labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Start it.
    #[serde(default = "yes")]
    #[schema(default = true)]
    pub start: bool,
    /// Wait until the agent answers; else only until the start is on its way.
    #[serde(default = "yes")]
    #[schema(default = true)]
    pub wait: bool,
    /// How long the guest may take to become ready, in milliseconds; a default by accelerator if absent.
    #[serde(default)]
    pub start_timeout_ms: Option<u64>,
    /// How the guest comes to life.
    #[serde(default)]
    pub path: PathChoice,
}

const fn yes() -> bool {
    true
}

impl SpawnRequest {
    /// What the VM shall be, and how it is started, if it is.
    #[must_use]
    pub fn split(self) -> (VmSpec, Option<StartRequest>) {
        let start = StartRequest { wait: self.wait, timeout_ms: self.start_timeout_ms, path: self.path, accel: None };
        let spec = VmSpec {
            name: self.name,
            template: self.template,
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            disk_bytes: self.disk_bytes,
            net: self.net,
            machine: self.machine,
            accel: self.accel,
            require_isolation: self.require_isolation,
            nested: self.nested,
            forwards: self.forwards,
            ttl_ms: self.ttl_ms,
            idle_ms: self.idle_ms,
            ephemeral: self.ephemeral,
            labels: self.labels,
            lease: None,
        };
        (spec, self.start.then_some(start))
    }
}

/// How a start waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct StartRequest {
    /// Wait until the agent answers; else only until the start is on its way.
    pub wait: bool,
    /// How long the guest may take to become ready, in milliseconds; a default by accelerator if absent.
    pub timeout_ms: Option<u64>,
    /// How the guest comes to life.
    #[serde(default)]
    pub path: PathChoice,
    /// The accelerator of this start instead of the VM's own. `tcg` is the only way to run a VM without hardware isolation
    /// that has run with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accel: Option<AccelChoice>,
}

impl Default for StartRequest {
    fn default() -> Self {
        Self { wait: true, timeout_ms: None, path: PathChoice::Auto, accel: None }
    }
}

/// How a guest shall come to life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PathChoice {
    /// The quickest that fits; `timings.path` and `machine_reason` say which and why.
    #[default]
    Auto,
    /// Boot.
    Cold,
    /// Fork, or fail.
    Fork,
}

/// Which VM: whichever has the name, or the one of this id and no other that has its name meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Which<'a> {
    /// Its name.
    pub name: &'a VmName,
    /// Its id, where somebody has decided about that very VM.
    pub id: Option<&'a str>,
}

impl<'a> From<&'a VmName> for Which<'a> {
    fn from(name: &'a VmName) -> Self {
        Self { name, id: None }
    }
}

impl Which<'_> {
    /// Whether the VM that has the name now, which has this id, is the one that is meant.
    ///
    /// # Errors
    /// `vm_replaced`.
    pub fn is(&self, id: &str) -> Result<(), Error> {
        if self.id.is_none_or(|meant| meant == id) {
            return Ok(());
        }
        let words = format!("VM '{}' is another one than was meant: that one is gone", self.name);
        Err(Error::new(Code::VmReplaced, words).hint("look at the VM of that name, and decide anew"))
    }
}

/// How a VM is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct StopRequest {
    /// Pull the plug at once.
    pub force: bool,
    /// How long an orderly power-off may take before the plug is pulled, in milliseconds; an hour at most.
    #[schema(maximum = 3_600_000)]
    pub timeout_ms: u64,
}

/// The longest that a guest may take to power off, in milliseconds.
pub const STOP_MAX_MS: u64 = 3_600_000;

impl Default for StopRequest {
    fn default() -> Self {
        Self { force: false, timeout_ms: 30_000 }
    }
}

/// How a start goes on, for progress shown to people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StartStage {
    /// Disk and configuration are made.
    Preparing,
    /// QEMU starts.
    Launching,
    /// The guest boots; the agent has not answered yet.
    Booting,
    /// The agent answers.
    Ready,
}

impl StartStage {
    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Launching => "launching",
            Self::Booting => "booting",
            Self::Ready => "ready",
        }
    }
}

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
