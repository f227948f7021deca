//! A host, as small as tests need one: it starts the real agent as an ordinary process, plays QEMU's end of the port
//! and speaks the protocol. Invariant: every wait ends after [`TEST_TIMEOUT`], and no agent outlives its test.

use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use futures::channel::{mpsc, oneshot};
use futures::{SinkExt, StreamExt};
use nido_guest_agent::config::{Channel, GuestConfig, Init};
use nido_guest_agent::wire::{
    self, ENTROPY_LEN, Exec, Failed, Fault, HEAD, Head, Hello, IdentityReset, TOKEN_LEN, ToGuest, ToHost, VERSION,
    Welcome, kind, sync,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};

/// How long anything may take.
pub const TEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The token of every agent under test.
pub const TOKEN: [u8; 32] = [7; 32];

/// Waits, but not for ever.
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(TEST_TIMEOUT, future)
        .await
        .unwrap_or_else(|_| panic!("{what} took longer than {TEST_TIMEOUT:?}"))
}

/// An agent under test and the host's end of its port.
pub struct Host {
    /// A directory of the test's own.
    pub directory: tempfile::TempDir,
    /// Where the agent connects to.
    pub listener: UnixListener,
    /// The agent's process.
    pub agent: tokio::process::Child,
    streams: mpsc::Sender<oneshot::Sender<yamux::Stream>>,
}

impl Host {
    /// Starts an agent and agrees with it on a connection.
    pub async fn start() -> Self {
        let mut host = Self::start_silent().await;
        let channel = host.accept().await;
        host.begin(channel).await;
        host
    }

    /// Starts an agent in a mount name space where `disk` in the test's directory is a file system of 1 MiB.
    pub async fn start_on_small_disk() -> Self {
        let mut host = Self::start_under(&[
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-ec",
            "mount -t tmpfs -o size=1m tmpfs \"$(dirname \"$4\")/disk\"; exec \"$@\"",
            "sh",
        ])
        .await;
        let channel = host.accept().await;
        host.begin(channel).await;
        host
    }

    /// Starts an agent; the test communicates with it.
    pub async fn start_silent() -> Self {
        Self::start_under(&[]).await
    }

    async fn start_under(wrapper: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("channel.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let config = GuestConfig {
            hostname: "test".into(),
            token: TOKEN.to_vec().into(),
            init: Init::Agent,
            channel: Channel::Serial,
            identity: "0123456789abcdef".into(),
            network: None,
            nested: false,
        };
        let saved = directory.path().join("config");
        std::fs::write(&saved, minicbor::to_vec(&config).unwrap()).unwrap();
        if !wrapper.is_empty() {
            std::fs::create_dir(directory.path().join("disk")).unwrap();
        }
        let command: Vec<_> = wrapper.iter().chain([&env!("CARGO_BIN_EXE_nido-guest-agent")]).collect();
        let agent = tokio::process::Command::new(command[0])
            .args(&command[1..])
            .args([Path::new("serve"), Path::new("--channel-socket"), &socket, Path::new("--config"), &saved])
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self { directory, listener, agent, streams: mpsc::channel(0).0 }
    }

    /// The agent's next connection.
    pub async fn accept(&mut self) -> UnixStream {
        soon("the agent's connection", self.listener.accept()).await.unwrap().0
    }

    /// Agrees on a connection and starts the multiplexer.
    pub async fn begin(&mut self, mut channel: UnixStream) {
        agree(&mut channel, 1).await;
        self.multiplex(channel);
    }

