//! The user of a QEMU that root starts: a user id and a group id of the VM's own, which own nothing else on the host.
//!
//! Invariant: the id of a VM depends on nothing but the VM's id, so that each start has the same one.

use std::ops::Range;

use super::{Failure, Step, checked};

/// User and group ids for VMs. Neither systemd nor Debian assigns any of them; 0x7FFF_FFFF ends the ids that all programs support.
pub const RANGE: Range<u32> = 0x7000_0000..0x7FFD_0000;
/// The id that only probes of the host use.
pub const PROBE: u32 = RANGE.end - 1;

/// The user and group id of a VM's QEMU.
#[must_use]
pub fn id_of(vm_id: &str) -> u32 {
    // FNV-1a, with its bits mixed: ids that differ in one character are far apart.
    let mut hash = vm_id
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^= hash >> 33;
    let count = u64::from(PROBE - RANGE.start);
    RANGE.start + u32::try_from(hash % count).unwrap_or(0)
}

/// Changes this process from root to a user with a group of the same number and no other group. Its effective, permitted and
/// ambient capabilities end. For a child between fork and exec: calls the kernel directly, because the C library would make other
/// threads change, too, and locks for that.
pub(super) fn change_to(user: u32) -> Result<(), Failure> {
    // SAFETY: plain system calls on numbers and an empty list.
    unsafe {
        checked(Step::OwnUser, libc::syscall(libc::SYS_setgroups, 0_usize, std::ptr::null::<libc::gid_t>()))?;
        checked(Step::OwnUser, libc::syscall(libc::SYS_setresgid, user, user, user))?;
        checked(Step::OwnUser, libc::syscall(libc::SYS_setresuid, user, user, user))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_vm_has_an_id_of_the_range_that_no_probe_uses() {
        let ids: HashSet<_> = (0..10_000).map(|number| id_of(&format!("vm-{number}"))).collect();
        assert!(ids.iter().all(|id| RANGE.contains(id) && *id != PROBE));
        assert!(ids.len() > 9_990, "{} of 10000", ids.len());
    }

    /// Files of a VM keep their group while nido is upgraded.
    #[test]
    fn the_id_of_a_vm_never_changes() {
        assert_eq!([id_of(""), id_of("0192f0c1")], [0x7dde_d066, 0x701a_f991]);
    }
}
