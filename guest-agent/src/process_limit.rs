//! The limit of processes and threads that all commands together have, with what they start.
//!
//! ```text
//!  /sys/fs/cgroup          the agent, as the guest's first process
//!    nido                  pids.max = the limit
//!      123-0               one command: pids.max = the limit less what is kept for other commands
//! ```
//!
//! An agent that is a service shares its group with the commands' group, so it first moves into another one below it: a group whose
//! children have limits has no processes of its own.
//!
//! Invariant: the agent itself is never in a limited group, so it can start commands whatever those that run have started.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The smallest limit: a shell and what it starts.
pub const MIN: u32 = 16;
/// At most so many processes are kept for other commands.
const KEPT_MAX: u32 = 64;
/// How often the agent's group is looked through for processes that were started meanwhile.
const ROUNDS: usize = 4;

/// The limit, as the host has set it.
pub struct ProcessLimit {
    /// The group above all commands'.
    base: PathBuf,
    /// The agent is in the group above that.
    shares_parent: bool,
    /// 0: no limit.
    limit: AtomicU32,
    /// Processes that were refused in groups that are gone.
    before: AtomicU64,
    /// Processes that were refused before the guest got its identity.
    baseline: AtomicU64,
}

impl ProcessLimit {
    /// The limit of the commands in `base`: no limit until it is set.
    pub fn new(base: PathBuf, shares_parent: bool) -> Self {
        let limit = AtomicU32::new(0);
        Self { base, shares_parent, limit, before: AtomicU64::new(0), baseline: AtomicU64::new(0) }
    }

    /// Puts a limit in force, also for commands that run.
    ///
    /// # Errors
    /// The kernel has no such control groups.
    pub fn set(&self, limit: u32) -> io::Result<()> {
        if self.limit.load(Ordering::Relaxed) != limit {
            self.enable()?;
            for entry in fs::read_dir(&self.base)?.flatten().filter(|entry| entry.path().is_dir()) {
                write_limit(&entry.path(), of_one_command(limit))?;
            }
        }
        // Written each time: the guest's init may have recreated the group.
        write_limit(&self.base, limit)?;
        self.limit.store(limit, Ordering::Relaxed);
        Ok(())
    }

    /// Applies the limit to the group of a new command.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn apply(&self, group: &Path) -> io::Result<()> {
        match self.limit.load(Ordering::Relaxed) {
            0 => Ok(()),
            limit => write_limit(group, of_one_command(limit)),
        }
    }

    /// What was refused in a group that is about to be removed, and is not counted above it.
    pub fn counted_only_in(&self, group: &Path) -> u64 {
        let is_limited = self.limit.load(Ordering::Relaxed) != 0;
        if is_limited && !counts_children(&self.base) { refused_in(group) } else { 0 }
    }

    /// A group was removed in which so many were refused.
    pub fn add(&self, refused: u64) {
        self.before.fetch_add(refused, Ordering::Relaxed);
    }

    /// How many processes and threads were refused since the guest got its identity.
    pub fn refused(&self) -> u64 {
        self.total().saturating_sub(self.baseline.load(Ordering::Relaxed))
    }

    /// The guest becomes another machine: what was refused before does not count.
    pub fn reset_count(&self) {
        self.baseline.store(self.total(), Ordering::Relaxed);
    }

    fn total(&self) -> u64 {
        if counts_children(&self.base) {
            return refused_in(&self.base);
        }
        let groups = fs::read_dir(&self.base).into_iter().flatten().flatten();
        let now = groups.map(|entry| refused_in(&entry.path())).fold(refused_in(&self.base), u64::saturating_add);
        now.saturating_add(self.before.load(Ordering::Relaxed))
    }

    /// Makes the group, with a count of processes for it and its children.
    fn enable(&self) -> io::Result<()> {
        match fs::create_dir(&self.base) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        if !self.base.join("pids.max").exists() {
            let parent = self.base.parent().ok_or(io::ErrorKind::InvalidInput)?;
            if self.shares_parent {
                move_processes(parent, &parent.join("agent"))?;
            }
            fs::write(parent.join("cgroup.subtree_control"), "+pids")?;
        }
        fs::write(self.base.join("cgroup.subtree_control"), "+pids")
    }
}

