//! The filter of system calls under which QEMU runs, besides QEMU's own (`-sandbox`).
//!
//! A list of what is denied, not of what is allowed: what QEMU and its libraries call changes with each version. A denied call
//! fails with EPERM. Invariant: no socket can be made but those of this host's file system, no process but QEMU itself can be
//! signalled or looked into, and nothing can be mounted.

use std::io;

use libc::{c_long, sock_filter};

/// The only architecture whose calls this filter knows.
const ARCHITECTURE: u32 = 0xC000_003E;
/// Calls with this bit are those of x32.
const X32: u32 = 0x4000_0000;
/// Where the number, the architecture and the first argument stand in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const ARGUMENTS: u32 = 16;

const DENY: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
/// The C library calls `clone` instead, whose flags can be looked at.
const NOT_THERE: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
const NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWCGROUP) as u32;

/// Calls that QEMU has no use for, and an attacker in it may have.
const DENIED: [c_long; 71] = [
    // other processes
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    // namespaces and mounts
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_fanotify_mark,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    // parts of the kernel with a history of holes
    libc::SYS_bpf,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_userfaultfd,
    libc::SYS_perf_event_open,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_modify_ldt,
    libc::SYS_vmsplice,
    libc::SYS_remap_file_pages,
    libc::SYS_msgget,
    libc::SYS_semget,
    libc::SYS_shmget,
    libc::SYS_mq_open,
    // the host itself
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_vhangup,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    libc::SYS_uselib,
];

/// A filter that is ready to be installed, apart from the number of the process.
#[derive(Debug)]
pub struct Filter {
    program: Vec<sock_filter>,
    /// The instruction that compares with the number of the process.
    process_at: usize,
}

/// What happens with a call whose number has been recognized: `code` compares its argument with `value`.
struct Check {
    call: c_long,
    argument: u32,
    code: u32,
    value: u32,
    /// Actions if it matches, and if not.
    actions: (u32, u32),
}

impl Filter {
    /// Builds the filter. Allocates: before the fork.
    #[must_use]
    pub fn new() -> Self {
        let (allow, only_if, except_if) = (libc::SECCOMP_RET_ALLOW, libc::BPF_JEQ, libc::BPF_JSET);
        let check = |call, argument, code, value, actions| Check { call, argument, code, value, actions };
        let unix = libc::AF_UNIX as u32;
        let checks = [
            check(libc::SYS_clone, 0, except_if, NAMESPACES, (DENY, allow)),
            check(libc::SYS_socket, 0, only_if, unix, (allow, DENY)),
            check(libc::SYS_socketpair, 0, only_if, unix, (allow, DENY)),
            check(libc::SYS_ioctl, 1, only_if, libc::TIOCSTI as u32, (DENY, allow)),
            // The last: its value is that of the process.
            check(libc::SYS_tgkill, 0, only_if, 0, (allow, DENY)),
        ];
        let mut program = vec![
            load(ARCHITECTURE_OFFSET),
            jump(libc::BPF_JEQ, ARCHITECTURE, 1, 0),
            action(libc::SECCOMP_RET_KILL_PROCESS),
            load(NUMBER),
            jump(libc::BPF_JGE, X32, 0, 1),
            action(DENY),
            jump(libc::BPF_JEQ, number(libc::SYS_clone3), 0, 1),
            action(NOT_THERE),
        ];
        for Check { call, argument, code, value, actions } in checks {
            program.extend([
                jump(libc::BPF_JEQ, number(call), 0, 4),
                load(ARGUMENTS + 8 * argument),
                jump(code, value, 0, 1),
                action(actions.0),
                action(actions.1),
            ]);
        }
        let process_at = program.len() - 3;
        for call in DENIED {
            program.extend([jump(libc::BPF_JEQ, number(call), 0, 1), action(DENY)]);
        }
        program.push(action(allow));
        Self { program, process_at }
    }

