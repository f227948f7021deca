//! What a clone becomes, as it is sent over the control socket.

use std::collections::BTreeMap;

use nido_api::name::{TemplateName, VmName};
use nido_api::restart::RestartPolicy;
use nido_api::{
    AccelChoice, EgressRule, ForwardSpec, LeaseId, MachineChoice, NetChoice, NetLimits, PresetRules, VmSpec,
};
use serde::{Deserialize, Serialize};

use super::ForwardCommand;

/// What a clone becomes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClaimCommand {
    /// What was requested. It fits the clone.
    pub spec: VmOrder,
    /// Virtual size of its disk; no smaller than the clone's.
    pub disk_bytes: u64,
    /// Why this machine.
    #[serde(default)]
    pub reason: String,
    /// Warnings for the user.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// How long ago the user asked, in milliseconds.
    #[serde(default)]
    pub asked_ms_ago: f64,
    /// How long the guest may take to become ready, in milliseconds.
    #[serde(default)]
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

/// A VM's specification as a command sends it. Every field but the name may be absent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // as those of VmSpec
pub struct VmOrder {
    pub name: VmName,
    #[serde(default)]
    pub template: Option<TemplateName>,
    #[serde(default)]
    pub cpus: Option<u32>,
    #[serde(default)]
    pub memory_mib: Option<u32>,
    #[serde(default)]
    pub disk_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_quota_bytes: Option<u64>,
    #[serde(default)]
    pub net: NetChoice,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<EgressRule>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub presets: Vec<PresetRules>,
    #[serde(default)]
    pub machine: MachineChoice,
    #[serde(default)]
    pub accel: AccelChoice,
    #[serde(default)]
    pub require_isolation: bool,
    #[serde(default)]
    pub require_confinement: bool,
    #[serde(default)]
    pub nested: bool,
    #[serde(default)]
    pub forwards: Vec<ForwardCommand>,
    #[serde(default)]
    pub ttl_ms: Option<u64>,
    #[serde(default)]
    pub idle_ms: Option<u64>,
    #[serde(default)]
    pub ephemeral: bool,
    #[serde(default, skip_serializing_if = "RestartPolicy::is_no")]
    pub restart: RestartPolicy,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseId>,
}

impl From<VmSpec> for VmOrder {
    fn from(spec: VmSpec) -> Self {
        Self {
            name: spec.name,
            template: Some(spec.template),
            cpus: Some(spec.cpus),
            memory_mib: Some(spec.memory_mib),
            disk_bytes: spec.disk_bytes,
            disk_quota_bytes: spec.disk_quota_bytes,
            net: spec.net,
            allow: spec.allow,
            presets: spec.presets,
            machine: spec.machine,
            accel: spec.accel,
            require_isolation: spec.require_isolation,
            require_confinement: spec.require_confinement,
            nested: spec.nested,
            forwards: spec.forwards.into_iter().map(ForwardCommand::from).collect(),
            ttl_ms: spec.ttl_ms,
            idle_ms: spec.idle_ms,
            ephemeral: spec.ephemeral,
            restart: spec.restart,
            labels: spec.labels,
            lease: spec.lease,
        }
    }
}

impl From<VmOrder> for VmSpec {
    fn from(order: VmOrder) -> Self {
        let default = Self::named(order.name);
        // Without `..default`: a new field of VmSpec does not compile until it is decided here.
        Self {
            name: default.name,
            template: order.template.unwrap_or(default.template),
            cpus: order.cpus.unwrap_or(default.cpus),
            memory_mib: order.memory_mib.unwrap_or(default.memory_mib),
            disk_bytes: order.disk_bytes,
            disk_quota_bytes: order.disk_quota_bytes,
            max_processes: None,
            net: order.net,
            allow: order.allow,
            presets: order.presets,
            // No clone is claimed for a VM with secrets, or with limits of its processes or its network.
            secrets: Vec::new(),
            net_limits: NetLimits::default(),
            secret_env: Vec::new(),
            machine: order.machine,
            accel: order.accel,
            require_isolation: order.require_isolation,
            require_confinement: order.require_confinement,
            nested: order.nested,
            forwards: order.forwards.into_iter().map(ForwardSpec::from).collect(),
            ttl_ms: order.ttl_ms,
            idle_ms: order.idle_ms,
            ephemeral: order.ephemeral,
            restart: order.restart,
            labels: order.labels,
            lease: order.lease,
        }
    }
}
