//! How a VM comes under supervision: its kernel boots, it is loaded from a saved state, or its QEMU is taken over from a
//! supervisor that was killed. Ends with the guest agent's first reply.
//!
//! ```text
//!  Boot   QEMU ............................ agent answers a ping
//!  Fork   QEMU (waits) - load - link down - cont - resize - identity reset - link up -> open for clients
//! ```
//!
//! Invariant: until the identity of a loaded guest has been reset, only this supervisor can reach it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::operation as op;
use nido_api::state::VmState;
use nido_api::{NetChoice, StartPath, Timings};
use nido_engine::guest::Link;
use nido_engine::home::{DEVICE_STATE, LOAD_SOCKET, QEMU_LOG};
use nido_engine::host::QemuFacts;
use nido_engine::logs::log_tail;
use nido_engine::machine::{GUEST_CIDS, Transport};
use nido_engine::qemu::argv::NET;
use nido_engine::qemu::migration::{self, Memory};
use nido_engine::qemu::{Monitor, QemuExit};
use nido_files::random;
use nido_guest_agent::wire::IdentityReset;
use nido_store::{Origin, Transition};
use qapi::qmp::{self, RunState};
use tokio::sync::oneshot;
use tokio::time::Instant as TokioInstant;

use super::control_server::{ActiveSessions, StartupPhase};
use super::forwards::bind;
use super::jobs::{self, HostProbe};
use super::launch::{LaunchError, RunningQemu, attach, launch};
use super::lifecycle::{Event, Stop};
use super::qmp::QMP_TIMEOUT;
use super::readiness::{AgentRoute, Readiness, reset_identity, warm};
use super::role::Role;
use super::state::{RECORD_JOB, RECORD_TIMEOUT, Supervisor, TAILS_JOB, TAILS_TIMEOUT};

/// How long loading may take: milliseconds for a bake, seconds for a large memory.
const LOAD_TIMEOUT: Duration = Duration::from_secs(600);
/// How long a QEMU that was left by its supervisor may take to listen to another.
const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(15);
/// How many vsock addresses are tried when the first is taken.
const ADDRESS_RETRIES_MAX: u32 = 4;

/// How a VM ended without having run under this supervisor.
pub(super) enum NotRunning {
    /// QEMU has ended.
    Exit(QemuExit),
    /// It never ran.
    Error(Error),
    /// It lives, and there is no way to it.
    OutOfReach(Error),
}

impl Supervisor {
    pub(super) async fn start(&mut self) -> Result<RunningQemu, NotRunning> {
        self.bind_forwards().await.map_err(NotRunning::Error)?;
        nido_files::failpoint!("startup.ports");
        let host = HostProbe::new(&self.context);
        let facts = jobs::run(move || host.qemu()).await.map_err(NotRunning::Error)?;
        let running = self.launch(&facts).await?;
        nido_files::failpoint!("startup.monitor");
        let qemu_ms = self.since_request_ms();
        let mut timings = Timings { path: StartPath::Cold, qemu_ms, load_ms: qemu_ms, agent_ms: 0.0, total_ms: 0.0 };
        if let Some((path, state, memory)) = self.what_to_load() {
            timings.path = path;
            self.load(&state, memory, &running).await?;
            nido_files::failpoint!("startup.resumed");
            timings.load_ms = self.since_request_ms();
        }
        self.row.timings = Some(timings);
        self.step(Event::QmpReady, &running);
        self.begin_booting(&running);
        Ok(running)
    }

    /// Starts QEMU. If another program uses the vsock address, tries another one.
    async fn launch(&mut self, facts: &QemuFacts) -> Result<RunningQemu, NotRunning> {
        let mut tries = 0;
        loop {
            match launch(self.context.home(), &self.row, &self.machine, facts).await {
                Ok(running) => return Ok(running),
                Err(LaunchError::Exited(_)) if tries < ADDRESS_RETRIES_MAX && self.address_was_taken().await => {
                    tries += 1;
                    self.take_another_address().map_err(NotRunning::Error)?;
                }
                Err(LaunchError::Exited(exit)) => return Err(NotRunning::Exit(exit)),
                Err(LaunchError::Failed(error)) => return Err(NotRunning::Error(error)),
            }
        }
    }

    async fn address_was_taken(&self) -> bool {
        if !matches!(self.machine.transport, Transport::Vsock { .. }) {
            return false;
        }
        let dir = self.dir.clone();
        let tail = jobs::run_within(TAILS_JOB, TAILS_TIMEOUT, move || Ok(log_tail(&dir, &[QEMU_LOG]))).await;
        tail.is_ok_and(|lines| lines.iter().any(|line| reports_address_in_use(line)))
    }

