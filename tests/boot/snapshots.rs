//! Snapshots of real guests: what they hold, and going back to them again and again.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::rig::{TestHome, Vm, eventually};

/// A process that counts in memory, and a file that it never touches.
fn start_counting(vm: &Vm<'_>) {
    vm.sh("echo before > /root/note; sync").ok();
    vm.start_counting();
}

fn names(vm: &Vm<'_>) -> Vec<String> {
    let list = vm.home.nido(["snapshot", "ls", vm.name]).json();
    list["snapshots"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect()
}

fn snapshot(vm: &Vm<'_>, verb: &str, name: &str) -> Value {
    vm.home.nido(["snapshot", verb, vm.name, name]).json()
}

/// The kernel has written nothing to its log about a broken file system.
fn check_disk(vm: &Vm<'_>) {
    assert_eq!(vm.sh("dmesg | grep -iE 'ext4.*(error|corrupt)' | head -n 3").text(), "");
}

#[test]
fn a_running_vm_goes_back_to_where_it_was() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["-p", "0:80"]);
    start_counting(&vm);
    let made = snapshot(&vm, "create", "first");
    assert_eq!((&made["running"], &made["vm"]), (&true.into(), &"web".into()));
    assert!(made["size_bytes"].as_u64().unwrap() > 1 << 20);
    assert!(made["paused_ms"].as_u64().unwrap() > 0);
    assert_eq!(home.nido(["snapshot", "ls", "web"]).json()["snapshots"][0]["paused_ms"], made["paused_ms"]);
    // It continued meanwhile, and its disk takes writes again.
    vm.await_count();
    vm.sh("echo after > /root/note; rm /bin/ping; sync").ok();
    let id = vm.exec(["cat", "/etc/machine-id"]).text();
    let boot = vm.exec(["cat", "/proc/sys/kernel/random/boot_id"]).text();

    for round in 0..2 {
        let restored = snapshot(&vm, "restore", "first");
        assert_eq!((&restored["timings"]["path"], &restored["status"]), (&"restore".into(), &"running".into()));
        assert_eq!(vm.exec(["cat", "/root/note"]).text(), "before", "round {round}");
        vm.sh("test -x /bin/ping").ok();
        // The process runs, and continues from there.
        vm.await_count();
        // The same machine, at another time, with random numbers of its own.
        assert_eq!(vm.exec(["cat", "/etc/machine-id"]).text(), id);
        assert_ne!(vm.exec(["cat", "/proc/sys/kernel/random/boot_id"]).text(), boot);
        let guest: f64 = vm.exec(["date", "+%s.%N"]).text().parse().unwrap();
        let host = jiff::Timestamp::now().as_millisecond() as f64 / 1000.0;
        assert!((guest - host).abs() < 10.0, "{guest} {host}");
        vm.sh("echo again > /root/note; sync").ok();
    }
    // A snapshot of what was restored, and back and forth between the two.
    vm.sh("echo second > /root/note").ok();
    snapshot(&vm, "create", "second");
    assert_eq!(names(&vm), ["first", "second"]);
    for (name, note) in [("first", "before"), ("second", "second"), ("first", "before")] {
        snapshot(&vm, "restore", name);
        assert_eq!(vm.exec(["cat", "/root/note"]).text(), note);
        check_disk(&vm);
    }
    assert_eq!(vm.info()["forwards"].as_array().unwrap().len(), 1);
    snapshot(&vm, "delete", "first");
    assert_eq!(names(&vm), ["second"]);
    home.nido(["snapshot", "restore", "web", "first"]).problem(1, "snapshot_not_found");
    // Its disk alone is whole, too: the guest had written everything down.
    let stopped = home.nido(["snapshot", "restore", "web", "second", "--disk-only"]).json();
    assert_eq!(stopped["status"], "stopped");
    vm.nido("start", &[]).ok();
    assert_eq!(vm.exec(["cat", "/root/note"]).text(), "second");
    assert_eq!(vm.exec(["cat", "/etc/machine-id"]).text(), id);
    check_disk(&vm);
}

#[test]
fn an_ephemeral_vm_can_be_restored_and_still_vanishes_when_it_stops() {
    // Agents are instructed to create ephemeral VMs: they could take snapshots of them, and never go back to one.
    let home = TestHome::new();
    let vm = home.spawn("web", &["--ephemeral"]);
    vm.sh("echo before > /root/note; sync").ok();
    let id = vm.info()["id"].clone();
    snapshot(&vm, "create", "first");
    for _ in 0..2 {
        vm.sh("echo after > /root/note; sync").ok();
        let restored = snapshot(&vm, "restore", "first");
        assert_eq!(
            (&restored["status"], &restored["id"], &restored["ephemeral"]),
            (&"running".into(), &id, &true.into())
        );
        assert_eq!(vm.exec(["cat", "/root/note"]).text(), "before");
    }
    // Its disk alone: it waits to be started, and no other command takes it away meanwhile.
    vm.sh("echo after > /root/note; sync").ok();
    home.nido(["snapshot", "restore", "web", "first", "--disk-only"]).ok();
    assert_eq!(home.names(), ["web"]);
    vm.nido("start", &[]).ok();
    assert_eq!(vm.exec(["cat", "/root/note"]).text(), "before");
    vm.nido("stop", &["--force"]).ok();
    assert!(home.names().is_empty());
}

