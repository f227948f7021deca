//! The loop that owns a running VM: everything that happens comes in here, every decision is somebody else's pure
//! function, and what is done about it goes out to QEMU, the agent and the store.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::fs::unlink;
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant as TokioInstant, sleep_until};

use super::begin::{Awake, Ended};
use super::ending::{Seen, verdict};
use super::failure_error;
use super::forwards::Forwards;
use super::launch::Running;
use super::limits::Limits;
use super::logs::{log_tail, panic_lines, rotate};
use super::serve::{Desk, Life, Order, Users, serve};
use crate::api::{AccelChoice, AgentInfo, Failure, PathChoice, StartRequest};
use crate::error::{Error, Problem, Result};
use crate::guest::{Channel, Guest};
use crate::home::{
    AGENT_SOCKET, CHANNEL_SOCKET, CONSOLE_LOG, CONTROL_SOCKET, QEMU_LOG, QMP_SOCKET, SUPERVISOR_LOG, VmDir,
};
use crate::host::kvm;
use crate::lock::Held;
use crate::machine::{Accel, Machine, Transport};
use crate::nido::Nido;
use crate::qemu::QemuExit;
use crate::state::{Fact, FailureCause, VmState, advance};
use crate::store::{Origin, Purpose, VmRow, VmUpdate};

/// How long a guest may take to become ready if nobody says otherwise.
const READY_WITHIN: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(180));
/// How often logs are looked at.
const LOGS_EVERY: Duration = Duration::from_secs(5);
/// How often the supervisor of a session's VM looks whether the session goes on.
pub(super) const SESSION_EVERY: Duration = Duration::from_secs(1);
/// How long answers to the last requests may take to be written.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How long the command that asked for a start may take to ask how it goes.
const ASKED_WITHIN: Duration = Duration::from_millis(500);

/// One VM's supervisor.
pub(super) struct Supervisor {
    pub(super) nido: Nido,
    pub(super) row: VmRow,
    pub(super) lock: Held,
    pub(super) machine: Machine,
    pub(super) dir: VmDir,
    pub(super) guest: Guest,
    pub(super) asked_at: Instant,
    pub(super) ready_within: Duration,
    /// The limit for that, if somebody set one.
    pub(super) asked_within_ms: Option<u64>,
    pub(super) life: watch::Sender<Life>,
    pub(super) orders: mpsc::Receiver<Order>,
    pub(super) users: Users,
    pub(super) channel: Option<Arc<Channel>>,
    pub(super) forwards: Forwards,
    pub(super) limits: Limits,
    pub(super) state: VmState,
    pub(super) seen: Seen,
    /// When the plug is pulled.
    pub(super) kill_at: Option<TokioInstant>,
    pub(super) quit_sent: bool,
    /// What has been saved, if this VM is there to be baked.
    pub(super) baked: Option<Result<()>>,
    /// One snapshot at a time.
    pub(super) snapshotting: Arc<Semaphore>,
    /// The guest's next answer, if it has been sent on its way again.
    pub(super) awaited: Option<oneshot::Receiver<Awake>>,
}

