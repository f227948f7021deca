//! A running VM as a unit of systemd: its supervisor and its QEMU leave the unit of the process that started them.
//!
//! Otherwise a VM that was started through a service, a login session or a CI job belongs to it, and goes down with it: `systemctl
//! restart` kills every process of a service's control group. In a scope of its own a VM is stopped in order when the host shuts
//! down: systemd sends SIGTERM, which QEMU blocks and the supervisor answers by having the guest power off.
//!
//! Requests to systemd go over D-Bus with its own `busctl`. Invariant: a host without systemd, or without a bus, costs a few file system
//! calls; and nothing waits for the reply.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nido_api::HostLimits;
use tokio::process::Command;

use super::control_group::scope_name;

/// How long systemd may take.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long systemd gives the VM to stop before it kills it, in microseconds: longer than the supervisor gives the guest.
const STOP_TIMEOUT_US: u64 = 60_000_000;

/// The bus of a systemd manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    /// The host's.
    System,
    /// The user's own.
    User,
}

impl Bus {
    const fn flag(self) -> &'static str {
        match self {
            Self::System => "--system",
            Self::User => "--user",
        }
    }
}

/// The bus of the manager that this user's units belong to, if there is one and the program to reach it by.
#[must_use]
pub fn bus() -> Option<Bus> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).find(|dir| dir.is_absolute() && dir.join("busctl").is_file())?;
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if rustix::process::geteuid().is_root() {
        let there = variable("DBUS_SYSTEM_BUS_ADDRESS").is_some() || Path::new("/run/systemd/private").exists();
        return there.then_some(Bus::System);
    }
    let socket = variable("XDG_RUNTIME_DIR").map(|dir| PathBuf::from(dir).join("systemd/private"));
    let there = variable("DBUS_SESSION_BUS_ADDRESS").is_some() || socket.is_some_and(|socket| socket.exists());
    there.then_some(Bus::User)
}

/// Puts processes of a VM into its scope, `nido-ID.scope`. A VM that was taken over has one already.
///
/// # Errors
/// The error of systemd or `busctl`.
pub async fn adopt(bus: Bus, id: &str, vm: &str, pids: &[i32], limits: &HostLimits) -> Result<(), String> {
    adopt_as(bus, id, &format!("nido VM {vm}"), pids, limits).await
}

/// Puts a process that serves a whole home into the scope `nido-ID.scope`: it must not keep the scope of a VM from ending.
///
/// # Errors
/// The error of systemd or `busctl`.
pub async fn adopt_helper(bus: Bus, id: &str, description: &str) -> Result<(), String> {
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    adopt_as(bus, id, description, &[own], &HostLimits::default()).await
}

async fn adopt_as(bus: Bus, id: &str, description: &str, pids: &[i32], limits: &HostLimits) -> Result<(), String> {
    // Before version 253 a scope has no OOMPolicy, and systemd leaves the supervisor of a QEMU that was killed alone.
    let mut refused = String::new();
    for properties in attempts(limits) {
        match call(bus, &start_arguments(id, description, pids, &properties)).await {
            Ok(()) if properties.is_empty() && !refused.is_empty() => {
                tracing::warn!("systemd refuses the VM's limits on the host, so none is in force: {refused}");
                return Ok(());
            }
            Ok(()) => return Ok(()),
            Err(why) => refused = why,
        }
    }
    call(bus, &attach_arguments(id, pids)).await.map_err(|_| refused)
}

/// The properties to try, one after the other: a scope without limits is better than none, which would end with its starter.
fn attempts(limits: &HostLimits) -> Vec<Vec<[String; 3]>> {
    let mut attempts = vec![limit_properties(limits, true), limit_properties(limits, false), Vec::new()];
    attempts.dedup();
    attempts
}