    fn take_another_address(&mut self) -> Result<()> {
        let cid = random::number_in(&GUEST_CIDS)?;
        tracing::warn!("another program uses the VM's vsock address; trying {cid}");
        self.machine.transport = Transport::Vsock { cid };
        let changed = Transition::AddressChanged { cid, machine: self.machine.clone() };
        self.context.store().transition(&self.row.id, &changed)?.log(&self.row.id, "its vsock address");
        (self.row.cid, self.row.machine) = (Some(cid), Some(self.machine.clone()));
        self.guest = self.context.guest(&self.row)?;
        Ok(())
    }

    /// The state that the machine is loaded from.
    fn what_to_load(&self) -> Option<(StartPath, PathBuf, Memory)> {
        match &self.row.origin {
            Origin::Boot => None,
            Origin::Fork(saved) => Some((StartPath::Fork, self.context.home().blob(&saved.state), Memory::Apart)),
            Origin::Restore { snapshot, .. } => {
                let state = nido_engine::snapshot::dir(&self.dir, snapshot).join(DEVICE_STATE);
                Some((StartPath::Restore, state, Memory::Within))
            }
        }
    }

    /// Loads a saved state into a QEMU that waits for one, and resumes it.
    async fn load(&self, state: &Path, memory: Memory, running: &RunningQemu) -> Result<(), NotRunning> {
        let broken = |why: String| Error::new(Code::QemuFailed, format!("the VM cannot be resumed: {why}"));
        let work = async {
            let monitor = running.monitor()?;
            let state = File::open(state).map_err(|e| broken(e.to_string()))?;
            migration::load(monitor, Path::new(LOAD_SOCKET), state, memory, LOAD_TIMEOUT)
                .await
                .map_err(|e| broken(nido_api::sanitize::on_one_line(&e.to_string())))?;
            nido_files::failpoint!("startup.loaded");
            if self.lifecycle.role().is_twin() {
                return Ok(());
            }
            self.set_link(false, running).await?;
            monitor.cont(QMP_TIMEOUT).await.map_err(|e| broken(nido_api::sanitize::on_one_line(&e.to_string())))?;
            // Not before: QEMU 10 keeps the disk of a loaded machine inactive until it is resumed.
            self.resize_disk(running).await
        };
        let failed = tokio::select! {
            outcome = work => match outcome {
                Ok(()) => return Ok(()),
                Err(error) => error,
            },
            // Its log has the cause.
            exit = running.process.wait() => return Err(NotRunning::Exit(exit.unwrap_or(QemuExit::Unknown))),
        };
        // A QEMU that cannot load ends itself.
        match tokio::time::timeout(Duration::from_secs(1), running.process.wait()).await {
            Ok(exit) => Err(NotRunning::Exit(exit.unwrap_or(QemuExit::Unknown))),
            Err(_) => {
                let _ = running.process.kill();
                let _ = running.process.wait().await;
                Err(NotRunning::Error(
                    failed.hint(Hint::run_on(op::VM_START, &self.row.spec.name).cold().to("boot it")),
                ))
            }
        }
    }

    /// Whether the guest has a network card and is loaded: it may send nothing before its identity reset.
    fn has_link_to_hold(&self) -> bool {
        self.row.origin != Origin::Boot && self.machine.net == NetChoice::Nat
    }

    /// Sets the link of the guest's network card. A loaded guest has the identity of another one until its identity reset.
    async fn set_link(&self, up: bool, running: &RunningQemu) -> Result<()> {
        if !self.has_link_to_hold() {
            return Ok(());
        }
        switch_link(running.monitor()?, up).await
    }

    /// The guest was saved with a disk of its template's size; the VM may have been promised a larger one.
    pub(super) async fn resize_disk(&self, running: &RunningQemu) -> Result<()> {
        let baked = self.row.parts.frozen.last().map_or(self.row.disk_bytes, |frozen| frozen.virtual_bytes);
        if baked == self.row.disk_bytes {
            return Ok(());
        }
        let size = i64::try_from(self.row.disk_bytes).unwrap_or(i64::MAX);
        let resize = qmp::block_resize { device: None, node_name: Some("disk".into()), size };
        running.monitor()?.execute(resize, QMP_TIMEOUT).await.map(drop).map_err(|e| {
            let why = nido_api::sanitize::on_one_line(&e.to_string());
            Error::new(Code::QemuFailed, format!("the VM's disk cannot be enlarged: {why}"))
        })
    }

