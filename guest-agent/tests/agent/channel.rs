//! Hello, limits, broken peers, and finding each other again.

use nido_guest_agent::wire::{
    Connect, Failed, Fault, MAX_SESSIONS, MAX_TUNNELS, MAX_WORK, Refusal, Refused, ToGuest, ToHost, VERSION, kind,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Answer, Host, Session, TOKEN, agree, shell, soon};

async fn refusal(session: &mut Session) -> Refusal {
    match session.message().await {
        ToHost::Refused(Refused { reason, oldest: VERSION, newest: VERSION }) => reason,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_ping_is_answered() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    session.send(&ToGuest::Ping).await;
    let ToHost::Pong(pong) = session.message().await else { panic!("no pong") };
    assert_eq!((pong.sessions, pong.is_init), (1, false));
    assert!(pong.uptime_ms > 0);
}

#[tokio::test]
async fn a_request_may_follow_the_hello_at_once() {
    let mut host = Host::start().await;
    let mut session = host.stream().await;
    let hello = nido_guest_agent::wire::Hello { oldest: 1, newest: VERSION, token: TOKEN.to_vec().into(), nonce: 3 };
    let both = [ToGuest::Hello(hello), ToGuest::Ping].map(|m| nido_guest_agent::wire::encode(&m).unwrap()).concat();
    session.stream.write_all(&both).await.unwrap();
    assert!(matches!(session.message().await, ToHost::Welcome(_)));
    assert!(matches!(session.message().await, ToHost::Pong(_)));
}

#[tokio::test]
async fn a_wrong_token_version_or_first_message_is_refused() {
    let mut host = Host::start().await;
    for (token, oldest, newest, reason) in [
        (&[8; 32][..], VERSION, VERSION, Refusal::Token),
        (b"", VERSION, VERSION, Refusal::Token),
        (&TOKEN, VERSION + 1, VERSION + 9, Refusal::Version),
    ] {
        let mut session = host.stream().await;
        let Some(ToHost::Refused(refused)) = session.greet(token, oldest, newest).await else { panic!("not refused") };
        assert_eq!(refused.reason, reason);
        assert_eq!(session.next().await, None);
    }
    let mut session = host.stream().await;
    session.send(&ToGuest::Ping).await;
    assert_eq!(refusal(&mut session).await, Refusal::NoHello);
    let mut session = host.stream().await;
    session.stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert_eq!(refusal(&mut session).await, Refusal::NoHello);
    host.open().await;
}

#[tokio::test]
async fn a_host_that_breaks_the_protocol_loses_its_session_only() {
    let mut host = Host::start().await;
    let oversized = [kind::MESSAGE, 0xff, 0xff, 0xff];
    let unknown = [0x77, 0, 0, 0];
    let not_cbor = [kind::MESSAGE, 0, 0, 2, 0xff, 0xff];
    let stray = [kind::FILE_DATA, 0, 0, 1, b'x'];
    let mut bystander = host.open().await;
    for bytes in [&oversized[..], &unknown, &not_cbor, &stray] {
        let mut session = host.open().await;
        session.stream.write_all(bytes).await.unwrap();
        assert_eq!(session.failure().await, Fault::Invalid);
        assert_eq!(session.next().await, None);
    }
    bystander.send(&ToGuest::Ping).await;
    assert!(matches!(bystander.message().await, ToHost::Pong(_)));
}

#[tokio::test]
async fn a_session_beyond_the_limit_is_refused_as_busy_and_the_others_stay() {
    let mut host = Host::start().await;
    let mut open = Vec::new();
    for _ in 0..MAX_SESSIONS {
        open.push(host.open().await);
    }
    let mut refused = host.stream().await;
    let Some(ToHost::Refused(why)) = refused.greet(&TOKEN, VERSION, VERSION).await else { panic!("not refused") };
    assert_eq!(why.reason, Refusal::Busy);
    for session in &mut open {
        session.send(&ToGuest::Ping).await;
        assert!(matches!(session.message().await, ToHost::Pong(_)));
    }
}

#[tokio::test]
async fn idle_connections_take_no_places_of_commands() {
    // Connections and commands shared one number of places: idle connections locked out exec, copies and power-off.
    let mut host = Host::start().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connect = ToGuest::Connect(Connect { host: None, port: listener.local_addr().unwrap().port() });
    let mut tunnels = Vec::new();
    for _ in 0..MAX_TUNNELS {
        let mut session = host.open().await;
        session.send(&connect).await;
        assert!(matches!(session.message().await, ToHost::Connected));
        tunnels.push((session, soon("a connection", listener.accept()).await.unwrap()));
    }
    let mut refused = host.open().await;
    refused.send(&connect).await;
    let ToHost::Refused(why) = refused.message().await else { panic!("not refused") };
    assert_eq!(why.reason, Refusal::Busy);
    assert_eq!(host.open().await.run("exit 3").await.code, Some(3));
    // A connection that ends gives its place to the next, also where the server keeps its half open.
    let (mut half, _server) = tunnels.swap_remove(0);
    half.stream.shutdown().await.unwrap();
    let again = async {
        loop {
            let mut session = host.open().await;
            session.send(&connect).await;
            if matches!(session.message().await, ToHost::Connected) {
                return;
            }
        }
    };
    soon("a free place", again).await;
}

#[tokio::test]
async fn a_command_too_many_waits_for_its_turn_and_pings_do_not() {
    let mut host = Host::start().await;
    let mut running = Vec::new();
    for _ in 0..MAX_WORK {
        let mut session = host.open().await;
        session.start(shell("exec sleep 1000")).await;
        running.push(session);
    }
    let mut waiting = host.open().await;
    waiting.send(&ToGuest::Exec(shell("exit 4"))).await;
    // One that is given up while it waits is never run.
    let mark = host.path("mark");
    let mut given_up = host.open().await;
    given_up.send(&ToGuest::Exec(shell(&format!("touch {}", mark.display())))).await;
    drop(given_up);
    let mut ping = host.open().await;
    ping.send(&ToGuest::Ping).await;
    assert!(matches!(ping.message().await, ToHost::Pong(_)));
    drop(running);
    assert!(matches!(waiting.message().await, ToHost::Started(_)));
    assert_eq!(waiting.finish().await.code, Some(4));
    assert!(!mark.exists());
}

#[tokio::test]
async fn unexpected_input_between_requests_is_dropped() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    session.send(&ToGuest::Exec(nido_guest_agent::wire::Exec { stdin: true, ..shell("exit 3") })).await;
    session.send_raw(kind::STDIN, b"for a command that ended").await;
    session.send(&ToGuest::StdinEof).await;
    session.send(&ToGuest::Signal(15)).await;
    assert!(matches!(session.message().await, ToHost::Started(_)));
    session.finish().await;
    session.send_raw(kind::STDIN, b"more").await;
    session.send(&ToGuest::Signal(15)).await;
    session.send(&ToGuest::Ping).await;
    assert!(matches!(session.message().await, ToHost::Pong(_)));
}

