//! All processes of one command: what it started, and what those started, whatever sessions and groups they made.
//!
//! In a guest of its own each command gets a control group (cgroup 2), in which the kernel keeps its processes together and
//! kills them in one go. Where there is none, the processes are found by their ancestry instead, which loses those that
//! made themselves orphans before.
//!
//! Invariant: a control group is removed once it is empty, and no request waits for that.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, Signal, kill_process};

use crate::process_limit::ProcessLimit;
use crate::role::Role;

/// Where control groups are.
const CGROUPS: &str = "/sys/fs/cgroup";
/// How many groups that were still in use are looked at again when another command ends.
const SWEEP: usize = 16;
/// How often the processes are looked for again, because they start others while they are killed.
const ROUNDS: usize = 8;

/// Where commands are kept together.
pub struct Scopes {
    /// The group above all commands'; none where the agent leaves the machine alone.
    base: Option<PathBuf>,
    /// How many processes all commands have together.
    limit: Option<Arc<ProcessLimit>>,
    count: AtomicU64,
    /// A group for the next command, made after the end of the one before.
    spare: Mutex<Option<Group>>,
    /// Groups whose command has ended and that may hold background processes.
    ended: Arc<Mutex<VecDeque<PathBuf>>>,
}

impl Scopes {
    /// Those of an agent of this role. Nothing is made before the first command.
    pub fn new(role: Role) -> Self {
        let base = match role {
            Role::Init => Some(Path::new(CGROUPS).join("nido")),
            Role::Service => own_group().map(|group| group.join("commands")),
            Role::Visitor => None,
        };
        let limit = base.clone().map(|base| Arc::new(ProcessLimit::new(base, role == Role::Service)));
        Self { base, limit, count: AtomicU64::new(0), spare: Mutex::default(), ended: Arc::default() }
    }

    /// The limit of processes of all commands; none where the agent leaves the machine alone.
    pub fn process_limit(&self) -> Option<&ProcessLimit> {
        self.limit.as_deref()
    }

    /// A scope for one more command.
    pub fn scope(&self) -> Scope {
        // Whatever manages the guest's control groups may have removed it since, because it was empty.
        let spare = self.spare().take().filter(|group| group.path.is_dir());
        let group = spare.or_else(|| self.base.as_deref().and_then(|base| self.group(base).ok()));
        // Set since the spare group was made; a kernel that refuses it has none of these limits.
        if let (Some(limit), Some(group)) = (&self.limit, &group) {
            let _ = limit.apply(&group.path);
        }
        Scope { group, main: None, known: BTreeMap::new(), ended: self.ended.clone(), limit: self.limit.clone() }
    }

    /// Makes what the next command needs ready. Blocks on the guest's files.
    pub fn make_ready(&self) {
        let mut spare = self.spare();
        if let (None, Some(base)) = (&*spare, self.base.as_deref()) {
            *spare = self.group(base).ok();
        }
    }

    fn spare(&self) -> MutexGuard<'_, Option<Group>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn group(&self, base: &Path) -> io::Result<Group> {
        // The agent's own number distinguishes its groups from those of an earlier agent.
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("{}-{number}", std::process::id()));
        match fs::create_dir(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir(base)?;
                fs::create_dir(&path)?;
            }
            made => made?,
        }
        let open = |file: &str| File::options().write(true).open(path.join(file));
        match (open("cgroup.procs"), open("cgroup.kill")) {
            (Ok(members), Ok(kill)) => Ok(Group { path, members, kill }),
            (Err(error), _) | (_, Err(error)) => {
                // An older kernel: the group would be of no use.
                let _ = fs::remove_dir(&path);
                Err(error)
            }
        }
    }
}

/// The agent's own control group, as a service has one.
fn own_group() -> Option<PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new(CGROUPS).join(own))
}

/// A control group.
struct Group {
    path: PathBuf,
    members: File,
    kill: File,
}

/// The processes of one command.
pub struct Scope {
    group: Option<Group>,
    main: Option<Pid>,
    /// Processes found by ancestry, and when each was started: a number may be used again.
    known: BTreeMap<i32, u64>,
    ended: Arc<Mutex<VecDeque<PathBuf>>>,
    limit: Option<Arc<ProcessLimit>>,
}