    pub(super) async fn take_over(&mut self) -> Result<RunningQemu, NotRunning> {
        tracing::info!("taking over the QEMU of VM {}", self.row.spec.name);
        let running = self.attach().await?;
        // No process waits for this VM any more. Creating another clone is faster than checking this one.
        if running.is_mute() {
            self.lifecycle.set_mute();
        }
        if self.lifecycle.role() != Role::Use {
            // It no longer counts, from here on.
            self.step(Event::Stop(Stop::force(None)), &running);
            let _ = running.process.kill();
            return Ok(running);
        }
        let Ok(monitor) = running.monitor().cloned() else { return Ok(running) };
        // The previous supervisor may have been killed between a claim and its record, which would still describe a clone of the pool.
        let (context, id) = (Arc::clone(&self.context), self.row.id.clone());
        let record = self.jobs.start(RECORD_JOB, move || {
            context.refresh_record(&id);
            Ok(())
        });
        if let Err(error) = record.outcome_within(RECORD_TIMEOUT).await {
            tracing::warn!("{RECORD_JOB}: {error}");
        }
        if let Err(error) = self.bind_forwards().await {
            tracing::error!("a published port is lost: {error}");
        }
        nido_files::failpoint!("takeover.begun");
        self.remove_warning();
        self.recover_snapshot(&running).await;
        match monitor.query_status(QMP_TIMEOUT).await {
            // It was loading, and what it has loaded may be incomplete. Its guest has done nothing yet, so another
            // QEMU is as good.
            Ok(RunState::inmigrate) => {
                tracing::info!("it was still loading; starting again");
                let _ = running.process.kill();
                let _ = running.process.wait().await;
                self.forwards.close().await;
                return self.start().await;
            }
            // Loaded, or claimed; only the previous supervisor knew whether it was resumed and its disk enlarged.
            Ok(status) if !self.lifecycle.is_ready() && self.row.origin != Origin::Boot => {
                if status == RunState::paused {
                    if let Err(error) = self.set_link(false, &running).await {
                        tracing::error!("{error}");
                    }
                    let _ = monitor.cont(QMP_TIMEOUT).await;
                }
                if let Err(error) = self.resize_disk(&running).await {
                    tracing::error!("{error}");
                }
                self.step(Event::QmpReady, &running);
            }
            Ok(status) => {
                // What the supervisor before could not write does not count any more.
                self.unwritten.mark_checked();
                if self.lifecycle.state() == VmState::Starting && status == RunState::running {
                    self.step(Event::QmpReady, &running);
                }
                self.observe(status, &running);
                let (state, cause, timings) = (self.lifecycle.state(), self.lifecycle.cause(), self.row.timings);
                self.write(Transition::Entered { state, cause, timings });
            }
            Err(error) => tracing::warn!("cannot read QEMU's status: {error}"),
        }
        self.begin_booting(&running);
        Ok(running)
    }

    /// The guardian may have recorded that no supervisor works: this one does.
    fn remove_warning(&mut self) {
        let before = self.machine.warnings.len();
        self.machine.warnings.retain(|warning| warning != crate::SUPERVISOR_FAILS);
        if self.machine.warnings.len() != before {
            self.write(Transition::MachineChanged(self.machine.clone()));
        }
    }

    /// From here on the agent is awaited.
    fn begin_booting(&mut self, running: &RunningQemu) {
        self.life.send_replace(StartupPhase::Booting);
        self.step(Event::Booting, running);
    }