impl Supervisor {
    /// Opens the VM's sockets.
    pub(super) fn prepare(
        nido: Nido,
        row: VmRow,
        lock: Held,
        attach: bool,
        asked_at: Instant,
        ready_within_ms: Option<u64>,
    ) -> Result<Self> {
        let machine = row.machine.clone().ok_or_else(|| Error::internal("the VM has no machine"))?;
        let dir = nido.vm_dir(&row.id);
        let guest = nido.guest(&row)?;
        let channel = match machine.transport {
            Transport::VirtioSerial { .. } => {
                // The agent of a bake waits for its host's first word. That of a snapshot goes on in the middle of what was
                // said, and what another supervisor has told a clone, nobody knows.
                let letters = !attach && matches!(row.origin, Origin::Fork(_)) && row.renewed_from().is_some();
                Some(Arc::new(Channel::start(listen(CHANNEL_SOCKET)?, listen(AGENT_SOCKET)?, letters)))
            }
            Transport::Vsock { .. } => None,
        };
        let default = if machine.accel == Accel::Kvm { READY_WITHIN.0 } else { READY_WITHIN.1 };
        let (order_desk, orders) = mpsc::channel(16);
        let users = Users::new();
        let life = watch::channel(Life::Launching).0;
        let desk = Desk { orders: order_desk, life: life.subscribe(), users: users.clone() };
        tokio::spawn(serve(listen(CONTROL_SOCKET)?, desk));
        let limits =
            Limits::new(Instant::now(), row.expires_at.map(instant_of), row.spec.idle_ms.map(Duration::from_millis));
        let state = row.state;
        let ready_within = ready_within_ms.map_or(default, Duration::from_millis);
        Ok(Self {
            nido,
            row,
            lock,
            machine,
            dir,
            guest,
            asked_at,
            ready_within,
            asked_within_ms: ready_within_ms,
            life,
            orders,
            users,
            channel,
            forwards: Forwards::default(),
            limits,
            state,
            seen: Seen::default(),
            kill_at: None,
            quit_sent: false,
            baked: None,
            snapshotting: Arc::new(Semaphore::new(1)),
            awaited: None,
        })
    }

    /// Supervises until the VM is at rest.
    pub(super) async fn run(mut self, attach_to: bool, announce: impl FnOnce()) -> Result<()> {
        announce();
        let running = if attach_to { self.take_over().await } else { self.start().await };
        match running {
            Ok(running) => {
                let exit = self.watch_over(running).await;
                self.conclude(exit).await
            }
            Err(Ended::Exit(exit)) => self.conclude(exit).await,
            // It never ran: what keeps it from running is the answer, and the VM is as it was.
            Err(Ended::Error(error)) => {
                tracing::error!("{error}");
                self.end(VmState::Stopped, None, Some(error.problem())).await
            }
            // It lives, and there is no way to it. What the store says stays as it is.
            Err(Ended::OutOfReach(error)) => Err(error),
        }
    }

    /// QEMU has ended: so has the VM, unless KVM is to blame.
    async fn conclude(mut self, exit: QemuExit) -> Result<()> {
        self.gather_tails();
        let (state, failure) = verdict(self.state, exit, &self.seen);
        if let Some(failure) = &failure {
            match kvm_is_to_blame(&self.row, &self.machine, failure.cause) {
                Blame::Kvm => match self.start_without_kvm(failure).await {
                    Ok(()) => return Ok(()),
                    Err(error) => tracing::error!("it cannot be started without KVM: {error}"),
                },
                // It does not boot without KVM either: KVM was blamed for what the guest, or a short time limit, had done.
                Blame::Guest => kvm::take_back(&self.nido.home().cache(), &late_under_kvm(&self.row)),
                Blame::Unknown => {}
            }
        }
        self.end(state, failure, None).await
    }

    /// Hands the VM to another supervisor, which boots it without KVM. That counts as unusable from now on, until the host's
    /// next boot or until the guest has not booted without it either, so there is no third start. Whoever waits for this one
    /// finds its connection ended and asks the next.
    async fn start_without_kvm(&mut self, failure: &Failure) -> Result<()> {
        let name = &self.row.spec.name;
        tracing::warn!("VM {name} is started again without KVM: {}", failure.message);
        let why = match failure.cause {
            FailureCause::GuestTimeout => late_under_kvm(&self.row),
            _ => format!("VM '{name}' could not run under it"),
        };
        kvm::remember_unusable(&self.nido.home().cache(), why);
        self.leave_sockets();
        self.forwards.close().await;
        let lock = self.lock.file().try_clone().map_err(|e| Error::io("cannot hand the VM's lock on", e))?;
        // It was booted, for it was asked to be or had nothing to be forked from: so it is again.
        let start =
            StartRequest { timeout_ms: self.asked_within_ms, path: PathChoice::Cold, ..StartRequest::default() };
        self.nido.launch(&self.row, Held::inherited(lock), start, Instant::now()).await
    }

