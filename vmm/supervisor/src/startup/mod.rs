//! How a VM comes under supervision: its kernel boots, it is loaded from a saved state, or its QEMU is taken over from a
//! supervisor that was killed. A task does that (`task.rs`) and reports each step to the event loop, which serves requests, signals
//! and limits meanwhile.
//!
//! ```text
//!  Boot        Spawned - Connected ........................................... Started -> the agent is awaited
//!  Fork        Spawned - Connected - load - link down - cont - resize disk ... Started -> identity reset, link up
//!  Take-over   Attached - complete or undo what the supervisor before did .... TakenOver -> the agent is awaited
//! ```
//!
//! Invariants: a VM whose guest has not run is stopped by killing its QEMU, also before the monitor replies; a request that needs
//! the guest or QEMU waits until the start is over; the process of a start that was cancelled is known, and killed.

mod task;

use std::sync::Arc;
use std::time::Duration;

use nido_api::error::Result;
use nido_api::state::VmState;
use nido_api::{StartPath, Timings};
use nido_engine::home::QEMU_LOG;
use nido_engine::logs::log_tail;
use nido_engine::machine::{GUEST_CIDS, Transport};
use nido_engine::qemu::QemuExit;
use nido_files::random;
use nido_store::{Origin, Transition};
use qapi::qmp::RunState;
use tokio::time::timeout;

use self::task::Startup;
use super::control::Request;
use super::control_server::{ActiveSessions, ControlRequest, StartupPhase};
use super::forwards::bind;
use super::jobs;
use super::launch::{Connection, RunningQemu};
use super::lifecycle::Event;
use super::role::Role;
use super::start_report::{End, PendingStart, StartReport, Takeover};
use super::state::{Supervisor, TAILS_JOB, TAILS_TIMEOUT};

/// How many vsock addresses are tried when the first is taken.
pub(super) const ADDRESS_RETRIES_MAX: u32 = 4;
/// How long a QEMU that was killed may take to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

impl Supervisor {
    /// Begins to start QEMU, or to take it over.
    pub(super) async fn begin_start(&mut self, attach: bool, running: &RunningQemu) -> Result<()> {
        if attach {
            tracing::info!("taking over the QEMU of VM {}", self.row.spec.name);
        } else {
            self.bind_forwards().await?;
            nido_files::failpoint!("startup.ports");
            self.step(Event::Launching, running);
        }
        // What the start before reported last.
        while self.reports.1.try_recv().is_ok() {}
        let startup = Startup {
            context: Arc::clone(&self.context),
            row: self.row.clone(),
            machine: self.machine.clone(),
            dir: self.dir.clone(),
            jobs: self.jobs.clone(),
            twin: self.lifecycle.role().is_twin(),
            snapshot: self.snapshot_recovery(),
            ready_within: self.lifecycle.ready_within(),
            process: running.process.clone(),
            reports: self.reports.0.clone(),
        };
        let task = if attach { tokio::spawn(startup.take_over()) } else { tokio::spawn(startup.start()) };
        self.startup = Some(PendingStart { task, attaches: attach });
        Ok(())
    }

    /// Whether the VM is being started or taken over.
    pub(super) const fn is_starting(&self) -> bool {
        self.startup.is_some()
    }

    /// Keeps a request that needs what is not there yet, until the start is over; returns any other.
    pub(super) fn defer(&mut self, call: ControlRequest) -> Option<ControlRequest> {
        let needs_guest = match call.request {
            Request::Ready | Request::Lease | Request::Stop(_) | Request::StopKept => false,
            Request::Retire | Request::Status | Request::ApplyRules => false,
            Request::Pause | Request::Resume | Request::Snapshot { .. } | Request::Claim(_) => true,
            Request::ForwardAdd { .. } | Request::ForwardRemove { .. } => true,
        };
        if needs_guest && self.is_starting() {
            self.deferred.push(call);
            return None;
        }
        Some(call)
    }

    /// QEMU is to quit, and its monitor is not connected yet: a start is given up. A QEMU that is being looked for is killed when it
    /// is found.
    pub(super) fn cancel_start(&mut self, running: &RunningQemu) {
        if let Some(start) = self.startup.as_ref().filter(|start| !start.attaches) {
            tracing::info!("the start is cancelled");
            start.task.abort();
            self.start_cancelled = true;
            running.process.kill();
        }
    }

    /// Waits until a start that was cancelled can start nothing any more. `Some` if it has started nothing.
    pub(super) async fn end_cancelled_start(&mut self, running: &RunningQemu) -> Option<End> {
        if !std::mem::take(&mut self.start_cancelled) {
            return None;
        }
        self.abort_start().await;
        running.process.kill();
        (!running.process.exists()).then_some(End::Exit(QemuExit::Unknown))
    }

    /// QEMU has ended: the task that started it reports nothing more.
    pub(super) async fn abort_start(&mut self) {
        if let Some(start) = self.startup.take() {
            start.task.abort();
            let _ = start.task.await;
        }
    }