#[tokio::test]
async fn the_agent_is_found_again_after_noise_and_half_a_frame() {
    let mut host = Host::start_silent().await;
    let mut channel = host.accept().await;
    // What an interrupted host may have sent: noise, half a preamble, a preamble without its end.
    channel.write_all(&[0xff, b'N', b'I', 0, 1, 2, 3]).await.unwrap();
    agree(&mut channel, 1).await;
    // A multiplexer's frame that promises 1 MiB and ends after ten bytes.
    let head = [0, 0, 0, 1, 0, 0, 0, 1, 0, 0x10, 0, 0];
    channel.write_all(&head).await.unwrap();
    channel.write_all(&[0; 10]).await.unwrap();
    agree(&mut channel, 2).await;
    host.multiplex(channel);
    host.open().await;
}

#[tokio::test]
async fn a_new_host_on_the_same_channel_ends_what_the_old_one_ran() {
    let mut host = Host::start_silent().await;
    let mut channel = host.accept().await;
    agree(&mut channel, 1).await;
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    host.multiplex(ours);
    // The test stands between the multiplexer and the agent, so that it can drop the one and keep the other.
    let (mut from_mux, mut to_mux) = theirs.into_split();
    let (mut from_agent, mut to_agent) = channel.into_split();
    let pump = tokio::spawn(async move {
        tokio::select! {
            _ = tokio::io::copy(&mut from_mux, &mut to_agent) => {}
            _ = tokio::io::copy(&mut from_agent, &mut to_mux) => {}
        }
        (from_agent, to_agent)
    });
    let mut session = host.open().await;
    let pid = session.start(shell("sleep 1000")).await;
    drop(session);
    let mut orphan = host.open().await;
    let second = orphan.start(shell("sleep 1000")).await;
    gone(pid).await;
    host.multiplex(tokio::net::UnixStream::pair().unwrap().0);
    let (from_agent, to_agent) = soon("the old multiplexer's end", pump).await.unwrap();
    let mut channel = from_agent.reunite(to_agent).unwrap();
    agree(&mut channel, 2).await;
    gone(second).await;
    host.multiplex(channel);
    host.open().await;
}

