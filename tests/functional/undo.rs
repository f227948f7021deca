//! What is undone is what was begun: never another VM of the same name, and nothing half-made stays.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use nido_api::name::VmName;
use nido_api::state::VmState;
use nido_api::{AccelChoice, Caller, Grant, LeaseId, StartRequest, VmSpec};
use nido_core::{Nido, OpenOptions, VmInProgress};
use nido_store::{Store, Transition, TransitionOutcome, VmRow};
use serde_json::json;

use super::leases::await_gone;
use crate::support::{Home, processes, until};

fn with_nido<T>(home: &Home, work: impl AsyncFnOnce(&Nido) -> T) -> T {
    let supervisor = Some(env!("CARGO_BIN_EXE_nido").into());
    let options =
        OpenOptions { home: Some(home.path()), qemu: Some(home.qemu_path()), supervisor, ..OpenOptions::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { work(&Nido::open(options).await.unwrap()).await })
}

fn id(home: &Home, name: &str) -> String {
    home.info(name)["id"].as_str().unwrap().to_owned()
}

fn store(home: &Home) -> Store {
    Store::open(&home.path().join("nido.db")).unwrap()
}

fn checks(home: &Home, name: &str) -> serde_json::Value {
    let report = home.nido(["doctor", "--json"]).run().json();
    report["checks"].as_array().unwrap().iter().find(|check| check["name"] == name).unwrap().clone()
}

// Undoing a spawn deleted whatever VM had the name by then, another command's running one included.
#[test]
fn undoing_a_spawn_leaves_another_vm_of_that_name_alone() {
    let home = Home::new();
    with_nido(&home, async |nido| {
        let name: VmName = "ci".parse().unwrap();
        let spec = VmSpec { accel: AccelChoice::Tcg, ephemeral: true, ..VmSpec::named(name.clone()) };
        let (begun, grant) = (VmInProgress::default(), Grant::unlimited(&Caller::command_line()));
        nido.spawn_tracked(spec, StartRequest::default(), &grant, &begun, &mut |_| ()).await.unwrap();
        let first = begun.id().unwrap();
        nido.delete(&name, true).await.unwrap();
        home.spawn("ci");
        nido.undo(&begun).await.unwrap();
        assert_eq!(home.info("ci")["status"], "running");
        assert_ne!(id(&home, "ci"), first);
    });
    home.nido(["delete", "ci", "--force", "--yes"]).run().ok();
    home.expect_empty();
}

/// A VM as an operation has it that makes several.
fn being_made(home: &Home, name: &str, operation: &LeaseId) -> String {
    home.nido(["create", name, "--accel", "tcg"]).run().ok();
    let (id, store) = (id(home, name), store(home));
    let row = store.vm_by_id(&id).unwrap().unwrap();
    store.remove_vm(&id, Vec::new()).unwrap();
    store.insert_vm(&VmRow { made_by: Some(operation.clone()), ..row }).unwrap();
    id
}

// Copies that were ready when `fork` was interrupted stayed.
#[test]
fn vms_of_interrupted_operations_are_deleted_and_those_of_completed_ones_stay() {
    let home = Home::new();
    with_nido(&home, async |nido| {
        let (operation, other) = (nido.lease_open().unwrap(), nido.lease_open().unwrap());
        let lost = being_made(&home, "lost", operation.id());
        being_made(&home, "kept", other.id());
        let is_inactive = being_made(&home, "at-rest", operation.id());
        for name in ["lost", "kept"] {
            home.nido(["start", name]).run().ok();
        }
        assert_eq!(home.names(), ["lost", "kept", "at-rest"], "the operation goes on");
        store(&home).keep_vms_made_by(other.id(), 1).unwrap();
        drop((operation, other));
        await_gone(&home, &lost);
        assert_eq!(home.names(), ["kept"]);
        assert_eq!(home.info("kept")["status"], "running");
        assert!(!home.path().join("vms").join(&is_inactive).exists());
    });
}

// A damaged snapshot failed the list of all, and could not be deleted.
#[test]
fn one_damaged_snapshot_fails_neither_the_list_nor_its_deletion() {
    let home = Home::new();
    home.spawn("v");
    home.nido(["stop", "v"]).run().ok();
    for name in ["a", "b", "c"] {
        home.nido(["snapshot", "create", "v", name]).run().ok();
    }
    let snapshots = home.path().join("vms").join(id(&home, "v")).join("snapshots");
    fs::write(snapshots.join("a/snapshot.json"), "").unwrap();
    fs::remove_file(snapshots.join("c/snapshot.json")).unwrap();
    let listed = home.nido(["snapshot", "ls", "v", "--json"]).run().ok().json();
    let of = |name: &str| {
        listed["snapshots"].as_array().unwrap().iter().find(|snapshot| snapshot["name"] == name).unwrap().clone()
    };
    assert!(of("a")["damaged"].is_string() && of("c")["damaged"].is_string() && of("b")["damaged"].is_null());
    assert!(home.nido(["snapshot", "ls", "v"]).run().ok().text().contains("damaged"));
    let refused = home.nido(["snapshot", "restore", "v", "a", "--json"]).run().fails(1, "snapshot_damaged");
    assert!(refused["detail"].as_str().unwrap().contains("'a'"), "{refused}");
    for name in ["a", "c"] {
        home.nido(["snapshot", "delete", "v", name]).run().ok();
        home.nido(["snapshot", "create", "v", name]).run().ok();
    }
    home.nido(["snapshot", "restore", "v", "a"]).run().ok();
}

