//! The real agent as an ordinary process, behind a channel as a supervisor runs it: what QEMU would carry in between
//! are plain bytes, so a unix socket stands for it.

use std::fs::File;
use std::future::Future;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use nido_engine::guest::{AgentAddress, Channel, Event, Guest, GuestError, RunningCommand};
use nido_guest_agent::config::{Channel as Reach, GuestConfig, Init};
use nido_guest_agent::wire::{Exec, Exited};
use rustix::fs::MemfdFlags;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::time::{Instant, timeout};

/// The token of every test VM.
pub const TOKEN: &[u8; 32] = b"0123456789abcdef0123456789abcdef";

/// A deadline that a healthy machine never reaches.
pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Fails the test instead of hanging it.
pub async fn within<T>(work: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), work).await.expect("finished in time")
}

/// Waits until `condition` holds.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(60), wait).await.unwrap_or_else(|_| panic!("{what}: not in time"));
}

/// The agent as a program: a file in memory that every child inherits, so that no file remains.
fn agent_program() -> PathBuf {
    static PROGRAM: OnceLock<OwnedFd> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        let fd = rustix::fs::memfd_create("nido-guest-agent", MemfdFlags::empty()).unwrap();
        File::from(fd.try_clone().unwrap()).write_all(nido_images::AGENT).unwrap();
        fd
    });
    format!("/proc/self/fd/{}", program.as_raw_fd()).into()
}

/// A VM's directory with the channel served in it.
pub struct Rig {
    pub dir: TempDir,
    pub channel: Channel,
    pub guest: Guest,
    agent: Option<Child>,
}

impl Rig {
    /// The channel alone; QEMU is not connected yet.
    pub fn without_agent() -> Self {
        Self::with_channel(false)
    }

    /// The channel alone, for an agent that gets bootstrap requests first.
    pub fn with_bootstrap() -> Self {
        Self::with_channel(true)
    }

    fn with_channel(letters: bool) -> Self {
        let dir = TempDir::new().unwrap();
        let channel = UnixListener::bind(dir.path().join("channel.sock")).unwrap();
        let clients = UnixListener::bind(dir.path().join("agent.sock")).unwrap();
        let endpoint = AgentAddress::Serial { dir: dir.path().into(), socket: "agent.sock".into() };
        let guest = Guest::new(endpoint, TOKEN.to_vec());
        let channel = Channel::start(channel, clients, letters);
        channel.open(true);
        Self { channel, dir, guest, agent: None }
    }

    /// With an agent that answers.
    pub async fn start() -> Self {
        let mut rig = Self::without_agent();
        rig.start_agent();
        rig.guest.wait_ready(soon()).await.unwrap();
        rig
    }

    /// With an agent that sees a file system of one MiB at `full` in the rig's directory.
    pub async fn start_with_small_disk() -> Self {
        let mut rig = Self::without_agent();
        let disk = rig.dir.path().join("full");
        std::fs::create_dir(&disk).unwrap();
        let mut shell = Command::new("unshare");
        shell.args(if nix::unistd::geteuid().is_root() { "-m" } else { "-Urm" }.split(' '));
        shell.args(["--", "sh", "-ec", "mount -t tmpfs -o size=1m none \"$1\"; shift; exec \"$@\"", "sh"]);
        shell.arg(&disk).arg(agent_program());
        rig.spawn(shell);
        rig.guest.wait_ready(soon()).await.unwrap();
        rig
    }

    pub fn start_agent(&mut self) {
        self.spawn(Command::new(agent_program()));
    }

    fn spawn(&mut self, mut command: Command) {
        let config = GuestConfig {
            hostname: "test".into(),
            token: TOKEN.to_vec().into(),
            init: Init::Agent,
            channel: Reach::Serial,
            identity: "0123456789abcdef".into(),
            network: None,
            nested: false,
        };
        let file = self.path("config");
        std::fs::write(&file, minicbor::to_vec(&config).unwrap()).unwrap();
        command.arg("serve").arg("--channel-socket").arg(self.path("channel.sock")).arg("--config").arg(file);
        self.stop_agent();
        self.agent = Some(command.stdin(Stdio::null()).spawn().unwrap());
    }

    pub fn stop_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().unwrap();
            agent.wait().unwrap();
        }
    }

    /// A path in the rig's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a shell script to its end.
    pub async fn sh(&self, script: &str) -> Outcome {
        let running = self.guest.exec(shell(script), soon()).await.unwrap();
        within(collect(running)).await.unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop_agent();
    }
}

/// A request for a shell script.
pub fn shell(script: &str) -> Exec {
    command(&["sh", "-c", script])
}

pub fn command(argv: &[&str]) -> Exec {
    Exec { argv: argv.iter().map(|a| a.as_bytes().to_vec().into()).collect(), ..Exec::default() }
}

/// What a command did.
#[derive(Debug)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exited: Exited,
}

/// Takes all events.
pub async fn collect(mut running: RunningCommand) -> Result<Outcome, GuestError> {
    let (mut stdout, mut stderr, mut last) = (Vec::new(), Vec::new(), None);
    while let Some(event) = running.events.next().await? {
        match event {
            Event::Stdout(bytes) => stdout.extend(bytes),
            Event::Stderr(bytes) => stderr.extend(bytes),
            Event::Exited(exited) => last = Some(exited),
        }
    }
    Ok(Outcome { stdout, stderr, exited: last.expect("an exit") })
}