/// Limits as properties of a unit: name, type and value of each.
fn limit_properties(limits: &HostLimits, keeps_supervisor: bool) -> Vec<[String; 3]> {
    let number = |name: &str, value: u64| [name.into(), "t".into(), value.to_string()];
    let memory = limits.memory_bytes.map(|bytes| number("MemoryMax", bytes));
    let processes = limits.processes.map(|processes| number("TasksMax", processes));
    let cpu = limits.cpu_percent.map(|percent| number("CPUQuotaPerSecUSec", percent * 10_000));
    let io = limits.io_weight.map(|weight| number("IOWeight", weight));
    // Otherwise systemd ends the supervisor, too, when the kernel kills QEMU.
    let policy = (keeps_supervisor && memory.is_some()).then(|| ["OOMPolicy", "s", "continue"].map(String::from));
    memory.into_iter().chain(processes).chain(cpu).chain(io).chain(policy).collect()
}

fn start_arguments(id: &str, description: &str, pids: &[i32], limits: &[[String; 3]]) -> Vec<String> {
    let count = (4 + limits.len()).to_string();
    let mut arguments =
        vec!["StartTransientUnit".into(), "ssa(sv)a(sa(sv))".into(), scope_name(id), "fail".into(), count];
    arguments.extend(["Description", "s", description].map(String::from));
    arguments.extend(["CollectMode", "s", "inactive-or-failed"].map(String::from));
    arguments.extend(["TimeoutStopUSec", "t", &STOP_TIMEOUT_US.to_string()].map(String::from));
    arguments.extend(limits.iter().flatten().cloned());
    arguments.extend(["PIDs", "au", &pids.len().to_string()].map(String::from));
    arguments.extend(pids.iter().map(i32::to_string));
    arguments.push("0".into());
    arguments
}

fn attach_arguments(id: &str, pids: &[i32]) -> Vec<String> {
    let mut arguments = vec!["AttachProcessesToUnit".into(), "ssau".into(), scope_name(id), String::new()];
    arguments.push(pids.len().to_string());
    arguments.extend(pids.iter().map(i32::to_string));
    arguments
}

async fn call(bus: Bus, arguments: &[String]) -> Result<(), String> {
    let mut command = Command::new("busctl");
    command
        .args(["call", bus.flag(), "org.freedesktop.systemd1", "/org/freedesktop/systemd1"])
        .arg("org.freedesktop.systemd1.Manager")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let output = tokio::time::timeout(REPLY_TIMEOUT, command.output()).await;
    let output = output.map_err(|_| "it did not answer".to_owned())?.map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().escape_debug().take(400).collect())
}

/// What keeps VMs from outliving what they are started in, in a sentence, with what to do about it; `None` if nothing does. `cgroup`
/// is the text of `/proc/self/cgroup`, `kill_user_processes` logind's switch.
#[must_use]
pub fn ties(cgroup: &str, bus: Option<Bus>, kill_user_processes: bool) -> Option<(String, &'static str)> {
    let own = cgroup.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    let unit = own.rsplit('/').find(|part| part.ends_with(".service") || part.ends_with(".scope"))?;
    let session = unit.starts_with("session-");
    if session && !kill_user_processes || unit.starts_with("user@") || unit.starts_with("nido-") || unit == "init.scope"
    {
        return None;
    }
    let shown = unit.escape_debug();
    match (bus, session) {
        (Some(Bus::User), true) => Some((
            "VMs end when you log out: logind kills the processes of a session, and your own systemd ends with the last one".into(),
            "run loginctl enable-linger, so that your systemd keeps running, with a scope for each VM",
        )),
        (Some(_), _) => None,
        (None, true) => Some((
            "VMs end when you log out: logind kills the processes of a session (KillUserProcesses=yes)".into(),
            "apt-get install dbus-user-session, loginctl enable-linger; or KillUserProcesses=no in /etc/systemd/logind.conf",
        )),
        (None, false) => Some((
            format!("VMs started from here belong to {shown} and are killed when it stops: no systemd manager can be reached"),
            "set KillMode=process in the unit, or make systemd reachable with busctl, so that each VM gets its own scope",
        )),
    }
}

