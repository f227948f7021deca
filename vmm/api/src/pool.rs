//! The warm pool: forks that are loaded, given an identity and paused before a client requests them.

use serde::{Deserialize, Serialize};

use super::{AccelChoice, BakeRequest, MachineChoice, NetChoice, VmSpec};
use crate::name::TemplateName;

/// Most clones that one pool may keep.
pub const POOL_MAX: u32 = 100;

/// The machine of a pool's clones. A template has at most one pool for each.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PoolKind {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Network: `nat` also for `restricted`, which is the same hardware.
    pub net: NetChoice,
    /// Requested machine type.
    pub machine: MachineChoice,
    /// Requested accelerator.
    pub accel: AccelChoice,
    /// Virtualization in the guest.
    pub nested: bool,
}

impl PoolKind {
    /// The kind of machine that a VM asks for.
    #[must_use]
    pub const fn of(spec: &VmSpec) -> Self {
        let VmSpec { cpus, memory_mib, net, machine, accel, nested, .. } = *spec;
        Self { cpus, memory_mib, net: net.hardware(), machine, accel, nested }
    }

    /// The same machine, as one is asked to be baked.
    #[must_use]
    pub fn bake_request(&self) -> BakeRequest {
        let Self { cpus, memory_mib, net, machine, accel, nested } = *self;
        BakeRequest {
            cpus: Some(cpus),
            memory_mib: Some(memory_mib),
            net,
            machine,
            accel,
            nested,
            ..BakeRequest::default()
        }
    }

    /// The flags that request it on the command line, each with a space before it; empty for the machine one gets without.
    #[must_use]
    pub fn flags(&self, defaults: &Self) -> String {
        let mut flags = String::new();
        let mut add = |differs: bool, flag: String| flags.push_str(if differs { &flag } else { "" });
        add(self.cpus != defaults.cpus, format!(" --cpus {}", self.cpus));
        add(self.memory_mib != defaults.memory_mib, format!(" --memory {}M", self.memory_mib));
        add(self.net != defaults.net, format!(" --net {}", self.net.name()));
        add(self.machine != defaults.machine, format!(" --machine {}", self.machine.name()));
        add(self.accel != defaults.accel, format!(" --accel {}", self.accel.name()));
        add(self.nested, " --nested".into());
        flags
    }
}

/// Size and machine of a pool; absent fields have the default of a VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolRequest {
    /// Number of waiting clones: 0 to [`POOL_MAX`]. 0 ends the pool.
    #[schema(maximum = 100)]
    pub wanted: u32,
    /// Virtual CPUs.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// Memory in MiB.
    #[serde(default)]
    pub memory_mib: Option<u32>,
    /// Network.
    #[serde(default)]
    pub net: NetChoice,
    /// Machine type.
    #[serde(default)]
    pub machine: MachineChoice,
    /// Accelerator.
    #[serde(default)]
    pub accel: AccelChoice,
    /// Virtualization in the guest.
    #[serde(default)]
    pub nested: bool,
}

impl PoolRequest {
    /// So many clones of the machine that a bake is requested for.
    #[must_use]
    pub const fn of(wanted: u32, bake: &BakeRequest) -> Self {
        let BakeRequest { cpus, memory_mib, net, machine, accel, nested, .. } = *bake;
        Self { wanted, cpus, memory_mib, net, machine, accel, nested }
    }
}

/// A pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PoolInfo {
    /// The template of its clones.
    pub template: TemplateName,
    /// Their machine.
    #[serde(flatten)]
    pub kind: PoolKind,
    /// The configured number of waiting clones.
    pub wanted: u32,
    /// The number of waiting clones.
    pub ready: u32,
    /// The number of clones that are being created.
    pub filling: u32,
    /// Why the pool cannot be filled at present.
    pub trouble: Option<String>,
}

/// A list of pools.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PoolList {
    /// In order of template and machine.
    pub pools: Vec<PoolInfo>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restricted_vm_is_of_the_kind_of_nat() {
        let plain = VmSpec::named("x".parse().unwrap());
        let restricted = VmSpec { net: NetChoice::Restricted, ..plain.clone() };
        assert_eq!(PoolKind::of(&restricted), PoolKind::of(&plain));
        let without = VmSpec { net: NetChoice::None, ..plain.clone() };
        assert_ne!(PoolKind::of(&without), PoolKind::of(&plain));
    }

    #[test]
    fn flags_show_only_non_default_values() {
        let plain = PoolKind::of(&VmSpec::named("x".parse().unwrap()));
        assert_eq!(plain.flags(&plain), "");
        let other = PoolKind { memory_mib: 640, net: NetChoice::None, nested: true, ..plain.clone() };
        assert_eq!(other.flags(&plain), " --memory 640M --net none --nested");
    }
}
