//! How a process of nido that stays is started: a supervisor, the pool filler, the delivery worker, the watcher of a time to live.
//!
//! It gets a clean descriptor table, a short list of environment variables, a directory of nido's own, a session of its own, default
//! signals and a umask that keeps everything private. Invariant: such a process keeps nothing of its caller's in use: no lock, no
//! pipe, no directory, no mark in its environment.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

/// Variables of the caller that a process of nido may see: where programs, the user's files and the buses are, what the system's
/// libraries need for certificates and times.
pub const KEPT_VARIABLES: [&str; 17] = [
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
];
/// What QEMU sees, when it is asked what it can do as well as when it runs a VM.
const QEMU_VARIABLES: [(&str, &str); 2] = [("PATH", "/usr/local/bin:/usr/bin:/bin"), ("LC_ALL", "C.UTF-8")];

/// A command for a process of nido that stays. Its directory has to be nido's own.
#[must_use]
pub fn command(program: &Path, directory: &Path) -> Command {
    // A relative program would be looked for in the new directory.
    let program = std::path::absolute(program).unwrap_or_else(|_| program.into());
    let mut command = Command::new(program);
    command.env_clear().envs(kept(std::env::vars_os())).current_dir(directory);
    // SAFETY: `detach` makes system calls only; it neither allocates nor locks.
    unsafe { command.pre_exec(detach) };
    command
}

fn kept(all: impl Iterator<Item = (OsString, OsString)>) -> impl Iterator<Item = (OsString, OsString)> {
    all.filter(|(name, _)| KEPT_VARIABLES.iter().any(|kept| name == OsStr::new(kept)))
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
    // SAFETY: a plain system call; it marks descriptors and changes nothing else.
    let done = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
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

/// What happens in the child between fork and exec: system calls and nothing else.
fn detach() -> io::Result<()> {
    reset_signals();
    // SAFETY: plain system calls on values of this frame.
    unsafe {
        if libc::setsid() == -1 {
            return Err(io::Error::last_os_error());
        }
        libc::umask(0o077);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
    close_descriptors_at_exec()
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;
    use std::process::Stdio;

    use super::*;

    /// A lock or a pipe that a caller's shell had open stayed in use for as long as the supervisor lived.
    #[test]
    fn a_process_that_stays_keeps_nothing_of_its_callers() {
        let dir = tempfile::tempdir().unwrap();
        let open = std::fs::File::open("/dev/null").unwrap();
        // SAFETY: makes a descriptor of this test inheritable.
        assert_ne!(unsafe { libc::fcntl(open.as_raw_fd(), libc::F_SETFD, 0) }, -1);
        let script = "ls /proc/$$/fd | wc -l; env; pwd; umask; exec cat /proc/self/stat";
        let mut command = command(Path::new("/bin/sh"), dir.path());
        let output = command.args(["-c", script]).stdin(Stdio::null()).stderr(Stdio::null()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0].trim(), "3", "{text}");
        assert!(lines.contains(&dir.path().canonicalize().unwrap().to_str().unwrap()), "{text}");
        assert!(lines.contains(&"0077"), "{text}");
        assert!(!text.contains("CARGO_"), "{text}");
        // Process, group and session are one: fields 1, 5 and 6.
        let fields: Vec<&str> = lines.last().unwrap().split(' ').collect();
        assert_eq!((fields[0], fields[0]), (fields[4], fields[5]), "{text}");
    }

    #[test]
    fn the_environment_is_the_named_variables() {
        let all = ["PATH", "HOME", "RUNNER_TRACKING_ID", "AWS_SECRET_ACCESS_KEY", "LD_PRELOAD", "NIDO_HOME"];
        let kept: Vec<_> = kept(all.iter().map(|name| (OsString::from(name), OsString::from("x")))).collect();
        assert_eq!(kept.iter().map(|(name, _)| name.to_str().unwrap()).collect::<Vec<_>>(), ["PATH", "HOME"]);
    }
}
