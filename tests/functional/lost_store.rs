//! VMs whose row or whose directory is lost: no disk is removed as a side effect, and there is a way back.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::Pid;

use crate::support::{Home, processes, until};

fn directory(home: &Home, name: &str) -> PathBuf {
    home.path().join("vms").join(home.info(name)["id"].as_str().unwrap())
}

/// Moves the store away, as a user does when it is reported as damaged.
fn lose_store(home: &Home) {
    let aside = home.scratch("aside");
    fs::create_dir_all(&aside).unwrap();
    for file in ["nido.db", "nido.db-wal", "nido.db-shm"] {
        let _ = fs::rename(home.path().join(file), aside.join(file));
    }
}

fn bring_store_back(home: &Home) {
    for file in ["nido.db", "nido.db-wal", "nido.db-shm"] {
        let _ = fs::remove_file(home.path().join(file));
        let _ = fs::rename(home.scratch("aside").join(file), home.path().join(file));
    }
}

fn stopped(home: &Home, name: &str) -> PathBuf {
    home.spawn(name);
    home.nido(["stop", name]).run().ok();
    directory(home, name)
}

fn check(home: &Home, name: &str) -> serde_json::Value {
    let report = home.nido(["doctor", "--json"]).run().json();
    report["checks"].as_array().unwrap().iter().find(|check| check["name"] == name).unwrap().clone()
}

fn blobs(home: &Home) -> usize {
    fs::read_dir(home.path().join("blobs/sha256")).unwrap().count()
}

// The next command that made a VM removed the disks and snapshots of every VM that the store did not know.
#[test]
fn a_lost_store_costs_no_disk_and_vms_can_be_adopted() {
    let home = Home::new();
    let keep = stopped(&home, "keep");
    fs::write(keep.join("disk.qcow2"), "precious").unwrap();
    home.nido(["snapshot", "create", "keep", "s"]).run().ok();
    let parts = blobs(&home);
    lose_store(&home);

    let made = home.nido(["create", "keep"]).run().ok();
    assert!(made.stderr.contains("nido doctor --adopt"), "{}", made.stderr);
    assert!(home.nido(["ls"]).run().ok().stderr.contains("nido doctor --adopt"));
    home.nido(["create", "other"]).run().ok();
    home.nido(["delete", "other"]).run().ok();
    home.nido(["doctor", "--gc"]).run().ok();
    // Its template goes; the parts that it stands on do not.
    home.nido(["delete", "keep"]).run().ok();
    home.nido(["template", "delete", "sandbox"]).run().ok();
    home.nido(["doctor", "--gc"]).run().ok();
    assert_eq!(fs::read(keep.join("disk.qcow2")).unwrap(), b"precious");
    assert!(keep.join("snapshots/s/snapshot.json").exists());
    // Kernel, initramfs with and without an agent, disk and packages are all there.
    assert_eq!(blobs(&home), parts);
    crate::support::publish(&home.path(), "sandbox");

    home.nido(["create", "keep"]).run().ok();
    let unknown = check(&home, "VMs");
    assert_eq!(unknown["status"], "warning", "{unknown}");
    assert!(unknown["detail"].as_str().unwrap().contains(&*keep.to_string_lossy()), "{unknown}");
    let told = home.nido(["doctor", "--adopt"]).run().ok().stderr;
    assert!(told.contains("keep-2"), "{told}");
    assert_eq!(check(&home, "VMs")["status"], "ok");
    assert_eq!(home.names(), ["keep-2", "keep"], "in order of creation");
    assert_eq!(home.info("keep-2")["status"], "stopped");
    home.nido(["start", "keep-2"]).run().ok();
    let listed = home.nido(["snapshot", "ls", "keep-2", "--json"]).run().ok().json();
    assert_eq!(listed["snapshots"][0]["name"], "s");
    home.nido(["delete", "keep-2", "--force", "--yes"]).run().ok();
    assert!(!keep.exists());
}

#[test]
fn an_older_store_costs_no_disk() {
    let home = Home::new();
    home.nido(["create", "old"]).run().ok();
    // Of the last process that closed it everything is in the file itself.
    fs::copy(home.path().join("nido.db"), home.scratch("nido.db")).unwrap();
    assert!(!home.path().join("nido.db-wal").exists());
    let new = stopped(&home, "new");
    for file in ["nido.db-wal", "nido.db-shm"] {
        let _ = fs::remove_file(home.path().join(file));
    }
    fs::copy(home.scratch("nido.db"), home.path().join("nido.db")).unwrap();
    home.nido(["create", "y"]).run().ok();
    assert!(new.join("disk.qcow2").exists());
    home.nido(["doctor", "--adopt"]).run().ok();
    home.nido(["start", "new"]).run().ok();
}

