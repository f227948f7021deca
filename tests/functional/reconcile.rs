//! What killed processes left is found by one reconciliation: by every command, by a server, by `doctor`.

use std::fs;

use serde_json::Value;

use crate::support::Home;

fn orphans<const N: usize>(home: &Home, doctor: [&str; N]) -> Value {
    let report = home.nido(doctor).run().json();
    report["checks"].as_array().unwrap().iter().find(|check| check["name"] == "orphans").unwrap().clone()
}

// The liveness file of a killed server stayed until another server was started.
#[test]
fn any_command_removes_orphans_of_ended_processes() {
    let home = Home::new();
    home.nido(["create", "v"]).run().ok();
    let dead = home.path().join("present/0123456789abcdef");
    fs::create_dir_all(dead.parent().unwrap()).unwrap();
    fs::write(&dead, "").unwrap();
    home.nido(["info", "v"]).run().ok();
    assert!(!dead.exists());
}

// Gigabytes of a killed build stayed until the next build, and doctor did not report them.
#[test]
fn doctor_reports_and_removes_orphans_of_builds_and_snapshots() {
    let home = Home::new();
    home.nido(["create", "v"]).run().ok();
    let id = home.info("v")["id"].as_str().unwrap().to_owned();
    let build = home.path().join("build/killed/rootfs");
    let snapshot = home.path().join("vms").join(id).join("snapshots/.new-one");
    for dir in [&build, &snapshot] {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("half"), "made").unwrap();
    }
    let found = orphans(&home, ["doctor", "--json"]);
    assert!(
        found["detail"]
            .as_str()
            .unwrap()
            .contains("1 directories of no VM, interrupted snapshots or restores of 1 VMs"),
        "{found}"
    );
    assert!(build.exists() && snapshot.exists());
    assert_eq!(orphans(&home, ["doctor", "--gc", "--json"])["status"], "ok");
    assert!(!build.exists() && !snapshot.exists());
    assert_eq!(orphans(&home, ["doctor", "--json"])["detail"], "none");
    home.nido(["start", "v"]).run().ok();
}