/// Whether logind kills a user's processes at logout. Pure, over its configuration files, the most important last.
#[must_use]
pub fn kills_user_processes<'a>(files: impl Iterator<Item = &'a str>) -> bool {
    let lines = files.flat_map(str::lines).filter_map(|line| line.trim().strip_prefix("KillUserProcesses="));
    lines.last().is_some_and(|value| matches!(value.trim(), "yes" | "true" | "on" | "1"))
}

/// What [`ties`] finds on this host.
#[must_use]
pub fn ties_here() -> Option<(String, &'static str)> {
    let cgroup = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let main = std::fs::read_to_string("/etc/systemd/logind.conf").unwrap_or_default();
    let mut drop_ins: Vec<PathBuf> = std::fs::read_dir("/etc/systemd/logind.conf.d")
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    drop_ins.sort();
    let more: Vec<String> = drop_ins.iter().filter_map(|path| std::fs::read_to_string(path).ok()).collect();
    let kills = kills_user_processes(std::iter::once(main.as_str()).chain(more.iter().map(String::as_str)));
    ties(&cgroup, bus(), kills)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_request_has_systemds_format() {
        let words = start_arguments("00ff", "nido VM web", &[7, 8], &[]).join(" ");
        assert_eq!(
            words,
            "StartTransientUnit ssa(sv)a(sa(sv)) nido-00ff.scope fail 4 Description s nido VM web CollectMode s \
             inactive-or-failed TimeoutStopUSec t 60000000 PIDs au 2 7 8 0"
        );
        assert_eq!(attach_arguments("00ff", &[9]), ["AttachProcessesToUnit", "ssau", "nido-00ff.scope", "", "1", "9"]);
    }

    #[test]
    fn limits_are_properties_of_the_scope() {
        let limits =
            HostLimits { memory_bytes: Some(5), processes: Some(6), cpu_percent: Some(150), io_weight: Some(50) };
        let words = start_arguments("00ff", "VM", &[7], &limit_properties(&limits, true)).join(" ");
        assert!(words.starts_with("StartTransientUnit ssa(sv)a(sa(sv)) nido-00ff.scope fail 9 "), "{words}");
        let properties =
            "MemoryMax t 5 TasksMax t 6 CPUQuotaPerSecUSec t 1500000 IOWeight t 50 OOMPolicy s continue PIDs au 1 7 0";
        assert!(words.ends_with(properties), "{words}");
        assert_eq!(limit_properties(&limits, false).len(), 4);
        assert_eq!(attempts(&limits).iter().map(Vec::len).collect::<Vec<_>>(), [5, 4, 0]);
        assert_eq!(attempts(&HostLimits::default()).len(), 1);
        assert!(limit_properties(&HostLimits::default(), true).is_empty());
    }

    /// A restart of the unit that runs `nido api-server` killed every VM, without a warning.
    #[test]
    fn units_that_kill_vms_with_their_starter_are_reported() {
        let service = "0::/system.slice/nido.service\n";
        assert!(
            ties(service, None, false)
                .is_some_and(|(why, hint)| why.contains("nido.service") && hint.contains("KillMode=process"))
        );
        assert_eq!(ties(service, Some(Bus::System), false), None);
        let session = "1:name=x:/\n0::/user.slice/user-1000.slice/session-3.scope\n";
        assert_eq!(ties(session, None, false), None);
        assert!(ties(session, None, true).is_some());
        assert!(ties(session, Some(Bus::User), true).is_some_and(|(_, hint)| hint.contains("linger")));
        for own in ["0::/\n", "", "0::/user.slice/user-1000.slice/user@1000.service/app.slice/nido-00ff.scope\n"] {
            assert_eq!(ties(own, None, true), None, "{own}");
        }
    }

    #[test]
    fn the_last_setting_of_logind_wins() {
        assert!(!kills_user_processes(["#KillUserProcesses=yes\n"].into_iter()));
        assert!(kills_user_processes(["KillUserProcesses=no\n", "[Login]\nKillUserProcesses=yes\n"].into_iter()));
        assert!(!kills_user_processes(["KillUserProcesses=yes\n", "KillUserProcesses=no\n"].into_iter()));
    }
}
