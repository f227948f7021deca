//! The guest agent: what nido runs inside every VM.
//!
//! ```text
//! /init in the initramfs (process 1)          mounts, modules, root disk, then
//!    |- the template's init is the agent  ->  goes on as process 1
//!    '- the template's init is systemd    ->  leaves a copy of itself in /run/nido, becomes /sbin/init
//! nido-guest-agent service                    that copy, started by a systemd unit
//! nido-guest-agent serve --channel-socket PATH --config FILE
//!                                             the same agent as an ordinary process, for tests on the host
//! ```
//!
//! Invariant: one thread runs all sessions and never blocks; what may block (files, starting programs, name files)
//! happens in threads with small stacks.

mod agent;
mod channel;
mod children;
mod exec;
mod files;
mod forward;
mod framing;
mod init;
mod network;
mod passwd;
mod port;
mod power;
mod program;
mod session;
mod stream;
mod sys;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use minicbor::Decode as _;
use nido_guest_agent::config::{Channel, GuestConfig, MAX_CONFIG, Network};
use nido_guest_agent::wire::TOKEN_LEN;
use tokio::sync::mpsc;

use crate::agent::Agent;

/// Stack of the threads that may block, in bytes.
const THREAD_STACK: usize = 192 * 1024;
/// Most threads that may block: several per session, so that stuck ones leave room for others.
const MAX_THREADS: usize = 4 * agent::MAX_SESSIONS;

fn main() -> ExitCode {
    sys::tune_allocator();
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let result = if std::process::id() == 1 {
        init::run()
    } else {
        match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["service"] => service(),
            ["serve", "--channel-socket", socket, "--config", config] => serve(socket.into(), config.into()),
            _ => {
                eprintln!("usage: nido-guest-agent service | serve --channel-socket PATH --config FILE");
                return ExitCode::from(2);
            }
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nido-guest-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Where and how an agent serves.
enum Reach {
    /// As the guest's agent, over the guest's channel.
    Guest { channel: Channel, network: Option<Network>, power: power::Mode },
    /// As an ordinary process that leaves the machine alone.
    Socket(PathBuf),
}

fn service() -> io::Result<()> {
    let config = read_config(init::SAVED_CONFIG)?;
    let (channel, network) = (config.channel, config.network);
    run(config.token.to_vec(), Reach::Guest { channel, network, power: power::Mode::Systemd })
}

fn serve(socket: PathBuf, config: PathBuf) -> io::Result<()> {
    let config = read_config(config)?;
    run(config.token.to_vec(), Reach::Socket(socket))
}

/// Reads and checks the configuration.
fn read_config(path: impl AsRef<std::path::Path>) -> io::Result<GuestConfig> {
    let path = path.as_ref();
    let named = |message: String| io::Error::other(format!("{}: {message}", path.display()));
    let bytes = std::fs::read(path).map_err(|error| named(error.to_string()))?;
    if bytes.len() > MAX_CONFIG {
        return Err(named(format!("larger than {MAX_CONFIG} bytes")));
    }
    let config = GuestConfig::decode(&mut minicbor::Decoder::new(&bytes), &mut ());
    let config = config.map_err(|error| named(format!("not a configuration of this agent: {error}")))?;
    if config.token.len() != TOKEN_LEN {
        return Err(named(format!("the token is not {TOKEN_LEN} bytes long")));
    }
    Ok(config)
}

/// Runs the agent to the end of the guest (or of the test).
fn run(token: Vec<u8>, reach: Reach) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_stack_size(THREAD_STACK)
        .max_blocking_threads(MAX_THREADS)
        .build()?;
    runtime.block_on(serve_until_power(token, reach))
}

async fn serve_until_power(token: Vec<u8>, reach: Reach) -> io::Result<()> {
    let (asked, mut asks) = mpsc::channel(1);
    let is_init = std::process::id() == 1;
    let agent = Arc::new(Agent::new(token, is_init, asked));
    let reaper = agent.clone();
    tokio::spawn(async move { reaper.children.reap().await });
    let mode = match reach {
        Reach::Guest { channel, network, power } => {
            start_network(network)?;
            let serving = agent.clone();
            tokio::spawn(async move {
                let served = match channel {
                    Channel::Vsock => channel::serve_vsock(serving).await,
                    Channel::Serial => channel::serve_serial(serving).await,
                };
                if let Err(error) = served {
                    eprintln!("nido-guest-agent: the channel to the host is broken: {error}");
                    std::process::exit(1);
                }
            });
            tokio::task::spawn_blocking(|| {
                if let Err(error) = init::grow_root() {
                    eprintln!("nido-guest-agent: the root file system does not fill its disk: {error}");
                }
            });
            power
        }
        Reach::Socket(path) => {
            let serving = agent.clone();
            tokio::select! {
                served = channel::serve_socket(serving, &path) => return served,
                _power = asks.recv() => return Ok(()),
            }
        }
    };
    let power = power::asked(&mut asks, mode).await?;
    power::go_down(&agent, power, mode).await
}

/// What the host has decided is there before the first session; what the network has to be asked for is not waited
/// for.
fn start_network(network: Option<Network>) -> io::Result<()> {
    let is_asked_for = network == Some(Network::Dhcp);
    let set_up = move || {
        if let Err(error) = network::set_up(network.as_ref()) {
            eprintln!("nido-guest-agent: the network could not be set up: {error}");
        }
    };
    if is_asked_for {
        std::thread::Builder::new().name("network".into()).stack_size(THREAD_STACK).spawn(set_up)?;
    } else {
        set_up();
    }
    Ok(())
}