/// What one command may have of a limit: the rest is for others, with which it can be ended.
fn of_one_command(limit: u32) -> u32 {
    limit - (limit / 8).clamp(1, KEPT_MAX)
}

fn write_limit(group: &Path, limit: u32) -> io::Result<()> {
    match fs::write(group.join("pids.max"), limit.to_string()) {
        // It was removed since it was listed.
        Err(error) if error.kind() == io::ErrorKind::NotFound && !group.exists() => Ok(()),
        written => written,
    }
}

/// Moves all processes of a group into another one.
fn move_processes(from: &Path, to: &Path) -> io::Result<()> {
    match fs::create_dir(to) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    for _ in 0..ROUNDS {
        let processes = fs::read_to_string(from.join("cgroup.procs"))?;
        if processes.is_empty() {
            return Ok(());
        }
        for process in processes.lines() {
            // One that has ended is as good as moved.
            let _ = fs::write(to.join("cgroup.procs"), process);
        }
    }
    Ok(())
}

/// Whether the kernel counts what was refused in a group's children as well: from Linux 6.11 on.
fn counts_children(group: &Path) -> bool {
    group.join("pids.events.local").exists()
}

fn refused_in(group: &Path) -> u64 {
    let events = fs::read_to_string(group.join("pids.events")).unwrap_or_default();
    events.lines().find_map(|line| line.strip_prefix("max ")?.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(path: &Path, refused: u64) {
        fs::create_dir_all(path).unwrap();
        for file in ["pids.max", "cgroup.subtree_control"] {
            fs::write(path.join(file), "").unwrap();
        }
        fs::write(path.join("pids.events"), format!("max {refused}\n")).unwrap();
    }

    fn max(path: &Path) -> String {
        fs::read_to_string(path.join("pids.max")).unwrap()
    }

    fn root(name: &str) -> PathBuf {
        let root = std::env::temp_dir().join(format!("nido-process-limit-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        root
    }

    #[test]
    fn one_command_leaves_room_for_others() {
        assert_eq!([MIN, 64, 1000, u32::MAX].map(of_one_command), [14, 56, 936, u32::MAX - 64]);
    }

    #[test]
    fn commands_that_run_and_new_ones_get_the_limit() {
        let root = root("set");
        let base = root.join("nido");
        group(&base, 0);
        group(&base.join("1-0"), 0);
        let limit = ProcessLimit::new(base.clone(), false);
        limit.apply(&base.join("1-0")).unwrap();
        assert_eq!(max(&base.join("1-0")), "", "no limit is set yet");
        limit.set(64).unwrap();
        assert_eq!((max(&base), max(&base.join("1-0"))), ("64".into(), "56".into()));
        group(&base.join("1-1"), 0);
        limit.apply(&base.join("1-1")).unwrap();
        assert_eq!(max(&base.join("1-1")), "56");
        assert_eq!(fs::read_to_string(base.join("cgroup.subtree_control")).unwrap(), "+pids");
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn refusals_are_counted_once_and_beyond_the_end_of_their_group() {
        let root = root("refused");
        let base = root.join("nido");
        group(&base, 0);
        group(&base.join("1-0"), 2);
        group(&base.join("1-1"), 3);
        let limit = ProcessLimit::new(base.clone(), false);
        limit.set(64).unwrap();
        assert_eq!(limit.refused(), 5);
        let only_there = limit.counted_only_in(&base.join("1-1"));
        fs::remove_dir_all(base.join("1-1")).unwrap();
        limit.add(only_there);
        assert_eq!(limit.refused(), 5);
        limit.reset_count();
        fs::write(base.join("1-0/pids.events"), "max 4\n").unwrap();
        assert_eq!(limit.refused(), 2);
        // A later kernel counts them in the group above.
        fs::write(base.join("pids.events.local"), "max 0\n").unwrap();
        fs::write(base.join("pids.events"), "max 9\n").unwrap();
        assert_eq!(limit.refused(), 4);
        assert_eq!(limit.counted_only_in(&base.join("1-0")), 0);
        fs::remove_dir_all(root).unwrap();
    }
}
