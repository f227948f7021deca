//! What the supervisor does about what happens: an answer of the agent, an event of QEMU's, an order, a deadline.
//!
//! Invariant: nothing here waits for the guest. Whatever may take long is a task of its own, with a deadline.

use std::path::Path;
use std::time::{Duration, Instant};

use nido_api::error::{Code, Error, Result};
use nido_api::sanitize::{head, on_one_line};
use nido_api::state::{Fact, FailureCause, StateCause, VmState};
use nido_api::{AgentInfo, ForwardSpec, Limit, PLUG_PULLED, StopRequest};
use nido_engine::guest::{Guest, GuestError};
use nido_engine::host::scope;
use nido_engine::machine::Machine;
use nido_engine::qemu::{Monitor, MonitorError, MonitorEvent, QemuExit, QemuProcess};
use nido_guest_agent::wire::{MAX_WARNING, MAX_WARNINGS, Pong, Power};
use nido_store::{Purpose, VmUpdate};
use qapi::qmp::RunState;
use tokio::sync::oneshot;
use tokio::time::Instant as TokioInstant;

use super::clock::set_clock;
use super::control_server::{ActiveSessions, ControlCommand, Life};
use super::forwards::bind;
use super::host_clocks::HostClocks;
use super::launch::Running;
use super::limits::Reached;
use super::pause::{Observed, Resume, Stillness, io_cause, observed};
use super::qmp::{QMP_TIMEOUT, qmp_error};
use super::readiness::Readiness;
use super::state::{Report, SESSION_EVERY, Supervisor};

/// What a warning of the guest's begins with.
const OF_GUEST: &str = "in the guest: ";
/// How long QEMU may take to quit before it is killed.
const QUIT_WITHIN: Duration = Duration::from_secs(5);
/// How long the agent may take to say that it powers off, before the power button is pressed.
const AGENT_WITHIN: Duration = Duration::from_secs(30);
/// The same of an agent that was not there yet when it was asked first.
const NEW_AGENT_WITHIN: Duration = Duration::from_secs(5);
/// How long after that it is asked again.
const ASKED_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// How long the agent may take to say whether the VM is in use.
const IN_USE_WITHIN: Duration = Duration::from_secs(10);
/// How long the guest may take to power off when the supervisor is asked to end. The host's own limit has to be longer.
const TERMINATE_STOP_MS: u64 = 30_000;
/// How long the VM is told to stop when its time is up, before the plug is pulled.
const LIMIT_STOP_MS: u64 = 10_000;

impl Supervisor {
    pub(super) async fn on_agent(&mut self, answer: Readiness, running: &Running) {
        match answer {
            // Only the time counts in which the CPUs ran.
            Readiness::Late if !self.row.agent.ready && self.is_given_longer(running) => {}
            // A VM that was taken over: its agent has answered before, and may again.
            Readiness::Late if self.row.agent.ready => drop(self.life.send_replace(Life::Ready)),
            Readiness::Late => {
                self.seen.late_after_ms = Some(u64::try_from(self.ready_within.as_millis()).unwrap_or(u64::MAX));
                self.learn(Fact::DeadlinePassed);
                self.quit(running);
            }
            // A VM that was taken over, perhaps by a newer nido: it runs, and each request says why it cannot be carried out.
            Readiness::Refused(error) if self.row.agent.ready => {
                tracing::error!("no session with the guest agent: {error}");
                self.life.send_replace(Life::Ready);
            }
            Readiness::Refused(error) => {
                tracing::error!("no session with the guest agent: {error}");
                self.seen.refused = Some(refused_by_guest(&error));
                self.quit(running);
            }
            Readiness::NotRenewed(why) => {
                tracing::error!("the guest could not be renewed: {why}");
                self.seen.not_renewed = Some(on_one_line(&why).chars().take(400).collect());
                self.quit(running);
            }
            Readiness::Yes(_) if self.row.purpose == Purpose::Bake => self.begin_bake(running),
            Readiness::Yes(pong) if self.row.purpose == Purpose::Pool => self.park(pong, running).await,
            // Its time was up before its agent answered: it is not ready, it ends.
            Readiness::Yes(_) if self.state == VmState::Stopping && !self.row.agent.ready => {}
            Readiness::Yes(pong) => self.on_ready(pong),
        }
    }

