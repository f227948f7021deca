//! Carries out what [`Lifecycle`](super::lifecycle::Lifecycle) decides.
//!
//! Invariant: nothing here waits for QEMU or the guest. Whatever may take long is a task of its own, with a deadline, whose outcome
//! arrives at the loop as a report.

use std::time::{Duration, Instant};

use nido_api::sanitize::{head, on_one_line};
use nido_api::state::{StateCause, VmState};
use nido_api::{AgentInfo, Limit, QEMU_KILLED_WARNING};
use nido_engine::machine::Machine;
use nido_guest_agent::wire::{MAX_WARNING, MAX_WARNINGS, Pong};
use nido_store::{AgentReady, Transition};
use tokio::time::Instant as TokioInstant;

use super::control_server::StartupPhase;
use super::launch::RunningQemu;
use super::lifecycle::{Action, Event};
use super::pause::AutomaticResume;
use super::power_off::PowerOff;
use super::qmp::{QMP_TIMEOUT, qmp_error};
use super::role::Role;
use super::state::{Report, Supervisor};

/// How long the agent may take to report its sessions.
const SESSIONS_TIMEOUT: Duration = Duration::from_secs(10);
/// How long QEMU may take to acknowledge that it quits.
const QUIT_REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// What a warning of the guest's begins with.
const GUEST_WARNING_PREFIX: &str = "in the guest: ";

impl Supervisor {
    /// Decides what follows from an event, and does it.
    pub(super) fn step(&mut self, event: Event, running: &RunningQemu) {
        self.lifecycle.set_saving(self.is_being_saved());
        for action in self.lifecycle.step(Instant::now(), event) {
            self.perform(action, running);
        }
    }

    fn perform(&mut self, action: Action, running: &RunningQemu) {
        match action {
            Action::RecordState => self.record_state(),
            Action::RecordLimit(limit) => {
                let why = match limit {
                    Limit::Ttl => "its time to live is over",
                    Limit::Idle => "it has been idle for too long",
                    Limit::Session => "the session that it was created for has ended",
                };
                tracing::info!("stopping VM {}: {why}", self.row.spec.name);
                self.write(Transition::LimitReached(limit));
            }
            Action::WarnPlugPulled => self.warn_plug_pulled(),
            Action::PowerOff(deadline) => self.power_off(deadline, running),
            Action::Quit => {
                nido_files::failpoint!("stop.quitting");
                match running.monitor().cloned() {
                    Ok(monitor) => drop(tokio::spawn(async move { monitor.quit(QUIT_REPLY_TIMEOUT).await })),
                    Err(_) => self.cancel_start(running),
                }
            }
            Action::Kill => {
                tracing::warn!("killing QEMU");
                running.process.kill();
            }
            Action::CountSessions => self.count_sessions(),
            Action::AwaitAgent(within) => {
                tracing::info!(
                    "the guest was paused for some time; its reply timeout is extended by {} ms",
                    within.as_millis()
                );
                self.awaited = Some(self.watch_for_agent_within(within, running));
            }
            Action::ReportReady => drop(self.life.send_replace(StartupPhase::Ready)),
            Action::RecordReady(pong) => self.record_ready(pong),
            Action::SaveGuest => self.begin_bake(running),
            Action::Park(pong) => self.park(pong, running),
            Action::SetClock => self.set_guest_clock(),
        }
    }

    fn record_state(&mut self) {
        let (state, cause) = (self.lifecycle.state(), self.lifecycle.cause());
        self.by_itself = (cause == Some(StateCause::DiskFull)).then(|| AutomaticResume::new(Instant::now()));
        let timings = self.row.timings.filter(|timings| timings.total_ms > 0.0);
        self.write(Transition::Entered { state, cause, timings });
        if state == VmState::Stopping {
            nido_files::failpoint!("stop.recorded");
        }
    }

