//! Requests for new VMs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::egress::{AllowEntry, split_entries};
use super::vm::{default_cpus, default_memory_mib, default_template};
use super::{
    AccelChoice, ForwardSpec, MachineChoice, NetChoice, NetLimits, PathChoice, SecretUse, SecretVariable, StartRequest,
    VmSpec,
};
use crate::name::{TemplateName, VmName};
use crate::restart::RestartPolicy;

/// A VM to create and, by default, start. Every field except the name has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SpawnRequest {
    /// Its name.
    pub name: VmName,
    /// Its template.
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
    /// How many bytes its files on the host may have: its disk, its snapshots and its logs. No quota if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 16777216, nullable = false)]
    pub disk_quota_bytes: Option<u64>,
    /// How many processes and threads all commands in the guest may have together. No limit if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 16, maximum = 4194304, nullable = false)]
    pub max_processes: Option<u32>,
    /// Network. If absent `nat`; `restricted` (or `none`) if the template or the caller's limits do not allow that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub net: Option<NetChoice>,
    /// Rules of the network: with `restricted` all that the guest reaches, with `nat` what it reaches in addition.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 256)]
    pub allow: Vec<AllowEntry>,
    /// Limits of the network. Absent: the defaults.
    #[serde(default, skip_serializing_if = "NetLimits::is_empty")]
    pub net_limits: NetLimits,
    /// Secrets that its requests get, and the hosts that get them: `NAME@HOST[:HEADER]`. The caller's limits have to list them.
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
    /// Start it.
    #[serde(default = "yes")]
    #[schema(default = true)]
    pub start: bool,
    /// Wait until the guest agent is ready; otherwise only until the start has begun.
    #[serde(default = "yes")]
    #[schema(default = true)]
    pub wait: bool,
    /// Time limit for the guest to become ready, in milliseconds; the default depends on the accelerator.
    #[serde(default)]
    pub start_timeout_ms: Option<u64>,
    /// How the guest starts.
    #[serde(default)]
    pub path: PathChoice,
}

const fn yes() -> bool {
    true
}

impl SpawnRequest {
    /// What the VM shall be, and how it is started, if it is.
    #[must_use]
    pub fn split(self, default_net: NetChoice) -> (VmSpec, Option<StartRequest>) {
        let start = StartRequest { wait: self.wait, timeout_ms: self.start_timeout_ms, path: self.path, accel: None };
        let (allow, presets) = split_entries(self.allow);
        let spec = VmSpec {
            name: self.name,
            template: self.template,
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            disk_bytes: self.disk_bytes,
            disk_quota_bytes: self.disk_quota_bytes,
            max_processes: self.max_processes,
            net: self.net.unwrap_or(default_net),
            allow,
            net_limits: self.net_limits,
            presets,
            secrets: self.secrets,
            secret_env: self.secret_env,
            machine: self.machine,
            accel: self.accel,
            require_isolation: self.require_isolation,
            require_confinement: self.require_confinement,
            nested: self.nested,
            forwards: self.forwards,
            ttl_ms: self.ttl_ms,
            idle_ms: self.idle_ms,
            ephemeral: self.ephemeral,
            restart: self.restart,
            labels: self.labels,
            lease: None,
        };
        (spec, self.start.then_some(start))
    }
}
