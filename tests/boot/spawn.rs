//! What a VM is made of, and what is left of a spawn that does not come to its end.

use rustix::process::Signal;

use crate::rig::{TestHome, Vm, eventually};

/// Whether something has come so far.
type Moment = fn(&TestHome) -> bool;

#[test]
fn the_guest_has_the_requested_resources() {
    let home = TestHome::new();
    let flags = ["--cpus", "2", "--memory", "768M", "--disk", "4G", "--label", "role=demo", "--label", "tier=1"];
    let vm = home.spawn("big", &flags);
    assert_eq!(vm.exec(["nproc"]).text(), "2");
    let memory: u64 = vm.sh("awk '/MemTotal/ {print $2}' /proc/meminfo").text().parse().unwrap();
    assert!((660 << 10..=768 << 10).contains(&memory), "{memory} KiB");
    // The file system grows beside the first sessions.
    eventually("the file system has grown with the disk", || {
        let kib: u64 = vm.sh("df -k --output=size / | tail -n 1").text().trim().parse().unwrap();
        (kib > 7 << 19).then_some(())
    });
    assert_eq!(vm.exec(["cat", "/sys/block/vda/size"]).text(), ((4_u64 << 30) / 512).to_string());
    let info = vm.info();
    assert_eq!(
        (&info["cpus"], &info["memory_mib"], &info["disk_bytes"]),
        (&2.into(), &768.into(), &(4_u64 << 30).into())
    );
    assert_eq!(info["labels"], serde_json::json!({ "role": "demo", "tier": "1" }));
    // It stays so.
    vm.nido("restart", &[]).ok();
    assert_eq!(vm.exec(["nproc"]).text(), "2");

    home.nido(["spawn", "small", "--disk", "1G"]).problem(2, "spec_invalid");
    home.nido(["spawn", "small", "--memory", "1M"]).problem(2, "spec_invalid");
    assert_eq!(home.names(), ["big"]);
}

#[test]
fn interrupted_it_leaves_no_vm() {
    let home = TestHome::new();
    let moments: [(&str, Moment); 3] = [
        ("the directory", |home| !home.vm_dirs().is_empty()),
        ("the supervisor", |home| home.processes().iter().any(|p| p.arguments.contains(&"supervise".into()))),
        ("QEMU", |home| home.qemu().is_some()),
    ];
    for (moment, is_now) in moments {
        for signal in [Signal::INT, Signal::TERM] {
            let (spawning, _keys) = home.nido(["spawn", "web", "--net", "none"]).start();
            eventually(moment, || is_now(&home).then_some(()));
            spawning.signal(signal);
            let done = spawning.wait();
            assert_eq!(done.code, 128 + signal.as_raw(), "{moment}: {}", done.stderr);
            home.assert_empty();
        }
    }
}

#[test]
fn of_two_with_one_name_one_wins() {
    let home = TestHome::new();
    for _ in 0..3 {
        let spawn = || home.nido(["--json", "spawn", "web", "--net", "none"]).start();
        let racers = [spawn(), spawn(), spawn()];
        let done: Vec<_> = racers.into_iter().map(|(racer, _keys)| racer.wait()).collect();
        let winners = done.iter().filter(|done| done.code == 0).count();
        assert_eq!(winners, 1, "{done:#?}");
        for loser in done.iter().filter(|done| done.code != 0) {
            assert_eq!(loser.code, 1);
            assert!(loser.stderr.contains("\"vm_exists\""), "{}", loser.stderr);
        }
        // The winner's VM is whole, and a later spawn does it no harm.
        let vm = Vm { home: &home, name: "web" };
        vm.exec(["true"]).ok();
        home.nido(["spawn", "web"]).problem(1, "vm_exists");
        assert_eq!((vm.status().as_str(), home.vm_dirs().len()), ("running", 1));
        vm.delete();
    }
}

#[test]
fn without_waiting() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--no-wait", "--net", "none"]);
    assert!(["starting", "running"].contains(&vm.status().as_str()));
    vm.exec(["true"]).ok();
    assert_eq!(vm.info()["agent"]["ready"], true);
    // And deleted before it is up.
    home.nido(["spawn", "other", "--no-wait", "--net", "none"]).ok();
    home.nido(["delete", "other", "--force", "--yes"]).ok();
    assert_eq!(home.names(), ["web"]);
}

#[test]
fn isolation_is_not_promised_in_vain() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let info = vm.info();
    if info["accel"] == "kvm" {
        assert_eq!((&info["isolation"], &info["warnings"]), (&"hardware".into(), &serde_json::Value::Null));
        home.spawn("safe", &["--net", "none", "--require-isolation", "--accel", "kvm"]);
    } else {
        assert!(info["warnings"][0].as_str().unwrap().contains("no hardware isolation"), "{info:#}");
        home.nido(["spawn", "safe", "--require-isolation"]).problem(1, "isolation_required");
        home.nido(["spawn", "safe", "--accel", "kvm"]).problem(1, "kvm_unavailable");
    }
    // Emulation that is asked for is no surprise.
    let slow = home.spawn("slow", &["--net", "none", "--accel", "tcg"]);
    assert_eq!((&slow.info()["accel"], &slow.info()["isolation"]), (&"tcg".into(), &"emulation".into()));
    slow.exec(["true"]).ok();
}

#[test]
fn virtualization_in_the_guest_only_on_request() {
    let home = TestHome::new();
    let has_it = |vm: &Vm<'_>| vm.sh("grep -cwE 'svm|vmx' /proc/cpuinfo || true").text() != "0";
    assert!(!has_it(&home.spawn("plain", &["--net", "none", "--accel", "tcg"])));
    assert!(has_it(&home.spawn("nested", &["--net", "none", "--accel", "tcg", "--nested"])));
}
