//! The lifecycle of VMs: created, started, paused, stopped, deleted; and what survives what.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};

use crate::support::{Home, processes, until};

#[test]
fn the_lifecycle_of_a_vm_from_spawn_to_delete() {
    let home = Home::new();
    let spawned = home.nido(["spawn", "web", "--accel", "tcg", "--memory", "256M", "--label", "role=demo"]).run().ok();
    assert_eq!(spawned.text(), "web\n");
    assert!(spawned.stderr.contains("web: booting\n"), "{}", spawned.stderr);
    assert!(spawned.stderr.contains("web is ready after "), "{}", spawned.stderr);
    assert!(spawned.stderr.contains("warning: no hardware isolation"), "{}", spawned.stderr);

    let info = home.info("web");
    assert_eq!(info["status"], "running");
    assert_eq!(info["memory_mib"], 256);
    assert_eq!(info["labels"]["role"], "demo");
    assert_eq!(info["isolation"], "emulation");
    assert_eq!(info["agent"]["ready"], true);
    assert_eq!(info["agent"]["transport"], "virtio-serial");
    assert_eq!(info["timings"]["path"], "cold");
    let shown = home.nido(["info", "web"]).run().ok();
    assert!(shown.text().contains("label:") && shown.text().contains("role=demo"), "{}", shown.text());
    let list = home.nido(["ls"]).run().ok();
    let row: Vec<_> = list.text().lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..4], ["web", "running", "sandbox", info["machine"].as_str().unwrap()]);

    assert_eq!(home.nido(["stop", "web"]).run().ok().text(), "web\n");
    assert_eq!(home.info("web")["status"], "stopped");
    assert_eq!(home.nido(["stop", "web"]).run().ok().text(), "web\n", "stopping again changes nothing");
    home.nido(["start", "web", "--quiet"]).run().ok();
    assert_eq!(home.info("web")["status"], "running");
    home.nido(["start", "web"]).run().ok();

    let refused = home.nido(["delete", "web", "--json"]).run().fails(1, "vm_busy");
    assert!(refused["hint"].as_str().unwrap().contains("--force"));
    assert_eq!(home.nido(["delete", "web", "--force", "--yes"]).run().ok().text(), "web\n");
    home.expect_empty();
}

#[test]
fn a_created_vm_waits_to_be_started() {
    let home = Home::new();
    home.nido(["create", "web", "--disk", "1G"]).run().ok();
    let info = home.info("web");
    assert_eq!(info["status"], "created");
    assert_eq!(info["disk_bytes"], 1u64 << 30);
    home.nido(["exec", "web", "--json", "--", "true"]).run().fails(125, "vm_not_running");
    home.nido(["pause", "web", "--json"]).run().fails(1, "vm_not_running");
    home.nido(["start", "web"]).run().ok();
    home.nido(["exec", "web", "--", "true"]).run().ok();
}

#[test]
fn a_paused_vm_stays_paused_until_it_is_resumed() {
    let home = Home::new();
    home.spawn("web");
    home.nido(["pause", "web"]).run().ok();
    home.nido(["pause", "web"]).run().ok();
    assert_eq!(home.info("web")["status"], "paused");
    home.nido(["exec", "web", "--json", "--", "true"]).run().fails(125, "vm_not_running");
    home.nido(["resume", "web"]).run().ok();
    home.nido(["exec", "web", "--", "true"]).run().ok();
    home.nido(["restart", "web", "--force"]).run().ok();
    home.nido(["exec", "web", "--", "true"]).run().ok();
}

#[test]
fn an_ephemeral_vm_vanishes_when_it_stops() {
    let home = Home::new();
    home.nido(["spawn", "web", "--ephemeral", "--accel", "tcg"]).run().ok();
    home.nido(["stop", "web"]).run().ok();
    home.expect_empty();
}

