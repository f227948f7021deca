//! What the supervisor does about what happens: an answer of the agent, an event of QEMU's, an order, a deadline.
//!
//! Invariant: nothing here waits for the guest. Whatever may take long is a task of its own, with a deadline.

use std::path::Path;
use std::time::{Duration, Instant};

use nido_api::AgentInfo;
use nido_api::sanitize::{head, on_one_line};
use nido_api::state::{Fact, FailureCause, StateCause, VmState};
use nido_engine::guest::{GuestError, Session};
use nido_engine::machine::Machine;
use nido_engine::qemu::MonitorEvent;
use nido_guest_agent::wire::{MAX_WARNING, MAX_WARNINGS, Pong};
use nido_store::{AgentReady, Purpose, Transition};
use qapi::qmp::RunState;
use tokio::time::Instant as TokioInstant;

use super::clock::set_clock;
use super::control::Reply;
use super::control_server::{Life, ReplySender};
use super::host_clocks::HostClocks;
use super::launch::Running;
use super::limits::Reached;
use super::pause::{Observed, Resume, Stillness, io_cause, observed};
use super::qmp::QMP_TIMEOUT;
use super::readiness::Readiness;
use super::state::{Report, Supervisor};

/// How long an agent may take to greet on a channel whose port was opened again.
const REOPENED_REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// What a warning of the guest's begins with.
const OF_GUEST: &str = "in the guest: ";

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
                tracing::error!("the guest's identity could not be reset: {why}");
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
        tracing::info!("the guest was paused for {} ms; its reply timeout is extended", stood_still.as_millis());
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

    /// Resumes the CPUs, in a task of its own.
    pub(super) fn begin_resume(&mut self, reply: Option<ReplySender>, running: &Running) {
        let monitor = match running.monitor() {
            Ok(monitor) => monitor.clone(),
            Err(error) => return drop(reply.map(|reply| reply.send(Err(error)))),
        };
        self.resuming = true;
        let (report, resume) =
            (self.reports.0.clone(), Resume { monitor, cause: self.cause, home: self.dir.path().to_owned() });
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
                reply.map(|reply| reply.send(outcome.map(|()| Reply::Done)));
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
        nido_files::failpoint!("ready.answered");
        self.row.agent = AgentInfo { ready: true, version: Some(version), transport: None };
        self.row.ip_address = pong.address.and_then(|a| a.parse::<std::net::IpAddr>().ok()).map(|a| a.to_string());
        let machine = self.with_guest_warnings(pong.warnings.unwrap_or_default());
        self.write(Transition::Ready(Box::new(AgentReady {
            machine,
            state: self.state,
            cause: self.cause,
            agent: self.row.agent.clone(),
            ip_address: self.row.ip_address.clone(),
            timings: self.row.timings,
        })));
        nido_files::failpoint!("ready.written");
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
            "VSERPORT_CHANGE" => self.check_reopened_port(),
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

    /// QEMU sends at most one `VSERPORT_CHANGE` a second: if the port was closed and opened again within that time, only the
    /// opening is reported. If a channel is up then, the agent behind it may be gone, and would never reply.
    fn check_reopened_port(&self) {
        let Some(channel) = self.channel.clone().filter(|channel| channel.is_up()) else { return };
        let guest = self.guest.clone();
        tokio::spawn(async move {
            let deadline = TokioInstant::now() + REOPENED_REPLY_TIMEOUT;
            let greeting = async { Session::open(channel.stream(deadline).await?, guest.token(), deadline).await };
            // Any reply, a refusal, too, comes from an agent that knows this channel.
            if let Err(GuestError::Timeout { .. }) = greeting.await {
                tracing::info!("the guest agent was restarted; opening its channel again");
                channel.reset();
            }
        });
    }

    async fn ask_status(&mut self, running: &Running) {
        let Ok(monitor) = running.monitor() else { return };
        match monitor.query_status(QMP_TIMEOUT).await {
            Ok(status) => self.observe(status, running),
            Err(error) => tracing::warn!("cannot read QEMU's status: {error}"),
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
            // It resumes automatically; no user has requested a pause.
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
