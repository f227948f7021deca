//! Limits on the host in a tree of control groups that was delegated: the kernel of the rig has nothing else that uses its controllers.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::rig::{TestHome, Vm, eventually};

const ROOT: &str = "/sys/fs/cgroup";
/// QEMU ends threads that have had nothing to do for ten seconds.
const IDLE_THREADS_END: Duration = Duration::from_secs(20);

/// A group for VMs, with all controllers that limits need.
struct Delegated(PathBuf);

impl Delegated {
    fn new() -> Self {
        for controller in ["memory", "pids", "cpu", "io"] {
            fs::write(Path::new(ROOT).join("cgroup.subtree_control"), format!("+{controller}")).unwrap();
        }
        let path = Path::new(ROOT).join(format!("delegated-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn spawn<'a>(&self, home: &'a TestHome, flags: &[&str]) -> Vm<'a> {
        home.nido(["spawn", "web", "--net", "none"]).args(flags).env("NIDO_CGROUP", &self.0).ok();
        Vm { home, name: "web" }
    }

    /// The group of the VM, which QEMU is in and this test is not.
    fn group(&self, vm: &Vm<'_>) -> PathBuf {
        let group = self.0.join(format!("nido-{}", vm.info()["id"].as_str().unwrap()));
        let members = fs::read_to_string(group.join("cgroup.procs")).unwrap();
        assert_eq!(members.trim(), vm.qemu().pid.to_string());
        group
    }

    /// The groups in it.
    fn groups(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.0).unwrap().flatten().map(|entry| entry.path());
        entries.filter(|path| path.is_dir()).collect()
    }
}

impl Drop for Delegated {
    fn drop(&mut self) {
        let removed = fs::remove_dir(&self.0);
        assert!(std::thread::panicking() || removed.is_ok(), "{removed:?}");
    }
}

/// How many threads QEMU has; `None` once it has ended.
fn current_threads(group: &Path) -> Option<u32> {
    fs::read_to_string(group.join("pids.current")).ok()?.trim().parse().ok()
}

fn text(group: &Path, file: &str) -> String {
    fs::read_to_string(group.join(file)).unwrap().trim().to_owned()
}

/// The VM as it is once it has failed.
fn failed(vm: &Vm<'_>) -> Value {
    eventually("the failure", || Some(vm.info()).filter(|info| info["status"] == "failed"))
}

#[test]
fn a_vm_has_limits_in_a_delegated_tree() {
    let (home, tree) = (TestHome::new(), Delegated::new());
    let report = home.nido(["doctor"]).env("NIDO_CGROUP", &tree.0).json();
    let check =
        report["checks"].as_array().unwrap().iter().find(|check| check["name"] == "host limits").unwrap().clone();
    assert!(check["detail"].as_str().unwrap().contains(tree.0.to_str().unwrap()), "{check}");
    let vm = tree.spawn(&home, &["--memory", "256M", "--cpus", "1"]);
    let group = tree.group(&vm);
    let limits = vm.info()["host_limits"].clone();
    assert_eq!(limits["memory_bytes"].to_string(), text(&group, "memory.max"));
    assert!(limits["memory_bytes"].as_u64().unwrap() > 256 << 20, "{limits}");
    assert_eq!((limits["processes"].to_string(), text(&group, "pids.max")), ("1025".into(), "1025".into()));
    assert_eq!((&limits["cpu_percent"], text(&group, "cpu.max")), (&200.into(), "200000 100000".into()));
    // The kernel has a file of the weight only with io.cost or BFQ.
    let weight = ["io.weight", "io.bfq.weight"].iter().find_map(|file| fs::read_to_string(group.join(file)).ok());
    assert_eq!(
        limits["io_weight"].as_u64(),
        weight.map(|text| text.trim().trim_start_matches("default ").parse().unwrap())
    );
    // Another supervisor finds the group again.
    vm.kill_supervisor();
    assert_eq!(vm.exec(["hostname"]).text(), "web");
    assert_eq!(vm.info()["host_limits"], limits);
    vm.nido("stop", &["--yes"]).ok();
    assert_eq!(tree.groups(), [] as [PathBuf; 0]);
    // Both are killed: the next command that finds that removes the group.
    vm.nido("start", &[]).env("NIDO_CGROUP", &tree.0).ok();
    let (supervisor, qemu) = (vm.supervisor(), vm.qemu());
    supervisor.kill();
    qemu.kill();
    eventually("the end of both", || home.processes().iter().all(|process| process.pid != qemu.pid).then_some(()));
    assert_eq!(failed(&vm)["failure"]["cause"], "host_restart");
    assert_eq!(tree.groups(), [] as [PathBuf; 0]);
    vm.delete();
}

#[test]
fn a_qemu_that_uses_up_its_memory_is_killed_and_reported() {
    let (home, tree) = (TestHome::new(), Delegated::new());
    let vm = tree.spawn(&home, &["--cold", "--memory", "256M"]);
    // Less than QEMU has already: the kernel kills it at once.
    fs::write(tree.group(&vm).join("memory.max"), (16 << 20).to_string()).unwrap();
    let info = failed(&vm);
    assert_eq!(info["failure"]["cause"], "out_of_memory", "{info}");
    let hit = &info["limits_hit"][0];
    assert_eq!((&hit["kind"], &hit["limit"]), (&"memory".into(), &(16 << 20).into()), "{hit}");
    assert!(hit["evidence"]["oom_kill"].as_u64().is_some_and(|kills| kills > 0), "{hit}");
    assert_eq!(tree.groups(), [] as [PathBuf; 0]);
    vm.delete();
}

#[test]
fn threads_that_qemu_cannot_start_are_a_limit_hit() {
    let (home, tree) = (TestHome::new(), Delegated::new());
    let vm = tree.spawn(&home, &["--cold", "--memory", "256M"]);
    let group = tree.group(&vm);
    let read = "for n in 1 2 3 4 5 6 7 8; do dd if=/dev/vda of=/dev/null bs=64k count=500 iflag=direct & done; wait";
    let hit = eventually("the limit hit", || {
        // QEMU starts a thread for each request to the disk that waits for another, unless it has one that is idle. It may end of it.
        let threads = current_threads(&group);
        if let Some(threads) = threads {
            let _ = fs::write(group.join("pids.max"), threads.to_string());
            vm.sh(read).run();
        }
        let hit = vm.info()["limits_hit"].get(0).cloned();
        // It had enough idle threads: fewer are left once one of them has ended.
        let deadline = Instant::now() + IDLE_THREADS_END;
        while hit.is_none() && Instant::now() < deadline && current_threads(&group) >= threads {
            std::thread::sleep(Duration::from_millis(100));
        }
        hit
    });
    assert_eq!(hit["kind"], "processes", "{hit}");
    assert!(hit["evidence"]["refused"].as_u64().is_some_and(|refused| refused > 0), "{hit}");
    // QEMU ends of it.
    failed(&vm);
    assert_eq!(tree.groups(), [] as [PathBuf; 0]);
    vm.delete();
}

/// As in a container or a job of a CI runner: nobody names a group.
#[test]
fn the_group_above_that_of_the_caller_is_found() {
    let (home, tree) = (TestHome::new(), Delegated::new());
    let caller = tree.0.join("main");
    fs::create_dir(&caller).unwrap();
    let script = "echo $$ > \"$0/cgroup.procs\" && exec \"$@\"";
    let inside = |call: crate::rig::Call| call.behind(["sh", "-c", script, caller.to_str().unwrap()]);
    inside(home.nido(["spawn", "web", "--net", "none"])).ok();
    let vm = Vm { home: &home, name: "web" };
    assert_eq!(text(&tree.group(&vm), "pids.max"), "1025");
    vm.nido("stop", &["--yes"]).ok();
    vm.delete();
    // The guardian that was started there ends when no VM runs.
    eventually("the end of all processes there", || {
        fs::read_to_string(caller.join("cgroup.procs")).unwrap().is_empty().then_some(())
    });
    fs::remove_dir(&caller).unwrap();
    assert_eq!(tree.groups(), [] as [PathBuf; 0]);
}
