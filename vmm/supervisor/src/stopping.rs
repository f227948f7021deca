//! How a VM is ended: a time limit, a session that is over, a signal, a command; first by the guest itself, then by QEMU.
//!
//! Invariant: nothing here waits for the guest. Whatever may take long is a task of its own, with a deadline.

use std::time::{Duration, Instant};

use nido_api::state::{Fact, StateCause, VmState};
use nido_api::{Limit, PLUG_PULLED, StopRequest};
use nido_engine::guest::Guest;
use nido_engine::host::scope;
use nido_engine::qemu::{Monitor, MonitorError, QemuProcess};
use nido_guest_agent::wire::Power;
use nido_store::{Purpose, Transition};
use qapi::qmp::RunState;
use tokio::time::Instant as TokioInstant;

use super::launch::Running;
use super::limits::Reached;
use super::qmp::QMP_TIMEOUT;
use super::state::{Report, Supervisor};

/// How long the agent may take to say whether the VM is in use.
const IN_USE_WITHIN: Duration = Duration::from_secs(10);
/// How long QEMU may take to quit before it is killed.
const QUIT_WITHIN: Duration = Duration::from_secs(5);
/// How long the agent may take to say that it powers off, before the power button is pressed.
const AGENT_WITHIN: Duration = Duration::from_secs(30);
/// The same of an agent that was not there yet when it was asked first.
const NEW_AGENT_WITHIN: Duration = Duration::from_secs(5);
/// How long after that it is asked again.
const ASKED_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// How long the guest may take to power off when the supervisor is asked to end. The host's own limit has to be longer.
const TERMINATE_STOP_MS: u64 = 30_000;
/// How long the guest may take to power off at the end of its time to live, before QEMU is terminated.
const LIMIT_STOP_MS: u64 = 10_000;

impl Supervisor {
    pub(super) fn time_is_up(&mut self, reached: Reached, running: &Running) {
        // Over vsock a session does not pass the supervisor, and the connection that reports it may be lost with the
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

    pub(super) fn end_limit(&mut self, reached: Reached, running: &Running) {
        let what = match reached {
            Reached::Ttl => "its time to live is over",
            Reached::Idle => "it has been idle for too long",
        };
        tracing::info!("stopping VM {}: {what}", self.row.spec.name);
        let limit = if reached == Reached::Ttl { Limit::Ttl } else { Limit::Idle };
        self.stop_cause.get_or_insert(if reached == Reached::Ttl { StateCause::Ttl } else { StateCause::Idle });
        self.write(Transition::LimitReached(limit));
        self.begin_stop(StopRequest { force: false, timeout_ms: LIMIT_STOP_MS }, running);
    }

    /// The host shuts down, its user logs out, or an administrator ends the supervisor: the guest powers off, within a limit.
    pub(super) fn on_terminate(&mut self, running: &Running) {
        if self.kill_at.is_some() {
            return;
        }
        tracing::info!("stopping VM {}: its supervisor received a signal", self.row.spec.name);
        // What is there to be saved, or waits in a pool, has nothing to lose.
        let force = self.row.purpose != Purpose::Use;
        self.stop_cause.get_or_insert(StateCause::Host);
        self.begin_stop(StopRequest { force, timeout_ms: TERMINATE_STOP_MS }, running);
    }

    /// Starts the guardian if none runs, unless this VM is about to end. While there is a supervisor, a guardian that was killed
    /// is replaced.
    pub(super) fn ensure_guardian(&self) {
        if self.kill_at.is_none() && self.state != VmState::Stopping {
            self.context.ensure_guardian();
        }
    }

    /// Where there is systemd, QEMU and this supervisor leave the unit of the process that started them.
    pub(super) fn leave_callers_unit(&self, qemu: &QemuProcess) {
        let Some(bus) = scope::bus() else { return };
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        let (id, name, pids) = (self.row.id.clone(), self.row.spec.name.to_string(), [own, qemu.pid()]);
        tokio::spawn(async move {
            match scope::adopt(bus, &id, &name, &pids).await {
                Ok(()) => tracing::info!("the VM has its own systemd scope"),
                Err(why) => tracing::warn!("the VM stays in the unit that it was started in: {why}"),
            }
        });
    }

    /// Its data is no longer needed, so the guest is not asked to power off.
    pub(super) fn session_is_over(&mut self, running: &Running) {
        tracing::info!("ending VM {}: the session that it was created for has ended", self.row.spec.name);
        self.stop_cause.get_or_insert(StateCause::Session);
        self.write(Transition::LimitReached(Limit::Session));
        self.begin_stop(StopRequest { force: true, ..StopRequest::default() }, running);
    }

    /// Asks the guest to go down, and sets the time at which the plug is pulled.
    pub(super) fn begin_stop(&mut self, stop: StopRequest, running: &Running) {
        self.learn(Fact::StopAsked);
        nido_files::failpoint!("stop.recorded");
        if stop.force {
            return self.quit(running);
        }
        let Ok(monitor) = running.monitor().cloned() else { return self.quit(running) };
        let deadline = TokioInstant::now() + Duration::from_millis(stop.timeout_ms);
        self.kill_at = Some(self.kill_at.map_or(deadline, |earlier| earlier.min(deadline)));
        let asking = GoingDown { guest: self.guest.clone(), monitor, ready: self.row.agent.ready, deadline };
        tokio::spawn(asking.ask());
    }

    pub(super) fn quit(&mut self, running: &Running) {
        self.quit_sent = true;
        nido_files::failpoint!("stop.quitting");
        self.kill_at = Some(TokioInstant::now() + QUIT_WITHIN);
        match running.monitor().cloned() {
            Ok(monitor) => drop(tokio::spawn(async move { monitor.quit(QUIT_WITHIN).await })),
            Err(_) => drop(running.process.kill()),
        }
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
            tracing::warn!("the guest did not power off in time; terminating QEMU");
            if !self.machine.warnings.iter().any(|warning| warning == PLUG_PULLED) {
                self.machine.warnings.push(PLUG_PULLED.into());
                self.write(Transition::MachineChanged(self.machine.clone()));
            }
            self.quit(running);
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
            // A paused guest never powers off; one that was paused by a full disk may be paused again.
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
