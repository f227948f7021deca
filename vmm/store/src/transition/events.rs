//! What of a transition of a VM is an event. Pure.

use jiff::Timestamp;
use nido_api::egress::Denial;
use nido_api::name::SnapshotName;
use nido_api::state::{StateCause, VmState};
use nido_api::{EventDetails, EventKind, SecretUse};

use super::{AgentReady, Transition, VmEnd};
use crate::events::of_vm;
use crate::{Origin, Purpose, VmRow};

/// What of a transition of a VM is an event.
#[must_use]
pub(super) fn events_of(before: &VmRow, transition: &Transition) -> Vec<(EventKind, EventDetails)> {
    if before.purpose != Purpose::Use {
        return Vec::new();
    }
    match transition {
        Transition::LimitReached(limit) => {
            let expired = (EventKind::VmExpired, EventDetails { limit: Some(*limit), ..of_vm(before) });
            std::iter::once(expired).chain(limit_hit(before, transition)).collect()
        }
        Transition::LimitHit(_) => limit_hit(before, transition).into_iter().collect(),
        Transition::NetDenied(denial) => {
            vec![(EventKind::NetDenied, EventDetails { denial: Some(Denial::clone(denial)), ..of_vm(before) })]
        }
        Transition::SecretUsed(used, requests) => {
            let (secret, secret_requests) = (Some(SecretUse::clone(used)), Some(*requests));
            vec![(EventKind::SecretUsed, EventDetails { secret, secret_requests, ..of_vm(before) })]
        }
        Transition::Entered { state, cause, .. } => change_of_state(before, *state, *cause).into_iter().collect(),
        Transition::Ready(ready) => {
            let about =
                EventDetails { ip_address: ready.ip_address.clone().or(before.ip_address.clone()), ..of_vm(before) };
            let changed = change_of_state(before, ready.state, ready.cause);
            changed.into_iter().chain(first_reply(before, ready, &about)).collect()
        }
        Transition::Ended(end) => end_of(before, end).into_iter().collect(),
        Transition::DiskRestored { snapshot, .. } => vec![restored(snapshot, of_vm(before))],
        Transition::StartBegan
        | Transition::StartGivenUp { .. }
        | Transition::Launching(_)
        | Transition::AddressChanged { .. }
        | Transition::MachineChanged(_)
        | Transition::FoundRunning
        | Transition::Adopted(_) => Vec::new(),
    }
}

fn limit_hit(before: &VmRow, transition: &Transition) -> Option<(EventKind, EventDetails)> {
    let hit = transition.limit_hit(before)?;
    let message = Some(hit.describe());
    Some((EventKind::VmLimitHit, EventDetails { limit_hit: Some(hit), message, ..of_vm(before) }))
}

fn change_of_state(before: &VmRow, after: VmState, cause: Option<StateCause>) -> Option<(EventKind, EventDetails)> {
    match (before.state, after) {
        (VmState::Starting | VmState::Running, VmState::Paused) => Some((
            EventKind::VmPaused,
            EventDetails { status_cause: cause, message: describe_cause(cause), ..of_vm(before) },
        )),
        (VmState::Paused, VmState::Running) => Some((EventKind::VmResumed, of_vm(before))),
        _ => None,
    }
}

/// The events of an agent that replies for the first time since the start.
fn first_reply(before: &VmRow, ready: &AgentReady, about: &EventDetails) -> Vec<(EventKind, EventDetails)> {
    if !ready.agent.ready || before.agent.ready || ready.state.is_inactive() {
        return Vec::new();
    }
    let restored = match &before.origin {
        Origin::Restore { snapshot, .. } => Some(restored(snapshot, about.clone())),
        Origin::Boot | Origin::Fork(_) => None,
    };
    let started =
        (EventKind::VmStarted, EventDetails { timings: ready.timings, image: before.named_image(), ..about.clone() });
    restored.into_iter().chain([started]).collect()
}

fn end_of(before: &VmRow, end: &VmEnd) -> Option<(EventKind, EventDetails)> {
    let ran_ms = before.started_at.map(|started| {
        let ran = Timestamp::now().duration_since(started).as_millis();
        u64::try_from(ran).unwrap_or(0)
    });
    match (before.state, end.state) {
        (_, VmState::Failed) => {
            let failure = end.failure.clone();
            let details = EventDetails {
                cause: failure.as_ref().map(|failure| failure.cause),
                message: failure.as_ref().map(|failure| failure.message.clone()),
                last_log_entries: failure.map(|failure| failure.log_tail).unwrap_or_default(),
                ran_ms,
                ..of_vm(before)
            };
            Some((EventKind::VmCrashed, details))
        }
        // A start that ended before QEMU ran is no event.
        (VmState::Starting, _) => None,
        (_, VmState::Stopped) => {
            let details = EventDetails {
                ran_ms,
                status_cause: end.cause,
                message: describe_cause(end.cause),
                last_log_entries: end.last_log_entries.clone(),
                ..of_vm(before)
            };
            Some((EventKind::VmStopped, details))
        }
        _ => None,
    }
}

fn restored(snapshot: &SnapshotName, about: EventDetails) -> (EventKind, EventDetails) {
    (EventKind::SnapshotRestored, EventDetails { snapshot: Some(snapshot.clone()), ..about })
}

/// A cause in a sentence, unless a user asked for what happened.
fn describe_cause(cause: Option<StateCause>) -> Option<String> {
    cause.filter(|cause| *cause != StateCause::User).map(|cause| cause.detail().into())
}
