//! Processes of nido that are killed at random moments, again and again, until so many were: `NIDO_FAULT_KILLS`.

use std::time::{Duration, Instant};

use rustix::process::Pid;

use crate::check::{await_recovery, expect_clean, expect_resumable};
use crate::kills::prepare;
use crate::operations::{BASIC, COPIES, Operation, TEMPLATES};
use crate::rig::{BYSTANDERS, Rig};
use crate::support::processes;
use crate::support::random::{Random, number};

/// How many processes are killed, unless `NIDO_FAULT_KILLS` is set.
const KILLS: u64 = 8;
/// Within which time after the beginning of an operation, in microseconds.
const MOMENT_US: u64 = 400_000;
/// How many rounds may pass without one.
const ROUNDS_PER_KILL: u64 = 10;

fn one_of<'a, T>(random: &mut Random, all: &'a [T]) -> Option<&'a T> {
    let at = random.below(u64::try_from(all.len()).unwrap().max(1));
    all.get(usize::try_from(at).unwrap())
}

/// The processes of nido in the home that work for no bystander.
fn victims(rig: &Rig, bystanders: &[String]) -> Vec<Pid> {
    let nido = env!("CARGO_BIN_EXE_nido");
    let all = processes::of(&rig.home.scratch(""));
    let ours = |line: &str| line.starts_with(nido) && !bystanders.iter().any(|id| line.contains(id));
    all.into_iter().filter(|(_, line)| ours(line)).map(|(pid, _)| pid).collect()
}

/// Kills a process at a random moment of an operation, and checks everything. Returns how many were killed.
fn round(rig: &Rig, operation: &Operation, bystanders: &[String], random: &mut Random) -> u64 {
    prepare(rig, operation);
    let command = rig.nido(operation.command).start();
    std::thread::sleep(Duration::from_micros(random.below(MOMENT_US)));
    let mut victims = victims(rig, bystanders);
    // The command has its home in the environment.
    victims.push(command.pid());
    let killed = one_of(random, &victims).is_some_and(|pid| processes::kill_if_alive(*pid));
    let acknowledged = command.succeeds();
    await_recovery(rig);
    assert!(!acknowledged || (operation.done)(rig), "it was acknowledged, and is not there");
    expect_clean(rig);
    expect_resumable(rig);
    rig.clear();
    await_recovery(rig);
    u64::from(killed)
}

#[test]
fn processes_that_are_killed_at_random_moments_lose_and_leave_nothing() {
    let wanted = number("NIDO_FAULT_KILLS").unwrap_or(KILLS);
    let seed = number("NIDO_FAULT_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    let mut random = Random(seed);
    let rig = Rig::new();
    let bystanders = BYSTANDERS.map(|name| rig.home.info(name)["id"].as_str().unwrap().to_owned());
    let operations: Vec<_> = BASIC.iter().chain(&COPIES).chain(&TEMPLATES).collect();
    let (mut killed, began) = (0, Instant::now());
    for number in 1.. {
        let operation = one_of(&mut random, &operations).unwrap();
        println!("NIDO_FAULT_SEED={seed}, round {number}: {}", operation.name);
        killed += round(&rig, operation, &bystanders, &mut random);
        if killed >= wanted {
            println!("{killed} kills at random moments survived in {} s", began.elapsed().as_secs());
            return;
        }
        assert!(number < 100 + wanted * ROUNDS_PER_KILL, "only {killed} kills in {number} rounds");
    }
}
