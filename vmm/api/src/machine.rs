//! The machine that a request became on a host.

use serde::{Deserialize, Serialize};

use crate::NetChoice;
use crate::host_limits::HostLimits;

/// A machine type of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineType {
    /// Minimal: virtio-mmio, no PCI, at most eight virtio devices.
    Microvm,
    /// i440FX with PCI.
    Pc,
    /// Q35 with PCI Express.
    Q35,
}

impl MachineType {
    /// The name QEMU knows it by.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Microvm => "microvm",
            Self::Pc => "pc",
            Self::Q35 => "q35",
        }
    }
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The host's CPU, through the kernel.
    Kvm,
    /// QEMU's emulator.
    Tcg,
}

impl Accel {
    /// The name QEMU knows it by.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// What stands between guest and host. QEMU promises no isolation for TCG.
    #[must_use]
    pub const fn isolation(self) -> &'static str {
        match self {
            Self::Kvm => "hardware",
            Self::Tcg => "emulation",
        }
    }
}

/// The way to the guest agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Transport {
    /// Kernel vsock: the agent listens on this CID.
    Vsock {
        /// The guest's CID.
        cid: u32,
    },
    /// A virtio-serial port that QEMU connects to the supervisor's socket.
    VirtioSerial {
        /// QEMU takes `reconnect-ms` (from 9.2); else `reconnect`, in seconds.
        reconnect_ms: bool,
    },
}

impl Transport {
    /// `vsock` or `virtio-serial`, as in the description of a VM.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vsock { .. } => "vsock",
            Self::VirtioSerial { .. } => "virtio-serial",
        }
    }
}

/// A layer of the confinement of QEMU's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// Namespaces of its own for users, networks and mounts, with a root directory that holds only what it needs.
    Namespaces,
    /// Landlock: it may use only the files that it needs.
    Landlock,
    /// A filter of system calls.
    Seccomp,
    /// It has no capabilities and can gain none.
    NoCapabilities,
}

impl Layer {
    /// All layers.
    pub const ALL: [Self; 4] = [Self::Namespaces, Self::Landlock, Self::Seccomp, Self::NoCapabilities];

    /// The name that is shown.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
            Self::NoCapabilities => "no-capabilities",
        }
    }
}

/// The name of the layer that gives a QEMU which root starts a user of its own. It is no [`Layer`]: earlier versions could not read
/// the record of a machine that lists another one.
pub const OWN_USER: &str = "own-user";

/// A machine, decided in every respect that QEMU's command line shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Machine type.
    pub machine: MachineType,
    /// Accelerator.
    pub accel: Accel,
    /// CPU model with its switches, as `-cpu` takes it.
    pub cpu_model: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Network.
    pub net: NetChoice,
    /// The way to the agent.
    pub transport: Transport,
    /// Memory for translated code, in MiB; under TCG only.
    pub tb_size_mib: Option<u32>,
    /// The rate of the guest's time-stamp counter in kHz, passed to its kernel; under TCG only.
    pub tsc_khz: Option<u32>,
    /// The layers that confine QEMU's process.
    #[serde(default)]
    pub confinement: Vec<Layer>,
    /// QEMU has a user of its own; only if root starts it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own_user: bool,
    /// What the host limits, as the kernel reported it after the start.
    #[serde(default, skip_serializing_if = "HostLimits::is_empty")]
    pub host_limits: HostLimits,
    /// One sentence: why this machine type and this accelerator.
    pub reason: String,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

impl Machine {
    /// The names of the layers that confine QEMU's process.
    #[must_use]
    pub fn confinement_names(&self) -> Vec<String> {
        let own_user = self.own_user.then_some(OWN_USER);
        self.confinement.iter().map(|layer| layer.name()).chain(own_user).map(Into::into).collect()
    }
}