    /// Takes note of how far the start has come. `Some` if it has ended without a guest.
    pub(super) async fn on_start_report(&mut self, report: StartReport, running: &mut RunningQemu) -> Option<End> {
        match report {
            StartReport::Spawned => {}
            StartReport::Connected(connection) => {
                running.connected(connection);
                self.join_group(running.process.pid());
                let qemu_ms = self.since_request_ms();
                let path = self.start_path();
                self.row.timings = Some(Timings { path, qemu_ms, load_ms: qemu_ms, agent_ms: 0.0, total_ms: 0.0 });
            }
            StartReport::Started => {
                let load_ms = self.since_request_ms();
                if let Some(timings) = self.row.timings.as_mut().filter(|timings| timings.path != StartPath::Cold) {
                    timings.load_ms = load_ms;
                }
                self.step(Event::QmpReady, running);
                self.begin_booting(running);
                self.end_start(running).await;
            }
            StartReport::Attached(connection) => self.on_attached(connection, running).await,
            StartReport::TakenOver(found) => return self.on_taken_over(found, running).await,
            StartReport::Over(End::Error(error)) => {
                end_qemu(running).await;
                return Some(End::Error(error));
            }
            StartReport::Over(end) => return Some(end),
        }
        None
    }

    async fn on_attached(&mut self, connection: Option<Connection>, running: &mut RunningQemu) {
        match connection {
            Some(connection) => running.connected(connection),
            None => running.fell_mute(),
        }
        self.join_group(running.process.pid());
        self.step(Event::Attached { mute: running.is_mute() }, running);
        // A VM without a purpose is killed, and one that does not reply can only be watched.
        if running.is_mute() || self.lifecycle.role() != Role::Use {
            return self.end_start(running).await;
        }
        if let Err(error) = self.bind_forwards().await {
            tracing::error!("a published port is lost: {error}");
        }
        self.remove_warning();
    }

    async fn on_taken_over(&mut self, found: Takeover, running: &mut RunningQemu) -> Option<End> {
        match found {
            Takeover::StillLoading if !self.lifecycle.is_ending() => {
                tracing::info!("it was still loading; starting again");
                end_qemu(running).await;
                self.forwards.close().await;
                return Some(End::StartAgain);
            }
            Takeover::StillLoading => running.process.kill(),
            Takeover::Loaded => self.step(Event::QmpReady, running),
            Takeover::Status(status) => {
                // What the supervisor before could not write does not count any more.
                self.unwritten.mark_checked();
                if self.lifecycle.state() == VmState::Starting && status == RunState::running {
                    self.step(Event::QmpReady, running);
                }
                self.observe(status, running);
                let (state, cause, timings) = (self.lifecycle.state(), self.lifecycle.cause(), self.row.timings);
                self.write(Transition::Entered { state, cause, timings });
            }
            Takeover::Unknown => {}
        }
        self.begin_booting(running);
        self.end_start(running).await;
        None
    }

    /// The start is over: the agent is awaited, and what waited for the guest is done.
    async fn end_start(&mut self, running: &RunningQemu) {
        self.startup = None;
        self.awaited = self.begin_watching(running);
        for call in std::mem::take(&mut self.deferred) {
            self.on_call(call, running).await;
        }
    }

    const fn start_path(&self) -> StartPath {
        match self.row.origin {
            Origin::Boot => StartPath::Cold,
            Origin::Fork(_) => StartPath::Fork,
            Origin::Restore { .. } => StartPath::Restore,
        }
    }

    /// Whether QEMU ended because another program uses the VM's vsock address.
    pub(super) async fn address_was_taken(&self) -> bool {
        if !matches!(self.machine.transport, Transport::Vsock { .. }) || self.lifecycle.is_ending() {
            return false;
        }
        let dir = self.dir.clone();
        let tail = jobs::run_within(TAILS_JOB, TAILS_TIMEOUT, move || Ok(log_tail(&dir, &[QEMU_LOG]))).await;
        tail.is_ok_and(|lines| lines.iter().any(|line| reports_address_in_use(line)))
    }

    pub(super) fn take_another_address(&mut self) -> Result<()> {
        let cid = random::number_in(&GUEST_CIDS)?;
        tracing::warn!("another program uses the VM's vsock address; trying {cid}");
        self.machine.transport = Transport::Vsock { cid };
        let changed = Transition::AddressChanged { cid, machine: self.machine.clone() };
        self.context.store().transition(&self.row.id, &changed)?.log(&self.row.id, "its vsock address");
        (self.row.cid, self.row.machine) = (Some(cid), Some(self.machine.clone()));
        self.guest = self.context.guest(&self.row)?;
        Ok(())
    }

    /// The guardian may have recorded that no supervisor works: this one does.
    fn remove_warning(&mut self) {
        let before = self.machine.warnings.len();
        self.machine.warnings.retain(|warning| !warning.starts_with(crate::SUPERVISOR_FAILS));
        if self.machine.warnings.len() != before {
            self.write(Transition::MachineChanged(self.machine.clone()));
        }
    }

    /// From here on the agent is awaited.
    fn begin_booting(&mut self, running: &RunningQemu) {
        self.life.send_replace(StartupPhase::Booting);
        self.step(Event::Booting, running);
    }

    async fn bind_forwards(&mut self) -> Result<()> {
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
}

/// Whether a line of QEMU's is the one with which it ends because another program uses the VM's vsock address.
fn reports_address_in_use(line: &str) -> bool {
    line.contains("unable to set guest cid") && line.contains("Address already in use")
}

/// Kills a QEMU whose guest has not run, if there is one, and waits for its end.
async fn end_qemu(running: &RunningQemu) {
    if running.process.exists() {
        running.process.kill();
        let _ = timeout(KILL_TIMEOUT, running.process.wait()).await;
    }
}
