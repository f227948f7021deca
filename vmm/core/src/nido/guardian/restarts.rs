//! When the guardian restarts VMs that have ended. Pure.

use std::collections::HashMap;
use std::time::Instant;

use jiff::Timestamp;
use nido_api::restart::{Restart, back_off, decide};
use nido_store::RestartFacts;

use crate::nido::restart_policy::in_row;

/// A VM that waits for its restart.
#[derive(Debug)]
struct PendingRestart {
    /// The start that has ended.
    started_ms: Option<i64>,
    /// How many restarts in a row did not work, as it was when the end was seen.
    in_row: u32,
    tries: u32,
    due: Instant,
}

/// The VMs that wait for their restart.
#[derive(Debug, Default)]
pub(super) struct PendingRestarts(HashMap<String, PendingRestart>);

/// Whether a VM waits for its restart.
pub(super) fn waits(vm: &RestartFacts) -> bool {
    decide(vm.policy, vm.ended) == Restart::Soon
}

/// The VMs whose restart is due now, each with how many in a row did not work.
pub(super) fn due(
    vms: &[RestartFacts],
    all: &mut PendingRestarts,
    now: Instant,
    wall: Timestamp,
) -> Vec<(String, u32)> {
    all.0.retain(|id, wait| vms.iter().any(|vm| vm.id == *id && vm.started_ms == wait.started_ms && waits(vm)));
    let mut due = Vec::new();
    for vm in vms.iter().filter(|vm| waits(vm)) {
        let wait = all.0.entry(vm.id.clone()).or_insert_with(|| {
            let in_row = in_row(vm, wall);
            PendingRestart { started_ms: vm.started_ms, in_row, tries: 0, due: now + back_off(in_row) }
        });
        if now >= wait.due {
            due.push((vm.id.clone(), wait.in_row));
            // Should it not even come to a start.
            wait.tries = wait.tries.saturating_add(1);
            wait.due = now + back_off(wait.in_row.saturating_add(wait.tries));
        }
    }
    due
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nido_api::restart::{ExitFacts, RestartPolicy};
    use nido_api::state::VmState;

    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn failed(started_ms: i64, in_row: u32) -> RestartFacts {
        RestartFacts {
            id: "a".into(),
            policy: RestartPolicy::OnFailure,
            ended: ExitFacts {
                state: VmState::Failed,
                cause: None,
                failure: None,
                held: false,
                restarting: in_row > 0,
            },
            in_row,
            started_ms: Some(started_ms),
            was_ready: true,
        }
    }

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millisecond(ms).unwrap()
    }

    #[test]
    fn a_restart_waits_for_its_back_off() {
        let (mut all, start) = (PendingRestarts::default(), Instant::now());
        // It ran for two seconds only.
        let vm = [failed(1_000, 3)];
        assert_eq!(due(&vm, &mut all, start, at(3_000)), []);
        assert_eq!(due(&vm, &mut all, start + 7 * S, at(10_000)), []);
        assert_eq!(due(&vm, &mut all, start + 8 * S, at(11_000)), [("a".to_owned(), 3)]);
        assert_eq!(due(&vm, &mut all, start + 9 * S, at(12_000)), [], "it is starting");
        assert_eq!(due(&vm, &mut all, start + 24 * S, at(27_000)), [("a".to_owned(), 3)]);
        // It ran again, for ten seconds.
        assert_eq!(due(&[failed(20_000, 4)], &mut all, start + 30 * S, at(30_000)), []);
        assert_eq!(due(&[failed(20_000, 4)], &mut all, start + 31 * S, at(31_000)), [("a".to_owned(), 0)]);
    }

    #[test]
    fn vms_that_a_user_stopped_are_not_restarted() {
        let (mut all, start) = (PendingRestarts::default(), Instant::now());
        let vm = failed(1_000, 0);
        assert!(waits(&vm) && due(std::slice::from_ref(&vm), &mut all, start, at(2_000)).is_empty());
        let held = RestartFacts { ended: ExitFacts { held: true, ..vm.ended }, ..vm };
        assert!(!waits(&held));
        assert_eq!(due(&[held], &mut all, start + 100 * S, at(100_000)), []);
    }
}