    /// Whether the CPUs stood still while the guest's answer was awaited; then it is awaited for so much longer.
    fn is_given_longer(&mut self, running: &Running) -> bool {
        let stood_still = self.still.take(Instant::now());
        if stood_still.is_zero() || self.state == VmState::Stopping {
            return false;
        }
        let within = if self.state == VmState::Paused { self.ready_within } else { stood_still };
        tracing::info!("the guest stood still for {} ms of its time to answer", stood_still.as_millis());
        self.awaited = Some(self.watch_for_agent_within(within, running));
        true
    }

    /// Sets the guest's clock, or remembers to do so when its agent answers.
    pub(super) fn set_guest_clock(&mut self) {
        self.clock_stale = !self.row.agent.ready || self.row.purpose != Purpose::Use;
        if !self.clock_stale && self.state == VmState::Running {
            tokio::spawn(set_clock(self.way()));
        }
    }

    /// What the host does without a word: its clock jumps, it sleeps, its disk has space again.
    pub(super) fn look_at_host(&mut self, running: &Running) {
        if self.host_clocks.jumped(HostClocks::now()) {
            tracing::info!("the host's clock has jumped, or it slept");
            self.set_guest_clock();
        }
        let now = Instant::now();
        if !self.resuming && self.by_itself.as_mut().is_some_and(|by_itself| by_itself.is_due(now, Path::new("."))) {
            tracing::info!("the disk has space again; resuming");
            self.begin_resume(None, running);
        }
    }

    /// Makes the CPUs run on a task of its own.
    fn begin_resume(&mut self, reply: Option<oneshot::Sender<Result<()>>>, running: &Running) {
        self.resuming = true;
        let (report, resume) = (
            self.reports.0.clone(),
            Resume { monitor: running.monitor.clone(), cause: self.cause, home: self.dir.path().to_owned() },
        );
        tokio::spawn(async move {
            let outcome = resume.run().await;
            let _ = report.send(Report::Resumed(outcome, reply)).await;
        });
    }

    pub(super) async fn on_report(&mut self, report: Report, running: &Running) {
        match report {
            Report::Resumed(outcome, reply) => {
                self.resuming = false;
                match &outcome {
                    Ok(()) => self.resumed(),
                    Err(error) => tracing::warn!("the VM cannot resume: {error}"),
                }
                // Only QEMU knows; it may have been paused again meanwhile.
                self.ask_status(running).await;
                reply.map(|reply| reply.send(outcome));
            }
            Report::Saved(saved) => {
                self.baked = Some(saved.inspect_err(|error| tracing::error!("{error}")));
                self.learn(Fact::StopAsked);
                self.quit(running);
            }
            Report::InUse(sessions) => {
                let used_since = self.asked_if_idle.take() != Some(self.limits.quiet_since());
                if sessions > 0 {
                    tracing::info!("the agent has {sessions} sessions: the VM is in use");
                    self.limits.used(Instant::now());
                } else if !used_since && self.kill_at.is_none() && self.limits.idle_for(Instant::now()).is_some() {
                    self.end_limit(Reached::Idle, running);
                }
            }
        }
    }

    /// A snapshot of a paused VM may let the CPUs run for a moment; the VM stays paused.
    fn is_saved_while_paused(&self) -> bool {
        self.is_being_saved() && self.state == VmState::Paused
    }

    fn resumed(&mut self) {
        let stood_still = self.state == VmState::Paused;
        self.learn(Fact::GuestResumed);
        self.no_space = None;
        if stood_still {
            self.set_guest_clock();
        }
    }

    pub(super) fn on_ready(&mut self, pong: Pong) {
        let total_ms = self.asked_for_ms();
        if !self.row.agent.ready
            && let Some(timings) = &mut self.row.timings
        {
            timings.agent_ms = total_ms - timings.load_ms;
            timings.total_ms = total_ms;
        }
        let version = pong.agent.chars().filter(char::is_ascii_graphic).take(64).collect();
        self.row.agent = AgentInfo { ready: true, version: Some(version), transport: None };
        self.row.ip_address = pong.address.and_then(|a| a.parse::<std::net::IpAddr>().ok()).map(|a| a.to_string());
        let machine = self.with_guest_warnings(pong.warnings.unwrap_or_default());
        self.write(VmUpdate {
            machine,
            state: Some(self.state),
            cause: Some(self.cause),
            agent: Some(self.row.agent.clone()),
            ip_address: Some(self.row.ip_address.clone()),
            timings: Some(self.row.timings),
            ..VmUpdate::default()
        });
        self.life.send_replace(Life::Ready);
        self.still = Stillness::default();
        if self.clock_stale {
            self.set_guest_clock();
        }
    }

