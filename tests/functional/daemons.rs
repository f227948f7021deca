//! Background processes of nido: what they inherit from the process that started them, what ends them, and what ends when they are killed.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{Home, processes, until};

const MARK: &str = "RUNNER_TRACKING_ID";

fn process_with(home: &Home, word: &str) -> Pid {
    until(word, || processes::of(&home.path()).into_iter().find(|(_, line)| line.contains(word)).map(|(pid, _)| pid))
}

fn supervisor(home: &Home) -> Pid {
    process_with(home, " supervise ")
}

fn qemu(home: &Home) -> Pid {
    process_with(home, "path=qemu/qmp.sock")
}

/// What `/proc` has about a process, as text.
fn about(pid: Pid, what: &str) -> String {
    String::from_utf8_lossy(&fs::read(format!("/proc/{}/{what}", pid.as_raw_nonzero())).unwrap()).into_owned()
}

/// A lock of the caller's, a pipe, a mark in its environment or its directory stayed in use by supervisors, delivery workers and pool fillers.
#[test]
fn processes_that_stay_keep_nothing_of_their_caller() {
    let home = Home::new();
    let lock = home.scratch("lock");
    let here = home.scratch("here");
    fs::create_dir(&here).unwrap();
    let locked = |arguments: &[&str]| {
        // flock(1) leaves the locked descriptor to the program that it runs.
        let mut command = Command::new("flock");
        command.arg("--nonblock").arg(&lock);
        // Besides, the caller ignores a signal, keeps nothing private and has another file open.
        let caller = "trap '' HUP; umask 0; exec 7</dev/zero; exec \"$0\" \"$@\"";
        command.args(["sh", "-c", caller, env!("CARGO_BIN_EXE_nido")]).args(arguments);
        command.env("NIDO_HOME", home.path()).env("NIDO_QEMU", home.qemu_path()).env(MARK, "q").current_dir(&here);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    };
    locked(&["spawn", "web", "--accel", "tcg", "--ttl", "1h"]);
    for pid in [supervisor(&home), process_with(&home, " watch")] {
        assert!(!about(pid, "environ").contains(MARK), "{}", about(pid, "environ"));
        let directory = fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero())).unwrap();
        assert!(directory.starts_with(home.path()), "{}", directory.display());
        // The rest a process does itself at its very beginning, which nothing waits for.
        let own =
            |what: &str, is_own: &dyn Fn() -> bool| until(&format!("{what} of {pid:?}"), || is_own().then_some(()));
        let status = |key: &str| {
            let status = about(pid, "status");
            status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim().to_owned()
        };
        own("only descriptors", &|| {
            let open = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).unwrap().flatten();
            !open.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|file| file.ends_with("zero"))
        });
        own("SIGHUP with its default action", &|| u64::from_str_radix(&status("SigIgn:"), 16).unwrap() & 1 == 0);
        own("a session", &|| rustix::process::getsid(Some(pid)) == Ok(pid));
        own("a umask", &|| status("Umask:") == "0077");
    }
    // Something to deliver starts a process that stays for a while.
    locked(&["webhook", "add", "--url", "http://127.0.0.1:9/", "--allow-private"]);
    locked(&["create", "later"]);
    locked(&["ls"]);
    let webhook = home.nido(["webhook", "list", "-q"]).run().ok().text().trim().to_owned();
    home.nido(["webhook", "remove", &webhook]).run().ok();
}

/// A VM whose supervisor was killed exceeded its time to live as long as no command ran.
#[test]
fn a_time_to_live_ends_without_a_supervisor_and_without_a_command() {
    let home = Home::new();
    for more in ["--label=a=b", "--ephemeral"] {
        home.nido(["spawn", "web", "--accel", "tcg", "--ttl", "8s", more]).run().ok();
        processes::kill(supervisor(&home));
        processes::expect_none(&home.path());
        match more {
            "--ephemeral" => home.expect_empty(),
            _ => {
                assert_eq!(home.info("web")["status"], "stopped");
                home.nido(["delete", "web"]).run().ok();
            }
        }
    }
}

