//! One VM's supervisor: what it holds, and how the VM's state changes.
//!
//! Invariant: its state, and what follows from it, are decided by [`Lifecycle`] alone.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nido_api::egress::Denial;
use nido_api::error::{Error, Result};
use nido_engine::guest::{Channel, Guest};
use nido_engine::home::{AGENT_SOCKET, CHANNEL_SOCKET, CONTROL_SOCKET, UNWRITTEN, VmDir};
use nido_engine::host::ControlGroup;
use nido_engine::machine::{Accel, Machine, Transport};
use nido_files::lock::HeldLock;
use nido_files::private_dir::{make_socket_private, remove_socket};
use nido_guest_agent::wire::Pong;
use nido_net::names::PinRecord;
use nido_net::{ByteLimit, Network, Reports, UseReport};
use nido_store::{Origin, Transition, VmRow};
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use super::control_group::LimitedGroup;
use super::control_server::{ActiveSessions, ControlQueue, ControlRequest, ReplySender, StartupPhase, serve};
use super::forwards::Forwards;
use super::host_clocks::HostClocks;
use super::jobs::Jobs;
use super::lifecycle::{InitialState, Lifecycle};
use super::limits::Limits;
use super::network;
use super::old_connections::Ends;
use super::pause::AutomaticResume;
use super::process_refusals::ProcessRefusals;
use super::qemu_sockets;
use super::readiness::{AgentRoute, Readiness};
use super::recorded_limits::RecordedLimits;
use super::role::Role;
use super::start_report::{PendingStart, StartReport};
use super::terminate::Termination;
use super::unwritten::UnwrittenChanges;
use crate::context::Context;

/// How long a guest may take to become ready by default.
const DEFAULT_READY_TIMEOUT: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(180));
/// How often the supervisor of a session's VM checks whether the session continues.
pub(super) const SESSION_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The job that writes the VM's record, and how long it is waited for.
pub(super) const RECORD_JOB: &str = "writing the VM's record";
pub(super) const RECORD_TIMEOUT: Duration = Duration::from_secs(30);
/// The job that reads the ends of the logs, and how long it is waited for: a VM can end without them.
pub(super) const TAILS_JOB: &str = "reading the logs";
pub(super) const TAILS_TIMEOUT: Duration = Duration::from_secs(5);

/// One VM's supervisor.
pub(super) struct Supervisor {
    pub(super) context: Arc<Context>,
    pub(super) row: VmRow,
    pub(super) lock: HeldLock,
    pub(super) machine: Machine,
    pub(super) dir: VmDir,
    pub(super) guest: Guest,
    pub(super) asked_at: Instant,
    pub(super) life: watch::Sender<StartupPhase>,
    pub(super) calls: mpsc::Receiver<ControlRequest>,
    pub(super) users: ActiveSessions,
    pub(super) channel: Option<Arc<Channel>>,
    pub(super) forwards: Forwards,
    /// The guest's network, if it has a card.
    pub(super) network: Option<Network>,
    /// The certificate that the guest has to trust for its secrets.
    pub(super) certificate: Option<String>,
    /// The guest may have connections that this network does not know.
    pub(super) has_old_connections: bool,
    pub(super) lifecycle: Lifecycle,
    /// It stays when it has stopped, although it is ephemeral: it is being restored.
    pub(super) kept: bool,
    /// What has been saved, if this VM is there to be baked.
    pub(super) baked: Option<Result<()>>,
    /// One snapshot at a time.
    pub(super) snapshotting: Arc<Semaphore>,
    /// Signals that request an end.
    pub(super) termination: Termination,
    /// The guest's next answer, if it has been sent on its way again.
    pub(super) awaited: Option<oneshot::Receiver<Readiness>>,
    /// What QEMU reported of the disk: whether the host's is full.
    pub(super) no_space: Option<bool>,
    /// When a full disk's VM resumes by itself.
    pub(super) by_itself: Option<AutomaticResume>,
    /// The guest's clock has to be set when its agent answers.
    pub(super) clock_stale: bool,
    pub(super) host_clocks: HostClocks,
    pub(super) unwritten: UnwrittenChanges,
    pub(super) recorded_limits: RecordedLimits,
    /// How long QEMU's files may become, once this supervisor has set it.
    pub(super) layer_limit: Option<u64>,
    /// What the guest has refused for its limit of processes.
    pub(super) process_refusals: ProcessRefusals,
    /// The control group that limits QEMU on the host.
    pub(super) group: Option<LimitedGroup>,
    /// The start of QEMU, or the take-over of one, until it is over.
    pub(super) startup: Option<PendingStart>,
    /// It was given up, and its task may not have ended yet.
    pub(super) start_cancelled: bool,
    /// Requests that wait until the start is over.
    pub(super) deferred: Vec<ControlRequest>,
    /// Jobs that may change the VM's directory.
    pub(super) jobs: Jobs,
    /// What tasks of the supervisor's own report.
    pub(super) reports: (mpsc::Sender<Report>, mpsc::Receiver<Report>),
}

