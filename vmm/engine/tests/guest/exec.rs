//! Sessions and commands, against the real agent.

use std::path::Path;

use nido_engine::guest::{Event, GuestError};
use nido_guest_agent::wire::{Exec, Fault, WindowSize};

use crate::rig::{Rig, collect, command, shell, soon, until, within};

#[tokio::test(flavor = "current_thread")]
async fn a_command_has_two_outputs_and_a_status() {
    let rig = Rig::start().await;
    let outcome = rig.sh("echo out; echo err >&2; exit 7").await;
    assert_eq!((&outcome.stdout[..], &outcome.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!((outcome.exited.code, outcome.exited.signal), (Some(7), None));
    let outcome = rig.sh("kill -TERM $$").await;
    assert_eq!((outcome.exited.code, outcome.exited.signal), (None, Some(15)));
}

#[tokio::test(flavor = "current_thread")]
async fn a_command_that_cannot_run_reports_why() {
    let rig = Rig::start().await;
    for (request, fault) in [
        (command(&["no-such-program"]), Fault::CommandNotFound),
        (command(&["/etc/passwd"]), Fault::CannotRun),
        (Exec { user: Some("no-such-user".into()), ..command(&["true"]) }, Fault::NoUser),
        (Exec { directory: Some(b"/no/such".to_vec().into()), ..command(&["true"]) }, Fault::NoDirectory),
    ] {
        let error = rig.guest.exec(request, soon()).await.unwrap_err();
        assert_eq!(error.fault(), Some(fault), "{error}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn standard_input_of_any_length_arrives_completely() {
    let rig = Rig::start().await;
    let running = rig.guest.exec(Exec { stdin: true, ..command(&["cat"]) }, soon()).await.unwrap();
    let sent: Vec<u8> = (0..5_000_000u32).map(|i| (i / 7) as u8).collect();
    let control = running.control.clone();
    let feed = async {
        control.stdin(&sent).await.unwrap();
        control.eof().await.unwrap();
    };
    let ((), outcome) = within(async { tokio::join!(feed, collect(running)) }).await;
    assert!(outcome.unwrap().stdout == sent);
    assert!(matches!(control.stdin(b"late").await, Err(GuestError::Gone)));
    assert!(matches!(control.signal(2).await, Err(GuestError::Gone)));
}

#[tokio::test(flavor = "current_thread")]
async fn a_signal_overtakes_unread_input() {
    let rig = Rig::start().await;
    let running = rig.guest.exec(Exec { stdin: true, ..command(&["sleep", "1000"]) }, soon()).await.unwrap();
    let control = running.control.clone();
    let stuck = tokio::spawn({
        let control = control.clone();
        async move { control.stdin(&vec![0; 4 << 20]).await }
    });
    control.signal(15).await.unwrap();
    assert_eq!(within(collect(running)).await.unwrap().exited.signal, Some(15));
    // What was still to be sent is either refused or was dropped by the agent; it never stays stuck.
    let sent = within(stuck).await.unwrap();
    assert!(matches!(sent, Ok(()) | Err(GuestError::Gone)), "{sent:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_terminal_has_the_size_it_is_given() {
    let rig = Rig::start().await;
    let size = |rows, columns| WindowSize { rows, columns };
    let script = "trap 'stty size; exit 3' WINCH; stty size; while :; do read x; done";
    let request = Exec { pty: Some(size(24, 80)), stdin: true, ..shell(script) };
    let mut running = rig.guest.exec(request, soon()).await.unwrap();
    let mut seen = Vec::new();
    let exited = within(async {
        let mut resized = false;
        loop {
            match running.events.next().await.unwrap().unwrap() {
                Event::Stdout(bytes) => seen.extend(bytes),
                Event::Stderr(bytes) => panic!("a terminal has one output: {bytes:?}"),
                Event::Exited(exited) => break exited,
            }
            if !resized && seen.windows(5).any(|w| w == b"24 80") {
                resized = true;
                running.control.resize(size(50, 132)).await.unwrap();
            }
            if resized {
                // The shell sees the signal once its read returns.
                let _ = running.control.stdin(b"\n").await;
            }
        }
    })
    .await;
    assert!(seen.windows(6).any(|w| w == b"50 132"), "{}", String::from_utf8_lossy(&seen));
    assert_eq!(exited.code, Some(3));
}

#[tokio::test(flavor = "current_thread")]
async fn a_time_limit_ends_the_command() {
    let rig = Rig::start().await;
    let request = Exec { timeout_ms: Some(50), ..shell("sleep 1000 & sleep 1000") };
    let outcome = within(collect(rig.guest.exec(request, soon()).await.unwrap())).await.unwrap();
    assert!(outcome.exited.timed_out);
}

#[tokio::test(flavor = "current_thread")]
async fn dropping_the_events_kills_the_command() {
    let rig = Rig::start().await;
    let mut running = rig.guest.exec(shell("echo $$; sleep 1000"), soon()).await.unwrap();
    let Some(Event::Stdout(pid)) = within(running.events.next()).await.unwrap() else { panic!("no output") };
    let process = Path::new("/proc").join(String::from_utf8(pid).unwrap().trim());
    assert!(process.exists());
    let control = running.control.clone();
    drop(running.events);
    until("the command dies", async || !process.exists()).await;
    assert!(matches!(control.eof().await, Err(GuestError::Gone)));
}

#[tokio::test(flavor = "current_thread")]
async fn unread_output_blocks_only_its_writer() {
    let rig = Rig::start().await;
    let mut stuck = rig.guest.exec(command(&["cat", "/dev/zero"]), soon()).await.unwrap();
    within(stuck.events.next()).await.unwrap();
    for _ in 0..20 {
        assert_eq!(rig.sh("echo on").await.stdout, b"on\n");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn one_session_runs_commands_one_after_another() {
    let rig = Rig::start().await;
    let mut session = rig.guest.session(soon()).await.unwrap();
    for round in 0..3u8 {
        let mut running = session.exec(shell(&format!("exit {round}")), soon()).await.unwrap();
        let Some(Event::Exited(exited)) = within(running.events.next()).await.unwrap() else { panic!("no exit") };
        assert_eq!(exited.code, Some(round));
        assert_eq!(running.events.next().await.unwrap(), None);
        session = running.events.finish().unwrap();
    }
    let running = session.exec(command(&["sleep", "1000"]), soon()).await.unwrap();
    assert!(running.events.finish().is_none(), "a running command keeps its session");
}