    /// The machine with what its guest warns of, if that is something new. Earlier warnings of the guest's are over.
    fn with_guest_warnings(&mut self, of_guest: Vec<String>) -> Option<Machine> {
        let shown = |text: String| format!("{OF_GUEST}{}", on_one_line(head(&text, MAX_WARNING)));
        let mut warnings = self.machine.warnings.clone();
        warnings.retain(|warning| !warning.starts_with(OF_GUEST));
        warnings.extend(of_guest.into_iter().take(MAX_WARNINGS).map(shown));
        if warnings == self.machine.warnings {
            return None;
        }
        self.machine.warnings = warnings;
        Some(self.machine.clone())
    }

    pub(super) async fn on_event(&mut self, event: MonitorEvent, running: &Running) {
        let MonitorEvent::Event(event) = event else {
            tracing::warn!("QEMU sent events faster than they were read");
            return self.ask_status(running).await;
        };
        tracing::info!(event = %event.name, data = %event.data, "QEMU");
        match event.name.as_str() {
            // The agent was started again, or its guest closed the port: what was agreed with it is void.
            "VSERPORT_CHANGE" if event.data.get("open") == Some(&serde_json::Value::Bool(false)) => {
                self.channel.iter().for_each(|channel| channel.reset());
            }
            "SHUTDOWN" => self.seen.shutdown_reason = Some(shutdown_reason(&event)),
            "GUEST_PANICKED" => self.seen.panicked = true,
            "BLOCK_IO_ERROR" => self.no_space = Some(event.data.get("nospace") == Some(&serde_json::Value::Bool(true))),
            "STOP" | "SUSPEND" => self.ask_status(running).await,
            // Of a resume that is on its way: whether it lasts, its report says.
            "RESUME" | "WAKEUP" if self.resuming || self.is_saved_while_paused() => {}
            "RESUME" | "WAKEUP" => self.resumed(),
            _ => {}
        }
    }

    async fn ask_status(&mut self, running: &Running) {
        match running.monitor.query_status(QMP_TIMEOUT).await {
            Ok(status) => self.observe(status, running),
            Err(error) => tracing::warn!("QEMU's status is not known: {error}"),
        }
    }

    /// Takes QEMU's word for what the CPUs do.
    pub(super) fn observe(&mut self, status: RunState, running: &Running) {
        let known = match status {
            RunState::io_error if self.cause == Some(StateCause::DiskFull) => self.cause,
            RunState::io_error => Some(io_cause(self.no_space, Path::new("."))),
            _ => self.cause,
        };
        match observed(status, known) {
            Observed::KvmFailed => {
                self.seen.kvm_error = true;
                self.quit(running);
            }
            Observed::Panicked => {
                self.seen.panicked = true;
                self.quit(running);
            }
            Observed::Runs if self.resuming || self.is_saved_while_paused() => {}
            Observed::Runs => self.resumed(),
            // It resumes by itself; nobody has asked for a pause.
            Observed::Paused(StateCause::User) if self.is_being_saved() && self.state != VmState::Paused => {}
            // A pause that was asked for changes nothing about why the VM was paused before.
            Observed::Paused(StateCause::User) if self.state == VmState::Paused && self.cause.is_some() => {}
            Observed::Paused(cause) => self.paused(cause),
            Observed::Passing => {}
        }
    }

    pub(super) async fn drain_events(&mut self, running: &mut Running) {
        let deadline = TokioInstant::now() + Duration::from_millis(200);
        while let Ok(Some(event)) = tokio::time::timeout_at(deadline, running.events.recv()).await {
            if let MonitorEvent::Event(event) = &event
                && event.name == "SHUTDOWN"
            {
                self.seen.shutdown_reason = Some(shutdown_reason(event));
            }
        }
    }

