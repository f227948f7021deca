//! The processes that belong to a home: those that work in it or name it on their command line.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, kill_process, pidfd_open};

use super::until;

/// Expects that none is left, or that the last is on its way out.
pub fn expect_none(home: &Path) {
    let mut left = Vec::new();
    let gone = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        until("the end of every process of the home", || {
            left = of(home);
            left.is_empty().then_some(())
        });
    }));
    if gone.is_err() {
        end_all(home);
        panic!("processes are left: {left:?}");
    }
}

/// Kills all of them.
pub fn end_all(home: &Path) {
    for (pid, _) in of(home) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Kills one and waits until the kernel has taken everything from it.
pub fn kill(pid: Pid) {
    assert!(kill_if_alive(pid), "{pid:?} has ended by itself");
}

/// The same for one that may have ended by itself; whether it had not.
pub fn kill_if_alive(pid: Pid) -> bool {
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return false };
    let was_alive = kill_process(pid, Signal::KILL).is_ok();
    let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)), Ok(1));
    was_alive
}

/// Process ids and command lines.
pub fn of(home: &Path) -> Vec<(Pid, String)> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| {
            let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
            // Zombies have no command line.
            let line = fs::read(entry.path().join("cmdline")).ok().filter(|line| !line.is_empty())?;
            let works_there = fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(home));
            let names_it = line.windows(home.as_os_str().len()).any(|part| part == home.as_os_str().as_bytes());
            let shown = String::from_utf8_lossy(&line).replace('\0', " ");
            (pid != getpid() && (works_there || names_it)).then_some((pid, shown))
        })
        .collect()
}
