//! What a VM's processes may use on the host: planned from its machine, put in force by systemd with the VM's scope, and read back
//! from the kernel.
//!
//! ```text
//!  Machine --plan--> HostLimits --scope--> nido-ID.scope --in_force--> HostLimits, as the kernel has them
//! ```
//!
//! Invariant: what is reported as in force is what the control group's files hold, never what was requested.

use std::path::{Path, PathBuf};

use nido_api::HostLimits;
use nido_api::machine::Machine;

/// Memory of QEMU and the supervisor besides the guest's, in MiB: code, device models, the network's buffers.
const OVERHEAD_MIB: u64 = 512;
/// One part in how many of the guest's memory is added: page tables, and what is copied while a snapshot is taken.
const OVERHEAD_PART: u64 = 16;
/// Threads: QEMU's I/O threads, the supervisor's jobs. Besides one for each CPU.
const PROCESSES: u64 = 1024;
/// CPUs for devices and the supervisor, in percent of one.
const DEVICES_PERCENT: u64 = 100;
/// Where control groups are mounted.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// The limits of a machine. In a home on a file system in memory, files count as memory: then memory has no limit.
#[must_use]
pub fn plan(machine: &Machine, home_in_memory: bool) -> HostLimits {
    let guest = u64::from(machine.memory_mib);
    let code = u64::from(machine.tb_size_mib.unwrap_or(0));
    let memory_mib = guest + guest / OVERHEAD_PART + code + OVERHEAD_MIB;
    HostLimits {
        memory_bytes: (!home_in_memory).then_some(memory_mib << 20),
        processes: Some(PROCESSES + u64::from(machine.cpus)),
        cpu_percent: Some(u64::from(machine.cpus) * 100 + DEVICES_PERCENT),
    }
}

/// The control group of a VM's scope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScopeGroup(PathBuf);

impl ScopeGroup {
    /// The group of a process, if it is the VM's own.
    #[must_use]
    pub fn of_process(pid: u32, id: &str) -> Option<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        Self::parse(&text, id, Path::new(CGROUP_ROOT))
    }

    /// The same from the text of `/proc/PID/cgroup`: in another group, limits are those of other processes, too.
    fn parse(text: &str, id: &str, root: &Path) -> Option<Self> {
        let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let is_own = path.rsplit('/').next() == Some(&format!("nido-{id}.scope"));
        (is_own && !path.split('/').any(|part| part == "..")).then(|| Self(root.join(path)))
    }

    fn text(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(self.0.join(file)).ok()
    }

    fn number(&self, file: &str) -> Option<u64> {
        self.text(file)?.trim().parse().ok()
    }

    /// The limits that the kernel has for it.
    #[must_use]
    pub fn in_force(&self) -> HostLimits {
        HostLimits {
            memory_bytes: self.number("memory.max"),
            processes: self.number("pids.max"),
            cpu_percent: self.text("cpu.max").and_then(|text| cpu_percent(&text)),
        }
    }

    /// How many of its processes were killed because its memory was used up.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let events = self.text("memory.events").unwrap_or_default();
        events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
    }

    /// The most memory that it had, in bytes; unknown before Linux 5.19.
    #[must_use]
    pub fn memory_peak(&self) -> Option<u64> {
        self.number("memory.peak")
    }
}

/// The percentage of `cpu.max`: `200000 100000` is 200.
fn cpu_percent(text: &str) -> Option<u64> {
    let (quota, period) = text.trim().split_once(' ')?;
    (quota.parse::<u64>().ok()?.checked_mul(100)?).checked_div(period.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_memory_is_more_than_the_guests() {
        let machine = crate::machine::tests::machine_of(1024, 2, Some(128));
        let limits = plan(&machine, false);
        assert_eq!(limits.describe(), "1728 MiB memory, 1026 processes, 300 % CPU");
        assert_eq!(plan(&machine, true).memory_bytes, None);
    }

    #[test]
    fn limits_are_read_from_the_scope_of_the_vm_only() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("system.slice/nido-00ff.scope");
        std::fs::create_dir_all(&group).unwrap();
        for (file, text) in [
            ("memory.max", "1073741824\n"),
            ("pids.max", "max\n"),
            ("cpu.max", "150000 100000\n"),
            ("memory.events", "low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n"),
            ("memory.peak", "1073741824\n"),
        ] {
            std::fs::write(group.join(file), text).unwrap();
        }
        let parse = |text: &str| ScopeGroup::parse(text, "00ff", root.path());
        let found = parse("1:name=x:/\n0::/system.slice/nido-00ff.scope\n").unwrap();
        let expected = HostLimits { memory_bytes: Some(1 << 30), processes: None, cpu_percent: Some(150) };
        assert_eq!((found.in_force(), found.oom_kills(), found.memory_peak()), (expected, 1, Some(1 << 30)));
        for other in ["0::/system.slice/nido.service\n", "0::/nido-00fe.scope\n", "0::/../nido-00ff.scope\n", ""] {
            assert_eq!(parse(other), None, "{other}");
        }
        let gone = parse("0::/nido-00ff.scope\n").unwrap();
        assert!(gone.in_force().is_empty() && gone.oom_kills() == 0);
    }
}