/// Shutting a host down sends SIGTERM to every process: QEMU ended of it at once, and the VM had failed.
#[test]
fn sigterm_stops_a_vm_in_order() {
    let home = Home::new();
    home.spawn("web");
    for signal in [Signal::TERM, Signal::HUP] {
        kill_process(supervisor(&home), signal).unwrap();
        let info = home.await_info("web", |info| info["status"] == "stopped");
        assert!(info["failure"].is_null(), "{info}");
        processes::expect_none(&home.path());
        home.nido(["start", "web"]).run().ok();
    }
}

/// A VM belonged to the service or session that it was started in, and went down with it.
#[test]
fn with_systemd_a_vm_gets_its_own_scope() {
    let home = Home::new();
    let programs = home.scratch("bin");
    fs::create_dir(&programs).unwrap();
    let said = home.scratch("busctl-said");
    let busctl = programs.join("busctl");
    fs::write(&busctl, format!("#!/bin/sh\necho \"$@\" >> '{}'\n", said.display())).unwrap();
    fs::set_permissions(&busctl, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", programs.display());
    let address = "unix:path=/nonexistent";
    let spawn = home.nido(["spawn", "web", "--accel", "tcg"]).env("PATH", path);
    spawn.env("DBUS_SYSTEM_BUS_ADDRESS", address).env("DBUS_SESSION_BUS_ADDRESS", address).run().ok();
    let id = home.info("web")["id"].as_str().unwrap().to_owned();
    let has_scope = |text: &String| text.ends_with('\n') && text.contains(&format!("nido-{id}.scope"));
    let line = until("busctl", || fs::read_to_string(&said).ok().filter(has_scope));
    // The guardian has one, too: it must not keep a VM's from ending.
    until("the guardian's scope", || fs::read_to_string(&said).ok().filter(|text| text.contains("nido-guardian-")));
    let pids = [supervisor(&home), qemu(&home)].map(|pid| pid.as_raw_nonzero().to_string()).join(" ");
    for part in ["StartTransientUnit", &format!("nido-{id}.scope"), &format!("PIDs au 2 {pids} 0")] {
        assert!(line.contains(part), "{part}: {line}");
    }
}

/// With a group that was named and cannot be used, VMs would not have the limits that the user expects.
#[test]
fn a_named_control_group_that_cannot_be_used_is_an_error() {
    let home = Home::new();
    let directory = home.scratch("group");
    fs::create_dir(&directory).unwrap();
    for group in [directory.to_str().unwrap(), "ci"] {
        let why = format!("NIDO_CGROUP cannot be used: {group} is not the absolute path of a control group");
        let refused = home.nido(["spawn", "web", "--accel", "tcg", "--json"]).env("NIDO_CGROUP", group).run();
        let problem = refused.fails(2, "spec_invalid");
        assert!(problem["detail"].as_str().unwrap().contains(&why), "{problem}");
        assert!(problem["hint"].as_str().unwrap().contains("unset NIDO_CGROUP"), "{problem}");
        processes::expect_none(&home.path());
        let report = home.nido(["doctor", "--json"]).env("NIDO_CGROUP", group).run().json();
        let is_named = |check: &&serde_json::Value| check["name"] == "host limits";
        let limits = report["checks"].as_array().unwrap().iter().find(is_named).unwrap();
        assert_eq!((&limits["status"], &limits["detail"]), (&"failed".into(), &why.into()));
        home.nido(["delete", "web", "--yes"]).run();
    }
}

/// A VM whose template holds another nido's agent booted that agent, which this nido may not understand.
#[test]
fn a_vm_boots_with_the_agent_of_this_nido() {
    let home = Home::new();
    let store = nido_images::Store::new(&home.path());
    let mut manifest = store.open("sandbox").unwrap();
    manifest.agent.sha256 = "f".repeat(64);
    store.publish(&manifest, &store.lock().unwrap()).unwrap();
    home.spawn("web");
    let blobs = home.path().join("blobs/sha256");
    let made = |blob: &fs::DirEntry| {
        let bytes = fs::read(blob.path()).unwrap();
        bytes.starts_with(b"initramfs base") && bytes.len() > nido_images::AGENT.len()
    };
    let count = || fs::read_dir(&blobs).unwrap().flatten().filter(|blob| made(blob)).count();
    assert_eq!(count(), 1);
    home.nido(["restart", "web"]).run().ok();
    home.nido(["doctor", "--gc"]).run();
    assert_eq!(count(), 1, "it is made once, and stays while a VM uses it");
}
