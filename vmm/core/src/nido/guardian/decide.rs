//! What the guardian does about the VMs of its home. Pure.
//!
//! ```text
//!  supervisor   QEMU     what is done
//!  lives        any      nothing; QEMU is killed if the time to live has been over for [`KILL_AFTER`]
//!  none         runs     a supervisor is started; after attempt n the next one waits 2^(n-1) s, at most [`BACK_OFF_MAX`]
//!  none         ended    the end is recorded after [`END_DELAY`], then with the same back-off
//! ```

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How long a supervisor may take to stop a VM whose time to live is over: more than it gives the guest.
pub(super) const KILL_AFTER: Duration = Duration::from_secs(30);
/// How long after it was seen the end of a QEMU without a supervisor is recorded.
const END_DELAY: Duration = Duration::from_secs(1);
/// The longest wait between two attempts.
const BACK_OFF_MAX: Duration = Duration::from_secs(60);
/// A supervisor that has lived for so long counts as one that works.
const STABLE_RUN_TIME: Duration = Duration::from_secs(10);
/// After so many supervisors in a row that ended, the VM gets a warning.
const WARN_AT: u32 = 4;

/// What the guardian knows about a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct VmFacts {
    /// Its id.
    pub id: String,
    /// Its state in the store is one in which no process takes care of it.
    pub is_inactive: bool,
    /// This version of nido can read its state.
    pub readable: bool,
    /// A process holds `supervisor.lock`, or this is unknown.
    pub supervised: bool,
    /// QEMU holds `vm.lock`, or this is unknown.
    pub runs: bool,
    /// Its time to live is over.
    pub ttl_over: bool,
}

impl VmFacts {
    /// Whether the guardian has to stay for it.
    pub fn needs_guardian(&self) -> bool {
        self.runs || self.readable && !self.is_inactive
    }
}

/// What is done about a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum GuardianAction {
    /// Starts a supervisor for its QEMU.
    Supervise(String),
    /// Records that it has ended, as reconciliation does.
    RecordEnd(String),
    /// Writes into its row that no supervisor stays.
    Warn(String),
    /// Kills its QEMU.
    KillQemu(String),
}

/// What was done about a VM before.
#[derive(Debug, Default)]
struct History {
    attempts: u32,
    next_attempt: Option<Instant>,
    supervised_since: Option<Instant>,
    over_since: Option<Instant>,
}

/// What was done before, by VM.
#[derive(Debug, Default)]
pub(super) struct Histories(HashMap<String, History>);

/// Decides, and keeps in mind what was decided.
pub(super) fn decide(vms: &[VmFacts], histories: &mut Histories, now: Instant) -> Vec<GuardianAction> {
    histories.0.retain(|id, _| vms.iter().any(|vm| vm.id == *id));
    vms.iter().flat_map(|vm| decide_vm(vm, histories.0.entry(vm.id.clone()).or_default(), now)).collect()
}

fn decide_vm(vm: &VmFacts, history: &mut History, now: Instant) -> Vec<GuardianAction> {
    // From when this process saw it: the host may have slept, and the supervisor with it.
    let over_since = vm.ttl_over.then(|| history.over_since.unwrap_or(now));
    history.over_since = over_since;
    let mut acts = Vec::new();
    if vm.runs && over_since.is_some_and(|since| now.duration_since(since) >= KILL_AFTER) {
        acts.push(GuardianAction::KillQemu(vm.id.clone()));
    }
    if vm.supervised {
        let since = *history.supervised_since.get_or_insert(now);
        if now.duration_since(since) >= STABLE_RUN_TIME {
            (history.attempts, history.next_attempt) = (0, None);
        }
        return acts;
    }
    history.supervised_since = None;
    if !vm.runs && history.next_attempt.is_none() {
        // A moment later, in case a command is at work on it, or its directory is just being removed.
        history.next_attempt = Some(now + END_DELAY);
    }
    if !vm.readable || history.next_attempt.is_some_and(|at| now < at) || !vm.runs && vm.is_inactive {
        return acts;
    }
    history.attempts = history.attempts.saturating_add(1);
    history.next_attempt = Some(now + back_off(history.attempts));
    if vm.runs && history.attempts == WARN_AT {
        acts.push(GuardianAction::Warn(vm.id.clone()));
    }
    acts.push(if vm.runs {
        GuardianAction::Supervise(vm.id.clone())
    } else {
        GuardianAction::RecordEnd(vm.id.clone())
    });
    acts
}