#[test]
fn a_stop_pulls_the_plug_of_a_guest_that_does_not_care() {
    let home = Home::new();
    home.qemu("ignore-powerdown");
    home.spawn("web");
    home.nido(["stop", "web", "--timeout", "300ms"]).run().ok();
    assert_eq!(home.info("web")["status"], "stopped");
}

// It was asked once: a guest that was coming up overlooked that, and the plug was pulled when the time was up.
#[test]
fn the_power_button_is_pressed_again_if_a_guest_misses_it() {
    let home = Home::new();
    home.qemu("no-agent;overlook-powerdown");
    home.nido(["spawn", "web", "--no-wait", "--accel", "tcg"]).run().ok();
    home.nido(["stop", "web", "--timeout", "1h"]).run().ok();
    assert_eq!(home.info("web")["status"], "stopped");
    let log = home.nido(["logs", "web", "--source", "supervisor"]).run().ok();
    assert!(!log.text().contains("terminating QEMU"), "{}", log.text());
    home.nido(["stop", "web", "--json", "--timeout", "2h"]).run().fails(2, "spec_invalid");
}

// The next supervisor did not know that there was a deadline: the VM was `stopping` for ever.
#[test]
fn a_stop_whose_supervisor_is_killed_ends_all_the_same() {
    let home = Home::new();
    home.qemu("ignore-powerdown");
    home.spawn("web");
    let stopping = home.nido(["stop", "web", "--timeout", "1s"]).start();
    home.await_info("web", |info| info["status"] == "stopping");
    // The command asks the next supervisor again; any command that reads the VM would start one as well.
    let all = processes::of(&home.path()).into_iter();
    all.filter(|(_, line)| line.contains(" supervise ")).for_each(|(pid, _)| processes::kill(pid));
    stopping.wait();
    home.await_info("web", |info| info["status"] == "stopped");
}

// A pause that was admitted before the stop paused the guest after it, which could then never go down.
#[test]
fn a_guest_that_powers_off_is_not_paused() {
    let home = Home::new();
    home.qemu("ignore-powerdown");
    let id = home.spawn("web")["id"].as_str().unwrap().to_owned();
    let stopping = home.nido(["stop", "web", "--timeout", "1h"]).start();
    home.await_info("web", |info| info["status"] == "stopping");
    let control = home.path().join("vms").join(id).join("control.sock");
    let mut supervisor = std::os::unix::net::UnixStream::connect(control).unwrap();
    supervisor.write_all(b"{\"op\":\"pause\"}\n").unwrap();
    let mut answer = String::new();
    BufReader::new(supervisor).read_line(&mut answer).unwrap();
    assert!(answer.contains("failed") && answer.contains("vm_busy"), "{answer}");
    home.nido(["stop", "web", "--force"]).run().ok();
    stopping.wait().ok();
}

#[test]
fn of_two_spawns_of_one_name_exactly_one_wins() {
    let home = Home::new();
    let runs: Vec<_> = (0..2).map(|_| home.nido(["spawn", "web", "--json", "--accel", "tcg"]).start()).collect();
    let ran: Vec<_> = runs.into_iter().map(crate::support::RunningNido::wait).collect();
    let won = ran.iter().filter(|ran| ran.code() == 0).count();
    assert_eq!(won, 1, "{ran:?}");
    let lost = ran.into_iter().find(|ran| ran.code() != 0).unwrap();
    lost.fails(1, "vm_exists");
    home.nido(["exec", "web", "--", "true"]).run().ok();
    assert_eq!(home.names(), ["web"]);
}

#[test]
fn several_vms_are_deleted_and_failures_are_reported() {
    let home = Home::new();
    home.nido(["create", "a"]).run().ok();
    home.nido(["create", "b"]).run().ok();
    let ran = home.nido(["delete", "b", "nobody", "a", "b"]).run().exits(1);
    assert_eq!(ran.text(), "a\nb\n");
    assert!(ran.stderr.contains("nobody"), "{}", ran.stderr);
    home.expect_empty();
}

