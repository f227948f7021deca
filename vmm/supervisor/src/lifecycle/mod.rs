//! What the supervisor decides about its VM: pure. It has no clock and does nothing itself.
//!
//! ```text
//!  event_loop.rs --(now, Event)--> Lifecycle::step() --Vec<Action>--> actions.rs --> QEMU, agent, store
//!
//!  ending:  none --stop--> PowerOff --deadline--> Quit --deadline--> Kill --deadline--> Kill ...
//!             +--force, a guest that failed, role--^       QEMU's monitor does not reply--^
//! ```
//!
//! Invariants, each held by a property test below: a stop that was requested ends in order, and as `stopped`, whatever the guest
//! and QEMU do meanwhile; its deadline is never extended; an expired limit starts a stop; nothing is done with QEMU after its
//! exit; a guest that was loaded only to be saved again never runs.

mod admission;
mod ending;
mod event;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use nido_api::Limit;
use nido_api::state::{Fact, StateCause, VmState, advance};
use nido_guest_agent::wire::Pong;

pub(super) use self::admission::taken;
use self::ending::{PendingEnd, Step, TERMINATE_STOP_TIMEOUT};
pub(super) use self::event::{Action, AgentReply, Event, Stop};
use super::exit_cause::ExitEvidence;
use super::limits::{LimitReached, Limits};
use super::pause::{ObservedState, PausedTime};
use super::role::{ReadyAction, Role};

/// A VM from QEMU's start to its end.
#[derive(Debug)]
pub(super) struct Lifecycle {
    role: Role,
    state: VmState,
    /// Why it is paused.
    cause: Option<StateCause>,
    ready: bool,
    /// The guest has run, so that it has something to lose.
    has_run: bool,
    /// The agent is awaited.
    booting: bool,
    ready_within: Duration,
    ending: Option<PendingEnd>,
    /// A stop was requested.
    asked: bool,
    stop_cause: Option<StateCause>,
    limits: Limits,
    /// How many sessions are open. Until the event loop reports that, the VM counts as used: loading a guest takes as long as it takes.
    sessions: Option<usize>,
    /// Sessions do not pass the supervisor: before an idle VM is stopped, its agent is asked.
    agent_counts: bool,
    /// Since when the VM seemed to be idle when the agent was asked.
    asked_if_idle: Option<Instant>,
    /// QEMU's monitor does not reply.
    mute: bool,
    /// A snapshot is being taken.
    saving: bool,
    resuming: bool,
    still: PausedTime,
    evidence: ExitEvidence,
    exited: bool,
}

/// What a lifecycle begins with.
#[derive(Debug, Clone, Copy)]
pub(super) struct InitialState {
    pub role: Role,
    pub state: VmState,
    pub cause: Option<StateCause>,
    pub ready: bool,
    /// The guest has run, under a supervisor before this one.
    pub has_run: bool,
    pub ready_within: Duration,
    pub limits: Limits,
    pub agent_counts: bool,
}

impl Lifecycle {
    pub(super) fn new(beginning: InitialState) -> Self {
        let InitialState { role, state, cause, ready, has_run, ready_within, limits, agent_counts } = beginning;
        Self {
            role,
            state,
            cause,
            ready,
            has_run,
            booting: false,
            ready_within,
            ending: None,
            asked: state == VmState::Stopping,
            stop_cause: None,
            limits,
            sessions: None,
            agent_counts,
            asked_if_idle: None,
            mute: false,
            saving: false,
            resuming: false,
            still: PausedTime::default(),
            evidence: ExitEvidence::default(),
            exited: false,
        }
    }

    /// What is to be done about an event that happens at `now`, in this order.
    pub(super) fn step(&mut self, now: Instant, event: Event) -> Vec<Action> {
        if self.exited {
            return Vec::new();
        }
        // All sessions lasted until now.
        self.limits.used_by(self.users(), now);
        let mut actions = self.react(now, event);
        self.limits.used_by(self.users(), now);
        if !self.exited {
            self.check_time(now, &mut actions);
        }
        actions
    }

