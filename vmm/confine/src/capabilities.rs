//! The end of all capabilities: those in force, and those that a program of root's would gain.

use std::io;

/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION: u32 = 0x2008_0522;
/// No kernel has as many.
const CAPABILITIES_MAX: libc::c_ulong = 64;

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

/// Empties the bounding set of this thread, as far as it is allowed to. For a child between fork and exec: makes system calls only.
pub fn drop_bounding() {
    for capability in 0..CAPABILITIES_MAX {
        // Refused to those that have none, and for numbers that are unknown.
        // SAFETY: a plain system call.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
    }
}

/// Drops all capabilities of this thread permanently. For a child between fork and exec: makes system calls only.
///
/// # Errors
/// The kernel refused.
pub fn drop_all() -> io::Result<()> {
    let header = Header { version: VERSION, pid: 0 };
    let none = [0_u32; 6];
    drop_bounding();
    // SAFETY: plain system calls on values of this frame.
    unsafe {
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
        if libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) == -1 {
            return Err(io::Error::last_os_error());
        }
        // Root without any has to have an empty bounding set, too: it would gain what is in it from the next program.
        let can_regain = |capability: libc::c_ulong| libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) == 1;
        if libc::geteuid() == 0 && (0..CAPABILITIES_MAX).any(can_regain) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
    }
    Ok(())
}
