//! The nested rig: what only a host with KVM and kernel vsock can show. `scripts/test nested` starts a VM with both of its
//! own, and runs these tests and a part of the boot suite in it, as root.
//!
//! Invariant: nothing here passes under another accelerator or over another transport than it is about: each test first
//! makes sure of that.

#![allow(clippy::unwrap_used)]

#[path = "../boot/rig/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the boot suite uses the rest")]
mod rig;

mod control_groups;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::rig::{TestHome, Vm};

/// Fails unless the VM runs on KVM and is reached over vsock; gives what is known about it.
#[track_caller]
fn on_kvm(vm: &Vm<'_>) -> Value {
    on_kvm_over(vm, "vsock")
}

#[track_caller]
fn on_kvm_over(vm: &Vm<'_>, transport: &str) -> Value {
    let info = vm.info();
    let found = ["accel", "isolation"].map(|key| info[key].as_str().unwrap_or_default().to_owned());
    assert_eq!(found, ["kvm", "hardware"], "{info}");
    assert_eq!(info["agent"]["transport"], transport, "{info}");
    info
}

/// The VM's vsock address, as QEMU got it.
fn cid(vm: &Vm<'_>) -> u32 {
    let arguments = vm.qemu().arguments;
    let device = arguments.iter().find(|argument| argument.contains("guest-cid=")).expect("a vsock device");
    device.rsplit_once("guest-cid=").unwrap().1.parse().unwrap()
}

/// One command over a QEMU's monitor that no supervisor holds.
fn ask_qemu(monitor: &Path, command: &str) -> Value {
    let mut monitor = UnixStream::connect(monitor).unwrap();
    monitor.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut lines = BufReader::new(monitor.try_clone().unwrap()).lines();
    for command in ["qmp_capabilities", command] {
        writeln!(monitor, "{}", json!({"execute": command})).unwrap();
    }
    let answers = lines.by_ref().map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    answers.filter(|answer| answer.get("return").is_some()).nth(1).unwrap()["return"].clone()
}

#[test]
fn kvm_is_really_used() {
    let home = TestHome::new();
    let report = home.nido(["doctor"]).json();
    let kvm = report["checks"].as_array().unwrap().iter().find(|check| check["name"] == "kvm").unwrap().clone();
    assert_eq!(kvm["status"], "ok", "{kvm}");
    let vm = home.spawn("web", &["--cold"]);
    on_kvm(&vm);
    // The guest's own view.
    assert!(
        vm.exec(["cat", "/sys/devices/system/clocksource/clocksource0/available_clocksource"])
            .text()
            .contains("kvm-clock")
    );
    // The kernel's.
    let descriptors = fs::read_dir(format!("/proc/{}/fd", vm.qemu().pid)).unwrap().flatten();
    let links: Vec<_> = descriptors.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
    assert!(links.iter().any(|link| link.to_string_lossy().contains("kvm-vcpu")), "{links:?}");
    // QEMU's. Any command of nido's would bring the next supervisor, which takes the monitor.
    let monitor = vm.dir().join("qemu/qmp.sock");
    vm.kill_supervisor();
    assert_eq!(ask_qemu(&monitor, "query-kvm"), json!({"enabled": true, "present": true}));
    assert_eq!(vm.exec(["hostname"]).text(), "web");
}

#[test]
fn every_machine_boots() {
    let home = TestHome::new();
    for (name, machine) in [("one", "microvm"), ("two", "q35"), ("three", "pc")] {
        let vm = home.spawn(name, &["--cold", "--machine", machine]);
        assert_eq!(on_kvm(&vm)["machine"], machine);
        assert_eq!(vm.exec(["hostname"]).text(), name);
        vm.delete();
    }
}

#[test]
fn forks_have_addresses_and_tokens_of_their_own() {
    let home = TestHome::new();
    let (one, two) = (home.spawn("one", &["--fork"]), home.spawn("two", &["--fork"]));
    for vm in [&one, &two] {
        assert_eq!(on_kvm(vm)["timings"]["path"], "fork");
    }
    // The first connection to a guest that has just been restored is lost, and vsock's own timeout for it is two seconds.
    let waited = [&one, &two].map(|vm| vm.info()["timings"]["agent_ms"].as_f64().unwrap());
    assert!(waited.iter().any(|ms| *ms < 2000.0), "{waited:?}");
    assert_ne!(cid(&one), cid(&two));
    assert_ne!(one.exec(["cat", "/etc/machine-id"]).text(), two.exec(["cat", "/etc/machine-id"]).text());
    let manifest: Value =
        serde_json::from_slice(&fs::read(home.path().join("templates/sandbox.json")).unwrap()).unwrap();
    let bakes = manifest["bakes"].as_array().unwrap();
    let bake = bakes.iter().find(|bake| bake["machine"]["transport"] == "vsock").expect("a bake for vsock");
    let templates_token = bake["token"].as_str().unwrap().to_owned();
    let nobodys = "00".repeat(32);
    for vm in [&one, &two] {
        for token in [&templates_token, &nobodys] {
            assert_eq!(greeting(cid(vm), token), "refused", "with {token}");
        }
        assert_eq!(vm.exec(["hostname"]).text(), vm.name, "and it goes on");
    }
}