/// What a task beside the loop reports when it is done.
pub(super) enum Report {
    /// How far the start of QEMU, or a take-over, has come.
    Start(StartReport),
    /// A pause: whether it is done, and the client that requested it.
    Paused(Result<()>, ReplySender),
    /// A resume: whether the CPUs run, and the client that requested it, if any.
    Resumed(Result<()>, Option<ReplySender>),
    /// A clone that is ready was paused, or could not be.
    Parked(Result<()>, Pong),
    /// The guest was saved to be baked, or could not be.
    Saved(Result<()>),
    /// How many sessions the agent has, this question's own left out.
    InUse(u32),
    /// The connections that the guest had before this supervisor, or before it was saved.
    OldConnections(Vec<Ends>),
    /// The addresses that the guest has resolved names to.
    Resolved(Vec<PinRecord>),
    /// The network refused what the guest tried to reach.
    Denied(Box<Denial>),
    /// The guest has sent or received as many bytes as it may.
    ByteLimit(ByteLimit),
    /// How many processes the guest has refused since it started; absent if it did not say.
    ProcessesRefused(Option<u64>),
    /// The VM has a systemd scope, which is this control group.
    Group(Box<ControlGroup>),
    /// The network is about to put a secret into a request, or has counted those that it did.
    SecretUsed(Box<UseReport>),
    /// What a job does, and its outcome: an error, too, if it is late and continues.
    JobEnded(&'static str, Result<()>),
}

impl Supervisor {
    /// Opens the VM's sockets.
    pub(super) fn prepare(
        context: Arc<Context>,
        row: VmRow,
        lock: HeldLock,
        attach: bool,
        asked_at: Instant,
        ready_within_ms: Option<u64>,
    ) -> Result<Self> {
        let machine = row.machine.clone().ok_or_else(|| Error::internal("the VM has no machine"))?;
        let dir = context.vm_dir(&row.id);
        let guest = context.guest(&row)?;
        qemu_sockets::prepare(Path::new("."), attach).map_err(|e| Error::io("cannot prepare the VM's sockets", e))?;
        let channel = match machine.transport {
            Transport::VirtioSerial { .. } => {
                // The agent of a warm image waits for a new connection. That of a snapshot has an open one, and the state of a
                // clone's connection is unknown.
                let bootstrap_requests = !attach
                    && matches!(&row.origin, Origin::Fork(saved) if !saved.live)
                    && row.identity_reset_token().is_some();
                Some(Arc::new(Channel::start(listen(CHANNEL_SOCKET)?, listen(AGENT_SOCKET)?, bootstrap_requests)))
            }
            Transport::Vsock { .. } => None,
        };
        let default = if machine.accel == Accel::Kvm { DEFAULT_READY_TIMEOUT.0 } else { DEFAULT_READY_TIMEOUT.1 };
        let (call_desk, calls) = mpsc::channel(16);
        let users = ActiveSessions::new();
        let life = watch::channel(StartupPhase::Launching).0;
        let desk = ControlQueue { calls: call_desk, life: life.subscribe(), users: users.clone() };
        tokio::spawn(serve(listen(CONTROL_SOCKET)?, desk));
        let reports = mpsc::channel(16);
        let used = pass_on(&reports.0, 16, |used| Report::SecretUsed(Box::new(used)));
        let (credentials, certificate) = context.credentials(&row, used)?.unzip();
        // Only its restart policy starts a VM again that a user does not.
        let continues = attach || row.origin == Origin::Boot && context.store().restart_count(&row.id)? > 0;
        let network = network::start(&row, &dir, (attach, continues), credentials, network_reports(&reports.0))?;
        let has_old_connections = network.is_some() && (attach || has_connections(&row.origin));
        let limits =
            Limits::new(Instant::now(), row.expires_at.map(instant_of), row.spec.idle_ms.map(Duration::from_millis));
        let lifecycle = Lifecycle::new(InitialState {
            role: Role::of(&row),
            state: row.state,
            cause: row.cause,
            ready: row.agent.ready,
            has_run: attach,
            ready_within: ready_within_ms.map_or(default, Duration::from_millis),
            limits,
            agent_counts: channel.is_none(),
        });
        Ok(Self {
            context,
            row,
            lock,
            machine,
            dir,
            guest,
            asked_at,
            life,
            calls,
            users,
            channel,
            forwards: Forwards::default(),
            has_old_connections,
            network,
            certificate,
            lifecycle,
            kept: false,
            baked: None,
            snapshotting: Arc::new(Semaphore::new(1)),
            termination: Termination::listen().map_err(|e| Error::io("cannot listen to signals", e))?,
            awaited: None,
            no_space: None,
            by_itself: None,
            clock_stale: attach,
            host_clocks: HostClocks::now(),
            unwritten: UnwrittenChanges::prepare(Path::new(UNWRITTEN)),
            recorded_limits: RecordedLimits::default(),
            layer_limit: None,
            process_refusals: ProcessRefusals::new(attach),
            group: None,
            startup: None,
            start_cancelled: false,
            deferred: Vec::new(),
            jobs: Jobs::new(),
            reports,
        })
    }