#[test]
fn one_damaged_template_fails_neither_the_list_nor_the_deletion_of_others() {
    let home = Home::new();
    crate::support::publish(&home.path(), "other");
    fs::write(home.path().join("templates/sandbox.json"), "{").unwrap();
    let listed = home.nido(["template", "ls", "--json"]).run().ok().json();
    assert_eq!(listed["templates"].as_array().unwrap().len(), 1);
    assert!(listed["damaged"][0].as_str().unwrap().contains("sandbox.json"), "{listed}");
    assert_eq!(checks(&home, "templates")["status"], "warning");
    home.nido(["doctor", "--gc"]).run();
    home.nido(["template", "delete", "other"]).run().ok();
    home.nido(["template", "delete", "sandbox"]).run().ok();
    assert!(home.nido(["template", "ls", "--json"]).run().ok().json()["damaged"].is_null());
}

// A restore ended the running VM before it knew whether it could restore.
#[test]
fn a_restore_that_cannot_copy_the_disk_leaves_the_vm_running() {
    let home = Home::new();
    home.spawn("v");
    home.nido(["stop", "v"]).run().ok();
    home.nido(["snapshot", "create", "v", "s"]).run().ok();
    home.nido(["start", "v"]).run().ok();
    let directory = home.path().join("vms").join(id(&home, "v"));
    // Its layer is there, and cannot be read: a directory.
    let layer = directory.join("snapshots/s/disk.qcow2");
    fs::remove_file(&layer).unwrap();
    fs::create_dir(&layer).unwrap();
    fs::write(layer.join("x"), "").unwrap();
    assert_ne!(home.nido(["snapshot", "restore", "v", "s"]).run().code(), 0);
    assert_eq!(home.info("v")["status"], "running");
    let left = |directory: &PathBuf| {
        let names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("disk.qcow2.")).count()
    };
    assert_eq!(left(&directory), 0);
}

// The orphan of a killed `snapshot create` of a stopped VM was never removed, and resumed a paused VM.
#[test]
fn orphans_of_a_killed_snapshot_are_removed_by_the_next_start_and_by_gc() {
    let home = Home::new();
    home.spawn("v");
    home.nido(["stop", "v"]).run().ok();
    let directory = home.path().join("vms").join(id(&home, "v"));
    let left = directory.join("snapshots/.new-x");
    let restore = directory.join("disk.qcow2.restore-0");
    for verb in ["start", "doctor"] {
        fs::create_dir_all(&left).unwrap();
        fs::write(&restore, "x").unwrap();
        match verb {
            "start" => home.nido(["start", "v"]).run().ok(),
            _ => home.nido(["doctor", "--gc"]).run().ok(),
        };
        assert!(!left.exists() && !restore.exists(), "{verb}");
        if verb == "start" {
            home.nido(["stop", "v"]).run().ok();
        }
    }
    // One that its user paused stays so, whatever lies there.
    home.nido(["start", "v"]).run().ok();
    home.nido(["pause", "v"]).run().ok();
    fs::create_dir_all(&left).unwrap();
    for (pid, line) in processes::of(&home.path()) {
        if line.contains(" supervise ") {
            processes::kill(pid);
        }
    }
    until("another supervisor", || {
        home.nido(["ls"]).run().ok();
        (!left.exists()).then_some(())
    });
    assert_eq!(home.info("v")["status"], "paused");
}

// An empty file that a power cut had left was taken for a disk in use.
#[test]
fn an_empty_disk_is_recreated() {
    let home = Home::new();
    home.nido(["create", "v"]).run().ok();
    let disk = home.path().join("vms").join(id(&home, "v")).join("disk.qcow2");
    fs::write(&disk, "").unwrap();
    home.nido(["start", "v"]).run().ok();
    assert!(fs::metadata(&disk).unwrap().size() > 0);
}

// Parts that only a removed VM had used stayed until a template changed.
#[test]
fn parts_that_no_vm_uses_any_more_are_collected_by_the_next_command() {
    let home = Home::new();
    let blobs = home.path().join("blobs/sha256");
    let orphan = blobs.join("0".repeat(64));
    home.nido(["ls"]).run().ok();
    fs::write(&orphan, "memory").unwrap();
    home.nido(["ls"]).run().ok();
    assert!(orphan.exists(), "there was no reason to look");
    let found = checks(&home, "orphans");
    assert!(found["detail"].as_str().unwrap().contains("1 MiB of unused template parts"), "{found}");
    // A supervisor removes it, and with it the reason to keep its parts.
    home.nido(["spawn", "v", "--ephemeral", "--accel", "tcg"]).run().ok();
    home.nido(["stop", "v"]).run().ok();
    until("the end of the part", || {
        home.nido(["ls"]).run().ok();
        (!orphan.exists()).then_some(())
    });
    assert_eq!(checks(&home, "orphans")["detail"], json!("none"));
}

// The list never reported when an idle VM would end.
#[test]
fn a_list_has_the_time_of_the_idle_stop() {
    let home = Home::new();
    home.nido(["spawn", "v", "--idle", "1h", "--accel", "tcg"]).run().ok();
    home.spawn("w");
    let listed = home.nido(["ls", "--json"]).run().ok().json();
    assert!(listed["vms"][0]["idle_at"].is_string(), "{listed}");
    assert!(listed["vms"][1]["idle_at"].is_null(), "{listed}");
    // Nor does one that does not answer keep the list from coming.
    let running = Transition::Entered { state: VmState::Running, cause: None, timings: None };
    assert_eq!(store(&home).transition(&id(&home, "w"), &running).unwrap(), TransitionOutcome::Yes);
    assert!(home.nido(["ls"]).run().ok().text().contains("in "));
}
