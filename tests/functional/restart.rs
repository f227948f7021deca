//! Restart policies, and what happens to VMs with one when the host reboots.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::{Home, processes, until};

fn with(home: &Home, word: &str) -> Vec<Pid> {
    processes::of(&home.path()).into_iter().filter(|(_, line)| line.contains(word)).map(|(pid, _)| pid).collect()
}

fn kill_all(home: &Home, word: &str) {
    with(home, word).into_iter().for_each(|pid| {
        processes::kill_if_alive(pid);
    });
}

fn restarts(info: &Value) -> u64 {
    info["restarts"].as_u64().unwrap_or(0)
}

fn runs_again(home: &Home, name: &str, count: u64) -> Value {
    home.await_info(name, |info| {
        info["status"] == "running" && info["agent"]["ready"] == true && restarts(info) >= count
    })
}

#[test]
fn a_vm_that_failed_is_restarted_until_a_user_stops_it() {
    let home = Home::new();
    home.nido(["spawn", "web", "--accel", "tcg", "--restart", "on-failure"]).run().ok();
    kill_all(&home, "path=qemu/qmp.sock");
    runs_again(&home, "web", 1);
    // Both at once: nothing is there that saw it end.
    let guardian = until("the guardian", || with(&home, " watch").pop());
    kill_process(guardian, Signal::STOP).unwrap();
    kill_all(&home, " supervise ");
    kill_all(&home, "path=qemu/qmp.sock");
    kill_process(guardian, Signal::CONT).unwrap();
    let info = runs_again(&home, "web", 2);
    assert_eq!((info["restart"].as_str(), restarts(&info)), (Some("on-failure"), 2), "{info}");
    let shown = home.nido(["info", "web"]).run().ok();
    assert!(shown.text().contains("on-failure (2 so far)"), "{}", shown.text());
    assert_eq!(home.nido(["exec", "web", "--", "echo", "there"]).run().ok().text(), "there\n");
    let events = home.nido(["events", "--json"]).run().ok();
    assert!(events.text().matches("vm.started").count() >= 3, "{}", events.text());
    home.nido(["stop", "web"]).run().ok();
    // The guardian ends, because nothing waits for a restart.
    processes::expect_none(&home.path());
    assert_eq!(home.info("web")["status"], "stopped");
    home.nido(["start", "web"]).run().ok();
    assert_eq!(restarts(&home.info("web")), 0, "a user started it");
}

#[test]
fn a_guest_that_powers_off_is_restarted_by_always_only() {
    let home = Home::new();
    home.qemu("shutdown-after-ms:700");
    for policy in ["on-failure", "always"] {
        home.nido(["create", policy, "--accel", "tcg", "--restart", policy]).run().ok();
        home.nido(["start", policy, "--no-wait"]).run().ok();
    }
    home.await_info("always", |info| restarts(info) >= 1);
    home.await_info("on-failure", |info| info["status"] == "stopped");
    home.nido(["delete", "always", "--force", "--yes"]).run().ok();
    processes::expect_none(&home.path());
    assert_eq!(restarts(&home.info("on-failure")), 0);
}

#[test]
fn a_vm_that_waits_for_its_restart_can_be_stopped_and_deleted() {
    let home = Home::new();
    home.qemu("die-after-ms:50");
    home.nido(["create", "web", "--accel", "tcg", "--restart", "always"]).run().ok();
    home.nido(["start", "web", "--no-wait"]).run();
    home.await_info("web", |info| restarts(info) >= 2 && info["status"] == "failed");
    home.nido(["stop", "web"]).run().ok();
    processes::expect_none(&home.path());
    let stopped = restarts(&home.info("web"));
    assert!(stopped <= 3, "{stopped}");
    assert_eq!(home.nido(["start", "--all", "--wanted", "--json"]).run().ok().json()["vms"], serde_json::json!([]));
    home.nido(["start", "web", "--no-wait"]).run();
    home.await_info("web", |info| restarts(info) >= 1);
    home.nido(["delete", "web", "--force", "--yes"]).run().ok();
    home.expect_empty();
}

#[test]
fn a_vm_ended_by_a_limit_is_not_restarted() {
    let home = Home::new();
    home.nido(["spawn", "web", "--accel", "tcg", "--ttl", "2s", "--restart", "always"]).run().ok();
    processes::expect_none(&home.path());
    let info = home.info("web");
    assert_eq!((info["status"].as_str(), restarts(&info)), (Some("stopped"), 0), "{info}");
}

