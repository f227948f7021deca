//! What a VM's processes may use on the host.

use serde::{Deserialize, Serialize};

/// Limits of QEMU and the VM's supervisor together.
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
}

impl HostLimits {
    /// Whether the kernel limits nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// For people: `2048 MiB memory, 1024 processes, 200 % CPU`.
    #[must_use]
    pub fn describe(&self) -> String {
        let memory = self.memory_bytes.map(|bytes| format!("{} MiB memory", bytes >> 20));
        let processes = self.processes.map(|processes| format!("{processes} processes"));
        let cpu = self.cpu_percent.map(|percent| format!("{percent} % CPU"));
        memory.into_iter().chain(processes).chain(cpu).collect::<Vec<_>>().join(", ")
    }
}
