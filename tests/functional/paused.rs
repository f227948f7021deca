//! A VM whose CPUs are paused: the cause, which clients are notified, and how it resumes.

use std::fs;

use rustix::process::Pid;

use crate::support::{Home, processes, until};

fn supervisors(home: &Home) -> Vec<Pid> {
    let all = processes::of(&home.path()).into_iter();
    all.filter(|(_, line)| line.contains(" supervise ")).map(|(pid, _)| pid).collect()
}

// A VM that a full disk had stopped was `paused` without a cause, or `running` for ever; a resume did nothing and succeeded.
#[test]
fn a_full_disk_pauses_a_vm_until_there_is_space() {
    let home = Home::new();
    home.qemu("disk-full-after-ms:1500");
    let id = home.spawn("web")["id"].as_str().unwrap().to_owned();
    let info = home.await_info("web", |info| info["status"] == "paused");
    assert_eq!(info["status_cause"], "disk_full", "{info}");
    assert!(info["status_detail"].as_str().unwrap().contains("free some space"), "{info}");
    let shown = home.nido(["ls"]).run().ok();
    assert!(shown.text().contains("paused(disk_full)"), "{}", shown.text());
    let problem = home.nido(["exec", "web", "--json", "--", "true"]).run().fails(125, "vm_not_running");
    assert!(problem["detail"].as_str().unwrap().contains("the host's disk is full"), "{problem}");

    home.nido(["resume", "web", "--json"]).run().fails(1, "disk_full");
    assert_eq!(home.info("web")["status_cause"], "disk_full");
    let events = home.nido(["events", "--json"]).run().ok();
    let paused: Vec<_> = events.text().lines().filter(|line| line.contains("vm.paused")).collect();
    assert_eq!(paused.len(), 1, "a resume that failed is no event: {paused:?}");
    assert!(paused[0].contains("\"status_cause\":\"disk_full\""), "{}", paused[0]);

    fs::write(home.path().join("vms").join(id).join("fake-space"), "").unwrap();
    home.nido(["resume", "web"]).run().ok();
    let info = home.info("web");
    assert_eq!((info["status"].as_str(), &info["status_cause"]), (Some("running"), &serde_json::Value::Null));
    home.nido(["exec", "web", "--", "true"]).run().ok();
}

#[test]
fn a_vm_that_a_full_disk_paused_resumes_by_itself() {
    let home = Home::new();
    home.qemu("disk-full-after-ms:1500");
    let id = home.spawn("web")["id"].as_str().unwrap().to_owned();
    home.await_info("web", |info| info["status_cause"] == "disk_full");
    fs::write(home.path().join("vms").join(id).join("fake-space"), "").unwrap();
    home.await_info("web", |info| info["status"] == "running");
    home.nido(["exec", "web", "--", "true"]).run().ok();
}

// A supervisor that took over took every state but `paused` for running.
#[test]
fn a_supervisor_that_takes_over_sees_why_a_vm_is_paused() {
    let home = Home::new();
    home.qemu("io-error-after-ms:1500");
    home.spawn("web");
    home.await_info("web", |info| info["status_cause"] == "io_error");
    supervisors(&home).into_iter().for_each(processes::kill);
    let info = home.await_info("web", |info| info["status"] == "paused");
    assert_eq!(info["status_cause"], "io_error", "{info}");
    home.nido(["resume", "web", "--json"]).run().fails(1, "qemu_failed");
    home.nido(["stop", "web", "--force"]).run().ok();
    let info = home.info("web");
    assert_eq!((&info["status"], &info["status_cause"]), (&"stopped".into(), &"user".into()), "{info}");
}

// The time to become ready elapsed while the CPUs were paused: a VM that was paused while it booted was ended.
#[test]
fn a_vm_that_is_paused_while_it_boots_is_given_its_time_again() {
    let home = Home::new();
    home.qemu("no-agent");
    home.nido(["spawn", "web", "--no-wait", "--timeout", "3s", "--accel", "tcg"]).run().ok();
    home.await_info("web", |info| info["status"] == "running");
    home.nido(["pause", "web"]).run().ok();
    let log = home.path().join("vms").join(home.info("web")["id"].as_str().unwrap()).join("supervisor.log");
    until("the end of its time", || {
        fs::read_to_string(&log).unwrap_or_default().contains("the guest was paused for").then_some(())
    });
    assert_eq!(home.info("web")["status"], "paused");
    home.nido(["resume", "web"]).run().ok();
    let failed = home.await_info("web", |info| info["status"] == "failed");
    assert_eq!(failed["failure"]["cause"], "guest_timeout");
}

// A VM that was paused, and so could not be used, was ended as idle; with --ephemeral that deleted it.
#[test]
fn a_paused_vm_is_not_idle() {
    let home = Home::new();
    home.nido(["spawn", "web", "--idle", "2s", "--ttl", "6s", "--accel", "tcg"]).run().ok();
    home.nido(["pause", "web"]).run().ok();
    let info = home.await_info("web", |info| info["status"] == "stopped");
    assert_eq!(info["status_cause"], "ttl", "the time to live goes on: {info}");
    let shown = home.nido(["ls"]).run().ok();
    assert!(shown.text().contains("stopped(ttl)"), "{}", shown.text());
}

// A refused argument was delivered to all webhooks for crashes.
#[test]
fn a_spawn_that_is_refused_is_no_crash() {
    let home = Home::new();
    home.nido(["spawn", "web", "--fork", "--json"]).run().fails(1, "template_mismatch");
    home.expect_empty();
    let events = home.nido(["events", "--json"]).run().ok();
    assert!(!events.text().contains("vm."), "{}", events.text());
}

// The line about a store that could not be written was written to the same full disk, and the failure of that ended the
// supervisor: QEMU's events reached no process.
#[test]
fn a_supervisor_outlives_its_log() {
    let home = Home::new();
    home.nido(["create", "web", "--accel", "tcg"]).run().ok();
    let log = home.path().join("vms").join(home.info("web")["id"].as_str().unwrap()).join("supervisor.log");
    std::os::unix::fs::symlink("/dev/full", log).unwrap();
    home.nido(["start", "web"]).run().ok();
    let before = supervisors(&home);
    home.nido(["pause", "web"]).run().ok();
    home.nido(["resume", "web"]).run().ok();
    home.nido(["exec", "web", "--", "true"]).run().ok();
    assert_eq!(supervisors(&home), before);
}

#[test]
fn a_qemu_that_takes_no_files_saves_over_a_socket() {
    let home = Home::new();
    home.qemu("migrates;lacks:getfd");
    let id = home.spawn("web")["id"].as_str().unwrap().to_owned();
    home.nido(["pause", "web"]).run().ok();
    home.nido(["snapshot", "create", "web", "s"]).run().ok();
    assert_eq!(home.info("web")["status"], "paused");
    let log = fs::read_to_string(home.path().join("vms").join(id).join("supervisor.log")).unwrap();
    assert!(log.contains("QEMU does not write a file itself"), "{log}");
    home.nido(["resume", "web"]).run().ok();
    home.nido(["exec", "web", "--", "true"]).run().ok();
    home.nido(["snapshot", "restore", "web", "s", "--yes"]).run().ok();
    home.nido(["exec", "web", "--", "true"]).run().ok();
}
