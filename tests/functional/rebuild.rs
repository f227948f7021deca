//! `doctor --rebuild`: a store that is missing or damaged is rebuilt from what can be read and from the VMs' directories.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use crate::support::Home;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Damage {
    Missing,
    Emptied,
    NoDatabase,
    Malformed,
    Truncated,
}

/// What nido reports about a VM, without what only the old store knew.
fn facts(home: &Home, name: &str) -> Value {
    let mut info = home.info(name);
    for key in ["agent", "timings", "ip_address", "idle_at", "status_cause", "status_detail"] {
        info.as_object_mut().unwrap().remove(key);
    }
    info
}

fn snapshots(home: &Home, name: &str) -> Value {
    home.nido(["snapshot", "ls", name, "--json"]).run().ok().json()
}

/// The supervisors still have the old file open, as they have after a crash of the disk.
fn damage(home: &Home, damage: Damage) {
    let database = home.path().join("nido.db");
    let bytes = fs::read(&database).unwrap();
    assert!(bytes.len() > 64 << 10, "{} bytes", bytes.len());
    for ending in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(home.path().join(format!("nido.db{ending}")));
    }
    let bytes = match damage {
        Damage::Missing => return,
        Damage::Emptied => Vec::new(),
        Damage::NoDatabase => vec![7; 8192],
        Damage::Truncated => bytes[..bytes.len() / 3].to_vec(),
        Damage::Malformed => {
            let mut bytes = bytes;
            // All but the first page, which has the list of tables' names at its end.
            for page in bytes.chunks_mut(4096).skip(2).step_by(2) {
                page.fill(0xff);
            }
            bytes
        }
    };
    fs::write(database, bytes).unwrap();
}

fn kept(home: &Home) -> Vec<PathBuf> {
    let entries = fs::read_dir(home.path()).unwrap().map(|entry| entry.unwrap().path());
    entries
        .filter(|path| path.to_string_lossy().contains("nido.db.damaged-") && path.to_string_lossy().ends_with('Z'))
        .collect()
}

fn rebuilt(kind: Damage) {
    let home = Home::new();
    home.nido(["token", "create", "--name", "ci", "--scope", "run"]).run().ok();
    home.nido(["create", "fresh", "--label", "role=new"]).run().ok();
    home.nido(["ls"]).run().ok();
    home.spawn("halted");
    home.nido(["spawn", "runs", "--accel", "tcg", "--ttl", "1h", "--label", "role=demo"]).run().ok();
    for (name, snapshot) in [("halted", "s"), ("runs", "t")] {
        home.nido(["stop", name]).run().ok();
        home.nido(["snapshot", "create", name, snapshot]).run().ok();
    }
    home.nido(["start", "runs"]).run().ok();
    let names = ["fresh", "halted", "runs"];
    let before = names.map(|name| facts(&home, name));
    let saved = ["halted", "runs"].map(|name| snapshots(&home, name));
    damage(&home, kind);
    if matches!(kind, Damage::NoDatabase | Damage::Truncated) {
        let refused = home.nido(["ls", "--json"]).run().fails(1, "store_damaged");
        assert!(refused["hint"].as_str().unwrap().contains("nido doctor --rebuild"), "{refused}");
    }

    let report = home.nido(["doctor", "--rebuild", "--json"]).run().ok().json();
    assert!(report["reason"].is_string(), "{report}");
    let all: Vec<_> = report["vms"].as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap()).collect();
    assert_eq!(all, names, "{report}");
    assert_eq!(report["skipped"], serde_json::json!([]));
    assert_eq!(kept(&home).len(), usize::from(kind != Damage::Missing), "{report}");
    let mut listed = home.names();
    listed.sort();
    assert_eq!(listed, names);
    assert_eq!(names.map(|name| facts(&home, name)), before, "{report}");
    assert_eq!(["halted", "runs"].map(|name| snapshots(&home, name)), saved);
    assert_eq!(home.nido(["exec", "runs", "--", "echo", "there"]).run().ok().text(), "there\n");
    let tokens = home.nido(["token", "list", "--json"]).run().ok().json();
    assert_eq!(tokens["tokens"][0]["name"], "ci", "{report}");
    home.nido(["audit", "verify"]).run().ok();

    // A second run changes nothing.
    let again = home.nido(["doctor", "--rebuild", "--json"]).run().ok().json();
    assert!(again["reason"].is_null() && again["vms"] == serde_json::json!([]), "{again}");
    assert_eq!(kept(&home).len(), usize::from(kind != Damage::Missing));
    assert_eq!(names.map(|name| facts(&home, name)), before);
    // What happens to the VM from now on is in the new store.
    home.nido(["stop", "runs"]).run().ok();
    assert_eq!(home.info("runs")["status"], "stopped");
    home.nido(["start", "halted"]).run().ok();
}

#[test]
fn a_missing_store_is_rebuilt() {
    rebuilt(Damage::Missing);
}

#[test]
fn an_emptied_store_is_rebuilt() {
    rebuilt(Damage::Emptied);
}

#[test]
fn a_store_that_is_no_database_is_rebuilt() {
    rebuilt(Damage::NoDatabase);
}

#[test]
fn a_store_with_malformed_pages_is_rebuilt() {
    rebuilt(Damage::Malformed);
}

#[test]
fn a_truncated_store_is_rebuilt() {
    rebuilt(Damage::Truncated);
}

/// What a command or a server writes into a file that is replaced is lost.
#[test]
fn a_rebuild_is_refused_while_a_command_uses_the_home() {
    let home = Home::new();
    home.nido(["create", "web", "--accel", "tcg"]).run().ok();
    home.nido(["start", "web"]).run().ok();
    let exec = home.nido(["exec", "web", "--", "sh", "-c", "echo begun; exec sleep 98791"]).start();
    assert_eq!(exec.line(), "begun");
    damage(&home, Damage::NoDatabase);
    let refused = home.nido(["doctor", "--rebuild", "--json"]).run().fails(1, "vm_busy");
    assert!(refused["detail"].as_str().unwrap().contains(" exec web"), "{refused}");
    assert!(kept(&home).is_empty());
    exec.kill();
    assert!(exec.end());
    home.nido(["doctor", "--rebuild"]).run().ok();
    assert_eq!(home.info("web")["status"], "running");
}