    /// Starts the multiplexer on a channel that has been agreed on. Dropping the host's senders ends it.
    pub fn multiplex(&mut self, channel: UnixStream) {
        let (streams, mut wanted) = mpsc::channel::<oneshot::Sender<yamux::Stream>>(8);
        self.streams = streams;
        tokio::spawn(async move {
            let mut mux = yamux::Connection::new(channel.compat(), many_streams(), yamux::Mode::Client);
            loop {
                let next = poll_fn(|context| {
                    if let std::task::Poll::Ready(asked) = wanted.poll_next_unpin(context) {
                        return std::task::Poll::Ready(asked);
                    }
                    match mux.poll_next_inbound(context) {
                        std::task::Poll::Ready(_) => std::task::Poll::Ready(None),
                        std::task::Poll::Pending => std::task::Poll::Pending,
                    }
                });
                let Some(answer) = next.await else { return };
                let Ok(stream) = poll_fn(|context| mux.poll_new_outbound(context)).await else { return };
                let _ = answer.send(stream);
            }
        });
    }

    /// A stream without a hello.
    pub async fn stream(&mut self) -> Session {
        let (answer, stream) = oneshot::channel();
        self.streams.send(answer).await.unwrap();
        Session { stream: soon("a stream", stream).await.unwrap().compat() }
    }

    /// An open session.
    pub async fn open(&mut self) -> Session {
        let mut session = self.stream().await;
        let welcome = session.greet(&TOKEN, VERSION, VERSION).await;
        assert!(matches!(welcome, Some(ToHost::Welcome(Welcome { version: VERSION, nonce: 99, .. }))), "{welcome:?}");
        session
    }

    /// A path in the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Drop for Host {
    /// Ends what the agent still runs; being killed, it cannot do that itself.
    fn drop(&mut self) {
        let Some(agent) = self.agent.id() else { return };
        let running = std::fs::read_dir("/proc").into_iter().flatten().filter_map(|entry| {
            let entry = entry.ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            // pid (name) state parent group ...
            let parent: u32 = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?;
            (parent == agent).then(|| entry.file_name().to_str()?.parse().ok())?
        });
        for child in running.filter_map(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process_group(child, rustix::process::Signal::KILL);
        }
    }
}

/// Speaks the preamble to its end.
pub async fn agree(channel: &mut UnixStream, seed: u8) {
    let nonce = probe(channel, seed).await;
    channel.write_all(&sync::Block { kind: sync::Kind::Go, nonce }.bytes()).await.unwrap();
}

/// Speaks the preamble until the agent has acknowledged a nonce that was sent once: a second acknowledgement could
/// come behind it and be taken for the multiplexer's. Gives the nonce.
pub async fn probe(channel: &mut UnixStream, seed: u8) -> [u8; 16] {
    let (mut nonce, mut sent) = ([seed; 16], 0);
    let mut scanner = sync::Scanner::default();
    let agreed = async {
        loop {
            channel.write_all(&sync::Block { kind: sync::Kind::Probe, nonce }.bytes()).await.unwrap();
            sent += 1;
            let acknowledged = tokio::time::timeout(Duration::from_millis(500), async {
                let ack = Some(sync::Block { kind: sync::Kind::Ack, nonce });
                while scanner.push(channel.read_u8().await.unwrap()) != ack {}
            });
            match acknowledged.await {
                Ok(()) if sent == 1 => return nonce,
                Ok(()) => (nonce[0], sent) = (nonce[0].wrapping_add(1), 0),
                Err(_silence) => channel.write_all(&vec![0xff; sync::FILLER]).await.unwrap(),
            }
        }
    };
    soon("the agent's acknowledgement", agreed).await
}

/// What the agent sent.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// A message.
    Message(ToHost),
    /// Raw bytes.
    Raw(u8, Vec<u8>),
}

/// How a command went.
#[derive(Debug, Default)]
pub struct Output {
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
    /// Its exit code.
    pub code: Option<u8>,
    /// The signal that ended it.
    pub signal: Option<u8>,
    /// Whether its time ran out.
    pub timed_out: bool,
}

/// One stream to the agent.
pub struct Session {
    /// The stream itself.
    pub stream: Compat<yamux::Stream>,
}

impl Session {
    /// Sends a hello; gives the reply.
    pub async fn greet(&mut self, token: &[u8], oldest: u16, newest: u16) -> Option<ToHost> {
        self.send(&ToGuest::Hello(Hello { oldest, newest, token: token.to_vec().into(), nonce: 99 })).await;
        match self.next().await {
            Some(Answer::Message(message)) => Some(message),
            Some(raw) => panic!("{raw:?}"),
            None => None,
        }
    }

