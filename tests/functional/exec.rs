//! Commands in a guest: streams, exit codes, signals, JSON. The "guest" is a process of this host.

use std::io::Write as _;
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::json;

use crate::support::Home;

fn vm() -> Home {
    let home = Home::new();
    home.spawn("web");
    home
}

#[test]
fn the_exit_code_is_the_commands_own() {
    let home = vm();
    for code in [0, 1, 2, 70, 124, 125, 255] {
        home.nido(["exec", "web", "--", "sh", "-c"]).arg(format!("exit {code}")).run().exits(code);
    }
    home.nido(["exec", "web", "--", "sh", "-c", "kill -9 $$"]).run().exits(137);
    home.nido(["exec", "web", "--timeout", "300ms", "--", "sleep", "60"]).run().exits(124);
    home.nido(["exec", "web", "--json", "--", "no-such-command"]).run().fails(127, "command_not_found");
    home.nido(["exec", "web", "--json", "--", "/etc/passwd"]).run().fails(126, "command_cannot_run");
    home.nido(["exec", "web", "--json", "-u", "nobody-at-all", "--", "true"]).run().fails(126, "user_not_found");
    home.nido(["exec", "web", "--json", "-w", "/no/such/place", "--", "true"]).run().fails(126, "directory_not_found");
}

#[test]
fn streams_stay_apart_and_bytes_stay_bytes() {
    let home = vm();
    let ran = home.nido(["exec", "web", "--", "sh", "-c", "printf 'a\\377\\000b\\033[2J'; echo oh >&2"]).run().ok();
    assert_eq!(ran.stdout, b"a\xff\0b\x1b[2J");
    assert_eq!(ran.stderr, "oh\n");
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n * 7 % 251) as u8).collect();
    let echoed = home.nido(["exec", "-i", "web", "--", "cat"]).input(bytes.clone()).run().ok();
    assert!(echoed.stdout == bytes, "{} bytes came back", echoed.stdout.len());
}

#[test]
fn standard_input_is_only_passed_on_with_i() {
    let home = vm();
    let ran = home.nido(["exec", "web", "--", "cat"]).input("unheard").run().ok();
    assert_eq!(ran.text(), "");
    let ran = home.nido(["exec", "web", "-i", "--", "tr", "a-z", "A-Z"]).input("heard").run().ok();
    assert_eq!(ran.text(), "HEARD");
}

#[test]
fn directory_and_environment_are_as_requested() {
    let home = vm();
    let command = ["exec", "web", "-w", "/usr", "-e", "A=1 2", "-e", "OWN", "-e", "EMPTY=", "--", "sh", "-c"];
    let ran = home.nido(command).arg("pwd; echo \"$A|$OWN|${EMPTY-unset}|${HOST-unset}\"");
    let ran = ran.env("OWN", "mine").env("HOST", "secret").run().ok();
    assert_eq!(ran.text(), "/usr\n1 2|mine||unset\n");
    home.nido(["exec", "web", "--json", "-e", "NOT_SET_HERE", "--", "true"]).run().fails(125, "spec_invalid");
    // Flags behind the command are the command's; without the two dashes, too.
    assert_eq!(home.nido(["exec", "web", "echo", "-n", "--json"]).run().ok().text(), "--json");
}

#[test]
fn with_json_the_output_is_collected() {
    let home = vm();
    let ran = home.nido(["exec", "web", "--json", "--", "sh", "-c", "echo out; echo err >&2; exit 3"]).run().exits(3);
    let result = ran.json();
    assert_eq!((&result["stdout"], &result["stderr"]), (&json!("out\n"), &json!("err\n")));
    assert_eq!(
        (&result["exit_code"], &result["signal"], &result["timed_out"]),
        (&json!(3), &json!(null), &json!(false))
    );
    assert_eq!(result["truncated"], json!({ "stdout": false, "stderr": false }));
    assert!(result["duration_ms"].is_u64());
    assert_eq!(ran.stderr, "");

    let ran = home.nido(["exec", "web", "--json", "--", "printf", "\\377"]).run().ok();
    assert_eq!(ran.json()["stdout_base64"], "/w==");
    let ran = home.nido(["exec", "web", "--json", "--", "sh", "-c", "yes | head -c 17000000"]).run().ok();
    assert_eq!(ran.json()["stdout"].as_str().unwrap().len(), 16 << 20);
    assert_eq!(ran.json()["truncated"]["stdout"], true);
    let ran = home.nido(["exec", "web", "--json", "--timeout", "300ms", "--", "sleep", "60"]).run().exits(124);
    assert_eq!(ran.json()["timed_out"], true);
}

