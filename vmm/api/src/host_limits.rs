//! What a VM's processes may use on the host.

use serde::{Deserialize, Serialize};

/// Limits of QEMU on the host; in a systemd scope, of QEMU and the VM's supervisor together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HostLimits {
    /// Memory in bytes: the guest's, and what QEMU needs itself. Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub memory_bytes: Option<u64>,
    /// Processes and threads. Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub processes: Option<u64>,
    /// CPU time, in percent of one CPU. Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub cpu_percent: Option<u64>,
    /// Weight of disk accesses when others want the disk, too: 1 to 10000, 100 for what has none of its own. Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub io_weight: Option<u64>,
}

impl HostLimits {
    /// Whether the kernel limits nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// For people: `2048 MiB memory, 1024 processes, 200 % CPU, I/O weight 50`.
    #[must_use]
    pub fn describe(&self) -> String {
        let memory = self.memory_bytes.map(|bytes| format!("{} MiB memory", bytes >> 20));
        let processes = self.processes.map(|processes| format!("{processes} processes"));
        let cpu = self.cpu_percent.map(|percent| format!("{percent} % CPU"));
        let io = self.io_weight.map(|weight| format!("I/O weight {weight}"));
        memory.into_iter().chain(processes).chain(cpu).chain(io).collect::<Vec<_>>().join(", ")
    }
}
