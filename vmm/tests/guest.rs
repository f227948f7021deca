//! The guest's client and the channel, against the real agent.

#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nido_guest_agent::wire::{Connect, Exec, Fault, WindowSize};
use nido_vmm::guest::{Download, Event, Guest, GuestError, Limits, Link, Source, Upload, proxy};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use support::{Rig, TOKEN, collect, command, shell, soon, until, within};

fn nowhere(_: nido_vmm::guest::Progress) {}

fn upload(source: &Path, destination: &Path) -> Upload {
    Upload {
        source: Source::Path(source.into()),
        destination: destination.as_os_str().as_bytes().to_vec(),
        user: None,
        parents: false,
    }
}

fn download(source: &Path, destination: &Path) -> Download {
    Download {
        source: source.as_os_str().as_bytes().to_vec(),
        destination: destination.into(),
        overwrite: false,
        limits: Limits::default(),
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_ping_is_answered_and_says_who_answers() {
    let rig = Rig::start().await;
    let pong = rig.guest.ping(soon()).await.unwrap();
    assert_eq!(pong.agent, env!("CARGO_PKG_VERSION"));
    assert!(!pong.is_init);
    let mut session = rig.guest.session(soon()).await.unwrap();
    assert_eq!(session.agent(), pong.agent);
    session.ping(soon()).await.unwrap();
    session.ping(soon()).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_client_that_is_early_waits_for_the_agent() {
    let mut rig = Rig::without_agent();
    let guest = rig.guest.clone();
    let waiting = tokio::spawn(async move { guest.wait_ready(soon()).await });
    let mut open = rig.channel.activity().open();
    within(open.wait_for(|open| *open == 1)).await.unwrap();
    rig.start_agent();
    waiting.await.unwrap().unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_wrong_token_is_refused() {
    let rig = Rig::start().await;
    let stranger = Guest::new(rig.guest.endpoint().clone(), vec![7; TOKEN.len()]);
    assert!(matches!(stranger.ping(soon()).await, Err(GuestError::TokenRefused)));
    // And waiting does not help, so it is not waited.
    assert!(matches!(stranger.wait_ready(soon()).await, Err(GuestError::TokenRefused)));
}

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
async fn a_command_that_cannot_run_says_why() {
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
async fn standard_input_of_any_length_comes_back_whole() {
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
async fn a_signal_overtakes_input_that_nobody_reads() {
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
async fn output_that_is_not_taken_stops_the_writer_and_nobody_else() {
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

#[tokio::test(flavor = "current_thread")]
async fn many_commands_at_once() {
    let rig = Arc::new(Rig::start().await);
    let all: Vec<_> = (0..40)
        .map(|i| {
            let rig = Arc::clone(&rig);
            tokio::spawn(async move { rig.sh(&format!("head -c 300000 /dev/zero; echo {i} >&2")).await })
        })
        .collect();
    for (i, one) in all.into_iter().enumerate() {
        let outcome = within(one).await.unwrap();
        assert_eq!(outcome.stdout.len(), 300_000);
        assert_eq!(outcome.stderr, format!("{i}\n").into_bytes());
    }
    let mut open = rig.channel.activity().open();
    within(open.wait_for(|open| *open == 0)).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn one_session_too_many_is_told_so() {
    let rig = Rig::start().await;
    let mut open = Vec::new();
    let refused = loop {
        match rig.guest.session(soon()).await {
            Ok(session) => open.push(session),
            Err(error) => break error,
        }
        assert!(open.len() <= 64, "more sessions than agreed");
    };
    assert!(matches!(refused, GuestError::Busy), "{refused}");
    drop(open);
    rig.guest.wait_ready(soon()).await.unwrap();
}

/// A tree with everything the protocol knows in it.
fn make_tree(root: &Path) {
    std::fs::create_dir_all(root.join("empty")).unwrap();
    std::fs::create_dir_all(root.join("deep/er/still")).unwrap();
    std::fs::write(root.join("plain"), b"plain").unwrap();
    std::fs::write(root.join("nothing"), b"").unwrap();
    std::fs::write(root.join("deep/er/still/big"), vec![0x5a; 3_000_001]).unwrap();
    std::fs::write(root.join("comma, new\nline = \u{1b}[31m"), b"odd").unwrap();
    std::fs::write(root.join(std::ffi::OsStr::from_bytes(b"not \xff\xfe utf-8")), b"bytes").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", root.join("absolute")).unwrap();
    std::os::unix::fs::symlink("../nowhere", root.join("deep/dangling")).unwrap();
    std::fs::set_permissions(root.join("plain"), std::fs::Permissions::from_mode(0o640)).unwrap();
    std::fs::set_permissions(root.join("empty"), std::fs::Permissions::from_mode(0o500)).unwrap();
    let past = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_000_000);
    std::fs::File::open(root.join("plain")).unwrap().set_modified(past).unwrap();
    std::fs::File::open(root.join("deep")).unwrap().set_modified(past).unwrap();
}

/// Everything that must survive a copy, as text. Times only where the test set them.
fn describe(root: &Path) -> Vec<String> {
    let mut lines: Vec<_> = walkdir::WalkDir::new(root)
        .into_iter()
        .map(|entry| {
            let entry = entry.unwrap();
            let meta = entry.metadata().unwrap();
            let what = if meta.is_symlink() {
                format!("-> {:?}", std::fs::read_link(entry.path()).unwrap())
            } else if meta.is_dir() {
                format!("dir {:o}", meta.mode() & 0o7777)
            } else {
                let bytes = std::fs::read(entry.path()).unwrap();
                format!(
                    "file {:o} {} {:?}",
                    meta.mode() & 0o7777,
                    bytes.len(),
                    bytes.iter().map(|b| u64::from(*b)).sum::<u64>()
                )
            };
            let time = if meta.is_symlink() { 0 } else { meta.mtime() * 1_000_000_000 + meta.mtime_nsec() };
            format!("{:?} {what} {time}", entry.path().strip_prefix(root).unwrap())
        })
        .collect();
    lines.sort();
    lines
}

#[tokio::test(flavor = "current_thread")]
async fn a_tree_survives_the_way_there_and_back() {
    let rig = Rig::start().await;
    let (here, there, back) = (rig.path("here"), rig.path("there"), rig.path("back"));
    make_tree(&here);
    let sent = within(rig.guest.upload(upload(&here, &there), nowhere, soon())).await.unwrap();
    assert_eq!(describe(&here), describe(&there));
    let got = within(rig.guest.download(download(&there, &back), nowhere, soon())).await.unwrap();
    assert_eq!(describe(&here), describe(&back));
    assert_eq!((sent.entries, sent.bytes, sent.skipped), (got.entries, got.bytes, got.skipped));
    assert_eq!(sent.entries, describe(&here).len() as u64);
    assert_eq!(got.path, back.as_os_str().as_bytes());
    // Nothing else is left beside it.
    let left: Vec<_> = std::fs::read_dir(rig.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.as_bytes().starts_with(b".nido")), "{left:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn an_existing_directory_gets_the_copy_under_its_own_name() {
    let rig = Rig::start().await;
    let (there, back) = (rig.path("there"), rig.path("back"));
    for dir in [&there, &back] {
        std::fs::create_dir(dir).unwrap();
    }
    let file = rig.path("one,two");
    std::fs::write(&file, b"text").unwrap();
    let copied = within(rig.guest.upload(upload(&file, &there), nowhere, soon())).await.unwrap();
    assert_eq!(copied.path, there.join("one,two").as_os_str().as_bytes());
    assert_eq!(std::fs::read(there.join("one,two")).unwrap(), b"text");
    within(rig.guest.download(download(&there, &back), nowhere, soon())).await.unwrap();
    assert_eq!(std::fs::read(back.join("there/one,two")).unwrap(), b"text");
}

#[tokio::test(flavor = "current_thread")]
async fn what_exists_is_replaced_only_if_asked() {
    let rig = Rig::start().await;
    let (new, old) = (rig.path("new"), rig.path("old"));
    std::fs::write(&new, b"new").unwrap();
    std::fs::write(&old, b"old").unwrap();
    let refused = within(rig.guest.download(download(&new, &old), nowhere, soon())).await;
    assert!(matches!(refused, Err(GuestError::PathExists(_))), "{refused:?}");
    assert_eq!(std::fs::read(&old).unwrap(), b"old");
    let request = Download { overwrite: true, ..download(&new, &old) };
    within(rig.guest.download(request, nowhere, soon())).await.unwrap();
    assert_eq!(std::fs::read(&old).unwrap(), b"new");
}

#[tokio::test(flavor = "current_thread")]
async fn directories_are_merged_if_asked() {
    let rig = Rig::start().await;
    let (tree, into) = (rig.path("tree"), rig.path("into"));
    make_tree(&tree);
    std::fs::create_dir_all(into.join("tree/deep")).unwrap();
    std::fs::write(into.join("tree/deep/kept"), b"kept").unwrap();
    std::fs::write(into.join("tree/plain"), b"older").unwrap();
    let refused = within(rig.guest.download(download(&tree, &into), nowhere, soon())).await;
    assert!(matches!(refused, Err(GuestError::PathExists(_))), "{refused:?}");
    let request = Download { overwrite: true, ..download(&tree, &into) };
    within(rig.guest.download(request, nowhere, soon())).await.unwrap();
    assert_eq!(std::fs::read(into.join("tree/deep/kept")).unwrap(), b"kept");
    assert_eq!(std::fs::read(into.join("tree/plain")).unwrap(), b"plain");
    assert_eq!(std::fs::read(into.join("tree/deep/er/still/big")).unwrap().len(), 3_000_001);
}

#[tokio::test(flavor = "current_thread")]
async fn a_merge_never_follows_a_symlink_of_the_destination() {
    let rig = Rig::start().await;
    let (tree, into, outside) = (rig.path("tree"), rig.path("into"), rig.path("outside"));
    std::fs::create_dir_all(tree.join("sub")).unwrap();
    std::fs::write(tree.join("sub/file"), b"text").unwrap();
    std::fs::create_dir_all(into.join("tree")).unwrap();
    std::fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, into.join("tree/sub")).unwrap();
    let request = Download { overwrite: true, ..download(&tree, &into) };
    let refused = within(rig.guest.download(request, nowhere, soon())).await;
    assert!(matches!(refused, Err(GuestError::PathExists(_))), "{refused:?}");
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
}

#[tokio::test(flavor = "current_thread")]
async fn one_file_through_a_reader_and_a_writer() {
    let rig = Rig::start().await;
    let there = rig.path("there");
    let reader = Box::new(std::io::Cursor::new(vec![1u8; 1_000_000]));
    let request = Upload { source: Source::Reader { reader, mode: 0o600 }, ..upload(Path::new("-"), &there) };
    assert_eq!(within(rig.guest.upload(request, nowhere, soon())).await.unwrap().bytes, 1_000_000);
    assert_eq!(there.metadata().unwrap().mode() & 0o7777, 0o600);
    let (mut out, writer) = std::io::pipe().unwrap();
    let read = std::thread::spawn(move || std::io::read_to_string(&mut out).unwrap());
    let source = there.as_os_str().as_bytes().to_vec();
    let got = rig.guest.download_to(source, writer, Limits::default(), nowhere, soon());
    assert_eq!(within(got).await.unwrap().bytes, 1_000_000);
    assert_eq!(read.join().unwrap(), "\u{1}".repeat(1_000_000));
    let source = rig.dir.path().as_os_str().as_bytes().to_vec();
    let refused = within(rig.guest.download_to(source, std::io::sink(), Limits::default(), nowhere, soon())).await;
    assert_eq!(refused.unwrap_err().fault(), Some(Fault::WrongType));
}

#[tokio::test(flavor = "current_thread")]
async fn what_is_missing_is_said_to_be_missing() {
    let rig = Rig::start().await;
    let missing = rig.path("missing");
    let error = within(rig.guest.upload(upload(&missing, &rig.path("x")), nowhere, soon())).await.unwrap_err();
    assert!(matches!(&error, GuestError::PathNotFound(path) if *path == missing), "{error}");
    let error = within(rig.guest.download(download(&missing, &rig.path("x")), nowhere, soon())).await.unwrap_err();
    assert_eq!(error.fault(), Some(Fault::NotFound), "{error}");
    let into = rig.path("no/such/dir");
    let error =
        within(rig.guest.download(download(Path::new("/etc/hosts"), &into), nowhere, soon())).await.unwrap_err();
    assert!(matches!(error, GuestError::PathNotFound(_)), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_full_guest_disk_is_reported_as_such_and_keeps_the_old_file() {
    let rig = Rig::start_with_small_disk().await;
    let big = rig.path("big");
    std::fs::write(&big, vec![1; 8 << 20]).unwrap();
    let there = rig.path("full/file");
    let small = Box::new(std::io::Cursor::new(b"old".to_vec()));
    let request = Upload { source: Source::Reader { reader: small, mode: 0o644 }, ..upload(&big, &there) };
    within(rig.guest.upload(request, nowhere, soon())).await.unwrap();
    for _ in 0..5 {
        let error = within(rig.guest.upload(upload(&big, &there), nowhere, soon())).await.unwrap_err();
        assert_eq!(error.fault(), Some(Fault::DiskFull), "{error}");
    }
    let mut got = rig.path("got");
    within(rig.guest.download(download(&there, &got), nowhere, soon())).await.unwrap();
    assert_eq!(std::fs::read(&got).unwrap(), b"old");
    got.pop();
}

#[tokio::test(flavor = "current_thread")]
async fn a_full_host_disk_is_reported_as_such() {
    let rig = Rig::start().await;
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let error = within(rig.guest.download_to(b"/etc/passwd".to_vec(), full, Limits::default(), nowhere, soon())).await;
    assert!(matches!(error, Err(GuestError::DiskFull(_))), "{error:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn dropping_a_download_leaves_nothing() {
    let rig = Rig::start().await;
    let (endless, into) = (rig.path("endless"), rig.path("into"));
    std::fs::create_dir(&into).unwrap();
    std::fs::File::create(&endless).unwrap().set_len(1 << 40).unwrap();
    let (moved, mut started) = tokio::sync::watch::channel(0);
    let progress = move |progress: nido_vmm::guest::Progress| {
        moved.send_replace(progress.bytes);
    };
    let copy = rig.guest.download(download(&endless, &into), progress, soon());
    tokio::select! {
        outcome = copy => panic!("ended by itself: {outcome:?}"),
        moving = started.wait_for(|bytes| *bytes > 0) => drop(moving.unwrap()),
    }
    until("the copy is removed", async || std::fs::read_dir(&into).unwrap().count() == 0).await;
}

/// A server that sends back what it gets and half-closes when its client does.
async fn echo_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = client.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
                let _ = to.write_all(b" and goodbye").await;
            });
        }
    });
    port
}

#[tokio::test(flavor = "current_thread")]
async fn a_port_is_forwarded_and_half_closes_are_kept() {
    let rig = Rig::start().await;
    let to = Connect { host: None, port: echo_server().await };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = listener.local_addr().unwrap();
    let guest = rig.guest.clone();
    let forward = tokio::spawn(async move { guest.forward(listener, to, 4, || ()).await });
    // More than four in all, so places are given back.
    for size in [0, 1, 100_000, 3_000_000, 5, 6, 7] {
        let mut client = TcpStream::connect(here).await.unwrap();
        let sent = vec![0x61; size];
        let (mut from, mut into) = client.split();
        let mut got = Vec::new();
        let send = async {
            into.write_all(&sent).await.unwrap();
            into.shutdown().await.unwrap();
        };
        within(async { tokio::join!(send, async { from.read_to_end(&mut got).await.unwrap() }) }).await;
        assert_eq!(got.len(), size + " and goodbye".len());
    }
    forward.abort();
}

#[tokio::test(flavor = "current_thread")]
async fn a_port_nobody_listens_on_is_said_to_be_closed() {
    let rig = Rig::start().await;
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = unused.local_addr().unwrap().port();
    drop(unused);
    let error = rig.guest.connect(&Connect { host: None, port }, soon()).await.unwrap_err();
    assert_eq!(error.fault(), Some(Fault::Unreachable), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_proxy_ends_when_the_guest_does() {
    let rig = Rig::start().await;
    let to = Connect { host: None, port: echo_server().await };
    let tunnel = rig.guest.connect(&to, soon()).await.unwrap();
    let (mut keyboard, input) = tokio::io::duplex(64);
    let (output, mut screen) = tokio::io::duplex(64);
    let mut shown = String::new();
    let use_it = async {
        keyboard.write_all(b"hello").await.unwrap();
        keyboard.shutdown().await.unwrap();
        screen.read_to_string(&mut shown).await.unwrap();
    };
    let (ended, ()) = within(async { tokio::join!(proxy(tunnel, input, output), use_it) }).await;
    ended.unwrap();
    assert_eq!(shown, "hello and goodbye");
}

/// A client of a forwarded port closes; the server inside does not look and goes on sending. Without a reset of the
/// half-closed stream the agent's session stayed for ever, and after 64 such clients the agent was busy.
#[tokio::test(flavor = "current_thread")]
async fn a_connection_whose_client_has_gone_does_not_stay() {
    let rig = Rig::start().await;
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = Connect { host: None, port: server.local_addr().unwrap().port() };
    tokio::spawn(async move {
        while let Ok((mut client, _)) = server.accept().await {
            tokio::spawn(async move { while client.write_all(&[0; 10_000]).await.is_ok() {} });
        }
    });
    for _ in 0..3 {
        let mut tunnel = rig.guest.connect(&to, soon()).await.unwrap();
        within(tunnel.read_exact(&mut [0; 100])).await.unwrap();
        tunnel.shutdown().await.unwrap();
        within(tunnel.read_exact(&mut [0; 100])).await.unwrap();
    }
    until("the sessions end", async || rig.guest.ping(soon()).await.unwrap().sessions == 1).await;
}

/// The same where the server is silent: then nothing but the client's own end can tell that nobody is left, and the
/// VM would never count as idle.
#[tokio::test(flavor = "current_thread")]
async fn a_half_closed_connection_ends_with_its_client() {
    let rig = Rig::start().await;
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = Connect { host: None, port: server.local_addr().unwrap().port() };
    let mut tunnel = rig.guest.connect(&to, soon()).await.unwrap();
    let (mut inside, _) = server.accept().await.unwrap();
    tunnel.shutdown().await.unwrap();
    assert_eq!(within(inside.read(&mut [0])).await.unwrap(), 0);
    let mut open = rig.channel.activity().open();
    within(open.wait_for(|open| *open == 1)).await.unwrap();
    drop(tunnel);
    within(open.wait_for(|open| *open == 0)).await.unwrap();
    // The agent notices as a host without it would: when the server says something, or closes.
    drop(inside);
    until("the session ends", async || rig.guest.ping(soon()).await.unwrap().sessions == 1).await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_dead_agent_is_noticed_and_a_new_one_served() {
    let mut rig = Rig::start().await;
    let running = rig.guest.exec(command(&["sleep", "1000"]), soon()).await.unwrap();
    rig.stop_agent();
    assert!(matches!(within(collect(running)).await, Err(GuestError::Gone)));
    let mut link = rig.channel.link();
    within(link.wait_for(|link| *link == Link::Waiting)).await.unwrap();
    rig.start_agent();
    within(link.wait_for(|link| *link == Link::Up)).await.unwrap();
    assert_eq!(rig.sh("echo again").await.stdout, b"again\n");
}

#[tokio::test(flavor = "current_thread")]
async fn the_supervisors_own_sessions_and_mere_looks_are_no_activity() {
    let rig = Rig::start().await;
    let mut open = rig.channel.activity().open();
    within(open.wait_for(|open| *open == 0)).await.unwrap();
    open.mark_unchanged();
    let mut session = rig.channel.session(TOKEN, soon()).await.unwrap();
    session.ping(soon()).await.unwrap();
    let look = tokio::net::UnixStream::connect(rig.path("agent.sock")).await.unwrap();
    drop(look);
    session.ping(soon()).await.unwrap();
    assert!(!open.has_changed().unwrap());
    rig.guest.ping(soon()).await.unwrap();
    assert!(open.has_changed().unwrap());
    assert_ne!(rig.channel.activity().bytes(), (0, 0));
}
