//! How a VM is brought to its end, once a user, a limit, the host or a failure ends it.

use std::time::{Duration, Instant};

use nido_api::Limit;
use nido_api::state::{Fact, StateCause};

use super::{Action, Lifecycle, Stop};
use crate::limits::LimitReached;
use crate::role::Role;

/// How long QEMU may take to quit before it is killed, and to die of that.
pub(super) const QUIT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the guest may take to power off at the end of its time to live, before QEMU is terminated.
const LIMIT_STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the guest may take to power off when the supervisor is asked to end. The host's own limit has to be longer.
pub(super) const TERMINATE_STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// How far an end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    PowerOff,
    Quit,
    Kill,
}

/// An end that has begun.
#[derive(Debug, Clone, Copy)]
pub(super) struct PendingEnd {
    pub(super) step: Step,
    pub(super) deadline: Instant,
}

impl Lifecycle {
    pub(super) fn end_limit(&mut self, now: Instant, reached: LimitReached, actions: &mut Vec<Action>) {
        let (cause, limit) = match reached {
            LimitReached::Ttl => (StateCause::Ttl, Limit::Ttl),
            LimitReached::Idle => (StateCause::Idle, Limit::Idle),
        };
        actions.push(Action::RecordLimit(limit));
        self.stop(now, Stop { cause: Some(cause), force: false, timeout: LIMIT_STOP_TIMEOUT }, actions);
    }

    pub(super) fn request_stop(&mut self, now: Instant, cause: Option<StateCause>, actions: &mut Vec<Action>) {
        self.asked = true;
        self.stop_cause = self.stop_cause.or(cause);
        self.learn(now, Fact::StopAsked, actions);
    }

    pub(super) fn stop(&mut self, now: Instant, stop: Stop, actions: &mut Vec<Action>) {
        self.request_stop(now, stop.cause, actions);
        if stop.force || self.mute || !self.has_run || !self.role.powers_off() {
            return self.quit(now, actions);
        }
        // The earliest deadline counts.
        let deadline = now.checked_add(stop.timeout).unwrap_or(now);
        let deadline = match self.ending {
            Some(PendingEnd { step: Step::Quit | Step::Kill, .. }) => return,
            Some(ending) => ending.deadline.min(deadline),
            None => deadline,
        };
        self.ending = Some(PendingEnd { step: Step::PowerOff, deadline });
        actions.push(Action::PowerOff(deadline));
    }

    /// A stop may have been requested before QEMU was found. No process waits any more for a VM whose role is not use.
    pub(super) fn attached(&mut self, now: Instant, mute: bool, actions: &mut Vec<Action>) {
        self.mute = mute;
        match self.ending {
            _ if self.role != Role::Use => {
                self.request_stop(now, None, actions);
                self.kill(now, actions);
            }
            Some(_) if mute => self.kill(now, actions),
            Some(PendingEnd { step: Step::PowerOff, deadline }) => actions.push(Action::PowerOff(deadline)),
            Some(PendingEnd { step: Step::Quit | Step::Kill, .. }) => self.kill(now, actions),
            None => {}
        }
    }

    pub(super) fn quit(&mut self, now: Instant, actions: &mut Vec<Action>) {
        match self.ending {
            Some(PendingEnd { step: Step::Quit | Step::Kill, .. }) => {}
            _ if self.mute => self.kill(now, actions),
            _ => {
                self.ending = Some(PendingEnd { step: Step::Quit, deadline: now + QUIT_TIMEOUT });
                actions.push(Action::Quit);
            }
        }
    }

    pub(super) fn kill(&mut self, now: Instant, actions: &mut Vec<Action>) {
        self.ending = Some(PendingEnd { step: Step::Kill, deadline: now + QUIT_TIMEOUT });
        actions.push(Action::Kill);
    }
}
