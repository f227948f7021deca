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
fn a_failed_or_interrupted_run_leaves_no_orphans() {
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

#[test]
fn a_vm_that_is_kept_is_named_in_every_form() {
    // With --json and with --quiet the VM's name was not printed.
    let home = Home::new();
    let ran = home.nido(["run", "--keep", "--json", "--", "sh", "-c", "echo hello; exit 3"]).run().exits(3);
    let names = home.names();
    assert_eq!(names.len(), 1);
    let answer = ran.json();
    assert_eq!((&answer["vm"]["name"], &answer["exec"]["stdout"]), (&names[0].as_str().into(), &"hello\n".into()));
    assert_eq!(answer["exec"]["exit_code"], 3);
    let ran = home.nido(["run", "--keep", "--quiet", "--", "true"]).run().ok();
    let other = home.names().into_iter().find(|name| *name != names[0]).unwrap();
    assert!(ran.stderr.contains(&format!("{other} was kept")), "{}", ran.stderr);
}

#[test]
fn a_volume_as_docker_takes_it_is_not_run_as_a_command() {
    let home = Home::new();
    let problem = home.nido(["run", "--json", "-v", ".:/x", "--", "true"]).run().fails(125, "spec_invalid");
    assert!(problem["hint"].as_str().unwrap().contains("did you mean --copy"), "{problem:#}");
    home.expect_empty();
}

#[test]
fn files_belong_to_the_user_of_the_command() {
    // They belonged to root, and the command could not write beside them.
    let home = Home::new();
    if !rustix::process::geteuid().is_root() {
        // The guest of these tests is a process of this host, which could not give files away.
        let copy = format!("job:{}", home.scratch("there").display());
        fs::write(home.scratch("job"), "x").unwrap();
        let run = home.nido(["run", "--json", "-u", "root", "--copy", &copy, "--", "true"]);
        run.in_directory(home.scratch("")).run().exits(125);
        return;
    }
    fs::create_dir(home.scratch("work")).unwrap();
    fs::write(home.scratch("work/job"), "the job").unwrap();
    let copy = format!("work:{}", home.scratch("there/work").display());
    let run = home.nido(["run", "-u", "0:65534", "--copy", &copy, "--", "stat", "-c", "%u:%g"]);
    let ran = run.arg(home.scratch("there/work")).arg(home.scratch("there/work/job"));
    let ran = ran.in_directory(home.scratch("")).run().ok();
    assert_eq!(ran.text(), "0:65534\n0:65534\n");
}