impl Scope {
    /// The file through which a process joins: it writes `0`.
    pub fn members(&self) -> Option<BorrowedFd<'_>> {
        self.group.as_ref().map(|group| group.members.as_fd())
    }

    /// The command's own process, once it has been started.
    pub fn set_main(&mut self, pid: Pid) {
        self.main = Some(pid);
    }

    /// Finds the current processes that their control group does not list.
    pub fn refresh(&mut self) {
        let Some(main) = self.main else { return };
        let all = processes();
        // A process whose number was reused meanwhile is not ours.
        self.known.retain(|pid, started| all.get(pid).is_some_and(|process| process.started == *started));
        let main = main.as_raw_nonzero().get();
        for pid in members(&all, main, self.known.keys().copied()) {
            self.known.entry(pid).or_insert(all[&pid].started);
        }
    }

    /// Whether nothing of it runs any more.
    pub fn is_empty(&mut self) -> bool {
        self.refresh();
        let in_group = self.group.as_ref().is_some_and(|group| is_populated(&group.path));
        self.known.is_empty() && !in_group
    }

    /// Kills all of it.
    pub fn kill(&mut self) {
        if let Some(group) = &self.group {
            // Fails only if the group is gone, and all of its processes with it.
            let _ = rustix::io::pwrite(&group.kill, b"1", 0);
        }
        for _ in 0..ROUNDS {
            self.refresh();
            if self.known.is_empty() {
                return;
            }
            for pid in self.known.keys().filter_map(|pid| Pid::from_raw(*pid)) {
                // Gone already is as good.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.extend(self.group.take().map(|group| group.path));
        for _ in 0..ended.len().min(SWEEP) {
            let Some(path) = ended.pop_front() else { return };
            let refused = self.limit.as_ref().map_or(0, |limit| limit.counted_only_in(&path));
            match fs::remove_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => ended.push_back(path),
                _ => self.limit.iter().for_each(|limit| limit.add(refused)),
            }
        }
    }
}

fn is_populated(group: &Path) -> bool {
    fs::read_to_string(group.join("cgroup.events")).is_ok_and(|events| events.contains("populated 1"))
}

/// The fields of a process in `/proc`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    parent: i32,
    group: i32,
    session: i32,
    /// In ticks since the boot.
    started: u64,
}

/// All running processes, without those that only wait to be reaped.
fn processes() -> BTreeMap<i32, Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return BTreeMap::new() };
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    numbers
        .filter_map(|pid| {
            let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
            Some((pid, parse_stat(&String::from_utf8_lossy(&stat))?))
        })
        .collect()
}

/// `pid (name) state parent group session ... started`; the name may hold anything.
fn parse_stat(stat: &str) -> Option<Process> {
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    if matches!(*fields.first()?, "Z" | "X") {
        return None;
    }
    let number = |at: usize| fields.get(at)?.parse().ok();
    Some(Process { parent: number(1)?, group: number(2)?, session: number(3)?, started: fields.get(19)?.parse().ok()? })
}

/// The command's process, those of its group and session, those that are known, and all that any of them started.
fn members(all: &BTreeMap<i32, Process>, main: i32, known: impl Iterator<Item = i32>) -> Vec<i32> {
    let mut found: Vec<i32> = known.filter(|pid| all.contains_key(pid)).collect();
    let belongs = |found: &[i32], pid: i32, process: &Process| {
        pid == main || process.group == main || process.session == main || found.contains(&process.parent)
    };
    loop {
        let more: Vec<i32> = all
            .iter()
            .filter(|(pid, process)| !found.contains(pid) && belongs(&found, **pid, process))
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            return found;
        }
        found.extend(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn process(parent: i32, group: i32, session: i32) -> Process {
        Process { parent, group, session, started: 1 }
    }

    #[test]
    fn proc_stat_is_parsed_with_any_process_name() {
        let line = "12 (a ) R 1) S 7 8 9 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 555 1 2";
        assert_eq!(parse_stat(line), Some(Process { parent: 7, group: 8, session: 9, started: 555 }));
        assert_eq!(parse_stat(&line.replace(") S", ") Z")), None);
        assert_eq!(parse_stat("12 (a) S 1"), None);
    }

    #[test]
    fn a_command_is_its_session_and_all_that_came_of_it() {
        let all = BTreeMap::from([
            (1, process(0, 0, 0)),
            (10, process(1, 10, 10)),
            // A child with a session of its own, and a child of that.
            (11, process(10, 11, 11)),
            (12, process(11, 11, 11)),
            // An orphan of the command's session.
            (13, process(1, 13, 10)),
            (20, process(1, 20, 20)),
            (21, process(20, 20, 20)),
        ]);
        let sorted = |main, known: &[i32]| {
            let mut found = members(&all, main, known.iter().copied());
            found.sort_unstable();
            found
        };
        assert_eq!(sorted(10, &[]), [10, 11, 12, 13]);
        assert_eq!(sorted(10, &[20, 99]), [10, 11, 12, 13, 20, 21]);
        assert_eq!(sorted(30, &[]), [] as [i32; 0]);
    }
}