#[test]
fn an_ephemeral_vm_has_no_restart_policy() {
    let home = Home::new();
    let create = home.nido(["create", "web", "--ephemeral", "--restart", "always", "--json"]);
    let refused = create.run().fails(2, "spec_invalid");
    assert!(refused["detail"].as_str().unwrap().contains("ephemeral"), "{refused}");
    assert!(home.names().is_empty());
}

#[test]
fn after_a_reboot_one_command_starts_the_vms_that_should_run() {
    let home = Home::new();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let publish = format!("--publish={port}:80");
    for (name, policy) in [("always", "always"), ("failure", "on-failure"), ("plain", "no"), ("halted", "always")] {
        let spawn = home.nido(["spawn", name, "--accel", "tcg", "--restart", policy]);
        if name == "failure" { spawn.arg(&publish) } else { spawn }.run().ok();
    }
    home.nido(["stop", "halted"]).run().ok();
    // Nothing asks which boot it is: after one, no process is left.
    until("the guardian", || with(&home, " watch").pop().map(|pid| kill_process(pid, Signal::STOP).unwrap()));
    for word in [" supervise ", "path=qemu/qmp.sock", " watch"] {
        kill_all(&home, word);
    }
    processes::expect_none(&home.path());
    // One that cannot be started does not keep the others from it.
    let in_use = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let first = home.nido(["start", "--all", "--wanted", "--json"]).run().exits(1);
    assert_eq!(first.json()["vms"][0]["name"], "always", "{}", first.text());
    assert!(first.stderr.contains(&port.to_string()), "{}", first.stderr);
    drop(in_use);
    until("both VMs", || home.nido(["start", "--all", "--wanted", "--quiet"]).run().code().eq(&0).then_some(()));
    for (name, status) in [("always", "running"), ("failure", "running"), ("plain", "failed"), ("halted", "stopped")] {
        home.await_info(name, |info| info["status"] == status);
    }
    let again = home.nido(["start", "--all", "--wanted", "--json"]).run().ok();
    assert_eq!(again.json()["vms"], serde_json::json!([]));
}

#[test]
fn a_vm_that_is_shut_down_with_the_host_starts_at_boot_only() {
    let home = Home::new();
    home.nido(["spawn", "web", "--accel", "tcg", "--restart", "on-failure"]).run().ok();
    for pid in with(&home, " supervise ") {
        kill_process(pid, Signal::TERM).unwrap();
    }
    processes::expect_none(&home.path());
    assert_eq!(home.info("web")["status_cause"], "host");
    home.nido(["start", "--all", "--wanted"]).run().ok();
    assert_eq!(home.info("web")["status"], "running");
}

#[test]
fn the_systemd_units_start_vms_and_keep_the_guardian() {
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("packaging");
    let home = Home::bare();
    for (instance, target) in [("system", "multi-user.target"), ("user", "default.target")] {
        let unit = fs::read_to_string(packaging.join(instance).join("nido-vms.service")).unwrap();
        let mut section = "";
        for line in unit.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            match line.strip_prefix('[') {
                Some(name) => section = name.trim_end_matches(']'),
                None => assert!(!section.is_empty() && line.contains('='), "{line}"),
            }
        }
        for line in [
            "ExecStartPre=-/usr/local/bin/nido start --all --wanted --no-wait",
            "ExecStart=/usr/local/bin/nido watch --stay",
            &format!("WantedBy={target}"),
        ] {
            assert!(unit.lines().any(|found| found == line), "{instance}: {line}");
        }
        let copy = home.scratch("nido-vms.service");
        fs::write(&copy, unit.replace("/usr/local/bin/nido", env!("CARGO_BIN_EXE_nido"))).unwrap();
        let verify = Command::new("systemd-analyze").arg("verify").arg(&copy).output();
        match verify {
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound),
            Ok(done) => assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr)),
        }
    }
}

/// The unit's guardian takes over from one that a supervisor has started, and stays when nothing runs.
#[test]
fn the_guardian_of_a_unit_stays() {
    let home = Home::new();
    home.spawn("web");
    let first = until("the guardian", || with(&home, " watch").pop());
    let stays = home.nido(["watch", "--stay"]).start();
    processes::kill(first);
    home.nido(["stop", "web"]).run().ok();
    // It was given its home by the environment, and is not found by its command line.
    let held = || nido_files::lock::is_held(&home.path().join("guardian.lock"));
    until("the unit's guardian", || (with(&home, " watch").is_empty() && held()).then_some(()));
    stays.kill();
    assert!(stays.end());
}