    fn warn_plug_pulled(&mut self) {
        tracing::warn!("the guest did not power off in time; terminating QEMU");
        if !self.machine.warnings.iter().any(|warning| warning == QEMU_KILLED_WARNING) {
            self.machine.warnings.push(QEMU_KILLED_WARNING.into());
            self.write(Transition::MachineChanged(self.machine.clone()));
        }
    }

    fn power_off(&self, deadline: Instant, running: &RunningQemu) {
        let Ok(monitor) = running.monitor().cloned() else { return };
        let (guest, ready) = (self.guest.clone(), self.lifecycle.is_ready());
        tokio::spawn(PowerOff { guest, monitor, ready, deadline: TokioInstant::from_std(deadline) }.request());
    }

    /// Over vsock a session does not pass the supervisor, and the connection that reports it may be lost with the supervisor
    /// before: the agent knows.
    fn count_sessions(&self) {
        let (guest, report) = (self.guest.clone(), self.reports.0.clone());
        tokio::spawn(async move {
            let pong = guest.ping(TokioInstant::now() + SESSIONS_TIMEOUT).await;
            let sessions = pong.map_or(0, |pong| pong.sessions.saturating_sub(1));
            let _ = report.send(Report::InUse(sessions)).await;
        });
    }

    /// Pauses a clone that is ready: from here on it waits.
    fn park(&self, pong: Pong, running: &RunningQemu) {
        let (monitor, report) = (running.monitor().cloned(), self.reports.0.clone());
        tokio::spawn(async move {
            let paused = match monitor {
                Ok(monitor) => monitor.stop(QMP_TIMEOUT).await.map_err(|error| qmp_error(&error)),
                Err(error) => Err(error),
            };
            let _ = report.send(Report::Parked(paused, pong)).await;
        });
    }

    /// Sets the guest's clock, or remembers to do so when its agent replies.
    pub(super) fn set_guest_clock(&mut self) {
        self.clock_stale = !self.lifecycle.is_ready() || self.lifecycle.role() != Role::Use;
        if !self.clock_stale && self.lifecycle.state() == VmState::Running {
            tokio::spawn(super::clock::set_clock(self.agent_route()));
        }
    }

    fn record_ready(&mut self, pong: Pong) {
        let total_ms = self.since_request_ms();
        if !self.row.agent.ready
            && let Some(timings) = &mut self.row.timings
        {
            timings.agent_ms = total_ms - timings.load_ms;
            timings.total_ms = total_ms;
        }
        let version = pong.agent.chars().filter(char::is_ascii_graphic).take(64).collect();
        nido_files::failpoint!("ready.answered");
        self.row.agent = AgentInfo { ready: true, version: Some(version), transport: None };
        self.row.ip_address = pong.address.and_then(|a| a.parse::<std::net::IpAddr>().ok()).map(|a| a.to_string());
        let machine = self.with_guest_warnings(pong.warnings.unwrap_or_default());
        self.write(Transition::Ready(Box::new(AgentReady {
            machine,
            state: self.lifecycle.state(),
            cause: self.lifecycle.cause(),
            agent: self.row.agent.clone(),
            ip_address: self.row.ip_address.clone(),
            timings: self.row.timings,
        })));
        nido_files::failpoint!("ready.written");
        self.life.send_replace(StartupPhase::Ready);
        if self.clock_stale {
            self.set_guest_clock();
        }
    }

    /// The machine with what its guest warns of, if that is something new. Earlier warnings of the guest's are over.
    fn with_guest_warnings(&mut self, of_guest: Vec<String>) -> Option<Machine> {
        let shown = |text: String| format!("{GUEST_WARNING_PREFIX}{}", on_one_line(head(&text, MAX_WARNING)));
        let mut warnings = self.machine.warnings.clone();
        warnings.retain(|warning| !warning.starts_with(GUEST_WARNING_PREFIX));
        warnings.extend(of_guest.into_iter().take(MAX_WARNINGS).map(shown));
        if warnings == self.machine.warnings {
            return None;
        }
        self.machine.warnings = warnings;
        Some(self.machine.clone())
    }
}
