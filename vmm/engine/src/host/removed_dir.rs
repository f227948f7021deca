//! Processes whose working directory has been removed: all that remains of a VM whose directory was deleted while it ran.
//!
//! Invariant: a signal goes through a pidfd whose process was looked at after the pidfd was opened, so it reaches no other one.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Kills every process of this user that works in the removed directory `dir`, but not this one. Returns how many still live
/// after `timeout`.
pub fn kill_processes_in(dir: &Path, timeout: Duration) -> usize {
    let deadline = Instant::now() + timeout;
    let found = processes_in(dir);
    for process in &found {
        let _ = pidfd_send_signal(process, Signal::KILL);
    }
    found.iter().filter(|process| !has_ended(process, deadline)).count()
}

/// How many processes work in the removed directory `dir`.
pub fn count_processes_in(dir: &Path) -> usize {
    processes_in(dir).len()
}

fn processes_in(dir: &Path) -> Vec<OwnedFd> {
    // The kernel shows real paths.
    let parent = dir.parent().and_then(|parent| fs::canonicalize(parent).ok());
    let (Some(parent), Some(name), Ok(entries)) = (parent, dir.file_name(), fs::read_dir("/proc")) else {
        return Vec::new();
    };
    let mut wanted = parent.join(name).into_os_string();
    wanted.push(" (deleted)");
    let works_there = |pid: i32| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| *cwd == *wanted);
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let found = pids.filter(|pid| *pid != own && works_there(*pid)).filter_map(|pid| {
        let pidfd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        works_there(pid).then_some(pidfd)
    });
    found.collect()
}

fn has_ended(process: &OwnedFd, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    let nanos = i64::from(left.subsec_nanos());
    let left = rustix::time::Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(0), tv_nsec: nanos };
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&left)).is_ok_and(|ended| ended > 0)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn only_processes_in_the_removed_directory_are_killed() {
        let root = tempfile::tempdir().unwrap();
        let (dir, other) = (root.path().join("vm"), root.path().join("vm-2"));
        let sleep = |dir: &Path| {
            fs::create_dir(dir).unwrap();
            Command::new("sleep").arg("100").current_dir(dir).spawn().unwrap()
        };
        let (mut gone, mut stays) = (sleep(&dir), sleep(&other));
        let timeout = Duration::from_secs(30);
        assert_eq!((count_processes_in(&dir), kill_processes_in(&dir, timeout)), (0, 0), "the directory is there");
        fs::remove_dir(&dir).unwrap();
        assert_eq!((count_processes_in(&dir), kill_processes_in(&dir, timeout)), (1, 0));
        gone.wait().unwrap();
        assert!(stays.try_wait().unwrap().is_none());
        stays.kill().unwrap();
        stays.wait().unwrap();
    }
}