#[test]
fn an_emptied_store_is_not_silently_taken_for_a_new_one() {
    let home = Home::new();
    let keep = stopped(&home, "keep");
    lose_store(&home);
    fs::write(home.path().join("nido.db"), "").unwrap();
    // Not only by the process that recreates the store, which may be one in the background.
    let calls = [home.nido(["pool", "ls"]), home.nido(["ls"]), home.nido(["template", "ls"])];
    for stderr in calls.map(|call| call.run().ok().stderr) {
        assert!(stderr.contains("1 VMs that the store"), "{stderr}");
    }
    assert!(keep.join("disk.qcow2").exists());
    bring_store_back(&home);
    assert_eq!(home.nido(["ls"]).run().ok().stderr, "");
    assert_eq!(home.names(), ["keep"]);
}

#[test]
fn a_vm_that_runs_without_its_row_is_adopted_running() {
    let home = Home::new();
    home.spawn("web");
    lose_store(&home);
    home.nido(["doctor", "--adopt"]).run().ok();
    assert_eq!(home.info("web")["status"], "running");
    assert_eq!(home.nido(["exec", "web", "--", "echo", "there"]).run().ok().text(), "there\n");
    home.nido(["delete", "web", "--force", "--yes"]).run().ok();
}

#[test]
fn a_directory_without_a_usable_record_is_kept_and_named() {
    let home = Home::new();
    let keep = stopped(&home, "keep");
    let parts = blobs(&home);
    lose_store(&home);
    fs::write(keep.join("vm.json"), "{").unwrap();
    home.nido(["create", "x"]).run().ok();
    home.nido(["delete", "x"]).run().ok();
    home.nido(["template", "delete", "sandbox"]).run().ok();
    home.nido(["doctor", "--gc"]).run().ok();
    assert!(keep.join("disk.qcow2").exists());
    assert_eq!(blobs(&home), parts, "nobody knows what it stands on");
    let told = home.nido(["doctor", "--adopt"]).run().ok().stderr;
    assert!(told.contains("cannot adopt directory") && told.contains("vm.json"), "{told}");
    bring_store_back(&home);
}

#[test]
fn only_a_directory_without_data_is_taken_for_a_left_one() {
    let home = Home::new();
    let vms = home.path().join("vms");
    fs::create_dir_all(vms.join("00000000000000aa")).unwrap();
    fs::write(vms.join("00000000000000aa/supervisor.lock"), "").unwrap();
    fs::create_dir_all(vms.join("00000000000000bb")).unwrap();
    fs::write(vms.join("00000000000000bb/notes"), "mine").unwrap();
    fs::create_dir_all(vms.join(".gone-00000000000000cc/snapshots")).unwrap();
    assert!(check(&home, "orphans")["detail"].as_str().unwrap().contains("2 directories"));
    home.nido(["create", "x"]).run().ok();
    assert!(!vms.join("00000000000000aa").exists() && !vms.join(".gone-00000000000000cc").exists());
    assert!(vms.join("00000000000000bb/notes").exists());
}

fn pids(home: &Home) -> Vec<Pid> {
    let mut all = processes::of(home.scratch("").as_path());
    // The guardian first: it would record and repair what the others leave.
    all.sort_by_key(|(_, line)| !line.contains(" watch"));
    all.into_iter().map(|(pid, _)| pid).collect()
}

fn remove(directory: &Path) {
    fs::remove_dir_all(directory).unwrap();
}

// A VM whose directory was removed could neither be deleted nor recreated: "it is not running".
#[test]
fn a_vm_without_its_directory_can_be_deleted_in_every_state() {
    let home = Home::new();
    for state in ["running", "paused", "stopped", "created", "ephemeral"] {
        match state {
            "created" => drop(home.nido(["create", "g"]).run().ok()),
            "ephemeral" => drop(home.nido(["spawn", "g", "--ephemeral", "--accel", "tcg"]).run().ok()),
            _ => drop(home.spawn("g")),
        }
        let directory = directory(&home, "g");
        match state {
            "paused" => drop(home.nido(["pause", "g"]).run().ok()),
            "stopped" => drop(home.nido(["stop", "g"]).run().ok()),
            _ => {}
        }
        for pid in pids(&home) {
            processes::kill_if_alive(pid);
        }
        until("the end of all processes", || pids(&home).is_empty().then_some(()));
        remove(&directory);
        if state == "ephemeral" {
            assert_eq!(home.names(), Vec::<String>::new());
            continue;
        }
        if matches!(state, "running" | "paused") {
            let info = home.info("g");
            assert_eq!((&info["status"], &info["failure"]["cause"]), (&"failed".into(), &"files_lost".into()));
        }
        let lost = check(&home, "VMs");
        assert!(lost["detail"].as_str().unwrap().contains("the files of g are gone"), "{lost}");
        let refused = home.nido(["start", "g", "--json"]).run().fails(1, "vm_not_running");
        assert!(refused["hint"].as_str().unwrap().contains("nido delete g"), "{refused}");
        home.nido(["delete", "g"]).run().ok();
        home.expect_empty();
    }
}