    /// Milliseconds since the user asked for the start.
    pub(super) fn since_request_ms(&self) -> f64 {
        self.asked_at.elapsed().as_secs_f64() * 1000.0
    }

    /// Whether it is paused only for a snapshot.
    pub(super) fn is_being_saved(&self) -> bool {
        self.snapshotting.available_permits() == 0
    }

    pub(super) fn agent_route(&self) -> AgentRoute {
        AgentRoute { guest: self.guest.clone(), channel: self.channel.clone() }
    }

    /// Writes into the store. What it does not take is kept and repeated.
    pub(super) fn write(&mut self, transition: Transition) {
        self.unwritten.push(transition);
        self.flush();
    }

    pub(super) fn flush(&mut self) {
        let (context, row) = (&self.context, &self.row);
        if let Err(error) = self.unwritten.flush(row, |transition| context.store().transition(&row.id, transition)) {
            tracing::error!("cannot write to the store: {error}");
        }
    }
}

/// Where the network reports what it refuses.
fn network_reports(reports: &mpsc::Sender<Report>) -> Reports {
    let denials = pass_on(reports, 16, |denial: Denial| Report::Denied(Box::new(denial)));
    let byte_limits = pass_on(reports, 1, Report::ByteLimit);
    Reports { denials, pins: pass_on(reports, 1, Report::Resolved), byte_limits }
}

/// A channel whose messages are reports.
fn pass_on<T: Send + 'static>(
    reports: &mpsc::Sender<Report>,
    length: usize,
    report: impl Fn(T) -> Report + Send + 'static,
) -> mpsc::Sender<T> {
    let (sender, mut received) = mpsc::channel(length);
    let reports = reports.clone();
    tokio::spawn(async move {
        while let Some(message) = received.recv().await {
            if reports.send(report(message)).await.is_err() {
                return;
            }
        }
    });
    sender
}

/// Whether a guest is loaded that was in use: one of a warm image has no connections.
fn has_connections(origin: &Origin) -> bool {
    match origin {
        Origin::Boot => false,
        Origin::Fork(saved) => saved.live,
        Origin::Restore { .. } => true,
    }
}

fn listen(name: &str) -> Result<UnixListener> {
    let failed = |e| Error::io(format!("cannot listen on {name}"), e);
    remove_socket(Path::new(name)).map_err(failed)?;
    let listener = UnixListener::bind(name).map_err(failed)?;
    make_socket_private(Path::new(name)).map_err(failed)?;
    Ok(listener)
}

pub(super) fn instant_of(at: Timestamp) -> Instant {
    let left = at.duration_since(Timestamp::now());
    let now = Instant::now();
    Duration::try_from(left).map_or(now, |left| now.checked_add(left).unwrap_or(now))
}
