//! The event loop of a running VM: all events arrive here, every decision is another module's pure
//! function, and what is done about it goes out to QEMU, the agent and the store.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nido_api::error::{Error, ErrorRecord, Result};
use nido_api::state::{FailureCause, VmState};
use nido_api::{Failure, StopRequest};
use nido_engine::home::{
    AGENT_SOCKET, CHANNEL_SOCKET, CONTROL_SOCKET, NETWORK_QEMU_SOCKET, NETWORK_SOCKET, QMP_SOCKET,
};
use nido_engine::host::kvm;
use nido_engine::machine::Accel;
use nido_engine::qemu::QemuExit;
use nido_store::{Transition, VmEnd};
use rustix::fs::unlink;
use tokio::sync::oneshot;
use tokio::time::{Instant as TokioInstant, Interval, MissedTickBehavior, sleep_until};

use super::control_server::{ActiveSessions, StartupPhase};
use super::failure_error;
use super::jobs::{self, Job, Tails, rotate_logs};
use super::launch::RunningQemu;
use super::lifecycle::{Event, Stop};
use super::qemu_sockets;
use super::readiness::Readiness;
use super::role::Role;
use super::start_report::End;
use super::startup::ADDRESS_RETRIES_MAX;
use super::state::{SESSION_CHECK_INTERVAL, Supervisor, TAILS_JOB, TAILS_TIMEOUT, instant_of};

/// How often logs are looked at.
const LOG_CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// How often the supervisor looks whether the guardian lives.
const GUARDIAN_CHECK_INTERVAL: Duration = Duration::from_secs(3);
/// How often a change that the store did not take is repeated.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How long answers to the last requests may take to be written.
const FINAL_REPLIES_TIMEOUT: Duration = Duration::from_secs(2);
/// The job that rotates logs, and after how long that is worth a warning.
const ROTATION_JOB: &str = "rotating the logs";
const ROTATION_TIMEOUT: Duration = Duration::from_secs(30);
/// How long jobs that may change a VM's directory may take until it is removed all the same.
const JOBS_TIMEOUT: Duration = Duration::from_secs(5);
/// The job that removes the files of a VM, and how long clients wait for it.
const REMOVAL_JOB: &str = "removing the VM's files";
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the command that asked for a start may take to ask how it goes.
const STATUS_REQUEST_TIMEOUT: Duration = Duration::from_millis(500);

impl Supervisor {
    /// Supervises until the VM is stopped.
    pub(super) async fn run(mut self, attach_to: bool, announce: impl FnOnce()) -> Result<()> {
        announce();
        let (mut attach, mut retries) = (attach_to, 0);
        loop {
            match self.watch_over(attach).await {
                End::StartAgain => attach = false,
                End::NeverConnected(_) if retries < ADDRESS_RETRIES_MAX && self.address_was_taken().await => {
                    retries += 1;
                    self.forwards.close().await;
                    if let Err(error) = self.take_another_address() {
                        return self.end_unstarted(&error).await;
                    }
                }
                End::Exit(exit) | End::NeverConnected(exit) => return self.conclude(exit).await,
                End::Error(error) => return self.end_unstarted(&error).await,
                // What the store says stays as it is.
                End::OutOfReach(error) => return Err(error),
            }
        }
    }

    /// The guest never ran: what keeps it from running is the reply, and the VM is as it was.
    async fn end_unstarted(mut self, error: &Error) -> Result<()> {
        tracing::error!("{error}");
        self.refuse_calls();
        self.end(VmState::Stopped, None, Some(error.record())).await
    }

    /// QEMU has ended, and so has the VM. A VM that failed under KVM never gets another start without it: what failed may be the
    /// guest's own doing.
    async fn conclude(mut self, exit: QemuExit) -> Result<()> {
        self.refuse_calls();
        self.gather_tails().await;
        self.note_host_limits(exit);
        let (state, failure) = self.lifecycle.end(exit);
        if self.machine.accel == Accel::Kvm && failure.as_ref().is_some_and(|failure| questions_kvm(failure.cause)) {
            self.test_kvm_again().await;
        }
        self.end(state, failure, None).await
    }

    /// Tests KVM again, for later starts.
    async fn test_kvm_again(&self) {
        let cache = self.context.home().cache();
        match jobs::run(move || Ok(kvm::probe_again(&cache))).await {
            Ok(verdict) => tracing::warn!(?verdict, "the VM failed under KVM; KVM was tested again"),
            Err(error) => tracing::error!("KVM could not be tested again: {error}"),
        }
    }