/// The reply of the agent at a vsock address to a hello with this token: `welcome` or `refused`.
fn greeting(cid: u32, token: &str) -> String {
    // A frame with [0, [[version, version, token, nonce]]]; the answer's number is the payload's second byte.
    let script = format!(
        "import socket,sys
token=bytes.fromhex('{token}')
hello=bytes([0x82,0,0x81,0x84,3,3,0x58,len(token)])+token+bytes([1])
s=socket.socket(socket.AF_VSOCK); s.settimeout(30); s.connect(({cid},1024))
s.sendall(bytes([1])+len(hello).to_bytes(3,'big')+hello)
answer=s.recv(4096)
print({{0:'welcome',1:'refused'}}[answer[5]])"
    );
    let ran = Command::new("python3").args(["-c", &script]).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).unwrap().trim().to_owned()
}

/// Another process on the host has the address that nido has chosen.
#[test]
fn an_address_that_is_taken_is_replaced() {
    let home = TestHome::new();
    let program = std::env::var("NIDO_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".into());
    let qemu = home.user_dir().join("qemu-system-slow");
    // Started for the first time it waits until another process has its address. It is confined as QEMU is: all that it may write is
    // `qemu` in the VM's directory, in which it works.
    let script = format!(
        "#!/bin/bash
if [[ \"$*\" =~ guest-cid=([0-9]+) && ! -e qemu/held ]]; then
    echo \"${{BASH_REMATCH[1]}}\" > qemu/wanted.new && mv qemu/wanted.new qemu/wanted
    while [[ ! -e qemu/held ]]; do sleep 0.1; done
fi
exec '{program}' \"$@\"
"
    );
    fs::write(&qemu, script).unwrap();
    fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).unwrap();
    let (first, mut holder) = std::thread::scope(|scope| {
        let holder = scope.spawn(|| {
            let (dir, first) = rig::eventually("an address", || {
                let mut dirs = fs::read_dir(home.path().join("vms")).ok()?.flatten().map(|entry| entry.path());
                dirs.find_map(|dir| Some((dir.clone(), fs::read_to_string(dir.join("qemu/wanted")).ok()?)))
            });
            let first: u32 = first.trim().parse().unwrap();
            let machine = ["-M", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"];
            let device = format!("vhost-vsock-pci,guest-cid={first}");
            let mut holder = Command::new(&program);
            holder.args(machine).args(["-device", &device]).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut holder = holder.spawn().unwrap();
            // Its prompt comes when its machine is made.
            holder.stdout.as_mut().unwrap().read_exact(&mut [0; 4]).unwrap();
            fs::write(dir.join("qemu/held"), "").unwrap();
            (first, holder)
        });
        home.nido(["spawn", "web", "--cold"]).env("NIDO_QEMU", &qemu).ok();
        holder.join().unwrap()
    });
    let vm = Vm { home: &home, name: "web" };
    on_kvm(&vm);
    assert_ne!(cid(&vm), first);
    assert_eq!(vm.exec(["hostname"]).text(), "web");
    holder.kill().unwrap();
    holder.wait().unwrap();
}

#[test]
fn a_restored_vm_is_saved_and_restored_again() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--fork"]);
    on_kvm(&vm);
    vm.sh("echo one > /root/note").ok();
    home.nido(["snapshot", "create", "web", "first"]).ok();
    vm.sh("echo two > /root/note").ok();
    home.nido(["snapshot", "restore", "web", "first"]).ok();
    assert_eq!(vm.exec(["cat", "/root/note"]).text(), "one");
    home.nido(["snapshot", "create", "web", "second"]).ok();
    vm.sh("echo three > /root/note").ok();
    home.nido(["snapshot", "restore", "web", "second"]).ok();
    assert_eq!(vm.exec(["cat", "/root/note"]).text(), "one");
    on_kvm(&vm);
}

/// A host with KVM and without kernel vsock, as containers often are: nido gets a `/dev/vhost-vsock` that is not a device.
#[test]
fn without_vsock_kvm_is_used_all_the_same() {
    let home = TestHome::new();
    let nothing = home.user_dir().join("nothing");
    let hidden = |arguments: &[&str]| {
        let script = "mknod \"$0\" c 0 0 && mount --bind \"$0\" /dev/vhost-vsock && rm \"$0\" && exec \"$@\"";
        let wrapper = ["unshare", "--mount", "sh", "-c", script, nothing.to_str().unwrap()];
        home.nido(arguments).behind(wrapper).ok();
    };
    hidden(&["spawn", "one", "--cold"]);
    let vm = Vm { home: &home, name: "one" };
    assert_eq!(on_kvm_over(&vm, "virtio-serial")["timings"]["path"], "cold");
    hidden(&["fork", "one", "two"]);
    let copy = Vm { home: &home, name: "two" };
    assert_eq!(on_kvm_over(&copy, "virtio-serial")["timings"]["path"], "fork");
    hidden(&["snapshot", "create", "two", "first"]);
    hidden(&["snapshot", "restore", "two", "first"]);
    on_kvm_over(&copy, "virtio-serial");
    assert_eq!(copy.exec(["hostname"]).text(), "two");
    assert_eq!(vm.exec(["hostname"]).text(), "one");
}
