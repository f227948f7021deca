//! What happens in QEMU's process between fork and exec: system calls and nothing else. Nothing here allocates or locks.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::RawFd;

use crate::confine::{Confinement, Failure};
use crate::host::daemon::{close_descriptors_at_exec, reset_signals};

/// A control group that QEMU joins.
#[derive(Debug)]
pub struct GroupToJoin {
    /// The file that takes its members.
    pub members: File,
    /// QEMU does not start outside of it.
    pub is_required: bool,
}

/// Joins a control group. For a child between fork and exec, before anything that may forbid it.
pub(super) fn join(group: &GroupToJoin) -> io::Result<()> {
    match rustix::io::write(&group.members, b"0") {
        Err(error) if group.is_required => Err(error.into()),
        // The supervisor finds no group, and reports no limits.
        _ => Ok(()),
    }
}

/// What happens in the child between fork and exec: system calls and nothing else.
pub(super) fn prepare(
    lock_fd: RawFd,
    confinement: Option<&mut Confinement>,
    file_bytes: Option<u64>,
) -> io::Result<()> {
    let done = |result: libc::c_int| if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) };
    let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    reset_signals();
    // SAFETY: plain system calls on values of this frame.
    unsafe {
        done(libc::setsid())?;
        done(libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core))?;
        if let Some(bytes) = file_bytes {
            // The signal's default ends the process; ignored, the write fails.
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
            done(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit))?;
        }
        done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        // The directories of a new root must be usable.
        libc::umask(0o022);
        confinement.map_or(Ok(()), Confinement::enter).map_err(Failure::error)?;
        libc::umask(0o177);
        let mut blocked: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut blocked);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&raw mut blocked, signal);
        }
        done(libc::sigprocmask(libc::SIG_SETMASK, &raw const blocked, std::ptr::null_mut()))?;
        close_descriptors_at_exec()?;
        done(libc::fcntl(lock_fd, libc::F_SETFD, 0))
    }
}
