//! What has to hold once the processes of a home have recovered from a crash.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpStream;
use std::path::Path;

use nido_api::state::VmState;
use nido_files::lock::is_held;
use nido_store::{Purpose, Store, VmRow};

use crate::rig::{BYSTANDERS, Rig};
use crate::support::processes;

/// What lies in a home.
const HOME_FILES: [&str; 22] = [
    "nido.db",
    "nido.db-wal",
    "nido.db-shm",
    "nido.db.backup",
    "nido.db.backup.1",
    "nido.db.backup.lock",
    "space.reserve",
    "templates",
    "templates.lock",
    "blobs",
    "build",
    "pool.lock",
    "logs",
    "exchange",
    "present",
    "deliver.lock",
    "cache",
    "vms",
    "audit-place",
    "audit",
    "tls",
    "guardian.lock",
];
/// The files in the directory of a stopped VM. Sockets of a supervisor that was killed may.
const VM_FILES: [&str; 20] = [
    "vm.json",
    "supervisor.lock",
    "vm.lock",
    "disk.qcow2",
    "guest.cbor",
    "qemu",
    "agent.sock",
    "control.sock",
    "snapshots",
    "console.log",
    "console.log.1",
    "qemu.log",
    "qemu.log.1",
    "supervisor.log",
    "supervisor.log.1",
    "unwritten.json",
    "names.json",
    "traffic",
    "authority.sealed",
    "cgroup",
];

fn rows(rig: &Rig) -> Vec<VmRow> {
    Store::open(&rig.home.path().join("nido.db")).unwrap().vms().unwrap()
}

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

/// Waits until the processes of the home have recovered: each VM is stopped or has exactly one supervisor and QEMU, and no process
/// works for anything else. Commands make them recover, so one is run again and again.
pub fn await_recovery(rig: &Rig) {
    rig.until_well(|| {
        rig.home.nido(["ls"]).run().ok();
        recovered(rig)
    });
}

/// Waits until a clone waits in the pool.
pub fn await_clone(rig: &Rig) {
    rig.until_well(|| {
        recovered(rig)?;
        let waits = rows(rig).iter().any(|row| row.purpose == Purpose::Pool);
        if waits { Ok(()) } else { Err("no clone waits".to_owned()) }
    });
}

fn recovered(rig: &Rig) -> Result<(), String> {
    let rows = rows(rig);
    let vms = rig.home.path().join("vms");
    let all = processes::of(&rig.home.scratch(""));
    for row in &rows {
        let id = &row.id;
        let supervisors = all.iter().filter(|(_, line)| line.contains(&format!(" supervise {id}"))).count();
        let works_there = |pid: i32| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == vms.join(id));
        let qemus = all
            .iter()
            .filter(|(pid, line)| line.contains("chardev=monitor") && works_there(pid.as_raw_nonzero().get()));
        let expected = match (row.state, row.purpose) {
            (VmState::Running | VmState::Paused, Purpose::Use) => 1,
            (VmState::Paused, Purpose::Pool) if row.agent.ready => 1,
            (VmState::Created | VmState::Stopped | VmState::Failed, Purpose::Use) => 0,
            (state, purpose) => return Err(format!("VM {id} ({}) is {state:?}", purpose.word())),
        };
        if expected == 1 && !row.agent.ready {
            return Err(format!("the agent of VM {} is not ready", row.spec.name));
        }
        let found = (supervisors, qemus.count());
        if found != (expected, expected) {
            return Err(format!("VM {} is {:?} with {found:?} supervisors and QEMUs", row.spec.name, row.state));
        }
        for lock in ["supervisor.lock", "vm.lock"] {
            if is_held(&vms.join(id).join(lock)) != (expected == 1) {
                return Err(format!("{lock} of VM {}, which is {:?}", row.spec.name, row.state));
            }
        }
        if row.deleting || row.made_by.is_some() {
            return Err(format!("VM {} is being deleted or made", row.spec.name));
        }
    }
    let is_guardian = |line: &str| line.trim_end().ends_with(" watch");
    match all.iter().filter(|(_, line)| is_guardian(line)).count() {
        1 => {}
        guardians => return Err(format!("{guardians} guardians, while VMs run")),
    }
    // Every other process belongs to a row, and none is there for anything else.
    let of_rows = |pid: i32, line: &str| {
        let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        let alive = |row: &&VmRow| !row.state.is_inactive();
        rows.iter().filter(alive).any(|row| cwd.starts_with(vms.join(&row.id)) || line.contains(&row.id))
    };
    match all.iter().find(|(pid, line)| !is_guardian(line) && !of_rows(pid.as_raw_nonzero().get(), line)) {
        Some((pid, line)) => Err(format!("process {pid:?} belongs to no VM: {line}")),
        None => Ok(()),
    }
}

