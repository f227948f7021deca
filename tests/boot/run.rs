//! `run`: a VM for one command, and nothing afterwards.

use std::fs;
use std::io::Write as _;

use rustix::process::Signal;

use crate::rig::{TestHome, eventually};

#[test]
fn a_command_in_a_vm_of_its_own() {
    let home = TestHome::new();
    let done = home.nido(["run", "--net", "none", "--", "sh", "-c", "echo out; echo err >&2; exit 9"]).run().expect(9);
    assert_eq!(done.stdout, b"out\n");
    assert!(done.stderr.lines().any(|line| line == "err"), "{}", done.stderr);
    home.assert_empty();

    let here = home.user_dir();
    fs::create_dir(here.join("work")).unwrap();
    fs::write(here.join("work/job.py"), "print(6 * 7)\n").unwrap();
    let flags = ["--net", "none", "--copy", "work:/deep/work", "-w", "/deep/work", "-e", "A=b", "-u", "user"];
    let done = home.nido(["run", "-q"]).args(flags).args(["--", "python3", "job.py"]).ok();
    assert_eq!(done.stdout, b"42\n");
    assert_eq!(
        home.nido(["run", "-i", "--net", "none", "--", "tr", "a-z", "A-Z"]).stdin("hello").ok().stdout,
        b"HELLO"
    );
    home.assert_empty();
}

#[test]
fn failures_leave_nothing() {
    let home = TestHome::new();
    home.nido(["run", "--net", "none", "--", "no-such-command"]).problem(127, "command_not_found");
    home.nido(["run", "--net", "none", "--timeout", "500ms", "--", "sleep", "98773"]).run().expect(124);
    home.nido(["run", "--net", "none", "--copy", "missing:/x", "--", "true"]).run().expect(125);
    home.nido(["run", "--template", "no-such", "--", "true"]).problem(125, "template_not_found");
    home.assert_empty();
}

#[test]
fn interrupted_at_any_moment_it_leaves_nothing() {
    let home = TestHome::new();
    // While it starts.
    let (running, _keys) = home.nido(["run", "--net", "none", "--", "sleep", "98774"]).start();
    eventually("QEMU", || home.qemu());
    running.signal(Signal::INT);
    running.wait().expect(130);
    home.assert_empty();
    // While the command runs. A shell would not do: between two commands it can lose the signal.
    let (running, mut keys) = home.nido(["run", "-i", "--net", "none", "--", "cat"]).start();
    keys.write_all(b"up\n").unwrap();
    running.read_until("up\n");
    running.signal(Signal::INT);
    running.wait().expect(130);
    home.assert_empty();
}

#[test]
fn kept_on_request() {
    let home = TestHome::new();
    home.nido(["run", "--keep", "--net", "none", "--", "touch", "/root/here"]).ok();
    let names = home.names();
    assert_eq!(names.len(), 1);
    home.nido(["exec", &names[0], "--", "test", "-e", "/root/here"]).ok();
    assert_eq!(home.nido(["info", &names[0]]).json()["ephemeral"], false);
}
