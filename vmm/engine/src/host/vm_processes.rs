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

use crate::home::VM_LOCK;

/// Kills every process of this user that works in the removed directory `dir`, but not this one. Returns how many still run
/// after `timeout`.
pub fn kill_processes_in_removed(dir: &Path, timeout: Duration) -> usize {
    kill(&processes_in_removed(dir), timeout)
}

/// How many processes work in the removed directory `dir`.
pub fn count_processes_in_removed(dir: &Path) -> usize {
    processes_in_removed(dir).len()
}

/// Kills every process of this user, but not this one, that holds the lock at `path`. Returns how many still run after
/// `timeout`.
pub fn kill_lock_holders(path: &Path, timeout: Duration) -> usize {
    let Some(wanted) = real(path) else { return 0 };
    kill(&lock_holders(&wanted), timeout)
}

/// A process that has a file open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileUser {
    /// Its number.
    pub pid: i32,
    /// Its command line.
    pub command: Vec<String>,
}

/// The processes of this user, but not this one, that have one of the files open whose path begins with `prefix`, also if it was
/// removed or replaced since. The ends of the paths after the prefix are short: `nido.db` means `nido.db-wal` as well.
#[must_use]
pub fn users_of(prefix: &Path) -> Vec<FileUser> {
    let Some(prefix) = real(prefix) else { return Vec::new() };
    let uses = |process: &Path| {
        let open = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        let named =
            |file: PathBuf| file.as_os_str().as_encoded_bytes().starts_with(prefix.as_os_str().as_encoded_bytes());
        open.filter_map(|fd| fs::read_link(fd.path()).ok()).any(named)
    };
    let command = |pid: i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words = line.split(|byte| *byte == 0).filter(|word| !word.is_empty());
        words.map(|word| String::from_utf8_lossy(word).into_owned()).collect()
    };
    pids().filter(|pid| uses(&proc_of(*pid))).map(|pid| FileUser { pid, command: command(pid) }).collect()
}

/// Kills a process that was found by [`users_of`], if it is still the same one. Returns whether it has ended after `timeout`.
pub fn kill_user(user: &FileUser, prefix: &Path, timeout: Duration) -> bool {
    let pidfd = Pid::from_raw(user.pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let Some(pidfd) = pidfd.filter(|_| users_of(prefix).contains(user)) else { return true };
    kill(&[pidfd], timeout) == 0
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
    let deleted = |path: PathBuf| {
        let mut path = path.into_os_string();
        path.push(" (deleted)");
        PathBuf::from(path)
    };
    // The directory that a QEMU with a root of its own works in is its own, too; it holds the VM's lock.
    let (wanted, lock) = (deleted(dir.clone()), deleted(dir.join(VM_LOCK)));
    processes(|process| {
        let mut open = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == wanted)
            || open.any(|fd| fs::read_link(fd.path()).is_ok_and(|file| file == lock))
    })
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
    let found = pids().filter(|pid| is_wanted(&proc_of(*pid))).filter_map(|pid| {
        let pidfd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        is_wanted(&proc_of(pid)).then_some(pidfd)
    });
    found.collect()
}

/// The numbers of all processes but this one.
fn pids() -> impl Iterator<Item = i32> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(move |pid| *pid != own)
}

fn proc_of(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
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

    #[test]
    fn the_users_of_a_file_are_found_and_one_can_be_killed() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("nido.db-wal");
        fs::write(&file, "").unwrap();
        let mut user = Command::new("sleep").arg("100").stdin(fs::File::open(&file).unwrap()).spawn().unwrap();
        fs::remove_file(&file).unwrap();
        let prefix = root.path().join("nido.db");
        let found = loop {
            // Between fork and exec it has this process's command line.
            let found = users_of(&prefix);
            if found.iter().any(|user| user.command == ["sleep", "100"]) {
                break found;
            }
        };
        assert_eq!(
            found,
            [FileUser { pid: user.id().try_into().unwrap(), command: vec!["sleep".into(), "100".into()] }]
        );
        assert!(kill_user(&found[0], &prefix, Duration::from_secs(30)));
        user.wait().unwrap();
        assert_eq!(users_of(&prefix), []);
    }

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
        let held = nido_files::lock::HeldLock::try_take(&lock).unwrap().unwrap();
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