    pub(super) async fn on_order(&mut self, order: ControlCommand, running: &Running) {
        match order {
            ControlCommand::Stop(stop) => {
                self.stop_cause.get_or_insert(StateCause::User);
                self.begin_stop(stop, running);
            }
            ControlCommand::StopKept => {
                self.kept = true;
                self.stop_cause.get_or_insert(StateCause::User);
                self.begin_stop(StopRequest { force: true, ..StopRequest::default() }, running);
            }
            ControlCommand::Pause(reply) if self.is_being_saved() => {
                drop(reply.send(Err(Error::new(Code::VmBusy, "a snapshot of this VM is being taken"))));
            }
            // What admitted it saw the VM as it was before: a guest that stands still never goes down.
            ControlCommand::Pause(reply) if self.state == VmState::Stopping => {
                drop(reply.send(Err(Error::new(Code::VmBusy, "this VM is being stopped"))));
            }
            ControlCommand::Pause(reply) => {
                let outcome = running.monitor.stop(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e));
                if outcome.is_ok() && self.state != VmState::Paused {
                    self.paused(StateCause::User);
                }
                let _ = reply.send(outcome);
            }
            ControlCommand::Resume(reply) if self.is_being_saved() => {
                drop(reply.send(Err(Error::new(Code::VmBusy, "a snapshot of this VM is being taken"))));
            }
            ControlCommand::Resume(reply) if self.state == VmState::Stopping => {
                drop(reply.send(Err(Error::new(Code::VmBusy, "this VM is being stopped"))));
            }
            ControlCommand::Resume(reply) => self.begin_resume(Some(reply), running),
            ControlCommand::Snapshot(name, into, reply) => self.take_snapshot(name, into, running, reply),
            ControlCommand::ForwardAdd(spec, reply) => drop(reply.send(self.add_forward(&spec).await)),
            ControlCommand::ForwardRemove(spec, reply) => drop(reply.send(self.remove_forward(&spec).await)),
            // Whoever asked may have given up, and made another VM.
            ControlCommand::Claim(_, reply) if reply.is_closed() => {}
            ControlCommand::Claim(order, reply) => {
                let outcome = self.claim(*order, running).await;
                let _ = reply.send(outcome);
            }
            ControlCommand::Retire(reply) => {
                let mine = self.is_pooled();
                if mine.is_ok() {
                    self.begin_stop(StopRequest { force: true, ..StopRequest::default() }, running);
                }
                let _ = reply.send(mine);
            }
            ControlCommand::Status(reply) => drop(reply.send(self.limits.idle_for(Instant::now()))),
        }
    }

    async fn add_forward(&mut self, spec: &ForwardSpec) -> Result<ForwardSpec> {
        let (bound, listener) = bind(spec).await?;
        self.context.store().add_forward(&self.row.id, &bound)?;
        self.forwards.start(bound.clone(), listener, self.guest.clone(), self.forward_users());
        Ok(bound)
    }

    async fn remove_forward(&mut self, spec: &ForwardSpec) -> Result<()> {
        self.context.store().remove_forward(&self.row.id, spec)?;
        self.forwards.stop(spec).await;
        Ok(())
    }

    pub(super) fn time_is_up(&mut self, reached: Reached, running: &Running) {
        // Over vsock a session does not pass the supervisor, and the connection that tells of it may be lost with the
        // supervisor before: the agent knows.
        let direct = self.channel.is_none() && reached == Reached::Idle;
        if !direct {
            return self.end_limit(reached, running);
        }
        if self.asked_if_idle.is_some() {
            return;
        }
        let now = Instant::now();
        self.limits.used(now);
        self.asked_if_idle = Some(now);
        let (guest, report) = (self.guest.clone(), self.reports.0.clone());
        tokio::spawn(async move {
            let pong = guest.ping(TokioInstant::now() + IN_USE_WITHIN).await;
            let sessions = pong.map_or(0, |pong| pong.sessions.saturating_sub(1));
            let _ = report.send(Report::InUse(sessions)).await;
        });
    }

    fn end_limit(&mut self, reached: Reached, running: &Running) {
        let what = match reached {
            Reached::Ttl => "its time to live is over",
            Reached::Idle => "it has been idle for too long",
        };
        tracing::info!("stopping VM {}: {what}", self.row.spec.name);
        let limit = if reached == Reached::Ttl { Limit::Ttl } else { Limit::Idle };
        self.stop_cause.get_or_insert(if reached == Reached::Ttl { StateCause::Ttl } else { StateCause::Idle });
        self.write(VmUpdate { expired: Some(limit), ..VmUpdate::default() });
        self.begin_stop(StopRequest { force: false, timeout_ms: LIMIT_STOP_MS }, running);
    }

    /// The host shuts down, its user logs out, or an administrator ends the supervisor: the guest powers off, within a limit.
    pub(super) fn on_terminate(&mut self, running: &Running) {
        if self.kill_at.is_some() {
            return;
        }
        tracing::info!("stopping VM {}: its supervisor was asked to end", self.row.spec.name);
        // What is there to be saved, or waits in a pool, has nothing to lose.
        let force = self.row.purpose != Purpose::Use;
        self.stop_cause.get_or_insert(StateCause::Host);
        self.begin_stop(StopRequest { force, timeout_ms: TERMINATE_STOP_MS }, running);
    }

    /// Has a small process end QEMU when its time is up, should this supervisor not be there to.
    pub(super) fn watch_ttl(&self, qemu: &QemuProcess) {
        if let Some(at) = self.row.expires_at
            && let Err(error) = self.context.start_ttl_watcher(&self.row.id, at, qemu)
        {
            tracing::error!("the time to live ends only under supervision: {error}");
        }
    }

    /// Where there is systemd, QEMU and this supervisor leave the unit of the process that started them.
    pub(super) fn leave_callers_unit(&self, qemu: &QemuProcess) {
        let Some(bus) = scope::bus() else { return };
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        let (id, name, pids) = (self.row.id.clone(), self.row.spec.name.to_string(), [own, qemu.pid()]);
        tokio::spawn(async move {
            match scope::adopt(bus, &id, &name, &pids).await {
                Ok(()) => tracing::info!("the VM has a scope of its own"),
                Err(why) => tracing::warn!("the VM stays in the unit that it was started in: {why}"),
            }
        });
    }

    /// Nobody will miss what is in it, so it is not asked to go down.
    pub(super) fn session_is_over(&mut self, running: &Running) {
        tracing::info!("ending VM {}: the session it was made for is over", self.row.spec.name);
        self.stop_cause.get_or_insert(StateCause::Session);
        self.write(VmUpdate { expired: Some(Limit::Session), ..VmUpdate::default() });
        self.begin_stop(StopRequest { force: true, ..StopRequest::default() }, running);
    }

    /// Asks the guest to go down, and sets the time at which the plug is pulled.
    pub(super) fn begin_stop(&mut self, stop: StopRequest, running: &Running) {
        self.learn(Fact::StopAsked);
        if stop.force {
            return self.quit(running);
        }
        let deadline = TokioInstant::now() + Duration::from_millis(stop.timeout_ms);
        self.kill_at = Some(self.kill_at.map_or(deadline, |earlier| earlier.min(deadline)));
        let asking = GoingDown {
            guest: self.guest.clone(),
            monitor: running.monitor.clone(),
            ready: self.row.agent.ready,
            deadline,
        };
        tokio::spawn(asking.ask());
    }

    pub(super) fn quit(&mut self, running: &Running) {
        self.quit_sent = true;
        self.kill_at = Some(TokioInstant::now() + QUIT_WITHIN);
        let monitor = running.monitor.clone();
        tokio::spawn(async move { monitor.quit(QUIT_WITHIN).await });
    }

    /// A deadline has passed: first QEMU is asked to quit, then it is killed.
    pub(super) fn pull_plug(&mut self, running: &Running) {
        if self.kill_at.is_none_or(|at| TokioInstant::now() < at) {
            return;
        }
        if self.quit_sent {
            tracing::warn!("QEMU does not quit; killing it");
            let _ = running.process.kill();
            self.kill_at = Some(TokioInstant::now() + QUIT_WITHIN);
        } else {
            tracing::warn!("the guest did not power off in time; pulling the plug");
            if !self.machine.warnings.iter().any(|warning| warning == PLUG_PULLED) {
                self.machine.warnings.push(PLUG_PULLED.into());
                self.write(VmUpdate { machine: Some(self.machine.clone()), ..VmUpdate::default() });
            }
            self.quit(running);
        }
    }

    /// Watches over a QEMU whose monitor does not answer: all that can be done with it is to end it.
    pub(super) async fn watch_over_mute(&mut self, process: &QemuProcess) -> QemuExit {
        let mut session = tokio::time::interval(SESSION_EVERY);
        let mut direct = self.users.watch();
        let mut spliced =
            self.channel.as_ref().map_or_else(|| ActiveSessions::new().watch(), |channel| channel.activity().open());
        loop {
            let users = *direct.borrow_and_update() + *spliced.borrow_and_update();
            self.limits.used_by(users, Instant::now());
            if self.stop_cause.is_none()
                && let Some(reached) = self.limits.reached(Instant::now())
            {
                let (cause, limit) = match reached {
                    Reached::Ttl => (StateCause::Ttl, Limit::Ttl),
                    Reached::Idle => (StateCause::Idle, Limit::Idle),
                };
                self.stop_cause = Some(cause);
                self.write(VmUpdate { expired: Some(limit), ..VmUpdate::default() });
                self.learn(Fact::StopAsked);
                let _ = process.kill();
            }
            let wake = self.limits.next_deadline().filter(|_| self.stop_cause.is_none()).map(TokioInstant::from_std);
            tokio::select! {
                _ = direct.changed() => {}
                Ok(()) = spliced.changed() => {}
                () = tokio::time::sleep_until(wake.unwrap_or_else(TokioInstant::now)), if wake.is_some() => {}
                exit = process.wait() => return exit.unwrap_or(QemuExit::Unknown),
                () = self.termination.requested() => {
                    self.stop_cause.get_or_insert(StateCause::Host);
                    self.learn(Fact::StopAsked);
                    let _ = process.kill();
                }
                _ = session.tick(), if self.row.spec.lease.is_some() => if self.context.is_orphan(&self.row) {
                    self.learn(Fact::StopAsked);
                    let _ = process.kill();
                },
                Some(order) = self.orders.recv() => {
                    let mute = || Error::new(Code::QemuFailed, "the VM's QEMU does not answer").hint("nido stop --force ends it");
                    match order {
                        order @ (ControlCommand::Stop(_) | ControlCommand::StopKept) => {
                            self.kept |= matches!(order, ControlCommand::StopKept);
                            self.stop_cause.get_or_insert(StateCause::User);
                            self.learn(Fact::StopAsked);
                            let _ = process.kill();
                        }
                        ControlCommand::Retire(reply) => {
                            let mine = self.is_pooled();
                            if mine.is_ok() {
                                self.learn(Fact::StopAsked);
                                let _ = process.kill();
                            }
                            let _ = reply.send(mine);
                        }
                        ControlCommand::Pause(reply)
                        | ControlCommand::Resume(reply)
                        | ControlCommand::Snapshot(_, _, reply)
                        | ControlCommand::ForwardRemove(_, reply)
                        | ControlCommand::Claim(_, reply) => drop(reply.send(Err(mute()))),
                        ControlCommand::ForwardAdd(_, reply) => drop(reply.send(Err(mute()))),
                        ControlCommand::Status(reply) => drop(reply.send(self.limits.idle_for(Instant::now()))),
                    }
                }
            }
        }
    }
}