#[test]
fn a_vm_ends_when_its_time_is_up() {
    let home = Home::new();
    home.nido(["spawn", "short", "--ttl", "1s", "--accel", "tcg"]).run().ok();
    home.await_info("short", |info| info["status"] == "stopped");
    home.nido(["spawn", "idle", "--idle", "500ms", "--accel", "tcg", "--ephemeral"]).run().ok();
    until("the end of an idle VM", || (home.names() == ["short"]).then_some(()));
}

#[test]
fn a_running_command_is_no_idleness() {
    let home = Home::new();
    home.nido(["spawn", "web", "--idle", "500ms", "--accel", "tcg"]).run().ok();
    // Longer than the limit, and then still there.
    home.nido(["exec", "web", "--", "sleep", "2"]).run().ok();
    home.await_info("web", |info| info["status"] == "stopped");
}

#[test]
fn qemu_outlives_its_supervisor_and_is_found_again() {
    let home = Home::new();
    home.spawn("web");
    home.nido(["exec", "web", "--", "true"]).run().ok();
    let supervisor = supervisor(&home);
    processes::kill(supervisor);
    home.nido(["exec", "web", "--", "true"]).run().ok();
    assert_eq!(home.info("web")["status"], "running");
    assert_ne!(self::supervisor(&home), supervisor);
    home.nido(["stop", "web"]).run().ok();
    assert_eq!(home.info("web")["status"], "stopped");
}

#[test]
fn a_vm_whose_processes_were_all_killed_is_failed() {
    let home = Home::new();
    home.spawn("web");
    processes::end_all(&home.path());
    processes::expect_none(&home.path());
    let info = home.await_info("web", |info| info["status"] == "failed");
    // QEMU may have been seen on its way out.
    assert!(["host_restart", "qemu_error"].contains(&info["failure"]["cause"].as_str().unwrap()), "{info}");
    home.nido(["start", "web"]).run().ok();
    home.nido(["exec", "web", "--", "true"]).run().ok();
}

#[test]
fn a_home_may_have_any_name() {
    // Longer than a socket's path may be, and with what QEMU's options take for separators.
    let home = Home::at(&format!("a, b=c,,d 'e' %s/{}/home", "long".repeat(40)));
    home.spawn("web");
    home.nido(["exec", "web", "--", "true"]).run().ok();
    processes::kill(supervisor(&home));
    home.nido(["exec", "web", "--", "true"]).run().ok();
    home.nido(["restart", "web"]).run().ok();
    home.nido(["exec", "web", "--", "true"]).run().ok();
}

#[test]
fn everything_of_a_vm_is_private() {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    let home = Home::new();
    let id = home.spawn("web")["id"].as_str().unwrap().to_owned();
    let directory = home.path().join("vms").join(id);
    assert_eq!(fs::metadata(&directory).unwrap().mode() & 0o777, 0o700);
    let mut sockets = 0;
    let of_qemu = fs::read_dir(directory.join("qemu")).unwrap();
    for entry in fs::read_dir(&directory).unwrap().chain(of_qemu) {
        let meta = entry.unwrap().metadata().unwrap();
        sockets += usize::from(meta.file_type().is_socket());
        assert_eq!(meta.mode() & 0o077, 0);
    }
    assert!(sockets >= 4, "{sockets} sockets");
}

fn supervisor(home: &Home) -> rustix::process::Pid {
    until("a supervisor", || {
        processes::of(&home.path()).into_iter().find(|(_, line)| line.contains(" supervise ")).map(|(pid, _)| pid)
    })
}

#[test]
fn a_home_may_be_made_by_several_at_once() {
    for _ in 0..5 {
        let home = Home::bare();
        let all: Vec<_> = (0..8).map(|_| home.nido(["ls", "-q"]).start()).collect();
        all.into_iter().for_each(|ls| drop(ls.wait().ok()));
    }
}
