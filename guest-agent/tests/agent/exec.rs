//! Commands: streams, exits, signals, time limits, terminals, and many at once.

use std::time::Duration;

use nido_guest_agent::wire::{Exec, Fault, STDIN_WINDOW, ToGuest, ToHost, WindowSize, kind};

use super::channel::gone;
use crate::support::{Answer, Host, command, shell, soon};

#[tokio::test]
async fn streams_and_exit_codes_are_separate() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let output = session.run("echo out; echo err >&2; exit 42").await;
    assert_eq!(
        (output.stdout.as_slice(), output.stderr.as_slice(), output.code),
        (&b"out\n"[..], &b"err\n"[..], Some(42))
    );
    let output = session.run("kill -9 $$").await;
    assert_eq!((output.code, output.signal, output.timed_out), (None, Some(9), false));
}

#[tokio::test]
async fn arguments_environment_and_directory_arrive_as_bytes() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let exec = Exec {
        env: vec![b"ODD=a\nb\xff".to_vec().into(), b"PATH=/usr/bin:/bin".to_vec().into()],
        directory: Some(b"/usr".to_vec().into()),
        ..command(&["sh", "-c", "pwd; printf '%s|' \"$ODD\" \"$PATH\" \"$HOME\" \"$1\"", "sh", "two words\t"])
    };
    session.start(exec).await;
    let output = session.finish().await;
    let home = of_passwd(5);
    let wanted = [b"/usr\na\nb\xff|/usr/bin:/bin|", home.as_bytes(), b"|two words\t|"].concat();
    assert_eq!(output.stdout, wanted);
}

#[tokio::test]
async fn failures_to_run_a_command_are_distinguished() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let script = host.path("script");
    std::fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let directory = |path: &str| Exec { directory: Some(path.as_bytes().to_vec().into()), ..shell("true") };
    let user = |name: &str| Exec { user: Some(name.into()), ..shell("true") };
    for (exec, fault) in [
        (command(&["no-such-command"]), Fault::CommandNotFound),
        (command(&["/no/such/command"]), Fault::CommandNotFound),
        (command(&["/etc/passwd"]), Fault::CannotRun),
        (command(&["/etc"]), Fault::CannotRun),
        (command(&[script.to_str().unwrap()]), Fault::CannotRun),
        (directory("/no/such/directory"), Fault::NoDirectory),
        (directory("/etc/passwd"), Fault::NoDirectory),
        (user("no-such-user"), Fault::NoUser),
        (user("4294967295"), Fault::NoUser),
        (user("0:no-such-group"), Fault::NoUser),
        (user("root:"), Fault::NoUser),
        (Exec::default(), Fault::Invalid),
        (command(&[""]), Fault::Invalid),
        (Exec { env: vec![b"=x".to_vec().into()], ..shell("true") }, Fault::Invalid),
        (Exec { pty: Some(WindowSize { rows: 0, columns: 1 }), ..shell("true") }, Fault::Invalid),
    ] {
        session.send(&ToGuest::Exec(exec.clone())).await;
        assert_eq!(session.failure().await, fault, "{exec:?}");
    }
    assert_eq!(session.run("echo still here").await.stdout, b"still here\n");
}

#[tokio::test]
async fn standard_input_is_streamed_under_credit() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    session.start(Exec { stdin: true, ..command(&["cat"]) }).await;
    let piece: Vec<u8> = (0..=255).cycle().take(50_000).collect();
    let total = 60 * piece.len();
    let (mut credit, mut sent, mut received) = (STDIN_WINDOW as usize, 0, Vec::new());
    while received.len() < total {
        if sent < total && credit >= piece.len() {
            session.send_raw(kind::STDIN, &piece).await;
            credit -= piece.len();
            sent += piece.len();
            if sent == total {
                session.send(&ToGuest::StdinEof).await;
            }
            continue;
        }
        match session.next().await {
            Some(Answer::Raw(kind::STDOUT, bytes)) => received.extend(bytes),
            Some(Answer::Message(ToHost::StdinCredit(more))) => credit += more as usize,
            other => panic!("{other:?}"),
        }
    }
    assert!(received.chunks(piece.len()).all(|chunk| chunk == piece));
    assert_eq!(session.finish().await.code, Some(0));
}

#[tokio::test]
async fn more_input_than_the_window_ends_the_session() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let pid = session.start(Exec { stdin: true, ..shell("sleep 1000") }).await;
    for _ in 0..3 {
        session.send_raw(kind::STDIN, &vec![0; STDIN_WINDOW as usize / 2]).await;
    }
    loop {
        match session.next().await {
            Some(Answer::Message(ToHost::StdinCredit(_))) => {}
            Some(Answer::Message(ToHost::Failed(failed))) => break assert_eq!(failed.fault, Fault::Invalid),
            other => panic!("{other:?}"),
        }
    }
    gone(pid).await;
}