#[test]
fn an_interrupt_reaches_the_command() {
    let home = vm();
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let script =
            format!("trap 'echo caught; exit 7' {}; echo ready; while :; do sleep 0.05; done", signal.as_raw());
        let exec = home.nido(["exec", "web", "--", "sh", "-c"]).arg(script).start();
        assert_eq!(exec.line(), "ready");
        exec.signal(signal);
        assert_eq!(exec.line(), "caught");
        exec.wait().exits(7);
    }
}

#[test]
fn the_third_interrupt_leaves_a_command_that_does_not_care() {
    let home = vm();
    let script = "trap 'echo first' INT; trap 'echo second' TERM; echo ready; while :; do sleep 0.05; done";
    let exec = home.nido(["exec", "web", "--", "sh", "-c", script]).start();
    for expected in ["ready", "first", "second"] {
        assert_eq!(exec.line(), expected);
        exec.signal(Signal::INT);
    }
    exec.wait().exits(130);
}

#[test]
fn a_signal_is_not_delayed_by_unread_input() {
    let home = vm();
    let script = "trap 'exit 9' INT; echo ready; while :; do sleep 0.05; done";
    let mut exec = home.nido(["exec", "web", "-i", "--", "sh", "-c", script]).start();
    let mut stdin = exec.stdin.take().unwrap();
    let filler = std::thread::spawn(move || while stdin.write_all(&[b'x'; 4096]).is_ok() {});
    assert_eq!(exec.line(), "ready");
    exec.signal(Signal::INT);
    exec.wait().exits(9);
    filler.join().unwrap();
}

#[test]
fn a_reader_that_leaves_ends_the_command() {
    let home = vm();
    let flag = home.scratch("alive");
    // The command holds a lock as long as it lives.
    let script = format!("exec 9>'{}'; flock 9; yes", flag.display());
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_nido"));
    command.args(["exec", "web", "--", "sh", "-c", &script]).env("NIDO_HOME", home.path());
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    std::io::Read::read_exact(&mut stdout, &mut [0; 100]).unwrap();
    drop(stdout);
    let ended = child.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), String::from_utf8_lossy(&ended.stderr).as_ref()), (Some(141), ""));
    let freed = std::process::Command::new("flock").args(["-w", "30"]).arg(&flag).arg("true").status().unwrap();
    assert!(freed.success(), "the command lives on");
}

#[test]
fn a_killed_nido_takes_its_command_along() {
    let home = vm();
    let flag = home.scratch("alive");
    let script = format!("exec 9>'{}'; flock 9; echo ready; sleep 1000", flag.display());
    let exec = home.nido(["exec", "web", "--", "sh", "-c"]).arg(script).start();
    assert_eq!(exec.line(), "ready");
    exec.signal(Signal::KILL);
    let freed = std::process::Command::new("flock").args(["-w", "30"]).arg(&flag).arg("true").status().unwrap();
    assert!(freed.success(), "the command lives on");
}

#[test]
fn many_commands_run_at_once() {
    let home = vm();
    let all: Vec<_> =
        (0..12).map(|n| (n, home.nido(["exec", "web", "--", "sh", "-c"]).arg(format!("exit {n}")).start())).collect();
    for (n, exec) in all {
        exec.wait().exits(n);
    }
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let home = vm();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_nido"));
    command.args(["exec", "web", "--", "echo", "lost"]).env("NIDO_HOME", home.path());
    let ended = command.stdin(Stdio::null()).stdout(full).output().unwrap();
    assert_eq!(ended.status.code(), Some(125));
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(said.contains("standard output") && said.contains("where the output is written to"), "{said}");
}

