//! The guest's client and the channel, against agents that lie: scripted peers at the session's and at the channel's
//! end.

#![allow(clippy::unwrap_used)]

mod support;

use std::future::poll_fn;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use nido_guest_agent::wire::sync::{Block, FILLER, Kind, Scanner};
use nido_guest_agent::wire::{
    self, Entry, EntryKind, Exited, Failed, Fault, Head, Pong, STDIN_WINDOW, Summary, ToGuest, ToHost, WireError, kind,
};
use nido_vmm::guest::{Channel, Copied, Download, Endpoint, Guest, GuestError, Limits, Link, Progress, Source, Upload};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Instant;
use tokio_util::compat::{FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};

use support::{Rig, TOKEN, collect, command, soon, within};

/// An agent at the other end of `agent.sock` that does as it is told.
struct Liar {
    dir: TempDir,
    listener: UnixListener,
    guest: Guest,
}

/// The liar's end of one session.
struct End(UnixStream);

impl Liar {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let listener = UnixListener::bind(dir.path().join("agent.sock")).unwrap();
        let endpoint = Endpoint::Serial { dir: dir.path().into(), socket: "agent.sock".into() };
        Self { dir, listener, guest: Guest::new(endpoint, TOKEN.to_vec()) }
    }

    async fn accept(&self) -> End {
        End(self.listener.accept().await.unwrap().0)
    }

    /// A session that has been greeted as it should be, its first request read.
    async fn accept_welcome(&self) -> End {
        let mut end = self.accept().await;
        let hello = end.hello().await;
        end.say(&welcome(hello.nonce)).await;
        end.read().await;
        end
    }
}

impl End {
    async fn read(&mut self) -> ToGuest {
        let mut head = [0; wire::HEAD];
        self.0.read_exact(&mut head).await.unwrap();
        let mut payload = vec![0; Head::parse(head).unwrap().length];
        self.0.read_exact(&mut payload).await.unwrap();
        wire::decode(&payload).unwrap()
    }

    async fn hello(&mut self) -> wire::Hello {
        match self.read().await {
            ToGuest::Hello(hello) => hello,
            other => panic!("not a hello: {other:?}"),
        }
    }

    async fn say(&mut self, message: &ToHost) {
        self.raw(&wire::encode(message).unwrap()).await;
    }

    /// The other side may have had enough.
    async fn raw(&mut self, bytes: &[u8]) {
        let _ = self.0.write_all(bytes).await;
    }

    async fn data(&mut self, bytes: &[u8]) {
        self.raw(&Head { kind: kind::FILE_DATA, length: bytes.len() }.bytes()).await;
        self.raw(bytes).await;
    }

    async fn entry(&mut self, path: &[&str], kind: EntryKind, mode: u16) {
        let path = path.iter().map(|c| c.as_bytes().to_vec().into()).collect();
        self.say(&ToHost::Entry(Entry { path, kind, mode, mtime_ns: 0 })).await;
    }

    async fn whole(&mut self, path: &[&str], kind: EntryKind) {
        self.entry(path, kind, 0o755).await;
        self.say(&ToHost::EntryEnd).await;
    }
}

fn welcome(nonce: u64) -> ToHost {
    ToHost::Welcome(wire::Welcome { version: wire::VERSION, nonce, agent: "liar".into() })
}

fn nowhere(_: Progress) {}

/// What a ping gives when the agent's first bytes are `answer`.
async fn ping_answered(answer: impl AsyncFnOnce(&mut End, wire::Hello)) -> GuestError {
    let liar = Liar::new();
    let lie = async {
        let mut end = liar.accept().await;
        let hello = end.hello().await;
        answer(&mut end, hello).await;
        end
    };
    let (outcome, _end) = within(async { tokio::join!(liar.guest.ping(soon()), lie) }).await;
    outcome.unwrap_err()
}

