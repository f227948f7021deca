//! The guest agent: what nido runs inside every VM.
//!
//! ```text
//! /init in the initramfs (process 1)          mounts, modules, root disk, then
//!    |- the template's init is the agent  ->  continues as process 1
//!    '- the template's init is systemd    ->  leaves a copy of itself in /run/nido, becomes /sbin/init
//! nido-guest-agent service                    that copy, started by a systemd unit
//! nido-guest-agent serve --channel-socket PATH --config FILE
//!                                             the same agent as an ordinary process, for tests on the host
//! ```
//!
//! Invariant: one thread runs all sessions and never blocks; what may block (files, starting programs, name files)
//! happens in threads with small stacks.

mod access;
mod agent;
mod channel;
mod etc_files;
mod exec;
mod files;
mod forward;
mod framing;
mod freeze;
mod helper_process;
mod hostname;
mod identity;
mod identity_reset;
mod init;
mod mux_stream;
mod nested;
mod network;
mod passwd;
mod port;
mod power;
mod process_limit;
mod program;
mod reaper;
mod refusal;
mod role;
mod scope;
mod session;
mod sys;
mod warnings;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use minicbor::Decode as _;
use nido_guest_agent::config::{Channel, GuestConfig, MAX_CONFIG};
use nido_guest_agent::wire::{Power, TOKEN_LEN};
use tokio::sync::mpsc;

use crate::agent::Agent;
use crate::role::Role;

/// Stack of the threads that may block, in bytes.
const THREAD_STACK: usize = 192 * 1024;
/// Most threads that may block: several per session, so that stuck ones leave room for others.
const MAX_THREADS: usize = 4 * nido_guest_agent::wire::MAX_WORK;

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
enum ServeMode {
    /// As the guest's agent, over the guest's channel.
    Guest(power::Mode),
    /// As an ordinary process that leaves the machine alone.
    Socket(PathBuf),
}

impl ServeMode {
    fn role(&self) -> Role {
        match self {
            Self::Guest(power::Mode::Init) => Role::Init,
            Self::Guest(power::Mode::Systemd) => Role::Service,
            Self::Socket(_) => Role::Visitor,
        }
    }
}

fn service() -> io::Result<()> {
    run(read_config(init::SAVED_CONFIG)?, ServeMode::Guest(power::Mode::Systemd))
}

fn serve(socket: PathBuf, config: PathBuf) -> io::Result<()> {
    run(read_config(config)?, ServeMode::Socket(socket))
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
fn run(config: GuestConfig, reach: ServeMode) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_stack_size(THREAD_STACK)
        .max_blocking_threads(MAX_THREADS)
        .build()?;
    runtime.block_on(serve_until_power(config, reach))
}

async fn serve_until_power(config: GuestConfig, reach: ServeMode) -> io::Result<()> {
    let (asked, mut asks) = mpsc::channel(1);
    let agent = Arc::new(Agent::new(config.token.to_vec(), reach.role(), asked));
    let reaper = agent.reaper.clone();
    tokio::spawn(async move { reaper.reap().await });
    let mode = match reach {
        ServeMode::Guest(mode) => mode,
        ServeMode::Socket(path) => {
            tokio::select! {
                served = channel::serve_socket(agent.clone(), &path) => return served,
                _power = asks.recv() => return Ok(()),
            }
        }
    };
    if agent.role == Role::Service {
        warnings::load();
        // An agent that was killed while it held the file system still has left it so.
        if let Err(refusal) = agent.freezer.thaw().await {
            let message = format!("the root file system stays frozen, so the guest is not used: {}", refusal.message);
            return fail_boot(&agent, mode, message).await;
        }
    }
    set_up_guest(&agent, &config).await;
    let (serving, channel) = (agent.clone(), config.channel);
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
    init::grow_root_in_background();
    let power = power::wait_for_request(&mut asks, mode).await?;
    // If it stays frozen the guest goes down nevertheless.
    let _ = agent.freezer.thaw().await;
    power::go_down(&agent, power, mode).await
}

/// What is there before the first session: the network, and a disk that is this VM's own. What cannot be done is a warning.
async fn set_up_guest(agent: &Agent, config: &GuestConfig) {
    if let Err(error) = network::set(config.network.as_ref()) {
        warnings::warn(format!("the network could not be set up: {error}"));
    }
    if config.nested {
        nested::prepare(&agent.reaper).await;
    }
    identity::reset_new_disk(&agent.reaper, config, agent.role == Role::Init).await;
}

/// Ends a boot that must not be used: process 1 by ending, a service by requesting the power to go off.
async fn fail_boot(agent: &Agent, mode: power::Mode, message: String) -> io::Result<()> {
    if mode == power::Mode::Systemd {
        // Without a console it is in the journal.
        let _ = std::fs::write("/dev/console", format!("nido-guest-agent: {message}\n"));
        eprintln!("nido-guest-agent: {message}");
        power::go_down(agent, Power::Off, mode).await?;
    }
    Err(io::Error::other(message))
}
