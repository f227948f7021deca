//! Failures of a guest: with the contract's errors, nothing lost, and no orphans.

use std::fs;

use rustix::process::Signal;

use crate::rig::{TestHome, eventually, send};

/// How long a start may take that is to end by time: enough for a busy host to start QEMU.
const SHORT_TIMEOUT: &str = "10s";

/// Has the kernel of VMs of this home print what it does.
fn print_kernel_messages(home: &TestHome) {
    let manifest = home.path().join("templates/sandbox.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    json["kernel"]["append"] = format!("{} ignore_loglevel", json["kernel"]["append"].as_str().unwrap()).into();
    fs::write(&manifest, serde_json::to_vec(&json).unwrap()).unwrap();
}

/// Suspends the QEMU of the only VM when its kernel has begun to boot: its agent never answers.
fn stop_while_the_kernel_boots(home: &TestHome) {
    let qemu = eventually("QEMU", || home.qemu());
    eventually("the kernel's first messages", || {
        let dir = home.path().join("vms").join(home.vm_dirs().first()?);
        fs::read(dir.join("console.log")).ok()?.contains(&b'\n').then_some(())
    });
    send(qemu.pid, Signal::STOP);
}

#[test]
fn a_guest_that_never_answers() {
    let home = TestHome::new();
    print_kernel_messages(&home);
    home.nido(["create", "web", "--net", "none"]).ok();
    let (starting, _keys) = home.nido(["--json", "start", "web", "--cold", "--timeout", SHORT_TIMEOUT]).start();
    stop_while_the_kernel_boots(&home);
    let done = starting.wait().expect(1);
    let told: serde_json::Value = serde_json::from_str(done.stderr.lines().last().unwrap()).unwrap();
    assert_eq!(told["code"], "agent_unreachable", "{told:#}");
    assert!(told["detail"].as_str().unwrap().contains("10.0 s") && told["hint"].is_string(), "{told:#}");
    let info = home.nido(["info", "web"]).json();
    assert_eq!((&info["status"], &info["failure"]["cause"]), (&"failed".into(), &"guest_timeout".into()));
    if let Some(tail) = told.get("log_tail") {
        assert_eq!(tail, &info["failure"]["log_tail"]);
    }
    home.nido(["start", "web"]).ok();
    home.nido(["exec", "web", "--", "true"]).ok();
    assert_eq!(home.nido(["info", "web"]).json()["failure"], serde_json::Value::Null);
}

#[test]
fn a_guest_whose_agent_is_not_there() {
    // A template whose initramfs holds no agent: the kernel finds no init and panics.
    let home = TestHome::new();
    let manifest = home.path().join("templates/sandbox.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    let base = json["parts"]["initramfs_base"].clone();
    json["parts"]["initramfs"] = base;
    fs::write(&manifest, serde_json::to_vec(&json).unwrap()).unwrap();
    let problem = home.nido(["spawn", "web", "--cold", "--net", "none"]).problem(1, "guest_failed");
    let tail = problem["log_tail"].to_string();
    assert!(tail.contains("Kernel panic"), "{problem:#}");
    home.assert_empty();
}

#[test]
fn a_hanging_guest_is_reported_with_its_last_log_lines() {
    let home = TestHome::new();
    print_kernel_messages(&home);
    let (spawning, _keys) = home.nido(["spawn", "web", "--cold", "--net", "none", "--timeout", SHORT_TIMEOUT]).start();
    stop_while_the_kernel_boots(&home);
    let done = spawning.wait().expect(1);
    assert!(done.stderr.contains("did not reply within 10.0 s"), "{}", done.stderr);
    assert!(done.stderr.contains("\n  | [") && done.stderr.contains("\nhint: "), "{}", done.stderr);
    home.assert_empty();
}

#[test]
fn parts_that_are_missing() {
    let home = TestHome::new();
    let json: serde_json::Value =
        serde_json::from_slice(&fs::read(home.path().join("templates/sandbox.json")).unwrap()).unwrap();
    let kernel = json["parts"]["vmlinux"]["sha256"].as_str().unwrap();
    home.nido(["create", "early"]).ok();
    // Only this home's link to it goes.
    fs::remove_file(home.path().join("blobs/sha256").join(kernel)).unwrap();
    let problem = home.nido(["spawn", "web"]).problem(1, "template_mismatch");
    assert!(problem["hint"].as_str().unwrap().contains("template build"), "{problem:#}");
    assert_eq!(home.names(), ["early"]);
    // The same for a VM that was made before.
    let done = home.nido(["start", "early"]).run();
    assert_eq!(done.code, 1, "{}", done.stderr);
    assert!(done.stderr.contains("error: ") && done.stderr.contains("hint: "), "{}", done.stderr);
    assert_ne!(home.nido(["info", "early"]).json()["status"], "running");
    home.nido(["delete", "early"]).ok();
}

#[test]
fn names_and_templates_that_are_wrong() {
    let home = TestHome::new();
    for name in ["", "UPPER", "a_b", "-a", "a-", "a b", "../x", "a\nb", &"x".repeat(64)] {
        let problem = home.nido(["spawn", "--", name]).problem(2, "name_invalid");
        assert!(problem["detail"].as_str().unwrap().contains("63") || problem["hint"].is_string(), "{problem:#}");
    }
    home.nido(["spawn", "web", "--template", "no-such"]).problem(1, "template_not_found");
    home.nido(["spawn", "web", "--accel", "kvm", "--machine", "q35", "--memory", "999999G"]).run().expect_failure();
    for verb in ["start", "stop", "pause", "resume", "restart", "delete", "info", "logs"] {
        home.nido([verb, "missing"]).problem(1, "vm_not_found");
    }
    home.nido(["exec", "missing", "--", "true"]).problem(125, "vm_not_found");
    home.nido(["upload", "missing", "/etc/hosts", "/x"]).problem(1, "vm_not_found");
    home.nido(["proxy", "missing", "80"]).problem(1, "vm_not_found");
    home.assert_empty();
}