    fn react(&mut self, now: Instant, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Tick => {}
            Event::Sessions(sessions) => self.sessions = Some(sessions),
            Event::ExpiresAt(at) => self.limits.expire_at(at),
            Event::Stop(stop) => self.stop(now, stop, &mut actions),
            Event::SessionEnded if self.has_quit() => {}
            Event::SessionEnded => {
                actions.push(Action::RecordLimit(Limit::Session));
                self.stop(now, Stop::force(Some(StateCause::Session)), &mut actions);
            }
            Event::Terminated if self.ending.is_some() => {}
            Event::Terminated => {
                let stop = Stop { cause: Some(StateCause::Host), force: false, timeout: TERMINATE_STOP_TIMEOUT };
                self.stop(now, stop, &mut actions);
            }
            Event::Launching => self.has_run = false,
            Event::Attached { mute } => self.attached(now, mute, &mut actions),
            Event::QmpReady => {
                self.has_run = true;
                self.learn(now, Fact::QmpReady, &mut actions);
            }
            Event::Booting => self.booting = true,
            Event::Agent(reply) => self.on_agent(now, reply, &mut actions),
            Event::AgentSessions(sessions) => self.on_sessions_counted(now, sessions, &mut actions),
            Event::Observed(observed) => self.on_observed(now, observed, &mut actions),
            Event::CpusRun if self.resuming || self.is_saved_while_paused() => {}
            Event::CpusRun => self.resumed(now, &mut actions),
            Event::Paused if self.state == VmState::Paused => {}
            Event::Paused => self.paused(now, StateCause::User, &mut actions),
            Event::ResumeBegins => self.resuming = true,
            Event::ResumeEnds(runs) => {
                self.resuming = false;
                if runs {
                    self.resumed(now, &mut actions);
                }
            }
            Event::Panicked => self.record_evidence(|evidence| evidence.panicked = true),
            Event::Saved => {
                self.request_stop(now, None, &mut actions);
                self.quit(now, &mut actions);
            }
            Event::Parked(Some(pong)) => {
                self.paused(now, StateCause::User, &mut actions);
                self.become_ready(pong, &mut actions);
            }
            Event::Parked(None) => self.quit(now, &mut actions),
            Event::Woken => self.state = advance(self.state, Fact::GuestResumed),
            Event::Claimed(limits, ready_within) => {
                (self.role, self.state, self.cause, self.ready) = (Role::Use, VmState::Starting, None, false);
                (self.limits, self.ready_within, self.still) = (limits, ready_within, PausedTime::default());
                self.booting = true;
            }
            Event::Exited => self.exited = true,
        }
        actions
    }

    /// How many use the VM. A booting guest is not idle, for no client could have used it yet; nor is one that is paused.
    fn users(&self) -> usize {
        let booting = self.booting && self.role.is_used_while_it_boots();
        let paused = self.state == VmState::Paused && self.role.is_used_while_paused();
        self.sessions.unwrap_or(1) + usize::from(booting) + usize::from(paused)
    }

    /// What is due at `now`.
    fn check_time(&mut self, now: Instant, actions: &mut Vec<Action>) {
        match self.ending {
            Some(PendingEnd { deadline, .. }) if now < deadline => {}
            Some(PendingEnd { step: Step::PowerOff, .. }) => {
                actions.push(Action::WarnPlugPulled);
                self.quit(now, actions);
            }
            Some(PendingEnd { step: Step::Quit | Step::Kill, .. }) => self.kill(now, actions),
            None => match self.limits.reached(now) {
                Some(LimitReached::Idle) if self.asked_if_idle.is_some() => {}
                Some(LimitReached::Idle) if self.agent_counts => {
                    self.limits.used(now);
                    self.asked_if_idle = Some(now);
                    actions.push(Action::CountSessions);
                }
                Some(reached) => self.end_limit(now, reached, actions),
                None => {}
            },
        }
    }

    /// When to step again, if nothing happens before.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        match self.ending {
            Some(ending) => Some(ending.deadline),
            None if self.asked_if_idle.is_some() => self.limits.expires_at(),
            None => self.limits.next_deadline(),
        }
    }

    fn on_agent(&mut self, now: Instant, reply: AgentReply, actions: &mut Vec<Action>) {
        match reply {
            // Its time was up before its agent replied: it is not ready, it ends.
            _ if self.asked && !self.ready => {}
            // Only the time counts in which the CPUs ran.
            AgentReply::Late if !self.ready && self.is_given_longer(now, actions) => {}
            // A VM that was taken over: its agent has replied before, and may again, or each request reports why it cannot.
            AgentReply::Late | AgentReply::Refused(..) if self.ready => {
                self.booting = false;
                actions.push(Action::ReportReady);
            }
            AgentReply::Late => {
                let after_ms = u64::try_from(self.ready_within.as_millis()).unwrap_or(u64::MAX);
                self.record_evidence(|evidence| evidence.late_after_ms = Some(after_ms));
                self.quit(now, actions);
            }
            AgentReply::Refused(cause, why) => {
                self.record_evidence(|evidence| evidence.refused = Some((cause, why)));
                self.quit(now, actions);
            }
            AgentReply::NotRenewed(why) => {
                self.record_evidence(|evidence| evidence.not_renewed = Some(why));
                self.quit(now, actions);
            }
            AgentReply::Ready(pong) => match self.role.at_ready() {
                ReadyAction::Save => actions.push(Action::SaveGuest),
                ReadyAction::Park => actions.push(Action::Park(pong)),
                ReadyAction::Report => self.become_ready(pong, actions),
            },
        }
    }

    fn become_ready(&mut self, pong: Pong, actions: &mut Vec<Action>) {
        (self.ready, self.booting, self.still) = (true, false, PausedTime::default());
        actions.push(Action::RecordReady(pong));
    }

    /// Whether the CPUs were paused while the agent was awaited; then the timeout is extended by that time.
    fn is_given_longer(&mut self, now: Instant, actions: &mut Vec<Action>) -> bool {
        let stood_still = self.still.take(now);
        if stood_still.is_zero() || self.ending.is_some() {
            return false;
        }
        let within = if self.state == VmState::Paused { self.ready_within } else { stood_still };
        actions.push(Action::AwaitAgent(within));
        true
    }

    fn on_sessions_counted(&mut self, now: Instant, sessions: u32, actions: &mut Vec<Action>) {
        let used_since = self.asked_if_idle.take() != Some(self.limits.quiet_since());
        if sessions > 0 {
            self.limits.used(now);
        } else if !used_since && self.ending.is_none() && self.limits.idle_for(now).is_some() {
            self.end_limit(now, LimitReached::Idle, actions);
        }
    }

    fn on_observed(&mut self, now: Instant, observed: ObservedState, actions: &mut Vec<Action>) {
        match observed {
            ObservedState::KvmFailed => {
                self.record_evidence(|evidence| evidence.kvm_error = true);
                self.quit(now, actions);
            }
            ObservedState::Panicked => {
                self.record_evidence(|evidence| evidence.panicked = true);
                self.quit(now, actions);
            }
            ObservedState::Runs if self.resuming || self.is_saved_while_paused() => {}
            ObservedState::Runs => self.resumed(now, actions),
            // It resumes automatically; no user has requested a pause.
            ObservedState::Paused(StateCause::User) if self.saving && self.state != VmState::Paused => {}
            // A pause that was asked for changes nothing about why the VM was paused before.
            ObservedState::Paused(StateCause::User) if self.state == VmState::Paused && self.cause.is_some() => {}
            ObservedState::Paused(cause) => self.paused(now, cause, actions),
            ObservedState::Passing => {}
        }
    }

    /// What is seen of a guest after a stop was requested is no reason for a failure.
    fn record_evidence(&mut self, record: impl FnOnce(&mut ExitEvidence)) {
        if !self.asked {
            record(&mut self.evidence);
        }
    }

    /// A snapshot of a paused VM may let the CPUs run for a moment; the VM stays paused.
    fn is_saved_while_paused(&self) -> bool {
        self.saving && self.state == VmState::Paused
    }

    fn resumed(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let stood_still = self.state == VmState::Paused;
        self.learn(now, Fact::GuestResumed, actions);
        if stood_still {
            actions.push(Action::SetClock);
        }
    }

    /// The CPUs are paused.
    fn paused(&mut self, now: Instant, cause: StateCause, actions: &mut Vec<Action>) {
        let next = advance(self.state, Fact::GuestPaused);
        if next != self.state || next == VmState::Paused && self.cause != Some(cause) {
            self.enter(now, next, (next == VmState::Paused).then_some(cause), actions);
        }
        self.still.note(true, now);
    }

    fn learn(&mut self, now: Instant, fact: Fact, actions: &mut Vec<Action>) {
        let next = advance(self.state, fact);
        if next != self.state {
            self.enter(now, next, None, actions);
        }
    }

    fn enter(&mut self, now: Instant, next: VmState, cause: Option<StateCause>, actions: &mut Vec<Action>) {
        if next != VmState::Paused {
            self.still.note(false, now);
        }
        (self.state, self.cause) = (next, cause);
        actions.push(Action::RecordState);
    }
}