/// The wait after so many attempts: 1 s, doubled each time.
fn back_off(attempts: u32) -> Duration {
    Duration::from_secs(1 << attempts.saturating_sub(1).min(6)).min(BACK_OFF_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn vm(supervised: bool, runs: bool) -> VmFacts {
        VmFacts { id: "a".into(), readable: true, supervised, runs, ..VmFacts::default() }
    }

    #[test]
    fn a_qemu_without_a_supervisor_gets_one_and_an_ended_one_is_recorded() {
        let (mut histories, now) = (Histories::default(), Instant::now());
        assert_eq!(decide(&[vm(true, true)], &mut histories, now), []);
        assert_eq!(decide(&[vm(false, true)], &mut histories, now), [GuardianAction::Supervise("a".into())]);
        let mut histories = Histories::default();
        assert_eq!(decide(&[vm(false, false)], &mut histories, now), []);
        assert_eq!(decide(&[vm(false, false)], &mut histories, now + S), [GuardianAction::RecordEnd("a".into())]);
        let stopped = VmFacts { is_inactive: true, ..vm(false, false) };
        assert_eq!(decide(std::slice::from_ref(&stopped), &mut Histories::default(), now), []);
        assert!(!stopped.needs_guardian() && vm(false, true).needs_guardian() && vm(true, false).needs_guardian());
        let unreadable = VmFacts { readable: false, ..vm(false, true) };
        assert_eq!(decide(std::slice::from_ref(&unreadable), &mut Histories::default(), now), []);
        assert!(unreadable.needs_guardian());
    }

    #[test]
    fn a_supervisor_that_ends_at_once_is_started_ever_more_seldom_and_reported_once() {
        let (mut histories, start) = (Histories::default(), Instant::now());
        let mut at = Vec::new();
        let mut warned = 0;
        for second in 0..400 {
            for act in decide(&[vm(false, true)], &mut histories, start + second * S) {
                match act {
                    GuardianAction::Supervise(_) => at.push(second),
                    GuardianAction::Warn(_) => warned += 1,
                    other => panic!("{other:?}"),
                }
            }
        }
        assert_eq!(at, [0, 1, 3, 7, 15, 31, 63, 123, 183, 243, 303, 363]);
        assert_eq!(warned, 1);
        // One that stays is no reason to wait the next time.
        for second in 400..411 {
            assert_eq!(decide(&[vm(true, true)], &mut histories, start + second * S), []);
        }
        assert_eq!(
            decide(&[vm(false, true)], &mut histories, start + 411 * S),
            [GuardianAction::Supervise("a".into())]
        );
    }

    #[test]
    fn a_supervisor_that_hangs_does_not_keep_a_vm_beyond_its_time_to_live() {
        let (mut histories, start) = (Histories::default(), Instant::now());
        let over = VmFacts { ttl_over: true, ..vm(true, true) };
        let all = std::slice::from_ref(&over);
        assert_eq!(decide(all, &mut histories, start), []);
        assert_eq!(decide(all, &mut histories, start + KILL_AFTER - S), []);
        assert_eq!(decide(all, &mut histories, start + KILL_AFTER), [GuardianAction::KillQemu("a".into())]);
        // It was restarted meanwhile.
        assert_eq!(decide(&[vm(true, true)], &mut histories, start + KILL_AFTER + S), []);
        assert_eq!(decide(all, &mut histories, start + KILL_AFTER + 2 * S), []);
    }
}