    /// Finds the QEMU that holds the VM's lock. One that cannot be reached has only just been started, or is about to end.
    async fn attach(&self) -> Result<RunningQemu, NotRunning> {
        let deadline = Instant::now() + TAKEOVER_TIMEOUT;
        loop {
            match attach().await {
                Ok(attached) => return Ok(attached),
                Err(_) if !nido_files::lock::is_held(&self.dir.file(nido_engine::home::VM_LOCK)) => {
                    return Err(NotRunning::Exit(QemuExit::Unknown));
                }
                Err(error) if Instant::now() > deadline => return Err(NotRunning::OutOfReach(error)),
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    pub(super) async fn bind_forwards(&mut self) -> Result<()> {
        for spec in self.row.forwards.clone() {
            let (bound, listener) = bind(&spec).await?;
            if bound != spec {
                let store = self.context.store();
                store.remove_forward(&self.row.id, &spec)?;
                store.add_forward(&self.row.id, &bound)?;
            }
            self.forwards.start(bound, listener, self.guest.clone(), self.forward_users());
        }
        Ok(())
    }

    /// With virtio-serial, forwarded connections pass the channel, which counts them.
    pub(super) fn forward_users(&self) -> ActiveSessions {
        if self.channel.is_some() { ActiveSessions::new() } else { self.users.clone() }
    }

    /// Waits for the guest's first reply, on a task of its own.
    pub(super) fn watch_for_agent(&self, running: &RunningQemu) -> oneshot::Receiver<Readiness> {
        self.watch_for_agent_within(self.lifecycle.ready_within(), running)
    }

    pub(super) fn watch_for_agent_within(
        &self,
        within: Duration,
        running: &RunningQemu,
    ) -> oneshot::Receiver<Readiness> {
        let (done, awake) = oneshot::channel();
        let deadline = TokioInstant::now() + within;
        let link = self.channel.as_ref().map(|channel| channel.link());
        let guest = self.guest.clone();
        let door = self.channel.clone();
        // No client uses a clone before it is claimed.
        let opens = self.lifecycle.role().opens_to_clients();
        let saved = self.row.identity_reset_token().filter(|_| !self.lifecycle.is_ready());
        let identity_reset = saved.map(|token| (nido_api::hex::decode(token), self.identity_reset()));
        let held =
            (identity_reset.is_some() && self.has_link_to_hold()).then(|| running.monitor().cloned().ok()).flatten();
        tokio::spawn(async move {
            let answer = match identity_reset {
                Some((token, identity_reset)) => {
                    let tokens = [token, guest.token().to_vec()];
                    let agent_route = AgentRoute { guest: guest.clone(), channel: door.clone() };
                    let mut answer = reset_identity(&agent_route, &tokens, identity_reset, deadline).await;
                    if let (Readiness::Yes(_), Some(monitor)) = (&answer, held)
                        && let Err(error) = switch_link(&monitor, true).await
                    {
                        answer = Readiness::NotRenewed(error.to_string());
                    }
                    door.iter().for_each(|channel| channel.end_bootstrap());
                    answer
                }
                None => {
                    door.iter().for_each(|door| door.open(true));
                    if let Some(mut link) = link {
                        // Dialling before the channel is up would only wait in its queue.
                        let _ = tokio::time::timeout_at(deadline, link.wait_for(|link| *link == Link::Up)).await;
                    }
                    let pong = guest.wait_ready(deadline).await;
                    match pong.inspect_err(|e| tracing::warn!("the guest agent does not reply: {e}")) {
                        Ok(pong) => Readiness::Yes(pong),
                        Err(error) if error.may_pass() => Readiness::Late,
                        Err(error) => Readiness::Refused(error),
                    }
                }
            };
            if !opens && matches!(answer, Readiness::Yes(_)) {
                warm(&AgentRoute { guest: guest.clone(), channel: door.clone() }, deadline).await;
            }
            if opens && matches!(answer, Readiness::Yes(_)) {
                door.iter().for_each(|door| door.open(true));
            }
            let _ = done.send(answer);
        });
        awake
    }

    /// What makes the guest a machine of its own; the random bytes and the time are put in when it is sent.
    pub(super) fn identity_reset(&self) -> IdentityReset {
        IdentityReset {
            token: self.guest.token().to_vec().into(),
            entropy: Vec::new().into(),
            time_ns: 0,
            hostname: self.row.spec.name.to_string(),
            identity: self.row.id.clone(),
            network: crate::context::guest_network(self.row.spec.net),
            disk_grown: self.row.parts.frozen.last().is_some_and(|frozen| frozen.virtual_bytes < self.row.disk_bytes),
        }
    }
}

async fn switch_link(monitor: &Monitor, up: bool) -> Result<()> {
    let set = qmp::set_link { name: NET.into(), up };
    monitor.execute(set, QMP_TIMEOUT).await.map(drop).map_err(|e| {
        let why = nido_api::sanitize::on_one_line(&e.to_string());
        Error::new(Code::QemuFailed, format!("the VM's network cannot be switched: {why}"))
    })
}

/// Whether a line of QEMU's is the one with which it ends because another program uses the VM's vsock address.
fn reports_address_in_use(line: &str) -> bool {
    line.contains("unable to set guest cid") && line.contains("Address already in use")
}
