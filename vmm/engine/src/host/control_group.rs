//! The control group (version 2) of one VM: its systemd scope, or a group that nido makes in a tree that was delegated to it
//! ([`super::delegation`]).
//!
//! Invariants: what is reported as in force is what the group's files hold, never what was requested; a group is removed only while
//! it is empty, which the kernel ensures.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use nido_api::HostLimits;

/// Where control groups are mounted, and where they are if those of version 1 are there.
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
/// The file that the root of each hierarchy of version 2 has.
pub(super) const CONTROLLERS: &str = "cgroup.controllers";
/// The file that lists and takes processes.
pub(super) const MEMBERS: &str = "cgroup.procs";
/// The period of `cpu.max`, in microseconds.
const CPU_PERIOD_US: u64 = 100_000;
/// The files of the weight of disk accesses: that of io.cost, and that of the scheduler BFQ.
const IO_WEIGHTS: [&str; 2] = ["io.weight", "io.bfq.weight"];

/// Where the hierarchy of version 2 is mounted.
pub(super) fn mount() -> Option<&'static Path> {
    MOUNTS.iter().map(Path::new).find(|mount| mount.join(CONTROLLERS).is_file())
}

/// The path of a process's group below the mount, from the text of `/proc/PID/cgroup`. None if it is outside of what this process
/// sees.
pub(super) fn path_in(text: &str) -> Option<&str> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    (!path.split('/').any(|part| part == "..")).then_some(path)
}

/// The control group of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlGroup(PathBuf);

/// How often limits of a group were reached since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GroupEvents {
    /// Processes that were killed because the group's memory was used up.
    pub oom_kills: u64,
    /// Processes or threads that were not started because there were too many.
    pub process_refusals: u64,
}

impl ControlGroup {
    /// The group of a process, if it is that of the VM `id`.
    #[must_use]
    pub fn of_process(pid: u32, id: &str) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        Self::parse(&text, id, mount()?)
    }

    /// The same from the text of `/proc/PID/cgroup`: in another group, limits are those of other processes, too.
    fn parse(text: &str, id: &str, mount: &Path) -> Option<Self> {
        let path = path_in(text)?;
        let name = path.rsplit('/').next()?;
        (name == scope_name(id) || name == group_name(id)).then(|| Self(mount.join(path)))
    }

    /// The group of a path that was recorded, if it can be that of the VM `id`.
    #[must_use]
    pub fn of_record(text: &str, id: &str) -> Option<Self> {
        let path = Path::new(text);
        let is_plain = path.is_absolute() && path.components().all(|part| part != std::path::Component::ParentDir);
        (is_plain && path.file_name()? == group_name(id).as_str()).then(|| Self(path.into()))
    }

    /// The group of the VM `id` in another one. It need not exist.
    pub(super) fn below(above: &Path, id: &str) -> Self {
        Self(above.join(group_name(id)))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes it, with these limits as far as its tree has controllers for them; an empty one that is there is replaced, because it
    /// has counted for another QEMU.
    ///
    /// # Errors
    /// Processes are in it; those of the file system.
    pub fn make(&self, limits: &HostLimits) -> io::Result<()> {
        self.remove()?;
        fs::create_dir(&self.0)?;
        let set = limit_files(limits).into_iter().try_for_each(|(file, value)| match self.write(file, &value) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            set => set,
        });
        set.inspect_err(|_| drop(self.remove()))
    }

    /// The file through which a process joins it: by writing `0`.
    ///
    /// # Errors
    /// Of the file system.
    pub fn members(&self) -> io::Result<File> {
        OpenOptions::new().write(true).open(self.0.join(MEMBERS))
    }

    /// Removes it. One that is not there is no error.
    ///
    /// # Errors
    /// Processes are in it.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        OpenOptions::new().write(true).open(self.0.join(file))?.write_all(value.as_bytes())
    }

    fn text(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.0.join(file)).ok()
    }

    fn number(&self, file: &str) -> Option<u64> {
        self.text(file)?.trim().parse().ok()
    }

    /// A number in a file with one name and number a line.
    fn counter(&self, file: &str, name: &str) -> u64 {
        let text = self.text(file).unwrap_or_default();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok());
        value.unwrap_or(0)
    }

    /// The limits that the kernel has for it.
    #[must_use]
    pub fn in_force(&self) -> HostLimits {
        let io_weight = IO_WEIGHTS.iter().find_map(|file| self.text(file));
        HostLimits {
            memory_bytes: self.number("memory.max"),
            processes: self.number("pids.max"),
            cpu_percent: self.text("cpu.max").and_then(|text| cpu_percent(&text)),
            io_weight: io_weight.and_then(|text| default_weight(&text)),
        }
    }

    /// How often its limits were reached.
    #[must_use]
    pub fn events(&self) -> GroupEvents {
        GroupEvents {
            oom_kills: self.counter("memory.events", "oom_kill"),
            process_refusals: self.counter("pids.events", "max"),
        }
    }

    /// The most memory that it had, in bytes; unknown before Linux 5.19.
    #[must_use]
    pub fn memory_peak(&self) -> Option<u64> {
        self.number("memory.peak")
    }
}

