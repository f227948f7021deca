//! Rows of the store that cannot be read: written by another version of nido, or damaged.

use std::process::Command;

use serde_json::json;

use crate::support::{Home, processes, until};

/// Changes the store behind nido's back.
fn damage(home: &Home, sql: &str) {
    let script =
        "import sqlite3, sys; store = sqlite3.connect(sys.argv[1]); store.execute(sys.argv[2]); store.commit()";
    let done = Command::new("python3").args(["-c", script]).arg(home.path().join("nido.db")).arg(sql).status().unwrap();
    assert!(done.success());
}

// One row that could not be decoded made `ls`, and every command that lists VMs, fail for all VMs.
#[test]
fn a_vm_whose_row_cannot_be_read_is_listed_and_deleted_and_harms_no_other() {
    let home = Home::new();
    for name in ["bad", "good"] {
        home.spawn(name);
    }
    let id = home.info("bad")["id"].as_str().unwrap().to_owned();
    let dir = home.path().join("vms").join(&id);
    damage(&home, "UPDATE vms SET machine = '7' WHERE name = 'bad'");

    let vms = home.nido(["ls", "--json"]).run().ok().json();
    let status = |name: &str| vms["vms"].as_array().unwrap().iter().find(|vm| vm["name"] == name).unwrap().clone();
    assert_eq!((&status("bad")["status"], &status("good")["status"]), (&json!("unknown"), &json!("running")));
    let detail = home.info("bad")["status_detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("column machine"), "{detail}");
    assert!(home.nido(["ls"]).run().ok().text().contains("unknown"));
    for verb in ["start", "pause", "stop"] {
        home.nido([verb, "bad", "--json"]).run().fails(1, "store_damaged");
    }
    home.nido(["exec", "bad", "--json", "--", "true"]).run().fails(125, "store_damaged");
    home.nido(["exec", "good", "--", "true"]).run().ok();

    home.nido(["delete", "bad", "--json"]).run().fails(1, "vm_busy");
    assert!(dir.exists() && !processes::of(&dir).is_empty());
    home.nido(["delete", "bad", "--force", "--yes"]).run().ok();
    assert!(!dir.exists());
    until("the end of its processes", || processes::of(&dir).is_empty().then_some(()));
    assert_eq!(home.names(), ["good"]);
    home.nido(["exec", "good", "--", "true"]).run().ok();
}

// A webhook of a newer version kept every VM from changing its state.
#[test]
fn a_webhook_that_cannot_be_read_stops_no_vm() {
    let home = Home::new();
    home.nido(["webhook", "add", "--allow-private", "--url", "http://127.0.0.1:9/"]).run().ok();
    damage(&home, "UPDATE webhooks SET events = '{', format = 'pigeon'");
    home.spawn("web");
    home.nido(["stop", "web"]).run().ok();
    home.nido(["webhook", "list"]).run().ok();
    assert_eq!(home.info("web")["status"], "stopped");
}