    /// Everything from QEMU's start, or the search for one that runs, to its end.
    async fn watch_over(&mut self, attach: bool) -> End {
        let mut running = RunningQemu::awaited();
        if let Err(error) = self.begin_start(attach, &running).await {
            return End::Error(error);
        }
        let mut awaiting_agent = false;
        let mut ready = oneshot::channel().1;
        let (mut retry, mut logs) = (every(RETRY_INTERVAL), every(LOG_CHECK_INTERVAL));
        let (mut guardian, mut session) = (every(GUARDIAN_CHECK_INTERVAL), every(SESSION_CHECK_INTERVAL));
        let mut direct = self.users.watch();
        let mut spliced =
            self.channel.as_ref().map_or_else(|| ActiveSessions::new().watch(), |channel| channel.activity().open());
        let mut monitor_open = true;
        loop {
            let sessions = *direct.borrow_and_update() + *spliced.borrow_and_update();
            let starting = self.is_starting();
            if !starting {
                self.step(Event::Sessions(sessions), &running);
            }
            let wake = self.lifecycle.next_deadline().map(TokioInstant::from_std);
            tokio::select! {
                exit = running.process.wait() => return self.on_exit(exit, &mut running).await,
                event = running.events.recv(), if monitor_open && !starting => match event {
                    Some(event) => self.on_event(event, &running).await,
                    None => monitor_open = false,
                },
                Some(call) = self.calls.recv() => self.on_call(call, &running).await,
                Some(report) = self.reports.1.recv() => {
                    if let Some(end) = self.on_report(report, &mut running).await {
                        return end;
                    }
                }
                outcome = &mut ready, if awaiting_agent => {
                    awaiting_agent = false;
                    self.on_agent(outcome.unwrap_or(Readiness::Late), &running);
                }
                () = self.termination.requested() => self.step(Event::Terminated, &running),
                _ = direct.changed() => {}
                Ok(()) = spliced.changed() => {}
                _ = logs.tick() => {
                    self.begin_rotation();
                    self.check_host(&running);
                    // The host may have slept, which the timer does not count; the wall clock does.
                    self.step(Event::ExpiresAt(self.row.expires_at.map(instant_of)), &running);
                }
                _ = guardian.tick(), if !starting => self.ensure_guardian(),
                _ = retry.tick(), if !self.unwritten.is_empty() => self.flush(),
                _ = session.tick(), if self.row.spec.lease.is_some() || self.row.made_by.is_some() => {
                    self.check_session(&running);
                }
                () = sleep_until(wake.unwrap_or_else(TokioInstant::now)), if wake.is_some() => self.step(Event::Tick, &running),
            }
            if let Some(next) = self.awaited.take() {
                (ready, awaiting_agent) = (next, true);
            }
            if let Some(end) = self.end_cancelled_start(&running).await {
                return end;
            }
        }
    }

    fn check_session(&mut self, running: &RunningQemu) {
        if !self.lifecycle.has_quit() && self.context.is_abandoned(&self.row) {
            self.step(Event::SessionEnded, running);
        }
    }

    async fn on_exit(&mut self, exit: QemuExit, running: &mut RunningQemu) -> End {
        self.abort_start().await;
        if !running.is_connected() {
            return End::NeverConnected(exit);
        }
        self.step(Event::Exited, running);
        // What QEMU said last may still be on its way.
        self.drain_events(running).await;
        End::Exit(exit)
    }

    /// What the watch over a QEMU begins with: the first reply of its agent, if that is awaited.
    pub(super) fn begin_watching(&mut self, running: &RunningQemu) -> Option<oneshot::Receiver<Readiness>> {
        if self.lifecycle.state() == VmState::Stopping && !self.lifecycle.is_ending() {
            // The supervisor before was stopping it: the deadline is this one's now.
            let StopRequest { force, timeout_ms } = StopRequest::default();
            let timeout = Duration::from_millis(timeout_ms);
            self.step(Event::Stop(Stop { cause: None, force, timeout }), running);
        }
        if running.is_mute() || self.lifecycle.has_quit() {
            return None;
        }
        if self.lifecycle.role().is_twin() {
            // It never runs: what was loaded is saved again.
            self.begin_bake(running);
            return None;
        }
        Some(self.watch_for_agent(running))
    }

    /// Rotates the logs that are too long, unless the rotation before has not finished.
    fn begin_rotation(&self) {
        if !self.jobs.is_running(ROTATION_JOB) {
            self.report_end(self.jobs.start(ROTATION_JOB, rotate_logs), ROTATION_TIMEOUT);
        }
    }

    /// The loop is over: requests get an error at once, and stops wait for the VM's end.
    fn refuse_calls(&mut self) {
        self.calls.close();
        self.deferred.clear();
        while self.calls.try_recv().is_ok() {}
    }

    async fn gather_tails(&mut self) {
        let dir = self.dir.clone();
        let tails = jobs::run_within(TAILS_JOB, TAILS_TIMEOUT, move || Ok(Tails::read(&dir))).await;
        let tails = tails.unwrap_or_else(|error| {
            tracing::warn!("{error}");
            Tails::default()
        });
        let stopping = self.lifecycle.state() == VmState::Stopping;
        let seen = self.lifecycle.evidence();
        (seen.disk_full, seen.qemu_tail) = (tails.disk_full, tails.qemu);
        seen.panicked |= tails.panic.is_some() && !stopping && seen.may_have_panicked();
        seen.console_tail = tails.panic.unwrap_or(tails.console);
    }

