//! The engine's thread, and the handle to it.

use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::rc::Rc;

use nido_api::SecretUse;
use tokio::runtime::Builder;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{LocalSet, spawn_local};

use crate::names::PinRecord;
use crate::policy::Policy;
use crate::port::Port;
use crate::shared::{Report, Reports, Settings, Shared};

/// How many threads look names up at once.
const LOOKUPS_MAX: usize = 8;

/// The network of one VM. It ends when the last of its handles is dropped.
#[derive(Debug, Clone)]
pub struct Network {
    commands: mpsc::UnboundedSender<Command>,
}

#[derive(Debug)]
enum Command {
    Report(oneshot::Sender<Report>),
    SetPolicy(Policy, oneshot::Sender<()>),
    Pins(oneshot::Sender<Vec<PinRecord>>),
    TakeUses(oneshot::Sender<Vec<(SecretUse, u64)>>),
    ResetConnections(Vec<(SocketAddr, SocketAddr)>),
}

impl Network {
    /// Starts the engine behind a socket that is bound; QEMU's socket is, or will be, at `peer`.
    ///
    /// # Errors
    /// The thread cannot be started, or the socket cannot be used.
    pub fn start(socket: UnixDatagram, peer: PathBuf, settings: Settings, reports: Reports) -> io::Result<Self> {
        let (commands, received) = mpsc::unbounded_channel();
        let runtime =
            Builder::new_current_thread().enable_io().enable_time().max_blocking_threads(LOOKUPS_MAX).build()?;
        keep_large_allocations_apart();
        let port = {
            let _guard = runtime.enter();
            Port::new(socket, peer)?
        };
        let run = move || {
            let serve = async move {
                let shared = Shared::new(port, settings, reports.denials, reports.byte_limits);
                let pins = Rc::clone(&shared);
                spawn_local(async move { pins.send_pins(reports.pins).await });
                if let Some(credentials) = shared.credentials.clone() {
                    spawn_local(async move { credentials.report_counts().await });
                }
                tokio::select! {
                    result = Rc::clone(&shared).serve() => {
                        tracing::error!("the VM's network has ended: {:?}", result.err());
                    }
                    () = run_commands(&shared, received) => {}
                }
            };
            LocalSet::new().block_on(&runtime, serve);
            // A look-up that hangs does not keep the thread.
            runtime.shutdown_background();
        };
        std::thread::Builder::new().name("network".into()).spawn(run)?;
        Ok(Self { commands })
    }

    /// What the network did; `None` if it has ended.
    pub async fn report(&self) -> Option<Report> {
        let (reply, report) = oneshot::channel();
        self.commands.send(Command::Report(reply)).ok()?;
        report.await.ok()
    }

    /// What the guest has resolved; `None` if the network has ended.
    pub async fn pins(&self) -> Option<Vec<PinRecord>> {
        let (reply, pins) = oneshot::channel();
        self.commands.send(Command::Pins(reply)).ok()?;
        pins.await.ok()
    }

    /// The uses of secrets that were counted and not reported yet; they count as reported then. `None` if the network has ended.
    pub async fn take_uses(&self) -> Option<Vec<(SecretUse, u64)>> {
        let (reply, uses) = oneshot::channel();
        self.commands.send(Command::TakeUses(reply)).ok()?;
        uses.await.ok()
    }

    /// Resets connections that the guest still believes in, each by the guest's end and the other, unless they are known here.
    pub fn reset_connections(&self, ends: Vec<(SocketAddr, SocketAddr)>) {
        let _ = self.commands.send(Command::ResetConnections(ends));
    }

    /// Replaces the rules, and returns when they are in force; `false` if the network has ended. Connections that they no longer
    /// allow are reset.
    pub async fn set_policy(&self, policy: Policy) -> bool {
        let (reply, done) = oneshot::channel();
        self.commands.send(Command::SetPolicy(policy, reply)).is_ok() && done.await.is_ok()
    }
}

/// Executes commands until the handle is dropped.
async fn run_commands(shared: &Rc<Shared>, mut commands: mpsc::UnboundedReceiver<Command>) {
    while let Some(command) = commands.recv().await {
        match command {
            Command::Report(reply) => drop(reply.send(shared.report())),
            Command::Pins(reply) => drop(reply.send(shared.export_pins())),
            Command::SetPolicy(policy, reply) => {
                shared.set_policy(policy);
                let _ = reply.send(());
            }
            // A report that is under way must not keep other commands waiting.
            Command::TakeUses(reply) => {
                let credentials = shared.credentials.clone();
                spawn_local(async move {
                    let uses = match credentials {
                        Some(credentials) => credentials.take_uses().await,
                        None => Vec::new(),
                    };
                    let _ = reply.send(uses);
                });
            }
            // A QEMU that takes no frames must not keep other commands waiting.
            Command::ResetConnections(ends) => {
                let shared = Rc::clone(shared);
                spawn_local(async move { shared.reset_connections(ends).await });
            }
        }
    }
}

/// Makes the allocator map each large buffer by itself. By default it stops doing so after the first one was released, and then each
/// connection's buffers are cleared, and so resident, from the start.
#[allow(unsafe_code)]
fn keep_large_allocations_apart() {
    #[cfg(target_env = "gnu")]
    {
        const THRESHOLD: i32 = 128 * 1024;
        // SAFETY: mallopt takes two numbers, and may be called at any time.
        unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, THRESHOLD) };
    }
}
