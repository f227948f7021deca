//! Processes as `/proc` shows them.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use super::wait::BOOT_TEST_TIMEOUT;

/// One process.
#[derive(Debug, Clone)]
pub struct Process {
    pub pid: i32,
    /// The first argument's file name.
    pub name: String,
    pub arguments: Vec<String>,
}

impl Process {
    fn read(pid: i32) -> Option<Self> {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let arguments: Vec<String> =
            line.split(|&byte| byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let name = Path::new(arguments.first()?).file_name()?.to_str()?.to_owned();
        Some(Self { pid, name, arguments })
    }

    fn directory(&self) -> Option<PathBuf> {
        fs::read_link(format!("/proc/{}/cwd", self.pid)).ok()
    }

    /// Whether it is a VM; a QEMU that is probed is not one.
    pub fn is_qemu(&self) -> bool {
        self.arguments.first().is_some_and(|program| program.contains("qemu-system-"))
            && self.arguments.iter().any(|argument| argument.starts_with("guest="))
    }

    /// One line of `/proc/PID/status`.
    pub fn status(&self, key: &str) -> Option<String> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        Some(line.trim().to_owned())
    }

    pub fn is_alive(&self) -> bool {
        self.status("State").is_some_and(|state| !state.starts_with('Z'))
    }

    /// Ends it with no chance to clear up, and waits until it is gone with all its threads and what they held open. One that has
    /// ended by itself is as good.
    #[track_caller]
    pub fn kill(&self) {
        let pid = Pid::from_raw(self.pid).expect("a process has a number");
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return };
        send(self.pid, Signal::KILL);
        let limit = Timespec { tv_sec: BOOT_TEST_TIMEOUT.as_secs().cast_signed(), tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)), Ok(1), "{self:?} does not die");
    }
}

/// Sends a signal to a process of ours; one that is gone already is as good.
pub fn send(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, signal);
    }
}

/// Every process that works in `directory` or has it in its arguments, except this one.
pub fn processes_in(directory: &Path) -> Vec<Process> {
    let told = directory.to_str().expect("test homes have plain names");
    let me = i32::try_from(std::process::id()).unwrap();
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| pid != me)
        .filter_map(Process::read)
        .filter(|process| {
            process.directory().is_some_and(|works_in| works_in.starts_with(directory))
                || process.arguments.iter().any(|argument| argument.contains(told))
        })
        .filter(Process::is_alive)
        .collect()
}