#[tokio::test]
async fn a_command_that_ignores_its_input_can_still_be_signalled() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    session.start(Exec { stdin: true, ..shell("sleep 1000; true") }).await;
    session.send_raw(kind::STDIN, &vec![0; STDIN_WINDOW as usize]).await;
    session.send(&ToGuest::Signal(15)).await;
    assert_eq!(session.finish().await.signal, Some(15));
}

#[tokio::test]
async fn a_command_whose_output_is_not_read_can_still_be_signalled() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let pid = session.start(command(&["cat", "/dev/zero"])).await;
    // The other session shows that the agent is past the signal before anything is read.
    session.send(&ToGuest::Signal(9)).await;
    gone(pid).await;
    let output = session.finish().await;
    assert_eq!(output.signal, Some(9));
}

#[tokio::test]
async fn input_for_a_command_that_has_closed_it_is_dropped() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    session.start(Exec { stdin: true, ..shell("exec 0<&-; echo closed; read line; sleep 1000") }).await;
    assert_eq!(session.next().await, Some(Answer::Raw(kind::STDOUT, b"closed\n".to_vec())));
    for _ in 0..3 {
        session.send_raw(kind::STDIN, &vec![0; STDIN_WINDOW as usize]).await;
        let mut credited = 0;
        while credited < STDIN_WINDOW {
            match session.next().await {
                Some(Answer::Message(ToHost::StdinCredit(more))) => credited += more,
                Some(Answer::Raw(kind::STDERR, _)) => {}
                other => panic!("{other:?}"),
            }
        }
    }
    session.send(&ToGuest::Signal(9)).await;
    assert_eq!(session.finish().await.signal, Some(9));
}

#[tokio::test]
async fn the_time_limit_kills_the_whole_group() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let script = "trap '' TERM HUP; sleep 1000 & sleep 1000";
    let pid = session.start(Exec { timeout_ms: Some(100), ..shell(script) }).await;
    let output = session.finish().await;
    assert_eq!((output.code, output.signal, output.timed_out), (None, Some(9), true));
    gone(pid).await;
}

#[tokio::test]
async fn a_closed_session_kills_the_whole_group() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let pid = session.start(shell("trap '' HUP TERM; sleep 1000 & sleep 1000")).await;
    drop(session);
    gone(pid).await;
    host.open().await;
}

#[tokio::test]
async fn large_output_arrives_whole() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let output = session.run("head -c 30000000 /dev/zero | tr '\\0' x; head -c 3000000 /dev/zero >&2").await;
    assert_eq!((output.stdout.len(), output.stderr.len(), output.code), (30_000_000, 3_000_000, Some(0)));
    assert!(output.stdout.iter().all(|&byte| byte == b'x'));
}

#[tokio::test]
async fn background_processes_do_not_delay_the_exit() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let output = session.run("sleep 1000 & echo $!; head -c 60000 /dev/zero; exit 5").await;
    assert_eq!(output.code, Some(5));
    let line = output.stdout.iter().position(|&byte| byte == b'\n').unwrap();
    assert_eq!(output.stdout.len() - line - 1, 60_000);
    let background = std::str::from_utf8(&output.stdout[..line]).unwrap().to_owned();
    // It was left running on purpose, as by any shell.
    assert_eq!(session.run(&format!("kill {background}")).await.code, Some(0));
    let output = session.run("cat /dev/zero & echo $! >&2; exit 6").await;
    assert_eq!(output.code, Some(6));
    let background = String::from_utf8(output.stderr).unwrap();
    session.run(&format!("kill -9 {background}")).await;
}