#[test]
fn a_vm_that_booted_is_no_different() {
    let home = TestHome::new();
    for machine in ["microvm", "q35"] {
        let vm = home.spawn("cold", &["--cold", "--net", "none", "--machine", machine]);
        start_counting(&vm);
        snapshot(&vm, "create", "s");
        vm.sh("echo after > /root/note").ok();
        // In the middle of a command that does not survive it.
        let (running, _keys) = vm.sh("echo up; exec sleep 98770").start();
        running.read_until("up\n");
        snapshot(&vm, "restore", "s");
        assert_ne!(running.wait().code, 0);
        assert_eq!(vm.exec(["cat", "/root/note"]).text(), "before");
        vm.delete();
    }
}

#[test]
fn a_stopped_vm_has_its_disk_kept() {
    let home = TestHome::new();
    home.nido(["create", "web", "--net", "none"]).ok();
    home.nido(["snapshot", "create", "web", "early"]).problem(1, "vm_not_running");
    home.nido(["start", "web"]).ok();
    home.nido(["exec", "web", "--", "sh", "-c", "echo one > /root/note"]).ok();
    home.nido(["stop", "web"]).ok();
    let made = home.nido(["snapshot", "create", "web", "one"]).json();
    assert_eq!((&made["running"], made.get("paused_ms")), (&false.into(), None));
    home.nido(["snapshot", "create", "web", "one"]).problem(1, "snapshot_exists");
    home.nido(["start", "web"]).ok();
    home.nido(["exec", "web", "--", "sh", "-c", "echo two > /root/note"]).ok();
    assert_eq!(home.nido(["snapshot", "restore", "web", "one"]).json()["status"], "stopped");
    home.nido(["start", "web"]).ok();
    assert_eq!(home.nido(["exec", "web", "--", "cat", "/root/note"]).text(), "one");
    home.nido(["pause", "web"]).ok();
    // A paused VM is saved as well, and stays paused.
    let made = home.nido(["snapshot", "create", "web", "paused"]).json();
    assert_eq!((&made["running"], made.get("paused_ms")), (&true.into(), None));
    assert_eq!(home.nido(["info", "web"]).json()["status"], "paused");
    home.nido(["delete", "--force", "web", "--yes"]).ok();
    home.assert_empty();
}

#[test]
fn an_ephemeral_vm_is_restored_without_vanishing() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--ephemeral", "--net", "none"]);
    let id = vm.info()["id"].clone();
    vm.sh("echo before > /root/file && sync").ok();
    snapshot(&vm, "create", "s");
    vm.sh("echo after > /root/file && sync").ok();
    snapshot(&vm, "restore", "s");
    assert_eq!((vm.status().as_str(), &vm.info()["id"]), ("running", &id));
    assert_eq!(vm.exec(["cat", "/root/file"]).text(), "before");
    vm.nido("stop", &[]).ok();
    vm.nido("info", &[]).problem(1, "vm_not_found");
}

/// Appends numbers to a file, and to one in memory when the disk has them, while it changes other blocks of the disk.
const WRITES: &str = "
    head -c 8M /dev/urandom > /root/noise
    i=0
    while :; do
        i=$((i + 1))
        echo $i >> /root/numbers
        sync /root/numbers
        echo $i > /dev/shm/number.new && mv /dev/shm/number.new /dev/shm/number
        dd if=/dev/urandom of=/root/noise bs=4k count=1 seek=$((i % 2000)) conv=notrunc 2>/dev/null
    done";

#[test]
fn memory_and_disk_of_a_guest_that_writes_are_of_the_same_moment() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    vm.sh(&format!("({WRITES}) >/dev/null 2>&1 </dev/null &")).ok();
    let number = || vm.sh("cat /dev/shm/number || echo 0").text().parse::<u64>().unwrap();
    eventually("the first numbers", || (number() > 20).then_some(()));
    for name in ["one", "two"] {
        snapshot(&vm, "create", name);
    }
    let last = number();
    for name in ["two", "one"] {
        snapshot(&vm, "restore", name);
        // It continues. What it reads comes from the disk.
        let restored = number();
        assert!((20..last + 50).contains(&restored), "{restored} {last}");
        vm.sh("sync; echo 3 > /proc/sys/vm/drop_caches").ok();
        let before = number();
        vm.sh("awk '$1 != NR { exit 1 }' /root/numbers").ok();
        assert!(vm.sh("wc -l < /root/numbers").text().parse::<u64>().unwrap() >= before);
        eventually("the next number", || (number() > before).then_some(()));
        check_disk(&vm);
    }
}

