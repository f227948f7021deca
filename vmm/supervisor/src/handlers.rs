//! What the supervisor makes of what happens: an agent's reply, an event of QEMU's, a report of a task. Each becomes an event of the
//! lifecycle.
//!
//! Invariant: nothing here waits for the guest. QEMU's status is the only thing that is waited for, with a deadline, and until QEMU
//! has ended at the latest.

use std::path::Path;
use std::time::{Duration, Instant};

use nido_api::sanitize::on_one_line;
use nido_api::state::{FailureCause, StateCause};
use nido_engine::guest::{GuestError, Session};
use nido_engine::qemu::MonitorEvent;
use qapi::qmp::RunState;
use tokio::time::Instant as TokioInstant;

use super::control::Reply;
use super::control_server::ReplySender;
use super::host_clocks::HostClocks;
use super::jobs::Job;
use super::launch::RunningQemu;
use super::lifecycle::{AgentReply, Event};
use super::pause::{Resume, io_cause, observed};
use super::qmp::QMP_TIMEOUT;
use super::readiness::Readiness;
use super::start_report::End;
use super::state::{Report, Supervisor};

/// How long an agent may take to greet on a channel whose port was opened again.
const REOPENED_REPLY_TIMEOUT: Duration = Duration::from_secs(5);

impl Supervisor {
    pub(super) fn on_agent(&mut self, answer: Readiness, running: &RunningQemu) {
        let reply = match answer {
            Readiness::Yes(pong) => {
                self.find_old_connections();
                AgentReply::Ready(pong)
            }
            Readiness::Late => AgentReply::Late,
            Readiness::Refused(error) => {
                tracing::error!("no session with the guest agent: {error}");
                let (cause, why) = refused_by_guest(&error);
                AgentReply::Refused(cause, why)
            }
            Readiness::NotRenewed(why) => {
                tracing::error!("the guest's identity could not be reset: {why}");
                AgentReply::NotRenewed(on_one_line(&why).chars().take(400).collect())
            }
        };
        self.step(Event::Agent(reply), running);
    }

    /// What the host does without a word: its clock jumps, it sleeps, its disk has space again.
    pub(super) fn check_host(&mut self, running: &RunningQemu) {
        if self.host_clocks.jumped(HostClocks::now()) {
            tracing::info!("the host's clock has jumped, or it slept");
            self.set_guest_clock();
        }
        self.apply_disk_quota(running);
        self.check_group();
        self.check_process_limit();
        let now = Instant::now();
        if !self.lifecycle.is_resuming()
            && self.by_itself.as_mut().is_some_and(|by_itself| by_itself.is_due(now, Path::new(".")))
        {
            tracing::info!("the disk has space again; resuming");
            self.begin_resume(None, running);
        }
    }

    /// Resumes the CPUs, in a task of its own.
    pub(super) fn begin_resume(&mut self, reply: Option<ReplySender>, running: &RunningQemu) {
        let monitor = match running.monitor() {
            Ok(monitor) => monitor.clone(),
            Err(error) => {
                if let Some(reply) = reply {
                    let _ = reply.send(Err(error));
                }
                return;
            }
        };
        self.step(Event::ResumeBegins, running);
        let (report, resume) = (
            self.reports.0.clone(),
            Resume { monitor, cause: self.lifecycle.cause(), home: self.dir.path().to_owned() },
        );
        tokio::spawn(async move {
            let outcome = resume.run().await;
            let _ = report.send(Report::Resumed(outcome, reply)).await;
        });
    }

    /// Has the loop notified when a job ends, or is late.
    pub(super) fn report_end(&self, job: Job<()>, limit: Duration) {
        let reports = self.reports.0.clone();
        tokio::spawn(async move {
            let what = job.what();
            let outcome = job.outcome_within(limit).await;
            let _ = reports.send(Report::JobEnded(what, outcome)).await;
        });
    }