#[tokio::test(flavor = "current_thread")]
async fn a_welcome_for_another_hello_is_no_welcome() {
    let error = ping_answered(async |end, hello| end.say(&welcome(hello.nonce ^ 1)).await).await;
    assert!(matches!(error, GuestError::Protocol(_)), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn an_answer_without_a_welcome_is_not_taken() {
    let pong = Pong { agent: "liar".into(), uptime_ms: 1, sessions: 1, is_init: true, address: None };
    let error = ping_answered(async |end, _| end.say(&ToHost::Pong(pong)).await).await;
    assert!(matches!(error, GuestError::Protocol(_)), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn another_version_is_named() {
    let error = ping_answered(async |end, hello| {
        let welcome = wire::Welcome { version: 9, nonce: hello.nonce, agent: String::new() };
        end.say(&ToHost::Welcome(welcome)).await;
    })
    .await;
    assert!(matches!(error, GuestError::VersionMismatch { host: wire::VERSION, guest: 9 }), "{error}");
    let error = ping_answered(async |end, _| {
        let refused = wire::Refused { reason: wire::Refusal::Version, oldest: 7, newest: 8 };
        end.say(&ToHost::Refused(refused)).await;
    })
    .await;
    assert!(matches!(error, GuestError::VersionMismatch { guest: 8, .. }), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn oversized_and_unknown_frames_are_refused() {
    let error = ping_answered(async |end, _| end.raw(&[kind::MESSAGE, 0xff, 0xff, 0xff]).await).await;
    assert!(matches!(error, GuestError::Protocol(WireError::TooLong { .. })), "{error}");
    let error = ping_answered(async |end, _| end.raw(b"SSH-2.0-OpenSSH_9.2\r\n").await).await;
    assert!(matches!(error, GuestError::Protocol(WireError::UnknownKind(b'S'))), "{error}");
    let error = ping_answered(async |end, _| end.raw(&[kind::MESSAGE, 0, 0, 1, 0xff]).await).await;
    assert!(matches!(error, GuestError::Protocol(WireError::Malformed(_))), "{error}");
    let error = ping_answered(async |end, _| end.raw(&[kind::STDOUT, 0, 0, 0]).await).await;
    assert!(matches!(error, GuestError::Protocol(WireError::Malformed(_))), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn an_early_end_is_an_end() {
    let error = ping_answered(async |end, _| end.0.shutdown().await.unwrap()).await;
    assert!(matches!(error, GuestError::Gone), "{error}");
    let error = ping_answered(async |end, hello| {
        let frame = wire::encode(&welcome(hello.nonce)).unwrap();
        end.raw(&frame[..frame.len() - 1]).await;
        end.0.shutdown().await.unwrap();
    })
    .await;
    assert!(matches!(error, GuestError::Gone), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn silence_ends_at_the_deadline() {
    let liar = Liar::new();
    let error = liar.guest.ping(Instant::now() + Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(error, GuestError::Timeout { .. }), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn an_address_that_is_none_is_not_passed_on() {
    let liar = Liar::new();
    let lie = async {
        let mut end = liar.accept_welcome().await;
        let address = Some("\u{1b}[2Jpwned".into());
        end.say(&ToHost::Pong(Pong { agent: "x".repeat(9999), uptime_ms: 1, sessions: 1, is_init: true, address }))
            .await;
    };
    let (pong, ()) = within(async { tokio::join!(liar.guest.ping(soon()), lie) }).await;
    let pong = pong.unwrap();
    assert_eq!(pong.address, None);
    assert!(pong.agent.len() < 200);
}

/// What a command gives when, once started, the agent says `answer`.
async fn exec_answered(answer: &[ToHost]) -> Result<support::Outcome, GuestError> {
    let liar = Liar::new();
    let lie = async {
        let mut end = liar.accept_welcome().await;
        end.say(&ToHost::Started(42)).await;
        for message in answer {
            end.say(message).await;
        }
        end
    };
    let exec = async { collect(liar.guest.exec(command(&["true"]), soon()).await?).await };
    within(async { tokio::join!(exec, lie) }).await.0
}

#[tokio::test(flavor = "current_thread")]
async fn credit_that_was_never_used_is_a_breach() {
    for credit in [1, STDIN_WINDOW, u32::MAX] {
        let error = exec_answered(&[ToHost::StdinCredit(credit)]).await.unwrap_err();
        assert!(matches!(error, GuestError::Protocol(_)), "{error}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn an_exit_has_one_status() {
    for (code, signal, fine) in
        [(Some(0), None, true), (None, Some(9), true), (None, None, false), (Some(1), Some(1), false)]
    {
        let exited = Exited { code, signal, timed_out: false, duration_ms: 0 };
        assert_eq!(exec_answered(&[ToHost::Exited(exited)]).await.is_ok(), fine);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_failure_of_endless_words_is_cut() {
    let failed = Failed { fault: Fault::Other, message: "\u{e9}".repeat(100_000) };
    let Err(GuestError::Guest(failed)) = exec_answered(&[ToHost::Failed(failed)]).await else { panic!("no failure") };
    assert!(failed.message.len() <= 4096);
}

#[tokio::test(flavor = "current_thread")]
async fn events_of_another_request_are_a_breach() {
    for stray in [ToHost::Connected, ToHost::PutDone(Summary::default()), ToHost::Started(1)] {
        assert!(matches!(exec_answered(&[stray]).await, Err(GuestError::Protocol(_))));
    }
}

/// Downloads to `into/copy` what `send` makes up; checks that nothing but a whole copy is ever there.
async fn download_of(limits: Limits, send: impl AsyncFnOnce(&mut End)) -> (TempDir, Result<Copied, GuestError>) {
    let liar = Liar::new();
    let into = TempDir::new().unwrap();
    let lie = async {
        let mut end = liar.accept_welcome().await;
        send(&mut end).await;
        let _ = end.0.shutdown().await;
        end
    };
    let request = Download { source: b"/srv/copy".to_vec(), destination: into.path().into(), overwrite: false, limits };
    let copy = liar.guest.download(request, nowhere, soon());
    let (outcome, _end) = within(async { tokio::join!(copy, lie) }).await;
    let left: Vec<_> = std::fs::read_dir(into.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    match &outcome {
        Ok(_) => assert_eq!(left, ["copy"]),
        Err(_) => assert!(left.is_empty(), "{left:?}"),
    }
    drop(liar.dir);
    (into, outcome)
}

async fn breach(send: impl AsyncFnOnce(&mut End)) {
    let (_into, outcome) = download_of(Limits::default(), send).await;
    assert!(matches!(outcome, Err(GuestError::Protocol(_))), "{outcome:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn names_that_are_paths_are_refused() {
    let long = "x".repeat(256);
    for bad in ["..", ".", "", "a/b", "/etc/passwd", "a\0b", &long] {
        breach(async |end: &mut End| {
            end.whole(&[], EntryKind::Directory).await;
            end.whole(&[bad], EntryKind::Directory).await;
        })
        .await;
        breach(async |end: &mut End| {
            end.whole(&[], EntryKind::Directory).await;
            end.whole(&["a"], EntryKind::Directory).await;
            end.whole(&["a", bad, "file"], EntryKind::File(0)).await;
        })
        .await;
    }
}

#[tokio::test(flavor = "current_thread")]
async fn nothing_is_written_through_a_symlink_of_the_guests() {
    let outside = TempDir::new().unwrap();
    let target = || EntryKind::Symlink(outside.path().as_os_str().as_encoded_bytes().to_vec().into());
    breach(async |end: &mut End| {
        end.whole(&[], EntryKind::Directory).await;
        end.whole(&["way"], target()).await;
        end.whole(&["way", "file"], EntryKind::File(0)).await;
    })
    .await;
    breach(async |end: &mut End| {
        end.whole(&[], EntryKind::Directory).await;
        end.whole(&["dir"], EntryKind::Directory).await;
        end.whole(&["dir", "way"], target()).await;
        end.whole(&["dir", "way", "deeper"], EntryKind::Directory).await;
    })
    .await;
    // The same name first as a symlink, then as a file.
    breach(async |end: &mut End| {
        end.whole(&[], EntryKind::Directory).await;
        end.whole(&["way"], target()).await;
        end.whole(&["way"], EntryKind::File(0)).await;
    })
    .await;
    breach(async |end: &mut End| end.whole(&[], target()).await).await;
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[tokio::test(flavor = "current_thread")]
async fn trees_out_of_order_are_refused() {
    breach(async |end: &mut End| end.say(&ToHost::TreeEnd(Summary::default())).await).await;
    breach(async |end: &mut End| end.whole(&["no root"], EntryKind::Directory).await).await;
    breach(async |end: &mut End| {
        end.whole(&[], EntryKind::Directory).await;
        end.whole(&[], EntryKind::Directory).await;
    })
    .await;
    breach(async |end: &mut End| {
        end.whole(&[], EntryKind::Directory).await;
        end.whole(&["absent", "file"], EntryKind::File(0)).await;
    })
    .await;
    breach(async |end: &mut End| {
        end.whole(&[], EntryKind::File(0)).await;
        end.whole(&["below"], EntryKind::File(0)).await;
    })
    .await;
    breach(async |end: &mut End| {
        end.entry(&[], EntryKind::Directory, 0o755).await;
        end.data(b"bytes of a directory").await;
    })
    .await;
    breach(async |end: &mut End| {
        end.whole(&[], EntryKind::Directory).await;
        end.whole(&["twice"], EntryKind::Directory).await;
        end.whole(&["twice"], EntryKind::Directory).await;
    })
    .await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_tree_without_end_is_cut_off() {
    let limits = Limits { entries: 100, bytes: 1 << 20 };
    let (_into, outcome) = download_of(limits, async |end: &mut End| {
        end.whole(&[], EntryKind::Directory).await;
        for i in 0..200 {
            end.whole(&[&format!("d{i}")], EntryKind::Directory).await;
        }
    })
    .await;
    assert!(matches!(outcome, Err(GuestError::LimitExceeded { what: "files", limit: 100 })), "{outcome:?}");
    let (_into, outcome) = download_of(limits, async |end: &mut End| {
        end.entry(&[], EntryKind::File(1), 0o644).await;
        for _ in 0..200 {
            end.data(&[0; 10_000]).await;
        }
    })
    .await;
    assert!(matches!(outcome, Err(GuestError::LimitExceeded { what: "bytes", .. })), "{outcome:?}");
    let deep: [String; 20] = std::array::from_fn(|_| "x".repeat(250));
    let (_into, outcome) = download_of(limits, async |end: &mut End| {
        end.whole(&[], EntryKind::Directory).await;
        end.whole(&deep.each_ref().map(String::as_str), EntryKind::File(0)).await;
    })
    .await;
    assert!(matches!(outcome, Err(GuestError::LimitExceeded { .. })), "{outcome:?}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_copy_that_breaks_off_is_no_copy() {
    for stop in 0..3 {
        let (_into, outcome) = download_of(Limits::default(), async |end: &mut End| {
            end.whole(&[], EntryKind::Directory).await;
            end.whole(&["dir"], EntryKind::Directory).await;
            if stop > 0 {
                end.entry(&["dir", "file"], EntryKind::File(9), 0o644).await;
            }
            if stop > 1 {
                end.data(b"some").await;
            }
        })
        .await;
        assert!(matches!(outcome, Err(GuestError::Gone)), "{outcome:?}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn modes_lose_what_is_dangerous_and_nothing_else() {
    let (into, outcome) = download_of(Limits::default(), async |end: &mut End| {
        end.entry(&[], EntryKind::Directory, 0o7755).await;
        end.say(&ToHost::EntryEnd).await;
        end.entry(&["suid"], EntryKind::File(0), 0o6755).await;
        end.say(&ToHost::EntryEnd).await;
        end.entry(&["locked"], EntryKind::Directory, 0o000).await;
        end.say(&ToHost::EntryEnd).await;
        end.whole(&["locked", "inside"], EntryKind::File(0)).await;
        end.say(&ToHost::TreeEnd(Summary { skipped: 3, ..Summary::default() })).await;
    })
    .await;
    let copied = outcome.unwrap();
    assert_eq!((copied.entries, copied.skipped), (4, 3));
    let mode = |name: &str| into.path().join("copy").join(name).metadata().unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(""), mode("suid"), mode("locked")), (0o755, 0o755, 0o000));
    std::fs::set_permissions(into.path().join("copy/locked"), std::fs::Permissions::from_mode(0o700)).unwrap();
    assert!(into.path().join("copy/locked/inside").exists());
}

#[tokio::test(flavor = "current_thread")]
async fn a_failure_in_the_middle_of_an_upload_is_the_reason_given() {
    let liar = Liar::new();
    let lie = async {
        let mut end = liar.accept_welcome().await;
        // The host is in the middle of it; nothing more is read.
        end.0.read_exact(&mut vec![0; 100_000]).await.unwrap();
        end.say(&ToHost::Failed(Failed { fault: Fault::DiskFull, message: "no space left".into() })).await;
    };
    let source = Source::Reader { reader: Box::new(std::io::repeat(7)), mode: 0o644 };
    let request = Upload { source, destination: b"/x".to_vec(), user: None, parents: false };
    let (outcome, ()) = within(async { tokio::join!(liar.guest.upload(request, nowhere, soon()), lie) }).await;
    assert_eq!(outcome.unwrap_err().fault(), Some(Fault::DiskFull));
}

/// The agent's end of the channel, up to the agreement, and what was seen on the way.
async fn dial(rig: &Rig) -> UnixStream {
    UnixStream::connect(rig.path("channel.sock")).await.unwrap()
}

async fn next_block(channel: &mut UnixStream) -> Block {
    let mut scanner = Scanner::default();
    loop {
        if let Some(block) = scanner.push(channel.read_u8().await.unwrap()) {
            return block;
        }
    }
}

async fn ack(channel: &mut UnixStream, nonce: [u8; 16]) {
    channel.write_all(&Block { kind: Kind::Ack, nonce }.bytes()).await.unwrap();
}

/// Answers probes as an agent does, until GO.
async fn agree(channel: &mut UnixStream) {
    let mut offered = None;
    loop {
        match next_block(channel).await {
            Block { kind: Kind::Probe, nonce } => {
                offered = Some(nonce);
                ack(channel, nonce).await;
            }
            Block { kind: Kind::Go, nonce } if offered == Some(nonce) => return,
            other => panic!("{other:?}"),
        }
    }
}

type Streams = yamux::Connection<tokio_util::compat::Compat<UnixStream>>;

fn multiplex(channel: UnixStream) -> Streams {
    yamux::Connection::new(channel.compat(), yamux::Config::default(), yamux::Mode::Server)
}

/// Answers every session's hello and ping, until the channel ends.
async fn serve_pings(mut streams: Streams) {
    while let Some(Ok(stream)) = poll_fn(|cx| streams.poll_next_inbound(cx)).await {
        tokio::spawn(async move {
            let mut stream = stream.compat();
            let mut head = [0; wire::HEAD];
            while stream.read_exact(&mut head).await.is_ok() {
                let mut payload = vec![0; Head::parse(head).unwrap().length];
                stream.read_exact(&mut payload).await.unwrap();
                let answer = match wire::decode(&payload).unwrap() {
                    ToGuest::Hello(hello) => welcome(hello.nonce),
                    _ => ToHost::Pong(Pong {
                        agent: "x".into(),
                        uptime_ms: 0,
                        sessions: 1,
                        is_init: true,
                        address: None,
                    }),
                };
                stream.write_all(&wire::encode(&answer).unwrap()).await.unwrap();
                stream.flush().await.unwrap();
            }
        });
    }
}

async fn is_up(channel: &Channel) {
    within(channel.link().wait_for(|link| *link == Link::Up)).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn noise_and_old_answers_before_the_agreement_are_skipped() {
    let rig = Rig::without_agent();
    let mut channel = dial(&rig).await;
    within(async {
        let probe = next_block(&mut channel).await;
        assert_eq!(probe.kind, Kind::Probe);
        channel.write_all(&[0, 0, 0, 1, 0xff, b'N', b'I']).await.unwrap();
        channel.write_all(&vec![0xab; 100_000]).await.unwrap();
        ack(&mut channel, [9; 16]).await;
        channel.write_all(&Block { kind: Kind::Go, nonce: probe.nonce }.bytes()).await.unwrap();
        channel.write_all(&Block { kind: Kind::Probe, nonce: probe.nonce }.bytes()).await.unwrap();
        ack(&mut channel, probe.nonce).await;
        agree_from(&mut channel, probe).await;
    })
    .await;
    tokio::spawn(serve_pings(multiplex(channel)));
    rig.guest.ping(soon()).await.unwrap();
}

/// Goes on until GO, `offered` having been answered.
async fn agree_from(channel: &mut UnixStream, mut offered: Block) {
    loop {
        let block = next_block(channel).await;
        match block.kind {
            Kind::Go if block.nonce == offered.nonce => return,
            Kind::Probe => {
                offered = block;
                ack(channel, block.nonce).await;
            }
            other => panic!("{other:?}"),
        }
    }
}

/// An agent that was slow answers every probe it finds waiting. The answers behind the first one must not be taken for
/// the start of the multiplexed stream.
#[tokio::test(flavor = "current_thread")]
async fn an_agent_that_answers_late_and_often_is_understood() {
    let rig = Rig::without_agent();
    let mut channel = dial(&rig).await;
    within(async {
        let first = next_block(&mut channel).await;
        let second = next_block(&mut channel).await;
        assert_eq!(first, second, "the same nonce again");
        ack(&mut channel, first.nonce).await;
        ack(&mut channel, first.nonce).await;
        let fresh = next_block(&mut channel).await;
        assert_ne!(fresh.nonce, first.nonce);
        ack(&mut channel, fresh.nonce).await;
        agree_from(&mut channel, fresh).await;
    })
    .await;
    tokio::spawn(serve_pings(multiplex(channel)));
    rig.guest.ping(soon()).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_that_does_not_read_is_not_flooded() {
    let rig = Rig::without_agent();
    let mut channel = dial(&rig).await;
    let mut link = rig.channel.link();
    within(link.wait_for(|link| *link == Link::Agreeing)).await.unwrap();
    // By the clock alone there would be one for each step.
    tokio::time::pause();
    for _ in 0..50 {
        tokio::time::advance(Duration::from_secs(3)).await;
        tokio::task::yield_now().await;
    }
    tokio::time::resume();
    let mut waiting = vec![0; 1 << 20];
    let count = within(channel.read(&mut waiting)).await.unwrap();
    assert!(count <= 4 * wire::sync::BLOCK, "{count} bytes were waiting");
}

#[tokio::test(flavor = "current_thread")]
async fn an_agent_stuck_inside_a_frame_is_fed_until_it_is_out() {
    let rig = Rig::without_agent();
    let mut channel = dial(&rig).await;
    within(async {
        // It takes what comes for the body of a frame of the largest size.
        channel.read_exact(&mut vec![0; FILLER]).await.unwrap();
        agree(&mut channel).await;
    })
    .await;
    tokio::spawn(serve_pings(multiplex(channel)));
    rig.guest.ping(soon()).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_that_opens_streams_loses_the_channel_and_may_come_back() {
    let rig = Rig::without_agent();
    let mut channel = dial(&rig).await;
    within(agree(&mut channel)).await;
    is_up(&rig.channel).await;
    // A window update with SYN, as opens a stream: version 0, type 1, flag 1, even numbers.
    for id in 1..=200u32 {
        let mut frame = [0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        frame[4..8].copy_from_slice(&(2 * id).to_be_bytes());
        if channel.write_all(&frame).await.is_err() {
            break;
        }
    }
    within(rig.channel.link().wait_for(|link| *link == Link::Waiting)).await.unwrap();
    let mut channel = dial(&rig).await;
    within(agree(&mut channel)).await;
    tokio::spawn(serve_pings(multiplex(channel)));
    rig.guest.ping(soon()).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn garbage_in_a_running_channel_ends_it_for_everyone() {
    let rig = Rig::without_agent();
    let mut channel = dial(&rig).await;
    within(agree(&mut channel)).await;
    let garbage = async {
        let mut first = [0; 64];
        channel.read_exact(&mut first).await.unwrap();
        channel.write_all(&[0xff; 64]).await.unwrap();
    };
    let (outcome, ()) = within(async { tokio::join!(rig.guest.ping(soon()), garbage) }).await;
    assert!(matches!(outcome, Err(GuestError::Gone)), "{outcome:?}");
    within(rig.channel.link().wait_for(|link| *link == Link::Waiting)).await.unwrap();
}
