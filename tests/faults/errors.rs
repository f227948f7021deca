//! Each operation on a disk that is full at one of its writes, in a home that cannot be written, and with few descriptors or little
//! memory: one sentence, nothing lost, nothing left.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::check::{await_recovery, expect_clean};
use crate::kills::{prepare, steps};
use crate::names::failpoints;
use crate::operations::{BASIC, COPIES, Operation, TEMPLATES};
use crate::rig::{Rig, Step};
use crate::support::run::FinishedRun;

/// How many times one failpoint of one operation fails, at most.
const TIMES_MAX: u32 = 1;

/// A command either succeeded, or reports in one sentence why not.
fn expect_result_or_sentence(ran: &FinishedRun, rig: &Rig, operation: &Operation) {
    if ran.code() == 0 {
        assert!((operation.done)(rig), "it was acknowledged, and is not there");
        return;
    }
    let problem = ran.problem();
    let detail = problem["detail"].as_str().unwrap_or_default();
    assert!(!detail.is_empty() && !detail.contains('\n'), "{problem}");
    assert!(problem["code"] != "internal", "{problem}");
}

fn fail_at(rig: &mut Rig, operation: &Operation, step: &Step) -> bool {
    prepare(rig, operation);
    rig.arm(step, "error");
    let ran = rig.nido(&format!("--json {}", operation.command)).run();
    await_recovery(rig);
    let failed = rig.disarm();
    expect_result_or_sentence(&ran, rig, operation);
    expect_clean(rig);
    rig.clear();
    await_recovery(rig);
    failed
}

fn fail_everywhere(operations: &[&Operation]) {
    let writes: BTreeSet<String> = failpoints(", io)");
    let (mut rig, mut failed, mut failures) = (Rig::new(), 0, Vec::new());
    for operation in operations {
        let all = steps(&rig, operation).into_iter();
        for step in all.filter(|step| step.count <= TIMES_MAX && writes.contains(&step.name)) {
            let outcome = catch_unwind(AssertUnwindSafe(|| fail_at(&mut rig, operation, &step)));
            println!("{} {step}: {outcome:?}", operation.name);
            match outcome {
                Ok(did_fail) => failed += u32::from(did_fail),
                Err(why) => {
                    let why = why.downcast_ref::<String>().cloned().unwrap_or_default();
                    failures.push(format!("{} {step}: {why}", operation.name));
                    std::mem::replace(&mut rig, Rig::new()).abandon();
                }
            }
        }
    }
    println!("{failed} faults injected, {} not survived", failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(failed > 0);
}

#[test]
fn a_disk_that_is_full_at_one_write_is_reported_and_loses_nothing() {
    fail_everywhere(&BASIC.iter().chain(&COPIES).chain(&TEMPLATES).collect::<Vec<_>>());
}

#[test]
fn a_process_without_descriptors_reports_it_and_leaves_no_orphans() {
    let rig = Rig::new();
    let mut refused = 0;
    for descriptors in [4, 8, 12, 16, 24, 32, 63, 1024] {
        let spawn = rig.nido("--json spawn op --accel tcg").through(&format!("ulimit -n {descriptors}"));
        let ran = spawn.run();
        await_recovery(&rig);
        if ran.code() == 0 {
            assert!(rig.info("op").is_some());
        } else {
            refused += 1;
            let said = ran.stderr.lines().filter(|line| !line.is_empty()).count();
            assert_eq!(said, 1, "with {descriptors} descriptors: {}", ran.stderr);
            assert!(ran.stderr.contains("ulimit -n"), "{}", ran.stderr);
        }
        expect_clean(&rig);
        rig.clear();
    }
    assert!(refused > 0, "each number of descriptors was enough");
}

/// What a shell does so that a program sees this directory mounted read-only. Processes that run already see it as it is.
fn read_only(directory: &Path) -> String {
    let directory = directory.display();
    let mount = format!("mount --bind {directory} {directory} && mount -o remount,bind,ro {directory}");
    format!(r#"exec unshare --user --map-root-user --mount sh -c '{mount} && exec "$0" "$@"' "$0" "$@""#)
}

#[test]
fn an_operation_in_a_home_that_cannot_be_written_is_refused_and_loses_nothing() {
    let rig = Rig::new();
    let mut refused = 0;
    for operation in BASIC.iter().chain(&COPIES).chain(&TEMPLATES) {
        prepare(&rig, operation);
        let ran = rig.nido(&format!("--json {}", operation.command)).through(&read_only(&rig.home.path())).run();
        await_recovery(&rig);
        println!("{}: {}", operation.name, ran.code());
        if ran.code() != 0 {
            refused += 1;
        }
        expect_result_or_sentence(&ran, &rig, operation);
        expect_clean(&rig);
        rig.clear();
    }
    assert!(refused > 10, "only {refused} operations were refused");
}

#[test]
fn a_process_without_memory_leaves_nothing() {
    let rig = Rig::new();
    let mut failed = 0;
    for kib in [30_000, 50_000, 100_000, 200_000, 400_000, 800_000, 2_000_000] {
        let spawn = rig.nido("--json spawn op --accel tcg").through(&format!("ulimit -v {kib}"));
        // A process that gets no memory may abort: for the home that is a crash.
        let acknowledged = spawn.start().succeeds();
        await_recovery(&rig);
        println!("{kib} KiB: {acknowledged}");
        if acknowledged {
            assert!(rig.info("op").is_some());
        } else {
            failed += 1;
        }
        expect_clean(&rig);
        rig.clear();
    }
    assert!(failed > 0, "each amount of memory was enough");
}
