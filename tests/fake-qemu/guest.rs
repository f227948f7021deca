//! The guest: the real agent, as a process on the host that dials the socket nido meant for QEMU.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitCode, Stdio};

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, close};

/// The word that makes this program become the agent: one more process start, because only a process of its own can
/// arrange what happens to it without `unsafe`.
pub const RUN_AGENT: &str = "become-the-agent";

/// What the agent is started with.
pub struct Start {
    /// The socket that it dials.
    pub channel: String,
    /// The file with its configuration.
    pub config: String,
    /// The configuration of a guest that was loaded: that of the guest that was saved.
    pub saved: Option<Vec<u8>>,
}

/// Starts the agent named by `FAKE_QEMU_AGENT`. To be called by the main thread: the agent is killed when that ends.
pub fn start_agent(Start { channel, config, saved }: &Start) -> io::Result<Child> {
    let agent =
        std::env::var_os("FAKE_QEMU_AGENT").ok_or_else(|| io::Error::other("FAKE_QEMU_AGENT names no agent"))?;
    prctl::set_child_subreaper(true)?;
    let config = if saved.is_some() { "/dev/stdin" } else { config };
    let mut child = Command::new(std::env::current_exe()?)
        .args([RUN_AGENT.as_ref(), agent.as_os_str(), channel.as_ref(), config.as_ref()])
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    if let (Some(mut stdin), Some(saved)) = (child.stdin.take(), saved) {
        stdin.write_all(saved)?;
    }
    Ok(child)
}

/// Turns this process into the agent, without the VM's lock and bound to its parent's life.
pub fn become_agent(args: &[String]) -> ExitCode {
    let [agent, channel, config] = args else { return ExitCode::from(2) };
    let _ = prctl::set_pdeathsig(Signal::SIGKILL);
    let _ = SigSet::all().thread_unblock();
    for fd in open_fds().into_iter().filter(|fd| *fd > 2) {
        let _ = close(fd);
    }
    // QEMU's own, which leaves directories unusable, is not a guest's.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let error = Command::new(agent).args(["serve", "--channel-socket", channel, "--config", config]).exec();
    eprintln!("fake-qemu: {agent}: {error}");
    ExitCode::FAILURE
}

fn open_fds() -> Vec<i32> {
    let entries = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Pauses or continues the guest, or ends it.
pub fn signal(agent: Pid, signal: Signal) {
    let _ = kill(agent, signal);
}

/// Ends everything that this process has started, directly or not.
pub fn end_all() {
    while let Some(child) = children().into_iter().next() {
        let _ = kill(child, Signal::SIGKILL);
        let _ = waitpid(child, Some(WaitPidFlag::__WALL));
    }
}

fn children() -> Vec<Pid> {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .map(Pid::from_raw)
        .collect()
}
