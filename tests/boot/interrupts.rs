//! Signals to a `nido` that waits for a command in the guest.

use rustix::process::Signal;

use crate::rig::{RunningCall, TestHome, Vm, eventually};

/// A script in the guest that has reported that it is ready.
fn ready(vm: &Vm<'_>, script: &str) -> (RunningCall, std::process::ChildStdin) {
    let (running, keys) = vm.sh(&format!("{script}\necho ready\nwhile :; do sleep 0.1; done")).start();
    running.read_until("ready\n");
    (running, keys)
}

fn nothing_runs(vm: &Vm<'_>) {
    eventually("the end of the script", || {
        let left = vm.exec(["pgrep", "-f", "echo ready"]).run();
        left.stdout.is_empty().then_some(())
    });
}

#[test]
fn signals_reach_the_command() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);

    let (running, _keys) = ready(&vm, "trap 'echo caught; exit 7' INT");
    running.signal(Signal::INT);
    let done = running.wait().expect(7);
    assert_eq!(done.stdout, b"caught\n");

    let (running, _keys) = ready(&vm, ":");
    running.signal(Signal::INT);
    running.wait().expect(130);
    nothing_runs(&vm);

    let (running, _keys) = ready(&vm, "trap 'exit 9' TERM");
    running.signal(Signal::TERM);
    running.wait().expect(9);

    // A second interrupt terminates.
    let (running, _keys) = ready(&vm, "trap 'echo ignored' INT; trap 'exit 8' TERM");
    running.signal(Signal::INT);
    running.read_until("ignored\n");
    running.signal(Signal::INT);
    running.wait().expect(8);

    // The third kills and leaves.
    let (running, _keys) = ready(&vm, "trap 'echo one' INT; trap 'echo two' TERM");
    running.signal(Signal::INT);
    running.read_until("one\n");
    running.signal(Signal::INT);
    running.read_until("two\n");
    running.signal(Signal::INT);
    running.wait().expect(130);
    nothing_runs(&vm);
}

#[test]
fn a_killed_nido_takes_its_command_with_it() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none"]);
    let (running, _keys) = ready(&vm, "trap '' HUP INT TERM; sleep 98768 &");
    running.signal(Signal::KILL);
    running.wait().expect(137);
    nothing_runs(&vm);
    eventually("the end of its child", || {
        vm.exec(["pgrep", "-x", "-f", "sleep 98768"]).run().stdout.is_empty().then_some(())
    });
}
