//! How a VM can end without a request, and what is reported about it.

use rustix::process::Signal;

use crate::rig::{TestHome, Vm, eventually};

fn ends_as(vm: &Vm<'_>, status: &str) -> serde_json::Value {
    eventually(&format!("{} is {status}", vm.name), || {
        let info = vm.info();
        (info["status"] == status).then_some(info)
    })
}

#[test]
fn a_guest_may_go_down_by_itself() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    vm.sh("echo kept > /root/note").ok();
    // Process 1 takes it as a wish to power off.
    vm.exec(["kill", "-TERM", "1"]).run();
    let info = ends_as(&vm, "stopped");
    assert_eq!((&info["failure"], &info["agent"]["ready"]), (&serde_json::Value::Null, &false.into()));
    vm.nido("start", &[]).ok();
    assert_eq!(vm.exec(["cat", "/root/note"]).text(), "kept");
    // A restart ends the VM too: it starts again when its owner wants it to.
    vm.exec(["kill", "-INT", "1"]).run();
    ends_as(&vm, "stopped");
    vm.nido("start", &[]).ok();
    vm.exec(["true"]).ok();
}

#[test]
fn systemd_powers_off() {
    let home = TestHome::new();
    let vm = home.spawn("deb", &["--template", "debian-12", "--net", "none"]);
    vm.exec(["systemctl", "poweroff"]).run();
    assert_eq!(ends_as(&vm, "stopped")["failure"], serde_json::Value::Null);
}

#[test]
fn a_kernel_panic_is_reported() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    // The last output of a guest can be anything.
    vm.sh("printf '\\033[2J\\033]0;owned\\007last words\\n' > /dev/ttyS0").ok();
    let done = vm.sh("echo c > /proc/sysrq-trigger").run().expect(125);
    assert!(!done.stderr.contains('\x1b'), "{:?}", done.stderr);
    let info = ends_as(&vm, "failed");
    assert_eq!(info["failure"]["cause"], "guest_panic");
    let tail = info["failure"]["log_tail"].to_string();
    assert!(tail.contains("Kernel panic") && tail.contains("last words"), "{tail}");
    for shown in [vm.nido("info", &[]).text(), vm.nido("info", &["--json"]).text(), vm.nido("logs", &[]).text()] {
        assert!(shown.contains("Kernel panic"), "{shown:?}");
        assert!(!shown.contains(['\x1b', '\x07']), "{shown:?}");
    }
    let problem = vm.exec(["true"]).problem(125, "vm_not_running");
    assert_eq!(problem["hint"], "nido start web");
    vm.nido("start", &[]).ok();
    assert_eq!(vm.info()["failure"], serde_json::Value::Null);
    vm.exec(["true"]).ok();
}

#[test]
fn a_killed_qemu_is_reported() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let (running, _keys) = vm.sh("echo up; sleep 98770").start();
    running.read_until("up\n");
    vm.qemu().kill();
    let done = running.wait().expect(125);
    assert!(done.stderr.starts_with("error: "), "{}", done.stderr);
    let info = ends_as(&vm, "failed");
    assert_eq!(info["failure"]["cause"], "qemu_signal");
    vm.nido("start", &[]).ok();

    // Both at once: no process saw it, the next command records it.
    let (qemu, supervisor) = (vm.qemu(), vm.supervisor());
    supervisor.kill();
    qemu.kill();
    eventually("both deaths", || (!qemu.is_alive() && !supervisor.is_alive()).then_some(()));
    let info = ends_as(&vm, "failed");
    // The last threads of a killed QEMU may outlive its name by a moment, and get a supervisor for that long.
    let cause = info["failure"]["cause"].as_str().unwrap();
    assert!(["host_restart", "qemu_error"].contains(&cause), "{info:#}");
    assert_eq!(info["agent"]["ready"], false);
    home.nido(["delete", "web"]).ok();
    home.assert_empty();
}

/// A way for a VM to end.
type Ending = fn(&Vm<'_>);

#[test]
fn ephemeral_vms_vanish() {
    let home = TestHome::new();
    let ways: [(&str, Ending); 4] = [
        ("stopped", |vm| drop(vm.nido("stop", &[]).ok())),
        ("forced", |vm| drop(vm.nido("stop", &["--force"]).ok())),
        ("by itself", |vm| drop(vm.exec(["kill", "-TERM", "1"]).run())),
        ("killed", |vm| vm.qemu().kill()),
    ];
    for (way, end) in ways {
        let vm = home.spawn("brief", &["--ephemeral", "--net", "none"]);
        assert_eq!(vm.info()["ephemeral"], true);
        vm.nido("restart", &[]).problem(2, "spec_invalid");
        end(&vm);
        eventually(way, || home.names().is_empty().then_some(()));
        home.assert_empty();
    }
}

#[test]
fn a_qemu_that_does_not_answer_can_be_stopped() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    crate::rig::send(vm.qemu().pid, Signal::STOP);
    vm.nido("stop", &["--timeout", "1s"]).ok();
    assert_eq!(vm.status(), "stopped");
}
