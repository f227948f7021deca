//! A helper program on untrusted data: it enters its confinement and its limits between fork and exec.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use super::Confinement;

/// The most that a helper may use. It makes no core dump, and ends with the thread that started it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Address space, in bytes.
    pub memory_bytes: u64,
    /// CPU time.
    pub cpu_seconds: u64,
    /// Size of a file that it writes, in bytes.
    pub file_bytes: u64,
    /// Open files.
    pub open_files: u64,
}

/// Makes a command enter a confinement. The program has to be named by its absolute path; the working directory is that of the
/// plan. An error of its start is put in words by [`super::explained`].
pub fn confine(command: &mut Command, mut confinement: Confinement, limits: Limits) {
    // SAFETY: the child makes system calls only; it neither allocates nor locks.
    unsafe { command.pre_exec(move || enter(&mut confinement, limits)) };
}

fn enter(confinement: &mut Confinement, limits: Limits) -> io::Result<()> {
    let done = |result: libc::c_int| if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: plain system calls on values of this frame.
    unsafe {
        for (resource, most) in [
            (libc::RLIMIT_CORE, 0),
            (libc::RLIMIT_AS, limits.memory_bytes),
            (libc::RLIMIT_CPU, limits.cpu_seconds),
            (libc::RLIMIT_FSIZE, limits.file_bytes),
            (libc::RLIMIT_NOFILE, limits.open_files),
        ] {
            let mut now: libc::rlimit = std::mem::zeroed();
            done(libc::getrlimit(resource, &raw mut now))?;
            now.rlim_max = now.rlim_max.min(most);
            now.rlim_cur = now.rlim_max;
            done(libc::setrlimit(resource, &raw const now))?;
        }
        done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        // The directories of a new root must be usable.
        libc::umask(0o022);
        confinement.enter().map_err(super::Failure::error)?;
        libc::umask(0o077);
        // The last: a change of rights clears it.
        done(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))
    }
}
