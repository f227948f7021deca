//! What the loop reads of a lifecycle, and which requests it admits.

use std::time::{Duration, Instant};

use nido_api::Failure;
use nido_api::error::{Code, Error, Result};
use nido_api::state::{StateCause, VmState};
use nido_engine::qemu::QemuExit;

use super::{Lifecycle, Step};
use crate::exit_cause::{ExitEvidence, exit_cause};
use crate::role::Role;

impl Lifecycle {
    pub(crate) const fn role(&self) -> Role {
        self.role
    }

    pub(crate) const fn state(&self) -> VmState {
        self.state
    }

    /// Why it is paused.
    pub(crate) const fn cause(&self) -> Option<StateCause> {
        self.cause
    }

    pub(crate) const fn is_ready(&self) -> bool {
        self.ready
    }

    pub(crate) const fn is_resuming(&self) -> bool {
        self.resuming
    }

    /// Whether QEMU was asked to quit, or killed.
    pub(crate) fn has_quit(&self) -> bool {
        self.ending.is_some_and(|ending| ending.step != Step::PowerOff)
    }

    pub(crate) const fn is_ending(&self) -> bool {
        self.ending.is_some()
    }

    /// For how long nothing has used it; `None` while something does.
    pub(crate) fn idle_for(&self, now: Instant) -> Option<Duration> {
        self.limits.idle_for(now)
    }

    pub(crate) const fn ready_within(&self) -> Duration {
        self.ready_within
    }

    /// Whether a snapshot is being taken.
    pub(crate) const fn set_saving(&mut self, saving: bool) {
        self.saving = saving;
    }

    pub(crate) const fn evidence(&mut self) -> &mut ExitEvidence {
        &mut self.evidence
    }

    /// Whether its CPUs may be paused or resumed on request. The state may have changed since the request was admitted: a paused
    /// guest never powers off.
    pub(crate) fn admit_pause_or_resume(&self) -> Result<()> {
        let busy = |words| Err(Error::new(Code::VmBusy, words));
        match () {
            () if self.saving => busy("a snapshot of this VM is being taken"),
            () if self.state == VmState::Stopping => busy("this VM is being stopped"),
            () if self.role != Role::Use => busy("this VM is not in use yet"),
            () => Ok(()),
        }
    }

    /// Whether this is a clone that waits, and so may be claimed.
    pub(crate) fn admit_claim(&self) -> Result<()> {
        self.admit_retirement()?;
        if self.state != VmState::Paused || !self.ready || self.ending.is_some() { Err(taken()) } else { Ok(()) }
    }

    /// Whether this is an unclaimed clone.
    pub(crate) fn admit_retirement(&self) -> Result<()> {
        if self.role == Role::Clone { Ok(()) } else { Err(taken()) }
    }

    /// The state that it ends in, why, and the failure if it is one.
    pub(crate) fn end(&self, exit: QemuExit) -> (VmState, Option<Failure>) {
        exit_cause(self.state, exit, &self.evidence)
    }

    /// Why it has stopped, if it has.
    pub(crate) fn end_cause(&self, state: VmState) -> Option<StateCause> {
        let by_guest = self.evidence.shutdown_reason.as_deref().is_some_and(|reason| reason.starts_with("guest"));
        self.stop_cause.or(by_guest.then_some(StateCause::Guest)).filter(|_| state == VmState::Stopped)
    }
}

/// The reply about a clone that another command has claimed.
pub(crate) fn taken() -> Error {
    Error::new(Code::VmBusy, "the clone is no longer waiting")
}
