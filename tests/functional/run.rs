//! `run`: a VM for one command, gone afterwards on every way.

use std::fs;

use rustix::process::Signal;

use crate::support::Home;

#[test]
fn a_vm_for_one_command() {
    let home = Home::new();
    let ran = home.nido(["run", "--accel", "tcg", "--", "sh", "-c", "echo hello; exit 3"]).run().exits(3);
    assert_eq!(ran.text(), "hello\n");
    assert!(ran.stderr.contains("warning: no hardware isolation"), "{}", ran.stderr);
    let ran = home.nido(["run", "--accel", "tcg", "-i", "--", "cat"]).input("hello").run().ok();
    assert_eq!(ran.text(), "hello");
    let ran = home.nido(["run", "--json", "--accel", "tcg", "--", "echo", "hello"]).run().ok();
    assert_eq!(ran.json()["stdout"], "hello\n");
    home.nido(["run", "--json", "--", "no-such-command"]).run().fails(127, "command_not_found");
    home.nido(["run", "--timeout", "300ms", "--", "sleep", "60"]).run().exits(124);
    home.expect_empty();
}

#[test]
fn files_are_there_before_the_command() {
    let home = Home::new();
    fs::write(home.scratch("job"), "the job").unwrap();
    let there = home.scratch("there/job");
    let copy = format!("job:{}", there.display());
    let ran = home.nido(["run", "--copy", &copy, "--", "cat"]).arg(&there).in_directory(home.scratch("")).run().ok();
    assert_eq!(ran.text(), "the job");
    let missing = format!("missing:{}", there.display());
    home.nido(["run", "--json", "--copy", &missing, "--", "true"]).run().fails(125, "path_not_found");
    home.expect_empty();
}

#[test]
fn what_fails_or_is_interrupted_leaves_nothing() {
    let home = Home::new();
    let run = home.nido(["run", "--", "sh", "-c", "echo ready; while :; do sleep 0.05; done"]).start();
    assert_eq!(run.line(), "ready");
    run.signal(Signal::INT);
    run.wait().exits(130);
    home.expect_empty();
    home.qemu("die-at-start:no");
    home.nido(["run", "--json", "--", "true"]).run().fails(125, "qemu_failed");
    home.expect_empty();
}

#[test]
fn a_vm_that_is_to_be_kept_is_kept() {
    let home = Home::new();
    let ran = home.nido(["run", "--keep", "--", "true"]).run().ok();
    let names = home.names();
    assert_eq!(names.len(), 1);
    assert!(ran.stderr.contains(&format!("{} was kept", names[0])), "{}", ran.stderr);
    home.nido(["exec", &names[0], "--", "true"]).run().ok();
}
