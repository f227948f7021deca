//! The guardian: a QEMU whose supervisor was killed gets another one, although no command comes.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{Home, processes, until};

/// Within which time a QEMU has a supervisor again. Twice what is promised, for busy machines; nothing else takes part.
const ADOPTION_TIMEOUT: Duration = Duration::from_secs(10);

fn with(home: &Home, word: &str) -> Vec<Pid> {
    processes::of(&home.path()).into_iter().filter(|(_, line)| line.contains(word)).map(|(pid, _)| pid).collect()
}

fn supervisors(home: &Home) -> Vec<Pid> {
    with(home, " supervise ")
}

fn guardian(home: &Home) -> Pid {
    until("the guardian", || match with(home, " watch")[..] {
        [one] => Some(one),
        _ => None,
    })
}

/// The log of a VM's supervisor: no command is needed to read it.
fn log(home: &Home, id: &str) -> String {
    fs::read_to_string(home.path().join("vms").join(id).join("supervisor.log")).unwrap_or_default()
}

fn await_adoptions(home: &Home, ids: &[String], count: usize) {
    let began = Instant::now();
    for id in ids {
        until("another supervisor", || (log(home, id).matches("taking over the QEMU").count() >= count).then_some(()));
    }
    assert!(began.elapsed() < ADOPTION_TIMEOUT, "{:?}", began.elapsed());
}

fn id(vm: &serde_json::Value) -> String {
    vm["id"].as_str().unwrap().to_owned()
}

/// A VM whose supervisor was killed had no idle limit, and its session's end did not reach it, until the next command.
#[test]
fn a_killed_supervisor_is_replaced_without_a_command() {
    let home = Home::new();
    let ids: Vec<_> = ["a", "b", "c"].map(|name| id(&home.spawn(name))).into();
    let idle = id(&home.nido(["spawn", "idle", "--json", "--accel", "tcg", "--idle", "3s"]).run().ok().json());
    guardian(&home);
    for round in 1..=2 {
        let killed = supervisors(&home);
        for pid in killed {
            processes::kill_if_alive(pid);
        }
        await_adoptions(&home, &ids, round);
    }
    // Nothing was called: the limit ends the VM.
    let file = home.path().join("vms").join(&idle);
    until("the end of the idle VM", || log(&home, &idle).contains("it has been idle for too long").then_some(()));
    until("its QEMU's end", || processes::of(&file).is_empty().then_some(()));
    assert_eq!(home.nido(["exec", "a", "--", "echo", "there"]).run().ok().text(), "there\n");
    assert_eq!(home.info("idle")["status"], "stopped");
}

/// The guardian itself may be killed, with some of the supervisors.
#[test]
fn a_killed_guardian_is_replaced_by_a_supervisor() {
    let home = Home::new();
    let (first, second) = (id(&home.spawn("first")), id(&home.spawn("second")));
    let before = guardian(&home);
    let of = |id: &str| with(&home, &format!(" supervise {id}"));
    processes::kill(before);
    of(&first).into_iter().for_each(processes::kill);
    await_adoptions(&home, &[first], 1);
    assert_ne!(guardian(&home), before);
    // All of them at the same moment: the next command is needed, and enough.
    kill_process(guardian(&home), Signal::STOP).unwrap();
    let stopped = guardian(&home);
    supervisors(&home).into_iter().for_each(processes::kill);
    processes::kill(stopped);
    home.nido(["ls"]).run().ok();
    await_adoptions(&home, &[second], 1);
    guardian(&home);
}

/// A supervisor that cannot be started was started in a busy loop, or never again.
#[test]
fn a_supervisor_that_ends_at_once_is_retried_with_pauses_and_reported() {
    let home = Home::new();
    let vm = id(&home.spawn("web"));
    guardian(&home);
    // The supervisor reads the token; without it, it ends at once.
    let token = home.path().join("vms").join(&vm).join("guest.cbor");
    let aside = token.with_extension("aside");
    fs::rename(&token, &aside).unwrap();
    supervisors(&home).into_iter().for_each(processes::kill);
    let guarded = || fs::read_to_string(home.path().join("logs/guardian.log")).unwrap_or_default();
    let tries = || guarded().matches("lost its supervisor").count();
    until("the fourth attempt", || (tries() >= 4).then_some(()));
    let store = || nido_store::Store::open_to_read(&home.path().join("nido.db")).unwrap();
    let warned = || store().vm_by_id(&vm).unwrap().unwrap().machine.unwrap().warnings.join(" ");
    until("the warning", || warned().contains("every supervisor").then_some(()));
    assert!(tries() <= 5, "{}", guarded());
    fs::rename(&aside, &token).unwrap();
    until("a supervisor that works", || (!warned().contains("every supervisor")).then_some(()));
    assert_eq!(home.info("web")["status"], "running");
}

/// QEMU and its supervisor were both killed: until the next command the VM seemed to run.
#[test]
fn the_end_of_a_qemu_without_a_supervisor_is_recorded_and_the_guardian_ends() {
    let home = Home::new();
    let vm = id(&home.spawn("web"));
    let guardian = guardian(&home);
    kill_process(guardian, Signal::STOP).unwrap();
    supervisors(&home).into_iter().for_each(processes::kill);
    with(&home, "path=qemu/qmp.sock").into_iter().for_each(processes::kill);
    kill_process(guardian, Signal::CONT).unwrap();
    processes::expect_none(&home.path());
    let store = nido_store::Store::open_to_read(&home.path().join("nido.db")).unwrap();
    let row = store.vm_by_id(&vm).unwrap().unwrap();
    assert_eq!(row.state, nido_api::state::VmState::Failed);
}

#[test]
fn a_guardian_leaves_a_removed_home_alone() {
    let home = Home::new();
    home.spawn("web");
    guardian(&home);
    let moved = home.scratch("moved");
    fs::rename(home.path(), &moved).unwrap();
    until("the guardian's end", || with(&home, " watch").is_empty().then_some(()));
    assert!(!home.path().exists(), "it was made again");
    fs::rename(&moved, home.path()).unwrap();
    home.nido(["delete", "web", "--force", "--yes"]).run().ok();
}