/// The name of a VM's systemd scope.
#[must_use]
pub fn scope_name(id: &str) -> String {
    format!("nido-{id}.scope")
}

/// The name of a VM's group in a delegated tree.
fn group_name(id: &str) -> String {
    format!("nido-{id}")
}

/// The files of limits and what they are set to.
fn limit_files(limits: &HostLimits) -> Vec<(&'static str, String)> {
    let memory = limits.memory_bytes.map(|bytes| ("memory.max", bytes.to_string()));
    let processes = limits.processes.map(|processes| ("pids.max", processes.to_string()));
    let cpu = limits.cpu_percent.map(|percent| {
        let quota = percent.saturating_mul(CPU_PERIOD_US / 100);
        ("cpu.max", format!("{quota} {CPU_PERIOD_US}"))
    });
    let io = limits.io_weight.map(|weight| IO_WEIGHTS.map(|file| (file, format!("default {weight}"))));
    memory.into_iter().chain(processes).chain(cpu).chain(io.into_iter().flatten()).collect()
}

/// The percentage of `cpu.max`: `200000 100000` is 200.
fn cpu_percent(text: &str) -> Option<u64> {
    let (quota, period) = text.trim().split_once(' ')?;
    (quota.parse::<u64>().ok()?.checked_mul(100)?).checked_div(period.parse().ok()?)
}

/// The weight of devices that have none of their own: `default 50`.
fn default_weight(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("default ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_from_the_group_of_the_vm_only() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("system.slice/nido-00ff.scope");
        fs::create_dir_all(&group).unwrap();
        for (file, text) in [
            ("memory.max", "1073741824\n"),
            ("pids.max", "max\n"),
            ("cpu.max", "150000 100000\n"),
            ("io.bfq.weight", "default 50\n8:0 100\n"),
            ("memory.events", "low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n"),
            ("pids.events", "max 3\n"),
            ("memory.peak", "1073741824\n"),
        ] {
            fs::write(group.join(file), text).unwrap();
        }
        let parse = |text: &str| ControlGroup::parse(text, "00ff", root.path());
        let found = parse("1:name=x:/\n0::/system.slice/nido-00ff.scope\n").unwrap();
        let expected =
            HostLimits { memory_bytes: Some(1 << 30), processes: None, cpu_percent: Some(150), io_weight: Some(50) };
        assert_eq!((found.in_force(), found.memory_peak()), (expected, Some(1 << 30)));
        assert_eq!(found.events(), GroupEvents { oom_kills: 1, process_refusals: 3 });
        for other in ["0::/system.slice/nido.service\n", "0::/nido-00fe\n", "0::/../nido-00ff.scope\n", ""] {
            assert_eq!(parse(other), None, "{other}");
        }
        let gone = parse("0::/nido-00ff\n").unwrap();
        assert!(gone.in_force().is_empty() && gone.events() == GroupEvents::default());
        gone.remove().unwrap();
    }

    #[test]
    fn limits_are_written_as_the_kernel_reads_them() {
        let limits =
            HostLimits { memory_bytes: Some(5), processes: Some(6), cpu_percent: Some(150), io_weight: Some(50) };
        let files: Vec<_> = limit_files(&limits).into_iter().map(|(file, text)| format!("{file}={text}")).collect();
        let expected = "memory.max=5 pids.max=6 cpu.max=150000 100000 io.weight=default 50 io.bfq.weight=default 50";
        assert_eq!(files.join(" "), expected);
        assert!(limit_files(&HostLimits::default()).is_empty());
    }

    /// The record is in a directory that earlier versions of QEMU's confinement let QEMU write.
    #[test]
    fn only_the_group_of_the_vm_is_taken_from_its_record() {
        let of = |text| ControlGroup::of_record(text, "00ff").map(|group| group.path().to_owned());
        assert_eq!(of("/sys/fs/cgroup/ci/nido-00ff"), Some("/sys/fs/cgroup/ci/nido-00ff".into()));
        for other in ["/sys/fs/cgroup/../nido-00ff", "nido-00ff", "/sys/fs/cgroup/nido-00fe", "/", ""] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