#[test]
fn a_guest_that_changes_its_memory_without_end_is_saved_all_the_same() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    vm.sh("head -c 80M /dev/urandom > /dev/shm/new; sha256sum < /dev/shm/new > /dev/shm/sum
        (while :; do dd if=/dev/shm/new of=/dev/shm/hot bs=1M conv=notrunc 2>/dev/null; echo > /dev/shm/turn; done) \
            >/dev/null 2>&1 </dev/null &")
        .ok();
    eventually("the first turn", || {
        vm.sh("test -e /dev/shm/turn && echo yes || echo no").text().eq("yes").then_some(())
    });
    let began = Instant::now();
    let made = snapshot(&vm, "create", "hot");
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    assert!(made["paused_ms"].as_u64().is_some());
    // Pages are written again, but not without end.
    assert!(made["size_bytes"].as_u64().unwrap() < 3 * (512 << 20), "{made}");
    snapshot(&vm, "restore", "hot");
    vm.sh("sha256sum < /dev/shm/new | cmp - /dev/shm/sum && rm /dev/shm/turn").ok();
    eventually("the next turn", || {
        vm.sh("test -e /dev/shm/turn && echo yes || echo no").text().eq("yes").then_some(())
    });
}

// QEMU may be done with the memory of a small guest before its file system is frozen.
#[test]
fn a_vm_with_little_memory_is_saved_while_it_runs() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none", "--memory", "128M"]);
    start_counting(&vm);
    for name in ["one", "two", "three"] {
        snapshot(&vm, "create", name);
        vm.await_count();
    }
    vm.sh("echo after > /root/note; sync").ok();
    for name in ["three", "one"] {
        snapshot(&vm, "restore", name);
        assert_eq!(vm.exec(["cat", "/root/note"]).text(), "before");
        vm.await_count();
    }
    check_disk(&vm);
}

#[test]
fn a_supervisor_killed_during_a_snapshot_is_replaced_and_the_vm_keeps_running() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    start_counting(&vm);
    let snapshots = vm.dir().join("snapshots");
    // At the beginning, while the guest runs, while it is frozen, and at the end.
    for delay_ms in [0, 50, 150, 300, 500, 800] {
        let (taking, _keys) = home.nido(["snapshot", "create", "web", "s"]).start();
        eventually("the beginning", || snapshots.join(".new-s").exists().then_some(()));
        std::thread::sleep(Duration::from_millis(delay_ms));
        vm.kill_supervisor();
        let done = taking.wait();
        vm.await_count();
        vm.sh("echo more > /root/more; sync").ok();
        assert_eq!(vm.status(), "running");
        // Whole, or not there at all.
        let whole = names(&vm) == ["s"];
        assert_eq!(snapshots.join("s").exists(), whole, "{}", done.stderr);
        assert!(!snapshots.join(".new-s").exists());
        if whole {
            snapshot(&vm, "restore", "s");
            snapshot(&vm, "delete", "s");
        }
    }
}

/// How long what is left of a copy may be there.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(90);

/// The directories of other VMs than this one, and of snapshots of it that are not finished.
fn left_of_copies(home: &TestHome, vm: &Path) -> Vec<PathBuf> {
    let vms = home.path().join("vms");
    let entries =
        |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect::<Vec<_>>();
    let mut left = Vec::new();
    for other in entries(&vms).into_iter().filter(|path| path != vm) {
        left.extend(entries(&other).iter().flat_map(|path| entries(path)));
        left.extend(entries(&other));
        left.push(other);
    }
    left.extend(entries(&vm.join("snapshots")).into_iter().filter(|path| path.ends_with(".new-aside")));
    left
}

#[test]
fn a_command_killed_while_it_copies_a_vm_leaves_nothing_in_it() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    start_counting(&vm);
    let dir = vm.dir();
    let snapshots = dir.join("snapshots");
    for command in [&["fork", "web", "copy"][..], &["template", "create", "copy", "--from", "web", "--no-bake"]] {
        // At the beginning, while the VM is saved, and when its snapshot is another's already.
        for moment in ["aside", "saving", "saved"] {
            let before = home.vm_dirs().len();
            let (copying, _keys) = home.nido(command).start();
            eventually(moment, || {
                let begun = home.vm_dirs().len() > before;
                let saving = snapshots.join(".new-aside").exists();
                let saved =
                    home.vm_dirs().iter().any(|id| home.path().join("vms").join(id).join("snapshots/aside").exists());
                match moment {
                    "aside" => begun,
                    "saving" => saving,
                    _ => saved,
                }
                .then_some(())
            });
            copying.signal(rustix::process::Signal::KILL);
            copying.wait().expect(137);
            assert_eq!(home.names(), ["web"]);
            // What saved the VM finishes, and what would have been the copy goes: a VM with any command, a directory that had
            // no row yet with the next one that makes a VM.
            let began = Instant::now();
            eventually("nothing is left", || {
                home.nido(["create", "next", "--net", "none"]).ok();
                home.nido(["delete", "next", "--yes"]).ok();
                let left = left_of_copies(&home, &dir);
                assert!(left.is_empty() || began.elapsed() < CLEANUP_TIMEOUT, "{command:?}, {moment}: {left:?}");
                left.is_empty().then_some(())
            });
            assert_eq!(names(&vm), [""; 0]);
            vm.await_count();
            check_disk(&vm);
        }
    }
    vm.delete();
    home.assert_empty();
}