    /// Sends a message.
    pub async fn send(&mut self, message: &ToGuest) {
        soon("sending", self.stream.write_all(&wire::encode(message).unwrap())).await.unwrap();
    }

    /// Sends raw bytes.
    pub async fn send_raw(&mut self, kind: u8, bytes: &[u8]) {
        let head = Head { kind, length: bytes.len() }.bytes();
        soon("sending", self.stream.write_all(&[&head, bytes].concat())).await.unwrap();
    }

    /// The next frame; `None` at the end.
    pub async fn next(&mut self) -> Option<Answer> {
        let mut head = [0; HEAD];
        if soon("an answer", self.stream.read_exact(&mut head)).await.is_err() {
            return None;
        }
        let head = Head::parse(head).unwrap();
        let mut payload = vec![0; head.length];
        soon("the rest of an answer", self.stream.read_exact(&mut payload)).await.unwrap();
        Some(match head.kind {
            kind::MESSAGE => Answer::Message(wire::decode(&payload).unwrap()),
            raw => Answer::Raw(raw, payload),
        })
    }

    /// The next frame, which must be a message.
    pub async fn message(&mut self) -> ToHost {
        match self.next().await {
            Some(Answer::Message(message)) => message,
            other => panic!("a message was expected, not {other:?}"),
        }
    }

    /// The next message, which must be a failure.
    pub async fn failure(&mut self) -> Fault {
        match self.message().await {
            ToHost::Failed(Failed { fault, .. }) => fault,
            other => panic!("a failure was expected, not {other:?}"),
        }
    }

    /// Starts a command; gives its process id.
    pub async fn start(&mut self, exec: Exec) -> u32 {
        self.send(&ToGuest::Exec(exec)).await;
        match self.message().await {
            ToHost::Started(pid) => pid,
            other => panic!("the command was not started: {other:?}"),
        }
    }

    /// Reads until a command has ended.
    pub async fn finish(&mut self) -> Output {
        let mut output = Output::default();
        loop {
            match self.next().await {
                Some(Answer::Raw(kind::STDOUT, bytes)) => output.stdout.extend(bytes),
                Some(Answer::Raw(kind::STDERR, bytes)) => output.stderr.extend(bytes),
                Some(Answer::Message(ToHost::StdinCredit(_))) => {}
                Some(Answer::Message(ToHost::Exited(exited))) => {
                    (output.code, output.signal, output.timed_out) = (exited.code, exited.signal, exited.timed_out);
                    return output;
                }
                other => panic!("a command's output was expected, not {other:?}"),
            }
        }
    }

    /// Runs a shell command to its end.
    pub async fn run(&mut self, script: &str) -> Output {
        self.start(shell(script)).await;
        self.finish().await
    }
}

/// A command for the shell.
pub fn shell(script: &str) -> Exec {
    command(&["sh", "-c", script])
}

/// A command.
pub fn command(argv: &[&str]) -> Exec {
    Exec { argv: argv.iter().map(|argument| argument.as_bytes().to_vec().into()).collect(), ..Exec::default() }
}

/// An identity reset with another token.
pub fn order(token: [u8; TOKEN_LEN]) -> IdentityReset {
    IdentityReset {
        token: token.to_vec().into(),
        entropy: vec![9; ENTROPY_LEN].into(),
        time_ns: 1_700_000_000_000_000_000,
        hostname: "nobody-is-called-this".into(),
        identity: "0123456789abcdef".into(),
        network: None,
        disk_grown: false,
    }
}

/// A multiplexer that takes more streams than the agent has sessions.
fn many_streams() -> yamux::Config {
    const STREAMS: usize = 2 * wire::MAX_SESSIONS;
    let mut config = yamux::Config::default();
    config.set_max_num_streams(STREAMS);
    config.set_max_connection_receive_window(Some(STREAMS * yamux::DEFAULT_CREDIT as usize));
    config
}