#[tokio::test]
async fn a_disconnect_ends_the_hosts_commands_and_it_may_reconnect() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    let pid = session.start(shell("trap '' HUP TERM; sleep 1000 & wait; sleep 1000")).await;
    // Dropping the multiplexer closes the channel; the agent connects again as QEMU does.
    host.multiplex(tokio::net::UnixStream::pair().unwrap().0);
    gone(pid).await;
    let channel = host.accept().await;
    host.begin(channel).await;
    host.open().await;
}

#[tokio::test]
async fn power_off_ends_the_agent_after_its_answer() {
    let mut host = Host::start().await;
    let mut session = host.open().await;
    session.send(&ToGuest::Power(nido_guest_agent::wire::Power::Off)).await;
    assert_eq!(session.message().await, ToHost::PoweringOff);
    assert_eq!(session.next().await, None);
    drop(session);
    assert!(soon("the agent's end", host.agent.wait()).await.unwrap().success());
}

#[tokio::test]
async fn an_invalid_configuration_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config");
    for bytes in [&b""[..], b"{}", &[0x85, 0x61, b'x', 0x41, 0, 0, 1, 0xf6]] {
        std::fs::write(&config, bytes).unwrap();
        let ended = tokio::process::Command::new(env!("CARGO_BIN_EXE_nido-guest-agent"))
            .args(["serve", "--channel-socket", "/nonexistent", "--config"])
            .arg(&config)
            .output();
        let ended = soon("the agent's end", ended).await.unwrap();
        assert_eq!(ended.status.code(), Some(1));
        assert!(String::from_utf8(ended.stderr).unwrap().starts_with("nido-guest-agent: "));
    }
}

/// Waits until no process of the group is left.
pub async fn gone(group: u32) {
    let group = i32::try_from(group).unwrap();
    let alive = || std::path::Path::new(&format!("/proc/{group}")).exists() || members(group) > 0;
    let gone = async {
        while alive() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    soon("the end of a process group", gone).await;
}

fn members(group: i32) -> usize {
    let stats = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let stat = std::fs::read_to_string(entry.ok()?.path().join("stat")).ok()?;
        // pid (name) state parent group ...
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        (fields.nth(2)?.parse() == Ok(group)).then_some(())
    });
    stats.count()
}

#[tokio::test]
async fn a_silent_peer_gets_no_reply_and_blocks_no_other() {
    let mut host = Host::start().await;
    let mut silent = host.stream().await;
    silent.stream.write_all(&[kind::MESSAGE]).await.unwrap();
    host.open().await;
    silent.stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    soon("the end of a stream", silent.stream.read_to_end(&mut rest)).await.unwrap();
    assert!(rest.is_empty());
    let mut failed = host.open().await;
    failed.send(&ToGuest::EntryEnd).await;
    assert!(matches!(failed.next().await, Some(Answer::Message(ToHost::Failed(Failed { fault: Fault::Invalid, .. })))));
}