/// A guest that is asked to go down.
struct GoingDown {
    guest: Guest,
    monitor: Monitor,
    /// Its agent has answered before.
    ready: bool,
    deadline: TokioInstant,
}

impl GoingDown {
    /// Asks until the agent says that it does, the VM is gone, or the time is up. Once is not enough: while the guest comes up
    /// it overlooks the power button, and while its disk is held still the agent does not answer.
    async fn ask(self) {
        let mut may_answer = self.ready;
        while TokioInstant::now() < self.deadline {
            // A guest that stands still never goes down; one that a full disk has paused may stand still again.
            if !matches!(self.monitor.query_status(QMP_TIMEOUT).await, Ok(RunState::running)) {
                let _ = self.monitor.cont(QMP_TIMEOUT).await;
            }
            // The agent syncs and powers off; where it does not answer, the power button is what is left.
            let patience = if self.ready { AGENT_WITHIN } else { NEW_AGENT_WITHIN };
            let within = self.deadline.min(TokioInstant::now() + patience);
            if may_answer && self.guest.power(Power::Off, within).await.is_ok() {
                return;
            }
            if matches!(self.monitor.system_powerdown(QMP_TIMEOUT).await, Err(MonitorError::QemuGone)) {
                return;
            }
            may_answer = true;
            tokio::time::sleep_until(self.deadline.min(TokioInstant::now() + ASKED_AGAIN_AFTER)).await;
        }
    }
}

/// Why there can be no session with a guest, for its row.
fn refused_by_guest(error: &GuestError) -> (FailureCause, String) {
    let cause = match error {
        GuestError::VersionMismatch { .. } => FailureCause::AgentVersion,
        _ => FailureCause::AgentRefused,
    };
    (cause, error.to_string().escape_debug().take(400).collect())
}

fn shutdown_reason(event: &nido_engine::qemu::monitor::Event) -> String {
    event.data.get("reason").and_then(|reason| reason.as_str()).unwrap_or("unknown").chars().take(40).collect()
}
