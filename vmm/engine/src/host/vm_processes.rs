//! Processes of a VM that no supervisor can end any more: because its directory was removed by something other than nido, or
//! because its row in the store cannot be read.
//!
//! Invariant: a signal goes through a pidfd whose process was looked at after the pidfd was opened, so it reaches no other one.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Kills every process of this user that works in the removed directory `dir`, but not this one. Returns how many still live
/// after `timeout`.
pub fn kill_processes_in_removed(dir: &Path, timeout: Duration) -> usize {
    kill(&processes_in_removed(dir), timeout)
}

/// How many processes work in the removed directory `dir`.
pub fn count_processes_in_removed(dir: &Path) -> usize {
    processes_in_removed(dir).len()
}

/// Kills every process of this user, but not this one, that holds the lock at `path`. Returns how many still live after
/// `timeout`.
pub fn kill_lock_holders(path: &Path, timeout: Duration) -> usize {
    let Some(wanted) = real(path) else { return 0 };
    kill(&lock_holders(&wanted), timeout)
}

fn kill(processes: &[OwnedFd], timeout: Duration) -> usize {
    let deadline = Instant::now() + timeout;
    for process in processes {
        let _ = pidfd_send_signal(process, Signal::KILL);
    }
    processes.iter().filter(|process| !has_ended(process, deadline)).count()
}

fn processes_in_removed(dir: &Path) -> Vec<OwnedFd> {
    let Some(dir) = real(dir) else { return Vec::new() };
    let mut wanted = dir.into_os_string();
    wanted.push(" (deleted)");
    processes(|process| fs::read_link(process.join("cwd")).is_ok_and(|cwd| *cwd == *wanted))
}

fn lock_holders(wanted: &Path) -> Vec<OwnedFd> {
    processes(|process| {
        let open = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        let mut wanted = open.filter(|fd| fs::read_link(fd.path()).is_ok_and(|file| file == *wanted));
        // A process may have it open only to see whether it is locked.
        wanted.any(|fd| {
            let info = fs::read_to_string(process.join("fdinfo").join(fd.file_name())).unwrap_or_default();
            info.lines().any(|line| line.starts_with("lock:"))
        })
    })
}

/// A path as the kernel shows it, also of a directory that is gone.
fn real(path: &Path) -> Option<PathBuf> {
    Some(fs::canonicalize(path.parent()?).ok()?.join(path.file_name()?))
}

/// The processes of this user, but not this one, for whose directory below `/proc` this is true.
fn processes(is_wanted: impl Fn(&Path) -> bool) -> Vec<OwnedFd> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let of = |pid: i32| PathBuf::from(format!("/proc/{pid}"));
    let found = pids.filter(|pid| *pid != own && is_wanted(&of(*pid))).filter_map(|pid| {
        let pidfd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        is_wanted(&of(pid)).then_some(pidfd)
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
        assert_eq!(
            (count_processes_in_removed(&dir), kill_processes_in_removed(&dir, timeout)),
            (0, 0),
            "the directory is there"
        );
        fs::remove_dir(&dir).unwrap();
        assert_eq!((count_processes_in_removed(&dir), kill_processes_in_removed(&dir, timeout)), (1, 0));
        gone.wait().unwrap();
        assert!(stays.try_wait().unwrap().is_none());
        stays.kill().unwrap();
        stays.wait().unwrap();
    }

    #[test]
    fn only_processes_that_hold_the_lock_are_killed() {
        let root = tempfile::tempdir().unwrap();
        let lock = root.path().join("vm.lock");
        let sleep =
            |file: fs::File| Command::new("sleep").arg("100").current_dir(root.path()).stdin(file).spawn().unwrap();
        let held = nido_files::lock::Held::try_take(&lock).unwrap().unwrap();
        let mut holder = sleep(held.file().try_clone().unwrap());
        drop(held);
        let mut other = sleep(fs::File::open(&lock).unwrap());
        assert!(nido_files::lock::is_held(&lock));
        let timeout = Duration::from_secs(30);
        assert_eq!(kill_lock_holders(&lock, timeout), 0);
        holder.wait().unwrap();
        assert!(other.try_wait().unwrap().is_none() && !nido_files::lock::is_held(&lock));
        assert_eq!(kill_lock_holders(&root.path().join("none"), timeout), 0);
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