    /// Removes the files of a VM that does not stay.
    async fn begin_removal(&self) -> Job<()> {
        // What another job adds to the directory meanwhile can make that fail; then the next command completes it.
        self.jobs.finish(JOBS_TIMEOUT).await;
        let (context, id) = (Arc::clone(&self.context), self.row.id.clone());
        self.jobs.start(REMOVAL_JOB, move || context.erase(&id))
    }

    fn leave_sockets(&self) {
        let network = [NETWORK_SOCKET, NETWORK_QEMU_SOCKET];
        for socket in [QMP_SOCKET, CHANNEL_SOCKET, AGENT_SOCKET, CONTROL_SOCKET].into_iter().chain(network) {
            let _ = unlink(Path::new(socket));
        }
        let _ = qemu_sockets::remove_earlier(Path::new("."));
    }

    /// Records how the VM ended, notifies all waiting clients, and removes its files if it is ephemeral.
    async fn end(mut self, state: VmState, failure: Option<Failure>, instead: Option<ErrorRecord>) -> Result<()> {
        self.leave_group().await;
        let never_ran = *self.life.borrow() == StartupPhase::Launching;
        let vanishes = self.row.spec.ephemeral && !self.kept || self.context.is_abandoned(&self.row);
        // Any process that finds a stopped ephemeral VM deletes it.
        let state = if self.row.spec.ephemeral && self.kept { VmState::Created } else { state };
        let problem = instead.or_else(|| failure.as_ref().map(|f| failure_error(&self.row.spec.name, f).record()));
        tracing::info!(state = state.word(), "VM {} ended", self.row.spec.name);
        let cause = self.lifecycle.end_cause(state);
        let last_log_entries = self.lifecycle.evidence().console_tail.clone();
        self.record_counted_uses().await;
        self.unwritten.push(Transition::Ended(Box::new(VmEnd { state, cause, failure, last_log_entries })));
        let (context, row) = (&self.context, &self.row);
        let written = self.unwritten.flush(row, |transition| context.store().transition(&row.id, transition));
        nido_files::failpoint!("end.recorded");
        // No process waits for a clone that was taken over only to be deleted.
        if never_ran && (self.lifecycle.role() == Role::Use || problem.is_some()) {
            // The command that requested the start knows that we listen, and is about to request the result.
            self.life.send_replace(StartupPhase::Ended(problem.clone()));
            let deadline = Instant::now() + STATUS_REQUEST_TIMEOUT;
            while self.life.receiver_count() < 2 && Instant::now() < deadline {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        self.leave_sockets();
        // A client that is notified of the end may use the ports again.
        self.forwards.close().await;
        let baked = match self.baked.take() {
            Some(Ok(())) => self.keep_bake().await.map(Some),
            Some(Err(error)) => Err(error),
            None => Ok(None),
        };
        nido_files::failpoint!("end.closed");
        let mut removal = if vanishes { Some(self.begin_removal().await) } else { None };
        let removed = match &mut removal {
            Some(removal) => removal.wait(REMOVAL_TIMEOUT).await,
            None => Some(Ok(())),
        };
        self.life.send_replace(match (problem, baked) {
            (None, Ok(Some(bake))) => StartupPhase::Baked(Box::new(bake)),
            (None, Err(error)) => StartupPhase::Ended(Some(error.record())),
            (problem, _) => StartupPhase::Ended(problem),
        });
        // Connections that wait for this end hold a receiver each; the accepting task holds one for ever.
        let deadline = Instant::now() + FINAL_REPLIES_TIMEOUT;
        while self.life.receiver_count() > 1 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let removed = match (removed, removal) {
            (None, Some(removal)) => {
                tracing::warn!("{REMOVAL_JOB} takes longer than {} s", REMOVAL_TIMEOUT.as_secs());
                removal.end().await
            }
            (removed, _) => removed.unwrap_or(Ok(())),
        };
        if self.jobs.finish(Duration::ZERO).await {
            // The next holder of the lock finds everything recorded.
            drop(self.lock);
        } else {
            // A job may still change the VM's directory: the kernel releases the lock when this process, and so the job, has ended.
            std::mem::forget(self.lock);
        }
        written.and(removed)
    }
}

/// Ticks at once, and then at this interval.
fn every(interval: Duration) -> Interval {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Whether such a failure may come from a KVM that does not work (any more).
fn questions_kvm(cause: FailureCause) -> bool {
    matches!(cause, FailureCause::GuestTimeout | FailureCause::KvmInternalError)
}
