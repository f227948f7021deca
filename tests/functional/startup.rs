//! A VM that is being started, or taken over, replies to requests, and is stopped at once by a user, a limit or the host.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::run::RunningNido;
use crate::support::{Home, processes, until};

/// How long a supervisor may take to reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);

fn with(home: &Home, word: &str) -> Vec<Pid> {
    processes::of(&home.path()).into_iter().filter(|(_, line)| line.contains(word)).map(|(pid, _)| pid).collect()
}

/// Begins to start the VM, and waits until its QEMU runs.
fn begin<'a>(home: &Home, start: crate::support::run::Nido<'a>) -> RunningNido {
    let mut start = start.start();
    start.until("QEMU", || with(home, "chardev=monitor").first().copied());
    start
}

/// A VM whose QEMU does not reply: its start takes until a deadline. The command that starts it.
fn starting(home: &Home, words: &str, flags: &[&str]) -> RunningNido {
    home.qemu(words);
    flags.iter().fold(home.nido(["create", "web", "--accel", "tcg"]), |nido, flag| nido.arg(*flag)).run().ok();
    begin(home, home.nido(["start", "web", "--json", "--timeout", "300s"]))
}

fn expect_stopped(home: &Home, start: RunningNido, cause: &str) {
    start.wait().fails(1, "vm_not_running");
    let info = home.info("web");
    assert_eq!((&info["status"], &info["status_cause"]), (&"stopped".into(), &cause.into()), "{info}");
    until("the end of QEMU", || with(home, "chardev=monitor").is_empty().then_some(()));
}

// Requests waited until QEMU had started, or for 30 seconds.
#[test]
fn a_stop_does_not_wait_for_a_qemu_that_does_not_reply() {
    for words in ["never-listens", "no-greeting"] {
        for force in [true, false] {
            let home = Home::new();
            let start = starting(&home, words, &[]);
            let stop = home.nido(["stop", "web"]);
            if force { stop.arg("--force") } else { stop }.run().ok();
            expect_stopped(&home, start, "user");
            home.qemu("");
            home.nido(["start", "web"]).run().ok();
        }
    }
}

#[test]
fn a_limit_holds_while_qemu_does_not_reply() {
    let home = Home::new();
    let start = starting(&home, "no-greeting", &["--ttl", "2s"]);
    expect_stopped(&home, start, "ttl");
}

#[test]
fn a_supervisor_that_is_terminated_does_not_wait_for_qemu() {
    let home = Home::new();
    let start = starting(&home, "no-greeting", &[]);
    let supervisor = with(&home, " supervise ")[0];
    kill_process(supervisor, Signal::TERM).unwrap();
    expect_stopped(&home, start, "host");
}

#[test]
fn requests_are_answered_while_qemu_does_not_reply() {
    let home = Home::new();
    let start = starting(&home, "no-greeting", &[]);
    let id = home.info("web")["id"].as_str().unwrap().to_owned();
    let status = |line: &str| {
        let mut stream = UnixStream::connect(home.path().join("vms").join(&id).join("control.sock")).unwrap();
        stream.set_read_timeout(Some(REPLY_TIMEOUT)).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        let mut reply = String::new();
        BufReader::new(stream).read_line(&mut reply).map(|_| reply)
    };
    // One that needs the guest waits, and keeps no other from being answered.
    let waiting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| status("{\"version\":2,\"op\":\"pause\"}\n"));
        for _ in 0..3 {
            let reply = status("{\"version\":2,\"op\":\"status\"}\n").unwrap();
            assert!(reply.contains("\"status\""), "{reply}");
        }
        home.nido(["stop", "web", "--force"]).run().ok();
        waiting.join().unwrap()
    });
    assert!(waiting.unwrap().contains("vm_not_running"));
    expect_stopped(&home, start, "user");
}

// Loading had its own time limit of ten minutes, within which a VM could not be stopped.
#[test]
fn a_vm_that_is_being_loaded_is_stopped_at_once() {
    let home = Home::new();
    home.qemu("migrates");
    home.nido(["template", "bake", "sandbox", "--accel", "tcg"]).run().ok();
    home.nido(["create", "web", "--accel", "tcg"]).run().ok();
    let id = home.info("web")["id"].as_str().unwrap().to_owned();
    let dir = home.path().join("vms").join(id);
    fs::write(dir.join("fake-hang"), "").unwrap();
    let start = begin(&home, home.nido(["start", "web", "--fork", "--json"]));
    let loads = |log: String| log.contains("fake-qemu: loading hangs").then_some(());
    until("the loading", || loads(fs::read_to_string(dir.join("qemu.log")).unwrap_or_default()));
    home.nido(["stop", "web"]).run().ok();
    expect_stopped(&home, start, "user");
}