/// Waits until a file has grown to hold `text`.
async fn holds(path: &std::path::Path, text: &str) {
    let written = async {
        while !std::fs::read_to_string(path).unwrap_or_default().contains(text) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon("a file", written).await;
}

#[tokio::test]
async fn background_processes_can_keep_writing() {
    // The end of the command took the readers away, and the next line killed its background processes.
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let (go, log) = (host.path("go"), host.path("log"));
    std::fs::write(&log, "").unwrap();
    let script = format!(
        "(until test -e {0}; do sleep 0.01; done; i=0; while test $i -lt 3000; do echo \"$i: a line that fills more \
         than one pipe in the end\"; echo error >&2; i=$((i+1)); done; echo alive >>{1}) & exit 7",
        go.display(),
        log.display()
    );
    assert_eq!(session.run(&script).await.code, Some(7));
    drop(session);
    host.open().await;
    std::fs::write(&go, "").unwrap();
    holds(&log, "alive").await;
}

/// Starts a command whose children leave its process group and session, and waits until all of them run.
async fn start_scattered(host: &mut Host, session: &mut crate::support::Session, timeout_ms: Option<u64>) -> Vec<u32> {
    let pids = host.path("pids");
    let script = format!(
        "setsid sh -c 'echo $$ >>{0}; setsid sh -c \"echo \\$\\$ >>{0}; exec sleep 1000\"; :' & \
         timeout 1000 sh -c 'echo $$ >>{0}; exec sleep 1000' & \
         until test $(wc -l <{0}) = 3; do sleep 0.01; done; echo all >>{0}; wait",
        pids.display()
    );
    std::fs::write(&pids, "").unwrap();
    session.start(Exec { timeout_ms, ..shell(&script) }).await;
    holds(&pids, "all").await;
    let text = std::fs::read_to_string(&pids).unwrap();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

#[tokio::test]
async fn the_end_of_a_session_reaches_children_in_other_sessions_and_groups() {
    // Only the process group was killed: children of setsid, timeout and interactive shells stayed.
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let pids = start_scattered(&mut host, &mut session, None).await;
    assert_eq!(pids.len(), 3);
    drop(session);
    for pid in pids {
        gone(pid).await;
    }
}

#[tokio::test]
async fn the_time_limit_reaches_children_in_other_sessions_and_groups() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let pids = start_scattered(&mut host, &mut session, Some(5000)).await;
    assert!(session.finish().await.timed_out);
    for pid in pids {
        gone(pid).await;
    }
}

#[tokio::test]
async fn a_request_that_names_something_long_is_refused_and_the_session_stays() {
    // The refusal repeated the name, did not fit in a frame, and the session was closed instead.
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let long = vec![b'x'; 200_000];
    let exec = Exec { directory: Some(long.into()), ..shell("true") };
    session.send(&ToGuest::Exec(exec)).await;
    assert_eq!(session.failure().await, Fault::NoDirectory);
    assert_eq!(session.run("echo still here").await.stdout, b"still here\n");
}

#[tokio::test]
async fn a_terminal_has_a_size_a_name_and_one_stream() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let pty = Some(WindowSize { rows: 33, columns: 111 });
    let exec = Exec { pty, term: Some("vt100".into()), ..shell("tty >/dev/null && stty size; echo $TERM >&2") };
    session.start(exec).await;
    let output = session.finish().await;
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "33 111\r\nvt100\r\n");
    assert_eq!(output.code, Some(0));
}

/// The window is full and the command has ended before anything is read.
#[tokio::test]
async fn a_terminal_that_is_read_late_loses_nothing() {
    // With the frames' heads a little more than the window; a terminal holds some kilobytes of its own.
    const BYTES: usize = 256 * 1024;
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let pty = Some(WindowSize { rows: 24, columns: 80 });
    let script = format!("head -c {BYTES} /dev/zero | tr '\\0' x");
    let pid = session.start(Exec { pty, ..shell(&script) }).await;
    // The window is full, the rest lies in the terminal, the command has ended.
    let ended = || !std::path::Path::new(&format!("/proc/{pid}")).exists();
    soon("the command's end", async {
        while !ended() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    // Another session is answered nevertheless; by then the first would have been given up.
    let mut other = host.open().await;
    assert_eq!(other.run("sleep 0.4").await.code, Some(0));
    let output = session.finish().await;
    assert_eq!((output.stdout.len(), output.code), (BYTES, Some(0)));
}

/// Reads a terminal until it has shown some text.
async fn see(session: &mut crate::support::Session, text: &str) {
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains(text) {
        match session.next().await {
            Some(Answer::Raw(kind::STDOUT, bytes)) => seen.extend(bytes),
            Some(Answer::Message(ToHost::StdinCredit(_))) => {}
            other => panic!("{other:?} instead of {text:?} after {:?}", String::from_utf8_lossy(&seen)),
        }
    }
}

#[tokio::test]
async fn a_terminal_can_be_typed_at_resized_and_interrupted() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let pty = Some(WindowSize { rows: 24, columns: 80 });
    let script = "echo ready; while read line; do echo got-$line; stty size; done; echo end; exec cat";
    session.start(Exec { pty, stdin: true, ..shell(script) }).await;
    see(&mut session, "ready").await;
    session.send(&ToGuest::Resize(WindowSize { rows: 50, columns: 132 })).await;
    session.send_raw(kind::STDIN, b"word\n").await;
    see(&mut session, "50 132").await;
    session.send(&ToGuest::StdinEof).await;
    see(&mut session, "end").await;
    session.send_raw(kind::STDIN, b"echo\n").await;
    // Once by the terminal and once by cat.
    see(&mut session, "echo\r\necho\r\n").await;
    session.send_raw(kind::STDIN, b"\x03").await;
    assert_eq!(session.finish().await.signal, Some(2));
}

/// A field of this user's line in the list of users.
fn of_passwd(field: usize) -> String {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let users = std::fs::read_to_string("/etc/passwd").unwrap();
    let mut lines = users.lines().map(|line| line.split(':').collect::<Vec<_>>());
    lines.find(|fields| fields.get(2) == Some(&uid.as_str())).unwrap()[field].to_owned()
}

fn login_shell() -> String {
    of_passwd(6)
}

#[tokio::test]
async fn a_login_shell_is_one() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    session.start(Exec { login_shell: true, stdin: true, ..Exec::default() }).await;
    session.send_raw(kind::STDIN, b"echo $0; exit 9\n").await;
    let output = session.finish().await;
    // Users without a shell, such as `nobody`, have one that reports that and fails.
    match login_shell() {
        shell if shell.ends_with("nologin") || shell.ends_with("false") => assert_eq!(output.code, Some(1)),
        _ => assert_eq!((output.stdout.first(), output.code), (Some(&b'-'), Some(9))),
    }
}