    /// Everything from QEMU's first answer to its end.
    async fn watch_over(&mut self, mut running: Running) -> QemuExit {
        let mut ready = self.watch_for_agent();
        let mut awaiting_agent = true;
        let mut logs = tokio::time::interval(LOGS_EVERY);
        logs.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut session = tokio::time::interval(SESSION_EVERY);
        session.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut direct = self.users.watch();
        let mut spliced =
            self.channel.as_ref().map_or_else(|| Users::new().watch(), |channel| channel.activity().open());
        let mut monitor_open = true;
        loop {
            let users = *direct.borrow_and_update() + *spliced.borrow_and_update();
            // A guest that boots is not idle: nobody could have used it yet.
            // But one that is there to be baked is there for somebody who waits for it.
            let booting = usize::from(*self.life.borrow() == Life::Booting && self.row.purpose != Purpose::Bake);
            self.limits.used_by(users + booting, Instant::now());
            if self.kill_at.is_none()
                && let Some(reached) = self.limits.reached(Instant::now())
            {
                self.time_is_up(reached, &running);
            }
            let wake = self.next_wake();
            tokio::select! {
                exit = running.process.wait() => {
                    // What QEMU said last may still be on its way.
                    self.drain_events(&mut running).await;
                    return exit.unwrap_or(QemuExit::Unknown);
                }
                event = running.events.recv(), if monitor_open => match event {
                    Some(event) => self.on_event(event, &running).await,
                    None => monitor_open = false,
                },
                Some(order) = self.orders.recv() => {
                    self.on_order(order, &running).await;
                    if let Some(next) = self.awaited.take() {
                        (ready, awaiting_agent) = (next, true);
                    }
                }
                outcome = &mut ready, if awaiting_agent => {
                    awaiting_agent = false;
                    self.on_agent(outcome.unwrap_or(Awake::Late), &running).await;
                }
                _ = direct.changed() => {}
                Ok(()) = spliced.changed() => {}
                _ = logs.tick() => rotate_logs(),
                _ = session.tick(), if self.row.spec.lease.is_some() && !self.quit_sent => {
                    if self.nido.is_orphan(&self.row) {
                        self.session_is_over(&running);
                    }
                }
                () = sleep_until(wake.unwrap_or_else(TokioInstant::now)), if wake.is_some() => self.pull_plug(&running),
            }
        }
    }

    fn next_wake(&self) -> Option<TokioInstant> {
        self.kill_at.or_else(|| self.limits.next_deadline().map(TokioInstant::from_std))
    }

    pub(super) fn learn(&mut self, fact: Fact) {
        let next = advance(self.state, fact);
        if next != self.state {
            self.state = next;
            self.write(&VmUpdate {
                state: Some(next),
                timings: Some(self.row.timings.filter(|timings| timings.total_ms > 0.0)),
                ..VmUpdate::default()
            });
        }
    }

    pub(super) fn write(&self, update: &VmUpdate) {
        if let Err(error) = self.nido.store().update_vm(&self.row.id, update) {
            tracing::error!("cannot write to the store: {error}");
        }
    }

    fn gather_tails(&mut self) {
        self.seen.qemu_tail = log_tail(&self.dir, &[QEMU_LOG]);
        let panic = panic_lines(&self.dir, CONSOLE_LOG);
        self.seen.panicked |= panic.is_some() && self.state != VmState::Stopping;
        self.seen.console_tail = panic.unwrap_or_else(|| log_tail(&self.dir, &[CONSOLE_LOG]));
    }