    /// Installs the filter for this process, which must have ruled out new privileges. For a child between fork and exec.
    ///
    /// # Errors
    /// The kernel has no filters.
    pub fn install(&mut self) -> io::Result<()> {
        // SAFETY: plain system calls; the program lives as long as this call.
        let result = unsafe {
            self.program[self.process_at].k = libc::getpid().cast_unsigned();
            let len = u16::try_from(self.program.len()).unwrap_or(0);
            let program = libc::sock_fprog { len, filter: self.program.as_mut_ptr() };
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
        };
        if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl Default for Filter {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether this kernel has filters of system calls.
#[must_use]
pub fn is_available() -> bool {
    let wanted = libc::SECCOMP_RET_ERRNO;
    // SAFETY: the kernel reads a number.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const wanted) };
    result == 0
}

fn number(call: c_long) -> u32 {
    u32::try_from(call).unwrap_or(u32::MAX)
}

fn load(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0)
}

fn jump(comparison: u32, value: u32, matching: u8, other: u8) -> sock_filter {
    instruction(libc::BPF_JMP | comparison | libc::BPF_K, value, matching, other)
}

fn action(value: u32) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, value, 0, 0)
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: u16::try_from(code).unwrap_or(u16::MAX), jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel does with a program: the part of it that is used here.
    fn verdict(filter: &Filter, architecture: u32, call: c_long, arguments: [u32; 2]) -> u32 {
        let (mut at, mut value) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = filter.program[at];
            at += 1;
            let is_met = match u32::from(code) {
                0x20 => {
                    value = match k {
                        NUMBER => number(call),
                        ARCHITECTURE_OFFSET => architecture,
                        _ => arguments[usize::try_from((k - ARGUMENTS) / 8).unwrap()],
                    };
                    continue;
                }
                0x06 => return k,
                0x15 => value == k,
                0x35 => value >= k,
                0x45 => value & k != 0,
                other => panic!("{other:x}"),
            };
            at += usize::from(if is_met { jt } else { jf });
        }
    }

    fn of(call: c_long, arguments: [u32; 2]) -> u32 {
        let mut filter = Filter::new();
        let at = filter.process_at;
        filter.program[at].k = 4711;
        verdict(&filter, ARCHITECTURE, call, arguments)
    }

    #[test]
    fn sockets_are_those_of_the_file_system() {
        for call in [libc::SYS_socket, libc::SYS_socketpair] {
            assert_eq!(of(call, [1, 0]), libc::SECCOMP_RET_ALLOW);
            for family in
                [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_PACKET, libc::AF_VSOCK, libc::AF_ALG]
            {
                assert_eq!(of(call, [family.cast_unsigned(), 0]), DENY, "{family}");
            }
        }
    }

    #[test]
    fn threads_are_made_and_namespaces_are_not() {
        let thread = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
        assert_eq!(of(libc::SYS_clone, [thread.cast_unsigned(), 0]), libc::SECCOMP_RET_ALLOW);
        assert_eq!(of(libc::SYS_clone, [libc::CLONE_NEWUSER.cast_unsigned(), 0]), DENY);
        assert_eq!(of(libc::SYS_clone3, [0, 0]), NOT_THERE);
        assert_eq!(of(libc::SYS_unshare, [0, 0]), DENY);
    }

    #[test]
    fn only_the_process_itself_is_signalled() {
        assert_eq!(of(libc::SYS_tgkill, [4711, 0]), libc::SECCOMP_RET_ALLOW);
        assert_eq!(of(libc::SYS_tgkill, [4712, 0]), DENY);
        assert_eq!(of(libc::SYS_kill, [4711, 0]), DENY);
    }

    #[test]
    fn calls_of_another_architecture_do_not_evade_the_filter() {
        assert_eq!(verdict(&Filter::new(), 0x4000_0003, libc::SYS_read, [0; 2]), libc::SECCOMP_RET_KILL_PROCESS);
        assert_eq!(of(libc::SYS_ptrace | c_long::from(X32), [0; 2]), DENY);
    }

    #[test]
    fn every_listed_call_is_denied_and_the_usual_ones_are_not() {
        for call in DENIED {
            assert_eq!(of(call, [0; 2]), DENY, "{call}");
        }
        for call in
            [libc::SYS_read, libc::SYS_ioctl, libc::SYS_mmap, libc::SYS_execve, libc::SYS_futex, libc::SYS_seccomp]
        {
            assert_eq!(of(call, [0; 2]), libc::SECCOMP_RET_ALLOW, "{call}");
        }
    }
}
