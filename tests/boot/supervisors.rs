//! Supervisors are replaceable: killed at any instant, the guest keeps running and the next command starts another.

use std::io::{Read, Write};
use std::net::TcpStream;

use rustix::process::Signal;

use crate::rig::{TestHome, Vm, eventually};

fn boot_id(vm: &Vm<'_>) -> String {
    vm.exec(["cat", "/proc/sys/kernel/random/boot_id"]).text()
}

/// Whether something has come so far.
type Moment = fn(&TestHome) -> bool;

#[test]
fn the_guest_survives_its_supervisor() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none", "-p", "8000"]);
    let boot = boot_id(&vm);
    let qemu = vm.qemu();
    vm.sh("cd /etc && setsid python3 -m http.server 8000 --bind 127.0.0.1 >/dev/null 2>&1 &").ok();
    let port = u16::try_from(vm.info()["forwards"][0]["host_port"].as_u64().unwrap()).unwrap();
    let fetch = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        stream.write_all(b"GET /hostname HTTP/1.0\r\n\r\n").ok()?;
        let mut page = String::new();
        stream.read_to_string(&mut page).ok()?;
        page.contains("200 OK").then_some(page)
    };
    eventually("the page", fetch);

    for _ in 0..3 {
        vm.kill_supervisor();
        assert!(qemu.is_alive());
        assert_eq!(boot_id(&vm), boot);
        assert_eq!(vm.qemu().pid, qemu.pid);
        eventually("the page through the next supervisor", fetch);
    }

    // Many commands at once find one supervisor between them.
    vm.kill_supervisor();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(boot_id(&vm), boot));
        }
    });
    vm.supervisor();

    // Every verb can be the first.
    vm.kill_supervisor();
    vm.nido("pause", &[]).ok();
    vm.kill_supervisor();
    assert_eq!(vm.status(), "paused");
    vm.nido("resume", &[]).ok();
    vm.kill_supervisor();
    vm.nido("upload", &["/etc/hostname", "/root/x"]).ok();
    vm.kill_supervisor();
    vm.sh("echo kept > /root/note").ok();
    vm.nido("restart", &[]).ok();
    assert_eq!(vm.exec(["cat", "/root/note"]).text(), "kept");
    vm.kill_supervisor();
    vm.nido("stop", &[]).ok();
    assert_eq!((vm.status().as_str(), &vm.info()["failure"]), ("stopped", &serde_json::Value::Null));
    vm.nido("start", &[]).ok();
    vm.kill_supervisor();
    home.nido(["delete", "--force", "web", "--yes"]).ok();
    home.assert_empty();
}

#[test]
fn a_command_ends_clearly_when_its_supervisor_is_killed() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let (running, _keys) = vm.sh("echo up; exec sleep 98772").start();
    running.read_until("up\n");
    vm.kill_supervisor();
    let done = running.wait();
    if vm.info()["agent"]["transport"] == "virtio-serial" {
        let done = done.expect(125);
        assert!(done.stderr.contains("error: ") && done.stderr.contains("hint: "), "{}", done.stderr);
    }
    vm.exec(["true"]).ok();
    // The guest noticed as well.
    eventually("the end of the command", || {
        vm.exec(["pgrep", "-x", "-f", "sleep 98772"]).run().stdout.is_empty().then_some(())
    });
    // A guest that powers itself off without a supervisor has stopped nevertheless.
    vm.sh("setsid sh -c 'sleep 2; kill -TERM 1' >/dev/null 2>&1 &").ok();
    let qemu = vm.qemu();
    vm.kill_supervisor();
    eventually("the end of QEMU", || (!qemu.is_alive()).then_some(()));
    // The supervisor that takes over finds out and writes it down.
    eventually("the end of the VM", || ["stopped", "failed"].contains(&vm.status().as_str()).then_some(()));
    vm.nido("start", &[]).ok();
    vm.exec(["true"]).ok();
}

#[test]
fn killed_while_the_guest_boots() {
    let home = TestHome::new();
    let vm = Vm { home: &home, name: "web" };
    let (spawning, _keys) = home.nido(["spawn", "web", "--net", "none", "--cold"]).start();
    let qemu = eventually("QEMU", || home.qemu());
    vm.kill_supervisor();
    let done = spawning.wait();
    // Either another supervisor carried the start on, or it failed and nothing is left of it.
    match done.code {
        0 => assert_eq!(vm.qemu().pid, qemu.pid),
        1 => {
            assert!(done.stderr.contains("error: ") && done.stderr.contains("hint: "), "{}", done.stderr);
            home.assert_empty();
            home.spawn("web", &["--net", "none"]);
        }
        other => panic!("spawn ended with {other}: {}", done.stderr),
    }
    vm.exec(["true"]).ok();
}

#[test]
fn killed_with_the_command_that_spawns() {
    let home = TestHome::new();
    let vm = Vm { home: &home, name: "web" };
    // At each of these moments both are killed; whatever is found afterwards can be started or deleted.
    let moments: [(&str, Moment); 3] = [
        ("its directory is there", |home| !home.vm_dirs().is_empty()),
        ("its supervisor is there", |home| home.processes().iter().any(|p| p.arguments.contains(&"supervise".into()))),
        ("QEMU is there", |home| home.qemu().is_some()),
    ];
    for (moment, is_now) in moments {
        let (spawning, _keys) = home.nido(["spawn", "web", "--net", "none"]).start();
        eventually(moment, || is_now(&home).then_some(()));
        spawning.signal(Signal::KILL);
        home.processes()
            .iter()
            .filter(|p| p.arguments.contains(&"supervise".into()))
            .for_each(crate::rig::Process::kill);
        spawning.wait().expect(137);
        if home.names().is_empty() {
            // Its row was not there yet: the next one is made as if nothing had been.
            home.spawn("web", &["--net", "none"]);
        }
        vm.nido("start", &[]).ok();
        vm.exec(["true"]).ok();
        vm.delete();
        home.assert_empty();
    }
}

#[test]
fn a_supervisor_killed_while_a_saved_guest_resumes_keeps_its_guarantees() {
    let home = TestHome::new();
    let vm = Vm { home: &home, name: "web" };
    // Milliseconds after QEMU came: before, while and after the guest is loaded, gets its disk and its identity reset.
    for after in [0, 20, 40, 60, 80, 100, 150] {
        let (spawning, _keys) = home.nido(["spawn", "web", "--net", "none", "--disk", "4G", "--fork"]).start();
        eventually("QEMU", || home.qemu());
        std::thread::sleep(std::time::Duration::from_millis(after));
        vm.kill_supervisor();
        let done = spawning.wait();
        if done.code == 0 {
            assert_eq!(vm.exec(["cat", "/sys/block/vda/size"]).text(), ((4_u64 << 30) / 512).to_string(), "{after} ms");
            assert_eq!(vm.exec(["hostname"]).text(), "web");
            vm.delete();
        }
        home.assert_empty();
    }
}