    fn leave_sockets(&self) {
        for socket in [QMP_SOCKET, CHANNEL_SOCKET, AGENT_SOCKET, CONTROL_SOCKET] {
            let _ = unlink(Path::new(socket));
        }
    }

    /// Writes down how it ended, tells everybody who waits, and leaves nothing behind.
    async fn end(mut self, state: VmState, failure: Option<Failure>, instead: Option<Problem>) -> Result<()> {
        let never_ran = *self.life.borrow() == Life::Launching;
        let problem = instead.or_else(|| failure.as_ref().map(|f| failure_error(&self.row.spec.name, f).problem()));
        tracing::info!(state = state.word(), "VM {} ended", self.row.spec.name);
        let update = VmUpdate {
            state: Some(state),
            cid: Some(None),
            expires_at: Some(None),
            agent: Some(AgentInfo { ready: false, ..self.row.agent.clone() }),
            ip_address: Some(None),
            failure: Some(failure),
            ..VmUpdate::default()
        };
        let written = self.nido.store().update_vm(&self.row.id, &update);
        if never_ran {
            // Whoever asked for the start knows that we listen, and is about to ask how it goes.
            self.life.send_replace(Life::Ended(problem.clone()));
            let deadline = Instant::now() + ASKED_WITHIN;
            while self.life.receiver_count() < 2 && Instant::now() < deadline {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        self.leave_sockets();
        // Whoever hears of the end may use the ports again.
        self.forwards.close().await;
        let baked = self.baked.take().map(|saved| saved.and_then(|()| self.keep_bake())).transpose();
        let erased = if self.row.spec.ephemeral { self.nido.erase(&self.row.id) } else { Ok(()) };
        self.life.send_replace(match (problem, baked) {
            (None, Ok(Some(bake))) => Life::Baked(Box::new(bake)),
            (None, Err(error)) => Life::Ended(Some(error.problem())),
            (problem, _) => Life::Ended(problem),
        });
        // Connections that wait for this end hold a receiver each; the accepting task holds one for ever.
        let deadline = Instant::now() + LAST_WORDS;
        while self.life.receiver_count() > 1 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        written.and(erased)
    }
}

/// Who has failed a VM.
enum Blame {
    /// KVM, as far as one can tell: another start without it will show.
    Kvm,
    /// The guest: it does not even boot under emulation.
    Guest,
    /// Neither is a reason to think otherwise of KVM.
    Unknown,
}

/// Whether KVM, which nobody insisted on, has failed a VM that booted.
fn kvm_is_to_blame(row: &VmRow, machine: &Machine, cause: FailureCause) -> Blame {
    let chosen = row.spec.accel == AccelChoice::Auto && row.origin == Origin::Boot && row.purpose == Purpose::Use;
    match (machine.accel, cause) {
        (Accel::Kvm, FailureCause::GuestTimeout | FailureCause::KvmInternalError) if chosen => Blame::Kvm,
        (Accel::Tcg, FailureCause::GuestTimeout) if chosen => Blame::Guest,
        _ => Blame::Unknown,
    }
}

/// What is remembered of a KVM under which this VM did not boot in time.
fn late_under_kvm(row: &VmRow) -> String {
    format!("VM '{}' did not boot in time under it", row.spec.name)
}

fn listen(name: &str) -> Result<UnixListener> {
    let _ = unlink(Path::new(name));
    UnixListener::bind(name).map_err(|e| Error::io(format!("cannot listen on {name}"), e))
}

fn rotate_logs() {
    for log in [CONSOLE_LOG, QEMU_LOG, SUPERVISOR_LOG] {
        if let Err(error) = rotate(Path::new(log)) {
            tracing::warn!("cannot rotate {log}: {error}");
        }
    }
}

fn instant_of(at: Timestamp) -> Instant {
    let left = at.duration_since(Timestamp::now());
    let now = Instant::now();
    Duration::try_from(left).map_or(now, |left| now.checked_add(left).unwrap_or(now))
}