#[test]
fn one_sigterm_ends_nido_even_if_the_guest_hangs() {
    // A command that ignored it, or a guest that was paused, kept nido running: timeout(1), systemd and CI send just one.
    let home = vm();
    let script = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
    let ignoring = home.nido(["exec", "web", "--", "sh", "-c", script]).start();
    assert_eq!(ignoring.line(), "ready");
    ignoring.signal(Signal::TERM);
    ignoring.wait().exits(143);

    let flag = home.scratch("begun");
    let script = format!("trap '' TERM; touch '{}'; while :; do sleep 0.05; done", flag.display());
    let mut collected = home.nido(["exec", "web", "--json", "--", "sh", "-c"]).arg(script).start();
    collected.until("the command runs", || flag.exists().then_some(()));
    collected.signal(Signal::TERM);
    collected.wait().exits(143);

    let still = home.nido(["exec", "web", "--", "sh", "-c", "echo ready; sleep 1000"]).start();
    assert_eq!(still.line(), "ready");
    home.nido(["pause", "web"]).run().ok();
    still.signal(Signal::TERM);
    still.wait().exits(143);
    home.nido(["resume", "web"]).run().ok();
    home.nido(["exec", "web", "--", "true"]).run().ok();
}

#[test]
fn a_command_that_is_too_large_is_not_the_guests_fault() {
    // What nido itself could not put into a frame was reported as a fault of the guest: "may have been tampered with".
    let home = vm();
    let long = "a".repeat(120_000);
    let mut arguments = home.nido(["exec", "web", "--json", "--", "true"]);
    let mut environment = home.nido(["exec", "web", "--json"]);
    for name in ["A", "B", "C"] {
        arguments = arguments.arg(&long);
        environment = environment.arg("-e").arg(format!("{name}={long}"));
    }
    for ran in [arguments.run(), environment.arg("--").arg("true").run()] {
        let problem = ran.fails(125, "limit_exceeded");
        assert!(problem["detail"].as_str().unwrap().contains("256 KiB"), "{problem:#}");
    }
    home.nido(["exec", "web", "--", "true"]).run().ok();
}

#[test]
fn quotes_of_a_guests_message_are_not_escaped() {
    let home = vm();
    let problem =
        home.nido(["exec", "web", "--json", "-u", "no-such", "--", "true"]).run().fails(126, "user_not_found");
    assert_eq!(problem["detail"], "there is no user 'no-such' in the guest");
    let problem = home.nido(["exec", "web", "--json", "--", ""]).run().fails(125, "guest_invalid");
    assert_eq!(problem["detail"], "the program's name is empty");
}

#[test]
fn more_commands_than_the_guest_runs_at_once_wait_for_their_turn() {
    // The 65th got the error that the agent is unreachable, or had too many sessions.
    let home = vm();
    let all: Vec<_> = (0..70).map(|_| home.nido(["exec", "web", "--", "sleep", "0.5"]).start()).collect();
    for exec in all {
        exec.wait().ok();
    }
}

#[test]
fn a_command_whose_vm_is_stopped_reports_it() {
    let home = vm();
    let exec = home.nido(["exec", "web", "--", "sh", "-c", "trap '' HUP TERM; echo ready; sleep 1000"]).start();
    assert_eq!(exec.line(), "ready");
    home.nido(["stop", "--force", "web"]).run().ok();
    let ran = exec.wait().exits(125);
    assert!(ran.stderr.contains("VM 'web' was stopped while the command ran"), "{}", ran.stderr);
}

#[test]
fn a_time_limit_that_passed_is_named() {
    let home = vm();
    let ran = home.nido(["exec", "web", "--timeout", "300ms", "--", "sleep", "60"]).run().exits(124);
    assert_eq!(ran.stderr, "timed out after 300ms; killed\n");
}
