//! Each operation, killed at each of its failpoints: one test for each group, so that groups run at the same time.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::check::{await_recovery, expect_clean, expect_resumable};
use crate::operations::{ACCESS, BASIC, COPIES, Operation, POOLS, TEMPLATES};
use crate::rig::{Rig, Step};

/// How many times one failpoint of one operation is used, at most, unless `NIDO_FAULT_TIMES` is set: the first times that a
/// process comes to it.
const TIMES_MAX: u32 = 1;

pub fn prepare(rig: &Rig, operation: &Operation) {
    for line in operation.prepare {
        rig.ok(line);
    }
    (operation.arrange)(rig);
}

/// Kills one process at one step, and checks everything. Returns whether one was killed.
fn kill_at(rig: &mut Rig, operation: &Operation, step: &Step) -> bool {
    prepare(rig, operation);
    rig.arm(step, "kill");
    let acknowledged = rig.nido(operation.command).start().succeeds();
    await_recovery(rig);
    let killed = rig.disarm();
    assert!(!acknowledged || (operation.done)(rig), "it was acknowledged, and is not there");
    expect_clean(rig);
    expect_resumable(rig);
    rig.clear();
    // The name is free.
    rig.ok("create op --accel tcg");
    rig.clear();
    await_recovery(rig);
    killed
}

/// The steps of an operation that are killed: not the same one again and again.
pub fn steps(rig: &Rig, operation: &Operation) -> Vec<Step> {
    prepare(rig, operation);
    let steps = rig.trace(|| {
        rig.nido(operation.command).run().ok();
        await_recovery(rig);
    });
    assert!((operation.done)(rig), "{} has no effect", operation.name);
    rig.clear();
    steps
}

fn kill_everywhere(operations: &[Operation]) {
    let only = std::env::var("NIDO_FAULTS_ONLY").unwrap_or_default();
    let times = std::env::var("NIDO_FAULT_TIMES").map_or(TIMES_MAX, |times| times.parse().unwrap());
    let mut rig = Rig::new();
    let (mut killed, mut failures) = (0, Vec::new());
    for operation in operations {
        for step in steps(&rig, operation).into_iter().filter(|step| step.count <= times) {
            let what = format!("{} {step}", operation.name);
            if !what.contains(&only) {
                continue;
            }
            let began = std::time::Instant::now();
            let outcome = catch_unwind(AssertUnwindSafe(|| kill_at(&mut rig, operation, &step)));
            println!("{what}: {outcome:?} in {} ms", began.elapsed().as_millis());
            match outcome {
                Ok(was_killed) => killed += u32::from(was_killed),
                Err(why) => {
                    let why = why.downcast_ref::<String>().cloned().unwrap_or_default();
                    failures.push(format!("{what}: {why}"));
                    std::mem::replace(&mut rig, Rig::new()).abandon();
                }
            }
        }
    }
    println!("{killed} kills survived, {} not", failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(killed > 0 || !only.is_empty());
}

#[test]
fn a_crash_while_a_vm_changes_its_state_loses_and_leaves_nothing() {
    kill_everywhere(&BASIC);
}

#[test]
fn a_crash_while_a_vm_is_copied_or_published_loses_and_leaves_nothing() {
    kill_everywhere(&COPIES);
}

#[test]
fn a_crash_while_templates_change_loses_and_leaves_nothing() {
    kill_everywhere(&TEMPLATES);
}

#[test]
fn a_crash_during_filling_and_claims_loses_no_vm_and_leaves_no_orphans() {
    kill_everywhere(&POOLS);
}

#[test]
fn a_crash_while_access_changes_loses_and_leaves_nothing() {
    kill_everywhere(&ACCESS);
}
