//! What a VM's processes may use on the host: planned from its machine. Pure. The limits are put in force by systemd with the VM's
//! scope, or in a delegated tree, and read back from the kernel.
//!
//! ```text
//!  Machine --plan--> HostLimits --+--scope-------> nido-ID.scope --+--in_force--> HostLimits, as the kernel has them
//!                                 +--delegation--> nido-ID --------+
//! ```

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
/// The weight of disk accesses, where those of other groups on the host have 100: they come first, and VMs share evenly.
const IO_WEIGHT: u64 = 50;

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
        io_weight: Some(IO_WEIGHT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_memory_is_more_than_the_guests() {
        let machine = crate::machine::tests::machine_of(1024, 2, Some(128));
        let limits = plan(&machine, false);
        assert_eq!(limits.describe(), "1728 MiB memory, 1026 processes, 300 % CPU, I/O weight 50");
        assert_eq!(plan(&machine, true).memory_bytes, None);
    }
}