#[test]
fn processes_that_outlive_their_directory_end_with_the_vm() {
    let home = Home::new();
    for arguments in [vec![], vec!["--ephemeral"]] {
        let mut spawn = home.nido(["spawn", "g", "--accel", "tcg"]);
        for argument in &arguments {
            spawn = spawn.arg(argument);
        }
        spawn.run().ok();
        remove(&directory(&home, "g"));
        assert!(!pids(&home).is_empty());
        home.nido(["delete", "g", "--force", "--yes"]).run();
        home.expect_empty();
    }
}

// A QEMU that outlived its row was invisible: its VM's files were removed beneath it.
#[test]
fn a_qemu_that_outlived_its_row_is_ended_with_its_vm() {
    let home = Home::new();
    home.spawn("web");
    let directory = directory(&home, "web");
    for (pid, line) in processes::of(&home.path()) {
        if line.contains(" supervise ") {
            processes::kill(pid);
        }
    }
    let store = nido_store::Store::open(&home.path().join("nido.db")).unwrap();
    let id = directory.file_name().unwrap().to_str().unwrap();
    let stopped = nido_store::Transition::ended(nido_api::state::VmState::Stopped, None);
    assert_eq!(store.transition(id, &stopped).unwrap(), nido_store::TransitionOutcome::Yes);
    home.nido(["delete", "web", "--json"]).run().fails(1, "vm_busy");
    assert!(directory.join("disk.qcow2").exists());
    home.nido(["delete", "web", "--force", "--yes"]).run().ok();
    home.expect_empty();
}

// A concurrent command re-created the lock's file in a directory that was being removed: "Directory not empty".
#[test]
fn delete_succeeds_while_other_commands_list_vms() {
    let home = Home::new();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let list = || {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                home.nido(["ls"]).run().ok();
            }
        };
        scope.spawn(list);
        scope.spawn(list);
        for _ in 0..15 {
            home.nido(["create", "x"]).run().ok();
            let directory = directory(&home, "x");
            // So that removing it takes a while.
            fs::create_dir_all(directory.join("snapshots/many")).unwrap();
            for number in 0..500 {
                fs::write(directory.join(format!("snapshots/many/{number}")), "").unwrap();
            }
            home.nido(["delete", "x"]).run().ok();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    home.expect_empty();
}

#[test]
fn the_store_is_backed_up_and_the_backup_can_be_put_in_its_place() {
    let home = Home::new();
    home.nido(["create", "web"]).run().ok();
    home.nido(["ls"]).run().ok();
    let backup = home.path().join("nido.db.backup");
    assert!(backup.exists());
    lose_store(&home);
    fs::write(home.path().join("nido.db"), [7; 8192]).unwrap();
    let refused = home.nido(["ls", "--json"]).run().fails(1, "store_damaged");
    let path = home.path().join("nido.db");
    assert!(refused["detail"].as_str().unwrap().contains(&*path.to_string_lossy()), "{refused}");
    fs::copy(backup, path).unwrap();
    assert_eq!(home.names(), ["web"]);
}

// A supervisor that was killed between the claim of a clone and its record kept the record of a clone, which has no data.
#[test]
fn the_record_of_a_vm_is_right_once_another_supervisor_has_it() {
    let home = Home::new();
    home.spawn("web");
    let record = directory(&home, "web").join("vm.json");
    let right = fs::read_to_string(&record).unwrap();
    fs::write(&record, right.replace("\"purpose\":\"use\"", "\"purpose\":\"pool\"")).unwrap();
    assert_ne!(fs::read_to_string(&record).unwrap(), right);
    let all = processes::of(&home.path()).into_iter();
    all.filter(|(_, line)| line.contains(" supervise ")).for_each(|(pid, _)| processes::kill(pid));
    home.nido(["exec", "web", "--", "true"]).run().ok();
    assert_eq!(fs::read_to_string(&record).unwrap(), right);
}
