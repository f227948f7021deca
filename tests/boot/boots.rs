//! Guests of both templates on every machine type; two at once; thirty in a row.

use crate::rig::TestHome;

/// The machine that was selected for a VM is in `info`, and the guest has it.
fn check_sandbox(machine: &'static str) {
    let home = TestHome::new();
    let vm = home.spawn("box", &["--machine", machine, "--cold"]);
    let info = vm.info();
    assert_eq!((&info["status"], &info["machine"]), (&"running".into(), &machine.into()));
    assert_eq!(info["template"], "sandbox");
    assert_eq!(info["agent"]["ready"], true);
    assert!(["vsock", "virtio-serial"].contains(&info["agent"]["transport"].as_str().unwrap()));
    let isolation = if info["accel"] == "kvm" { "hardware" } else { "emulation" };
    assert_eq!(info["isolation"], isolation);
    assert_eq!(vm.exec(["cat", "/proc/1/cmdline"]).text().trim_end_matches('\0').rsplit('/').next().unwrap(), "init");
    assert_eq!(vm.exec(["uname", "-n"]).text(), "box");
    // What the sandbox promises to hold.
    vm.sh("bash --version && python3 --version && git --version && curl --version && ls /etc/ssl/certs/ca-certificates.crt")
        .ok();
    vm.nido("stop", &[]).ok();
    vm.nido("start", &[]).ok();
    vm.exec(["true"]).ok();
}

#[test]
fn sandbox_on_microvm() {
    check_sandbox("microvm");
}

#[test]
fn sandbox_on_pc() {
    check_sandbox("pc");
}

#[test]
fn sandbox_on_q35() {
    check_sandbox("q35");
}

/// Emulated: the one kind of virtualization that every host can give away.
#[test]
fn only_nested_guests_see_virtualization_on_any_machine() {
    let home = TestHome::new();
    for machine in ["microvm", "pc", "q35"] {
        for (name, flags, seen) in [("outer", &["--nested"][..], true), ("plain", &[], false)] {
            let vm = home
                .spawn(name, &[&["--machine", machine, "--accel", "tcg", "--net", "none", "--cold"], flags].concat());
            let info = vm.info();
            assert_eq!((&info["machine"], &info["nested"]), (&machine.into(), &seen.into()));
            let found = vm.exec(["grep", "-cwE", "svm|vmx", "/proc/cpuinfo"]).run().text() != "0";
            assert_eq!(found, seen, "{machine} {flags:?}");
            vm.delete();
        }
    }
}

fn check_debian(machine: &str) {
    let home = TestHome::new();
    let vm = home.spawn("deb", &["--template", "debian-12", "--machine", machine, "--cold"]);
    assert_eq!(vm.info()["template"], "debian-12");
    assert_eq!(vm.exec(["cat", "/proc/1/comm"]).text(), "systemd");
    assert_eq!(vm.exec(["systemctl", "is-active", "nido-guest-agent.service"]).text(), "active");
    // The agent answers early; `--wait` is for the rest. A degraded system exits with 1 and names what failed below.
    let state = vm.exec(["systemctl", "is-system-running", "--wait"]).run();
    let failed = vm.exec(["systemctl", "--failed", "--no-legend", "--plain"]).text();
    assert_eq!((state.text().as_str(), failed.as_str()), ("running", ""));
    let pid = vm.exec(["systemctl", "show", "--property=MainPID", "--value", "nido-guest-agent.service"]).text();
    assert_ne!(pid, "1");
    assert_eq!(vm.exec(["hostname"]).text(), "deb");
    assert_eq!(vm.exec(["findmnt", "-no", "FSTYPE", "/"]).text(), "ext4");
    assert_eq!(vm.home.nido(["exec", "deb", "-u", "user", "--", "sudo", "id", "-u"]).text(), "0");
    // systemd takes the guest down in order.
    vm.sh("echo kept > /root/note").ok();
    vm.nido("stop", &[]).ok();
    assert_eq!(vm.status(), "stopped");
    let console = vm.nido("logs", &[]).text();
    vm.nido("start", &[]).ok();
    assert_eq!(vm.exec(["cat", "/root/note"]).text(), "kept", "console of the first boot:\n{console}");
}

#[test]
fn debian_on_microvm() {
    check_debian("microvm");
}

#[test]
fn debian_on_pc() {
    check_debian("pc");
}

#[test]
fn debian_on_q35() {
    check_debian("q35");
}

#[test]
fn two_at_once_do_not_mix() {
    let home = TestHome::new();
    std::thread::scope(|scope| {
        for name in ["left", "right"] {
            let home = &home;
            scope.spawn(move || {
                let vm = home.spawn(name, &[]);
                vm.sh("hostname > /root/who").ok();
            });
        }
    });
    for name in ["left", "right"] {
        assert_eq!(home.nido(["exec", name, "--", "cat", "/root/who"]).text(), name);
    }
    let ids: Vec<_> = ["left", "right"].map(|name| home.nido(["info", name]).json()["id"].clone()).into();
    assert_ne!(ids[0], ids[1]);
    let mut names = home.names();
    names.sort();
    assert_eq!(names, ["left", "right"]);
}

#[test]
fn thirty_cold_boots_in_a_row() {
    let home = TestHome::new();
    let mut booted = 0;
    for _ in 0..30 {
        let vm = home.spawn("again", &["--cold"]);
        assert_eq!(vm.exec(["cat", "/proc/sys/kernel/hostname"]).text(), "again");
        vm.delete();
        booted += 1;
    }
    println!("{booted} cold boots of 30 succeeded");
    assert_eq!(booted, 30);
}
