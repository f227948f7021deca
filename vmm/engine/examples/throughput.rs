//! How fast the guest's client is when there is no guest in the way: the agent runs on this host, and the channel
//! between it and this program is served by a process of its own, as a supervisor does.
//!
//! `cargo run --release -p nido-engine --example throughput [MIB]`

use std::error::Error;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nido_engine::guest::{AgentAddress, Channel, Download, Event, Guest, Limits, Source, Upload};
use nido_guest_agent::config::{Channel as Reach, GuestConfig, Init};
use nido_guest_agent::wire::Exec;
use tokio::net::UnixListener;

const TOKEN: [u8; 32] = [7; 32];
const ROUNDS: u32 = 200;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", dir] => serve(Path::new(dir)).await,
        [] => measure(256).await,
        [mib] => measure(mib.parse()?).await,
        _ => Err("usage: throughput [MIB]".into()),
    }
}

/// The supervisor's part, as long as its standard input is open.
async fn serve(dir: &Path) -> Outcome {
    let channel = UnixListener::bind(dir.join("channel.sock"))?;
    let clients = UnixListener::bind(dir.join("agent.sock"))?;
    let open = Channel::start(channel, clients, false);
    open.open(true);
    tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink())).await??;
    Ok(())
}

/// Ends a process when dropped.
struct KilledOnDrop(Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn(program: &Path, arguments: &[&str]) -> Outcome<KilledOnDrop> {
    Ok(KilledOnDrop(Command::new(program).args(arguments).stdin(Stdio::piped()).spawn()?))
}

fn deadline() -> tokio::time::Instant {
    tokio::time::Instant::now() + Duration::from_secs(60)
}

async fn measure(mib: usize) -> Outcome {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let supervisor = spawn(&std::env::current_exe()?, &["serve", &path("")])?;
    let config = GuestConfig {
        hostname: "here".into(),
        token: TOKEN.to_vec().into(),
        init: Init::Agent,
        channel: Reach::Serial,
        identity: "0123456789abcdef".into(),
        network: None,
        nested: false,
    };
    std::fs::write(path("config"), minicbor::to_vec(&config)?)?;
    std::fs::write(path("agent"), nido_images::AGENT)?;
    std::fs::set_permissions(path("agent"), std::fs::Permissions::from_mode(0o755))?;
    let arguments = ["serve", "--channel-socket", &path("channel.sock"), "--config", &path("config")];
    let agent = spawn(Path::new(&path("agent")), &arguments)?;
    let endpoint = AgentAddress::Serial { dir: dir.into(), socket: "agent.sock".into() };
    let guest = Guest::new(endpoint, TOKEN.to_vec());
    guest.wait_ready(deadline()).await?;

    let mut file = std::fs::File::create(path("file"))?;
    for _ in 0..mib {
        file.write_all(&[0x5a; 1 << 20])?;
    }
    report("nothing yet", &supervisor, &agent);
    for round in 1..=3 {
        let upload = Upload {
            source: Source::Path(path("file").into()),
            destination: path("up").into_bytes(),
            user: None,
            parents: false,
            preserve: false,
            set_mode: false,
        };
        let started = Instant::now();
        guest.upload(upload, |_| (), deadline()).await?;
        print_rate(&format!("upload {round}"), mib, started);
        let download = Download {
            source: path("up").into_bytes(),
            destination: path("down").into(),
            overwrite: true,
            preserve: false,
            limits: Limits::default(),
        };
        let started = Instant::now();
        guest.download(download, |_| (), deadline()).await?;
        print_rate(&format!("download {round}"), mib, started);
    }
    report("after the copies", &supervisor, &agent);

    let mut session = guest.session(deadline()).await?;
    let started = Instant::now();
    for _ in 0..ROUNDS {
        session.ping(deadline()).await?;
    }
    print_each("ping in an open session", started);
    let started = Instant::now();
    for _ in 0..ROUNDS {
        guest.ping(deadline()).await?;
    }
    print_each("ping in its own session", started);
    let started = Instant::now();
    for _ in 0..ROUNDS {
        let request = Exec { argv: vec![b"true".to_vec().into()], ..Exec::default() };
        let mut running = guest.exec(request, deadline()).await?;
        while !matches!(running.events.next().await?, None | Some(Event::Exited(_))) {}
    }
    print_each("exec of true in its own session", started);
    let mut open = Vec::new();
    for _ in 0..50 {
        open.push(guest.session(deadline()).await?);
    }
    report("with 50 idle sessions", &supervisor, &agent);
    Ok(())
}

fn print_rate(what: &str, mib: usize, started: Instant) {
    println!("{what:32} {:8.0} MiB/s", mib as f64 / started.elapsed().as_secs_f64());
}

fn print_each(what: &str, started: Instant) {
    println!("{what:32} {:8.0} us", started.elapsed().as_secs_f64() * 1e6 / f64::from(ROUNDS));
}

/// Prints private and peak memory.
fn report(when: &str, supervisor: &KilledOnDrop, agent: &KilledOnDrop) {
    for (who, pid) in [("client", std::process::id()), ("channel", supervisor.0.id()), ("agent", agent.0.id())] {
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let sum = |text: &str, keys: &[&str]| -> u64 {
            let lines = text.lines().filter(|line| keys.iter().any(|key| line.starts_with(key)));
            lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
        };
        let private = sum(&read("smaps_rollup"), &["Private_Clean", "Private_Dirty"]);
        let peak = sum(&read("status"), &["VmHWM"]);
        println!("{:32} private {private} KiB, peak resident {peak} KiB", format!("{when}: {who}"));
    }
}