/// Everything is accounted for.
pub fn expect_clean(rig: &Rig) {
    rig.home.nido(["doctor", "--gc"]).run();
    let report = rig.home.nido(["doctor", "--json"]).run().json();
    for name in ["orphans", "VMs"] {
        let check = report["checks"].as_array().unwrap().iter().find(|check| check["name"] == name).unwrap();
        assert_eq!(check["status"], "ok", "{check}");
        assert!(name != "orphans" || check["detail"] == "none", "{check}");
    }
    expect_known_files(rig);
    expect_free_locks(rig);
    expect_ports(rig);
    let audit = rig.home.nido(["audit", "verify", "--json"]).run().json();
    assert!(audit["ok"] == true || audit["code"].is_string(), "{audit}");
    rig.expect_bystanders();
}

/// Every paused VM can be resumed, and stays running: nothing that was interrupted pauses it again.
pub fn expect_resumable(rig: &Rig) {
    let names = rig.home.names().into_iter().filter(|name| !BYSTANDERS.contains(&name.as_str()));
    for name in names.filter(|name| rig.home.info(name)["status"] == "paused") {
        rig.home.nido(["resume", &name]).run().ok();
        rig.home.nido(["exec", &name, "--timeout", "20s", "--", "true"]).run().ok();
        assert_eq!(rig.home.info(&name)["status"], "running", "{name} was resumed");
    }
}

fn expect_known_files(rig: &Rig) {
    let home = rig.home.path();
    let known: BTreeSet<String> = HOME_FILES.map(str::to_owned).into();
    let unknown: Vec<_> = names(&home).into_iter().filter(|name| !known.contains(name)).collect();
    assert_eq!(unknown, Vec::<String>::new(), "unknown files in the home");
    // A command may just have started a process that fills pools: the directory of a clone is there before its row.
    let rows = rig.until_well(|| {
        let rows = rows(rig);
        let ids: BTreeSet<String> = rows.iter().map(|row| row.id.clone()).collect();
        let found = names(&home.join("vms"));
        if found == ids { Ok(rows) } else { Err(format!("directories {found:?}, rows {ids:?}")) }
    });
    for VmRow { id, state, .. } in &rows {
        let directory = home.join("vms").join(id);
        // The next start removes the temporary files of a running VM.
        let is_temporary = |name: &str| name.starts_with(".tmp-") || name.starts_with("disk.qcow2.");
        let may_stay = |name: &String| VM_FILES.contains(&name.as_str()) || !state.is_inactive() && is_temporary(name);
        let unknown: Vec<_> = names(&directory).into_iter().filter(|name| !may_stay(name)).collect();
        assert_eq!(unknown, Vec::<String>::new(), "unknown files of VM {id}");
        for snapshot in names(&directory.join("snapshots")) {
            assert!(!snapshot.starts_with('.'), "an unfinished snapshot is left: {snapshot}");
            assert!(directory.join("snapshots").join(&snapshot).join("snapshot.json").is_file(), "{snapshot}");
        }
    }
    assert_eq!(names(&home.join("build")), BTreeSet::new(), "scratch directories are left");
    assert_eq!(names(&home.join("present")), BTreeSet::new(), "liveness files are left");
    let temporary = |name: &String| name.starts_with('.');
    // Those of `cache`, some bytes for each crash there, go with it.
    for directory in ["templates", "blobs/sha256", "audit"] {
        let left: Vec<_> = names(&home.join(directory)).into_iter().filter(temporary).collect();
        assert_eq!(left, Vec::<String>::new(), "temporary files in {directory}");
    }
}

fn expect_free_locks(rig: &Rig) {
    // A command may just have started a process that fills pools, or delivers.
    rig.until_well(|| {
        for lock in ["pool.lock", "deliver.lock", "nido.db.backup.lock"] {
            if is_held(&rig.home.path().join(lock)) {
                return Err(format!("{lock} is held"));
            }
        }
        let templates = fs::File::options().read(true).open(rig.home.path().join("templates.lock"));
        templates.map_or(Ok(()), |file| file.try_lock().map_err(|_| "templates.lock is held".to_owned()))
    });
}

/// A published port is served by the supervisor of its VM; one of a stopped VM is free. CIDs are distinct.
fn expect_ports(rig: &Rig) {
    let mut cids = BTreeSet::new();
    for row in rows(rig) {
        for forward in &row.forwards {
            let is_open = TcpStream::connect((forward.host, forward.host_port)).is_ok();
            assert_eq!(is_open, !row.state.is_inactive(), "port {forward} of {}", row.spec.name);
        }
        assert!(row.cid.is_none_or(|cid| !row.state.is_inactive() && cids.insert(cid)), "{:?}", row.cid);
    }
}
