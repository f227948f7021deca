//! How a process of nido that stays is started: a supervisor, the pool filler, the delivery worker, the guardian.
//!
//! The process that starts it gives it a short list of environment variables and a directory of nido's own ([`command`]), and passes on no
//! descriptor ([`keep_descriptors`]). The rest it does itself ([`begin`]): a session of its own, default signals, a umask that keeps
//! everything private. Nothing has to happen between fork and exec, so it is started without a copy of its parent's page tables,
//! which would take as long as all the rest.
//!
//! Invariant: such a process keeps nothing of its caller's in use: no lock, no pipe, no directory, no mark in its environment.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::Path;
use std::process::Command;

/// Variables of the caller that a process of nido may see: where programs, the user's files and the buses are, what the system's
/// libraries need for certificates and times, and nido's own settings.
pub const KEPT_VARIABLES: [&str; 19] = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "XDG_DATA_HOME",
    "XDG_STATE_HOME",
    "XDG_RUNTIME_DIR",
    "DBUS_SESSION_BUS_ADDRESS",
    "DBUS_SYSTEM_BUS_ADDRESS",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "RUST_BACKTRACE",
    "LLVM_PROFILE_FILE",
    "NIDO_CGROUP",
    "NIDO_PRECOPY",
];
/// How many files a process of nido must be allowed to open, at least.
pub const OPEN_FILES_MIN: u64 = 64;
/// What QEMU sees, when it is probed as well as when it runs a VM.
const QEMU_VARIABLES: [(&str, &str); 2] = [("PATH", "/usr/local/bin:/usr/bin:/bin"), ("LC_ALL", "C.UTF-8")];

/// A command for a process of nido that stays. Its directory has to be nido's own.
#[must_use]
pub fn command(program: &Path, directory: &Path) -> Command {
    // A relative program would be looked for in the new directory.
    let program = std::path::absolute(program).unwrap_or_else(|_| program.into());
    let mut command = Command::new(program);
    command.env_clear().envs(kept(std::env::vars_os())).current_dir(directory);
    command
}

fn kept(all: impl Iterator<Item = (OsString, OsString)>) -> impl Iterator<Item = (OsString, OsString)> {
    let is_kept = |name: &OsStr| KEPT_VARIABLES.iter().any(|kept| name == OsStr::new(kept));
    all.filter(move |(name, _)| is_kept(name) || nido_files::failpoint::is_variable(name))
}

/// Gives QEMU the one environment that it is probed and run in.
pub fn set_qemu_environment(command: &mut Command) {
    command.env_clear().envs(QEMU_VARIABLES);
}

/// Closes everything above standard error at exec. For a child between fork and exec.
///
/// # Errors
/// The kernel is older than 5.11.
pub fn close_descriptors_at_exec() -> io::Result<()> {
    close_range(libc::CLOSE_RANGE_CLOEXEC)
}

/// Keeps what this process has inherited from the processes that it starts. For the beginning of a program of nido's.
pub fn keep_descriptors() {
    // On an older kernel a process that stays closes them itself.
    let _ = close_descriptors_at_exec();
}

fn close_range(flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: a plain system call. It either marks descriptors, or is the first thing that a process does ([`begin`]), which owns
    // none above standard error then.
    let done = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, flags) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives all signals their default action. For a child between fork and exec.
pub fn reset_signals() {
    // The kernel's `struct sigaction` for "default": no handler, no flags, no mask. Asked of the kernel directly because the
    // C library keeps two signals to itself. SIGKILL and SIGSTOP are refused, which does not matter.
    let default = [0_u64; 4];
    for signal in 1..=64 {
        // SAFETY: the array has the size that the kernel expects.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, &raw const default, std::ptr::null::<u64>(), 8) };
    }
}

/// Makes this process one that stays. For its very beginning, when it has opened nothing and has one thread.
///
/// # Errors
/// The kernel is older than 5.9.
pub fn begin() -> io::Result<()> {
    close_range(0)?;
    obey_ignored_signals();
    // SAFETY: plain system calls on values of this frame.
    unsafe {
        // Fails where it has a session of its own already.
        libc::setsid();
        libc::umask(0o077);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
    Ok(())
}

/// Gives the signals that the caller ignored (`nohup` does) their default action. SIGPIPE is ignored by every Rust program.
fn obey_ignored_signals() {
    const IGNORED: u64 = libc::SIG_IGN as u64;
    for signal in (1..=64).filter(|signal| *signal != libc::SIGPIPE) {
        let mut action = [0_u64; 4];
        // SAFETY: the array has the size of the kernel's `struct sigaction`, whose first field is the handler.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, std::ptr::null::<u64>(), action.as_mut_ptr(), 8);
            if action[0] == IGNORED {
                let default = [0_u64; 4];
                libc::syscall(libc::SYS_rt_sigaction, signal, &raw const default, std::ptr::null::<u64>(), 8);
            }
        }
    }
}

/// Lets this process, and what it starts, have as many descriptors open as its hard limit allows: a server has several for each
/// connection and stream, and the usual soft limit is 1024.
pub fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!("the limit of open files stays low: {error}");
        }
    }
}

/// Checks that this process may open as many files as nido needs, so that a start does not fail half-way.
///
/// # Errors
/// `EMFILE`, if the limit is below [`OPEN_FILES_MIN`] and cannot be raised.
pub fn check_open_files() -> io::Result<()> {
    use rustix::process::{Resource, getrlimit};
    let is_enough = || getrlimit(Resource::Nofile).current.is_none_or(|limit| limit >= OPEN_FILES_MIN);
    if is_enough() {
        return Ok(());
    }
    raise_open_files();
    if is_enough() { Ok(()) } else { Err(rustix::io::Errno::MFILE.into()) }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    // What such a process keeps of its caller is tested with the real program: tests/functional/daemons.rs.
    #[test]
    fn a_process_that_stays_has_its_own_environment_and_directory() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = command(Path::new("/bin/sh"), dir.path());
        let output = command.args(["-c", "env; pwd"]).stdin(Stdio::null()).stderr(Stdio::null()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.contains(&dir.path().canonicalize().unwrap().to_str().unwrap()), "{text}");
        assert!(!text.contains("CARGO_"), "{text}");
    }

    #[test]
    fn the_environment_is_the_named_variables() {
        let all = ["PATH", "HOME", "RUNNER_TRACKING_ID", "AWS_SECRET_ACCESS_KEY", "LD_PRELOAD", "NIDO_HOME"];
        let kept: Vec<_> = kept(all.iter().map(|name| (OsString::from(name), OsString::from("x")))).collect();
        assert_eq!(kept.iter().map(|(name, _)| name.to_str().unwrap()).collect::<Vec<_>>(), ["PATH", "HOME"]);
    }
}