#[tokio::test]
async fn many_commands_at_once_do_not_disturb_each_other() {
    let mut host = Host::start().await;
    let mut stuck = host.open().await;
    stuck.start(shell("sleep 1000")).await;
    let mut flooding = host.open().await;
    flooding.start(command(&["cat", "/dev/zero"])).await;
    let mut sessions = Vec::new();
    for number in 0..40 {
        let mut session = host.open().await;
        session.send(&ToGuest::Exec(shell(&format!("sleep 0.1; echo {number}; exit {number}")))).await;
        sessions.push(session);
    }
    for (number, session) in sessions.iter_mut().enumerate() {
        assert!(matches!(session.message().await, ToHost::Started(_)));
        let output = session.finish().await;
        assert_eq!(output.code.map(usize::from), Some(number));
        assert_eq!(output.stdout, format!("{number}\n").as_bytes());
    }
}

#[tokio::test]
async fn a_thousand_short_commands_lose_no_exit() {
    let mut host = Host::start().await;
    let mut sessions = [host.open().await, host.open().await, host.open().await, host.open().await];
    for round in 0..250u32 {
        for session in &mut sessions {
            session.send(&ToGuest::Exec(command(&["true"]))).await;
        }
        for session in &mut sessions {
            assert!(matches!(session.message().await, ToHost::Started(_)), "{round}");
            assert_eq!(session.finish().await.code, Some(0), "{round}");
        }
    }
}

#[tokio::test]
async fn commands_inherit_nothing_of_the_agent() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let output = session.run("ls /proc/self/fd; env | cut -d= -f1 | sort | tr '\\n' ' '").await;
    let text = String::from_utf8(output.stdout).unwrap();
    // 3 is the directory that ls reads.
    assert_eq!(text, "0\n1\n2\n3\nHOME LANG LOGNAME PATH PWD SHELL USER ");
    let output = session.run("sed -nE 's/^Sig(Ign|Blk):\\t[0-9a-f]{8}//p' /proc/self/status").await;
    let masks = String::from_utf8(output.stdout).unwrap();
    // Signals from 32 on belong to the C library.
    let standard = masks.lines().map(|mask| u32::from_str_radix(mask, 16).unwrap() & 0x7fff_ffff);
    assert_eq!(standard.collect::<Vec<_>>(), [0, 0]);
}

#[tokio::test]
async fn another_user_gets_its_own_ids_home_and_streams() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    if !rustix::process::geteuid().is_root() {
        // An agent that is not root cannot switch users, and reports that.
        session.send(&ToGuest::Exec(Exec { user: Some("root".into()), ..shell("true") })).await;
        assert_eq!(session.failure().await, Fault::Denied);
        return;
    }
    for (user, ids) in
        [("12345", "12345\n0\n0\n/\n"), ("1:4711", "1\n4711\n4711\n"), (":7", "0\n7\n7\n"), ("0:0", "0\n0\n")]
    {
        session.start(Exec { user: Some(user.into()), ..shell("id -u; id -g; id -G; echo $HOME") }).await;
        let output = String::from_utf8(session.finish().await.stdout).unwrap();
        assert!(output.starts_with(ids), "{user}: {output}");
    }
    let script = "id -u; id -G; echo $HOME $USER; pwd; echo named >/dev/stderr; umask";
    let wanted = |pty| Exec { user: Some("nobody".into()), pty, ..shell(script) };
    session.start(wanted(None)).await;
    let output = session.finish().await;
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "65534\n65534\n/nonexistent nobody\n/\n0022\n");
    assert_eq!(output.stderr, b"named\n");
    session.start(wanted(Some(WindowSize { rows: 24, columns: 80 }))).await;
    let output = session.finish().await;
    assert!(String::from_utf8(output.stdout).unwrap().contains("named\r\n"));
}