    /// `Some`: the supervision of this QEMU is over.
    pub(super) async fn on_report(&mut self, report: Report, running: &mut RunningQemu) -> Option<End> {
        match report {
            Report::Start(report) => return self.on_start_report(report, running).await,
            Report::Paused(outcome, reply) => {
                if outcome.is_ok() {
                    self.step(Event::Paused, running);
                }
                let _ = reply.send(outcome.map(|()| Reply::Done));
            }
            Report::Resumed(outcome, reply) => {
                match &outcome {
                    Ok(()) => self.no_space = None,
                    Err(error) => tracing::warn!("the VM cannot resume: {error}"),
                }
                self.step(Event::ResumeEnds(outcome.is_ok()), running);
                // Only QEMU knows; it may have been paused again meanwhile.
                self.query_status(running).await;
                if let Some(reply) = reply {
                    let _ = reply.send(outcome.map(|()| Reply::Done));
                }
            }
            Report::Parked(outcome, pong) => {
                let parked = outcome.inspect_err(|error| tracing::error!("the clone cannot be paused: {error}"));
                self.step(Event::Parked(parked.ok().map(|()| pong)), running);
            }
            Report::Saved(saved) => {
                self.baked = Some(saved.inspect_err(|error| tracing::error!("{error}")));
                self.step(Event::Saved, running);
            }
            Report::InUse(sessions) => {
                tracing::debug!("the agent of a VM that seems to be idle has {sessions} sessions");
                self.step(Event::AgentSessions(sessions), running);
            }
            Report::OldConnections(ends) => {
                if let Some(network) = &self.network {
                    network.reset_connections(ends);
                }
            }
            Report::Denied(denial) => self.on_denied(denial),
            Report::ByteLimit(reached) => self.on_limit_hit(super::recorded_limits::of_bytes(&reached)),
            Report::Resolved(pins) => self.keep_pins(pins),
            Report::ProcessesRefused(count) => self.on_processes_refused(count),
            Report::Group(group) => self.on_group(*group),
            Report::SecretUsed(used) => self.on_secret_used(*used),
            Report::JobEnded(what, outcome) => {
                if let Err(error) = outcome {
                    tracing::warn!("{what}: {error}");
                }
            }
        }
        None
    }

    pub(super) async fn on_event(&mut self, event: MonitorEvent, running: &RunningQemu) {
        let MonitorEvent::Event(event) = event else {
            tracing::warn!("QEMU sent events faster than they were read");
            return self.query_status(running).await;
        };
        tracing::info!(event = %event.name, data = %event.data, "QEMU");
        match event.name.as_str() {
            // The agent was started again, or its guest closed the port: what was agreed with it is void.
            "VSERPORT_CHANGE" if event.data.get("open") == Some(&serde_json::Value::Bool(false)) => {
                self.channel.iter().for_each(|channel| channel.reset());
            }
            "VSERPORT_CHANGE" => self.check_reopened_port(),
            "SHUTDOWN" => self.lifecycle.evidence().shutdown_reason = Some(shutdown_reason(&event)),
            "GUEST_PANICKED" => self.step(Event::Panicked, running),
            "BLOCK_IO_ERROR" => {
                self.no_space = Some(event.data.get("nospace") == Some(&serde_json::Value::Bool(true)));
                self.explain_io_error();
            }
            "STOP" | "SUSPEND" => self.query_status(running).await,
            "RESUME" | "WAKEUP" => self.cpus_run(Event::CpusRun, running),
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

    async fn query_status(&mut self, running: &RunningQemu) {
        let Ok(monitor) = running.monitor() else { return };
        match monitor.query_status(QMP_TIMEOUT).await {
            Ok(status) => self.observe(status, running),
            Err(error) => tracing::warn!("cannot read QEMU's status: {error}"),
        }
    }

    /// Takes QEMU's word for what the CPUs do.
    pub(super) fn observe(&mut self, status: RunState, running: &RunningQemu) {
        let cause = self.lifecycle.cause();
        let known = match status {
            RunState::io_error if cause == Some(StateCause::DiskFull) => cause,
            RunState::io_error => Some(io_cause(self.no_space, Path::new("."))),
            _ => cause,
        };
        let event = Event::Observed(observed(status, known));
        if status == RunState::running { self.cpus_run(event, running) } else { self.step(event, running) }
    }

    /// The CPUs run, unless a resume is on its way or a snapshot is being taken.
    fn cpus_run(&mut self, event: Event, running: &RunningQemu) {
        self.step(event, running);
        if self.lifecycle.state() != nido_api::state::VmState::Paused && !self.lifecycle.is_resuming() {
            self.no_space = None;
        }
    }

    pub(super) async fn drain_events(&mut self, running: &mut RunningQemu) {
        let deadline = TokioInstant::now() + Duration::from_millis(200);
        while let Ok(Some(event)) = tokio::time::timeout_at(deadline, running.events.recv()).await {
            if let MonitorEvent::Event(event) = &event
                && event.name == "SHUTDOWN"
            {
                self.lifecycle.evidence().shutdown_reason = Some(shutdown_reason(event));
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
