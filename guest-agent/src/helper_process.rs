//! Programs of the guest that the agent runs for itself: `ssh-keygen`, and the hooks of an identity reset.
//!
//! Invariant: a program has a deadline and then is killed with its whole process group, and what it printed is on the
//! console.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Signal, kill_process_group};
use tokio::time::timeout;

use crate::reaper::{ExitStatus, Reaper};
use crate::sys::Launch;

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program, its arguments (without its own name), and what it finds in its environment besides `PATH`.
#[derive(Debug, PartialEq, Eq)]
pub struct HelperProcess {
    /// Absolute path.
    pub program: String,
    /// Arguments.
    pub arguments: Vec<String>,
    /// `KEY=VALUE`.
    pub environment: Vec<String>,
    /// How long it may take.
    pub deadline: Duration,
}

/// Runs a program to its end.
///
/// # Errors
/// It cannot be started, does not end in time, or does not end with success.
pub async fn run(reaper: &Arc<Reaper>, helper: HelperProcess) -> io::Result<()> {
    let (starter, deadline) = (reaper.clone(), helper.deadline);
    let launched = tokio::task::spawn_blocking(move || launch(&starter, &helper));
    let (pid, ended) = launched.await.map_err(io::Error::other)??;
    match timeout(deadline, ended).await {
        Ok(Ok(ExitStatus::Code(0))) => Ok(()),
        Ok(Ok(ExitStatus::Code(code))) => Err(io::Error::other(format!("ended with exit code {code}"))),
        Ok(Ok(ExitStatus::Signal(signal))) => Err(io::Error::other(format!("was ended by signal {signal}"))),
        Ok(Err(_lost)) => Err(io::Error::other("was lost")),
        Err(_late) => {
            // Gone already is as good.
            let _ = kill_process_group(pid, Signal::KILL);
            Err(io::Error::new(io::ErrorKind::TimedOut, format!("did not end within {} s", deadline.as_secs())))
        }
    }
}

type LaunchedProcess = (rustix::process::Pid, tokio::sync::oneshot::Receiver<ExitStatus>);

fn launch(reaper: &Reaper, helper: &HelperProcess) -> io::Result<LaunchedProcess> {
    let strings = |list: &[String]| -> io::Result<Vec<CString>> {
        list.iter().map(|text| CString::new(text.as_str()).map_err(io::Error::other)).collect()
    };
    let program = CString::new(helper.program.as_str())?;
    let argv = [vec![program.clone()], strings(&helper.arguments)?].concat();
    let environment = [vec![CString::new(PATH)?], strings(&helper.environment)?].concat();
    let (input, output) = (File::open("/dev/null")?, console()?);
    let launch = Launch {
        programs: &[program],
        argv: &argv,
        environment: &environment,
        directory: c"/",
        stdio: [input.as_fd(), output.as_fd(), output.as_fd()],
        terminal: false,
        identity: None,
        group: None,
        reset_oom_score: crate::sys::has_oom_score(),
    };
    reaper.launch(&launch).map_err(|error| error.error)
}

/// Where output goes: the console, which the host keeps; where there is none, the agent's own error output.
fn console() -> io::Result<OwnedFd> {
    match OpenOptions::new().write(true).custom_flags(libc::O_NOCTTY).open("/dev/console") {
        Ok(console) => Ok(console.into()),
        Err(_none) => io::stderr().as_fd().try_clone_to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn shell(script: &str, deadline: Duration) -> io::Result<()> {
        let reaper = Arc::new(Reaper::default());
        let reaped = reaper.clone();
        let reaping = tokio::spawn(async move { reaped.reap().await });
        let arguments = vec!["-c".into(), script.into()];
        let helper =
            HelperProcess { program: "/bin/sh".into(), arguments, environment: vec!["WORD=x".into()], deadline };
        let result = run(&reaper, helper).await;
        reaping.abort();
        result
    }

    /// One test, for all children of the test's process are reaped in one place.
    #[tokio::test]
    async fn only_success_in_time_is_success() {
        const LONG: Duration = Duration::from_secs(60);
        shell("test \"$WORD\" = x && test -z \"$HOME\" && ! read line", LONG).await.unwrap();
        assert_eq!(shell("exit 3", LONG).await.unwrap_err().to_string(), "ended with exit code 3");
        assert_eq!(shell("kill -9 $$", LONG).await.unwrap_err().to_string(), "was ended by signal 9");
        let late = shell("sleep 1000 & wait", Duration::from_millis(50)).await.unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
    }
}
