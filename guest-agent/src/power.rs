//! Going down in order: processes get SIGTERM, then SIGKILL, the disks are written, the power goes off.
//!
//! Invariant: it always ends. Every wait has a deadline, and the last step is the kernel's.

use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nido_guest_agent::wire::Power;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::mount::{MountFlags, mount_remount};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::agent::Agent;
use crate::sys::Launch;

/// How long processes may take after SIGTERM.
const TERM_GRACE: Duration = Duration::from_secs(5);
/// How long the kernel may take to end them after SIGKILL.
const KILL_GRACE: Duration = Duration::from_secs(2);

/// Which process does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The agent, as process 1.
    Init,
    /// systemd is notified.
    Systemd,
}

/// Waits until the host requests it, or (as process 1) a program in the guest by a signal.
///
/// # Errors
/// Signals cannot be watched.
pub async fn wait_for_request(requests: &mut mpsc::Receiver<Power>, mode: Mode) -> io::Result<Power> {
    if mode == Mode::Systemd {
        return requests.recv().await.ok_or_else(|| io::Error::other("the requester is gone"));
    }
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let power = tokio::select! {
        Some(power) = requests.recv() => power,
        _ = term.recv() => Power::Off,
        _ = interrupt.recv() => Power::Restart,
    };
    Ok(power)
}

/// Takes the guest down. As process 1 it does not return.
///
/// # Errors
/// systemd cannot be notified, or the kernel refuses.
pub async fn go_down(agent: &Agent, power: Power, mode: Mode) -> io::Result<()> {
    match mode {
        Mode::Systemd => notify_systemd(agent, power).await,
        Mode::Init => end_everything(agent, power).await,
    }
}

async fn notify_systemd(agent: &Agent, power: Power) -> io::Result<()> {
    let verb = match power {
        Power::Off => c"poweroff",
        Power::Restart => c"reboot",
    };
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let launch = Launch {
        programs: &[c"/bin/systemctl".into(), c"/usr/bin/systemctl".into()],
        argv: &[c"systemctl".into(), CString::from(c"--no-block"), verb.into()],
        environment: &[],
        directory: c"/",
        stdio: [null.as_fd(), null.as_fd(), null.as_fd()],
        terminal: false,
        identity: None,
        group: None,
        reset_oom_score: false,
    };
    agent.reaper.launch(&launch).map_err(io::Error::other)?;
    // systemd ends this process when its turn has come.
    std::future::pending().await
}

async fn end_everything(agent: &Agent, power: Power) -> io::Result<()> {
    // Interactive shells ignore SIGTERM and obey SIGHUP; stopped processes obey once they continue.
    let politely = &[Signal::SIGHUP, Signal::SIGTERM, Signal::SIGCONT][..];
    for (signals, grace) in [(politely, TERM_GRACE), (&[Signal::SIGKILL], KILL_GRACE)] {
        for &signal in signals {
            // As process 1, "every process" does not include the caller. That there is no other is no failure.
            let _ = kill(Pid::from_raw(-1), signal);
        }
        if timeout(grace, agent.reaper.wait_until_empty()).await.is_ok() {
            break;
        }
    }
    // What cannot be written now never can; the power goes off nevertheless.
    rustix::fs::sync();
    let _ = mount_remount("/", MountFlags::RDONLY, c"");
    let command = match power {
        Power::Off => rustix::system::RebootCommand::PowerOff,
        Power::Restart => rustix::system::RebootCommand::Restart,
    };
    Ok(rustix::system::reboot(command)?)
}
