//! Requests about VMs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::egress::{PresetRules, effective_rules};
use super::{EgressRule, ForwardSpec, LeaseId, NetChoice, NetLimits, SecretUse, SecretVariable};
use crate::error::Error;
use crate::name::{TemplateName, VmName};
use crate::restart::RestartPolicy;

/// Requested machine type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum MachineChoice {
    /// nido selects one; `machine_reason` explains it.
    #[default]
    Auto,
    /// The smallest and fastest one.
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

/// Requested accelerator.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum AccelChoice {
    /// KVM if its test succeeds, else TCG with a warning.
    #[default]
    Auto,
    /// KVM only.
    Kvm,
    /// Software emulation. Not a security boundary.
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

/// Specification of a VM. Every field except the name has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Its name.
    pub name: VmName,
    /// Its template; `sandbox` if absent.
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
    /// How many bytes its files on the host may have: its disk, its snapshots and its logs. No quota if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 16777216, nullable = false)]
    pub disk_quota_bytes: Option<u64>,
    /// How many processes and threads all commands in the guest may have together. No limit if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 16, maximum = 4194304, nullable = false)]
    pub max_processes: Option<u32>,
    /// Network.
    #[serde(default)]
    pub net: NetChoice,
    /// Rules of the network: with `restricted` all that the guest reaches, with `nat` what it reaches in addition.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 256)]
    pub allow: Vec<EgressRule>,
    /// Limits of the network. Absent: the defaults.
    #[serde(default, skip_serializing_if = "NetLimits::is_empty")]
    pub net_limits: NetLimits,
    /// Presets whose rules it has in addition. In a request they are in `allow`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub presets: Vec<PresetRules>,
    /// Secrets that its requests get, and the hosts that get them: `NAME@HOST[:HEADER]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 64)]
    pub secrets: Vec<SecretUse>,
    /// Variables of commands that have the placeholder of a secret: `VARIABLE=NAME`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 64)]
    pub secret_env: Vec<SecretVariable>,
    /// Machine type.
    #[serde(default)]
    pub machine: MachineChoice,
    /// Accelerator.
    #[serde(default)]
    pub accel: AccelChoice,
    /// Refuse to run without hardware isolation.
    #[serde(default)]
    pub require_isolation: bool,
    /// Refuse to run unless QEMU's process is confined by all layers.
    #[serde(default)]
    pub require_confinement: bool,
    /// Provide virtualization in the guest.
    #[serde(default)]
    pub nested: bool,
    /// Ports to publish on the host's loopback.
    #[serde(default)]
    pub forwards: Vec<ForwardSpec>,
    /// Time to live after a start, in milliseconds. The VM is then stopped (and deleted if ephemeral).
    #[serde(default)]
    #[schema(minimum = 1)]
    pub ttl_ms: Option<u64>,
    /// Stop the VM after this long without an exec, copy or forwarded connection, in milliseconds.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub idle_ms: Option<u64>,
    /// Delete it when it stops.
    #[serde(default)]
    pub ephemeral: bool,
    /// Start it again when it has ended: `no`, `on-failure` (it failed) or `always` (also if the guest powered itself off).
    #[serde(default, skip_serializing_if = "RestartPolicy::is_no")]
    pub restart: RestartPolicy,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The session that it is created for. It is deleted when the session ends, and therefore also ephemeral.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseId>,
}

pub(super) fn default_template() -> TemplateName {
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
            disk_quota_bytes: None,
            max_processes: None,
            net: NetChoice::default(),
            allow: Vec::new(),
            net_limits: NetLimits::default(),
            presets: Vec::new(),
            secrets: Vec::new(),
            secret_env: Vec::new(),
            machine: MachineChoice::default(),
            accel: AccelChoice::default(),
            require_isolation: false,
            require_confinement: false,
            nested: false,
            forwards: Vec::new(),
            ttl_ms: None,
            idle_ms: None,
            ephemeral: false,
            restart: RestartPolicy::No,
            labels: BTreeMap::new(),
            lease: None,
        }
    }

    /// All rules of its network: its own, and those of its presets.
    #[must_use]
    pub fn rules(&self) -> Vec<EgressRule> {
        effective_rules(&self.allow, &self.presets)
    }

    /// Whether its network can have its rules.
    ///
    /// # Errors
    /// `spec_invalid`.
    pub fn check_rules(&self) -> Result<(), Error> {
        self.net.check_rules(&self.allow).and_then(|()| self.net.check_presets(&self.presets))?;
        self.net.check_rules(&self.rules())
    }

    /// What its user should know about its rules.
    #[must_use]
    pub fn rule_warnings(&self) -> Vec<String> {
        let of_rules = self.allow.iter().filter_map(EgressRule::warning);
        of_rules.chain(self.presets.iter().flat_map(|preset| preset.warnings.iter().cloned())).collect()
    }
}

/// Options of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct StartRequest {
    /// Wait until the guest agent is ready; otherwise only until the start has begun.
    pub wait: bool,
    /// Time limit for the guest to become ready, in milliseconds; the default depends on the accelerator.
    pub timeout_ms: Option<u64>,
    /// How the guest starts.
    #[serde(default)]
    pub path: PathChoice,
    /// The accelerator of this start instead of the VM's. `tcg` is the only way to run a VM without hardware isolation
    /// after it has run with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accel: Option<AccelChoice>,
}

impl Default for StartRequest {
    fn default() -> Self {
        Self { wait: true, timeout_ms: None, path: PathChoice::Auto, accel: None }
    }
}

/// How a guest starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PathChoice {
    /// The fastest path that fits; `timings.path` and `machine_reason` report which one, and why.
    #[default]
    Auto,
    /// Boot.
    Cold,
    /// Fork, or fail.
    Fork,
}

/// Options of a stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct StopRequest {
    /// Terminate QEMU at once.
    pub force: bool,
    /// Time limit for the guest to power off before QEMU is terminated, in milliseconds; an hour at most.
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
