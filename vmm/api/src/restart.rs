//! Restart policies: whether a VM that has ended is started again, and when. Pure.
//!
//! | how it ended | `no` | `on-failure` | `always` |
//! |---|---|---|---|
//! | it failed (guest panic, QEMU was killed, start failed) | no | yes | yes |
//! | the guest powered itself off | no | no | yes |
//! | stopped by a user, by a limit, by the end of its session | no | no | no |
//! | stopped because the host shuts down | no | at the next boot | at the next boot |
//!
//! A restart waits 1 s, and twice as long after each restart that did not work, at most 60 s. One works if the guest became ready
//! and the VM ran for 10 s. Like docker, nido never gives up.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::state::{FailureCause, StateCause, VmState};

/// How long a VM has to run for a restart to count as one that worked.
const STABLE_RUN_TIME: Duration = Duration::from_secs(10);
/// The longest wait before a restart.
const BACK_OFF_MAX: Duration = Duration::from_secs(60);

/// Whether a VM is started again when it has ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Never.
    #[default]
    No,
    /// If it failed.
    OnFailure,
    /// Also if the guest powered itself off.
    Always,
}

impl RestartPolicy {
    /// Every policy.
    pub const ALL: [Self; 3] = [Self::No, Self::OnFailure, Self::Always];

    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::OnFailure => "on-failure",
            Self::Always => "always",
        }
    }

    /// The policy that a word stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.word() == word)
    }

    /// Whether it never restarts anything.
    #[must_use]
    pub const fn is_no(&self) -> bool {
        matches!(self, Self::No)
    }
}

/// How a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitFacts {
    /// Its state.
    pub state: VmState,
    /// Why it is stopped.
    pub cause: Option<StateCause>,
    /// Why it failed.
    pub failure: Option<FailureCause>,
    /// A user stopped it since, while it waited for its restart.
    pub held: bool,
    /// Its policy started it last, and that did not work yet.
    pub restarting: bool,
}

/// When a VM that has ended is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restart {
    /// Not before a user starts it.
    Never,
    /// When the host has booted again.
    AtBoot,
    /// After the wait.
    Soon,
}

/// Decides whether a VM that has ended is started again.
#[must_use]
pub fn decide(policy: RestartPolicy, ended: ExitFacts) -> Restart {
    if policy.is_no() || ended.held || ended.failure == Some(FailureCause::FilesLost) {
        return Restart::Never;
    }
    match (ended.state, ended.cause) {
        (VmState::Failed, _) => Restart::Soon,
        (VmState::Stopped, Some(StateCause::Guest)) if policy == RestartPolicy::Always => Restart::Soon,
        (VmState::Stopped, Some(StateCause::Host)) => Restart::AtBoot,
        // A restart that failed before QEMU ran: for example, a published port was in use.
        (VmState::Stopped, None) if ended.restarting => Restart::Soon,
        _ => Restart::Never,
    }
}

/// How long a restart waits after so many in a row that did not work.
#[must_use]
pub fn back_off(in_row: u32) -> Duration {
    Duration::from_secs(1 << in_row.min(6)).min(BACK_OFF_MAX)
}

/// Whether the last start worked: the guest became ready, and the VM ended no sooner than 10 s after it was started.
#[must_use]
pub fn worked(was_ready: bool, ran: Option<Duration>) -> bool {
    was_ready && ran.is_some_and(|ran| ran >= STABLE_RUN_TIME)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(state: VmState, cause: Option<StateCause>) -> ExitFacts {
        ExitFacts { state, cause, failure: None, held: false, restarting: false }
    }

    #[test]
    fn only_failures_and_with_always_a_power_off_of_the_guest_restart_a_vm() {
        use RestartPolicy::{Always, No, OnFailure};
        for policy in [No, OnFailure, Always] {
            let soon = |expected: bool| if expected { Restart::Soon } else { Restart::Never };
            let failed = ended(VmState::Failed, None);
            assert_eq!(decide(policy, failed), soon(policy != No));
            assert_eq!(decide(policy, ExitFacts { held: true, ..failed }), Restart::Never);
            assert_eq!(decide(policy, ExitFacts { failure: Some(FailureCause::FilesLost), ..failed }), Restart::Never);
            let stopped = ended(VmState::Stopped, None);
            assert_eq!(decide(policy, ExitFacts { restarting: true, ..stopped }), soon(policy != No));
            for cause in StateCause::ALL {
                let expected = match cause {
                    StateCause::Guest => soon(policy == Always),
                    StateCause::Host if policy != No => Restart::AtBoot,
                    _ => Restart::Never,
                };
                assert_eq!(decide(policy, ended(VmState::Stopped, Some(cause))), expected, "{policy:?} {cause:?}");
            }
            for state in VmState::ALL {
                if !matches!(state, VmState::Failed) {
                    assert_eq!(decide(policy, ended(state, None)), Restart::Never, "{policy:?} {state:?}");
                }
            }
        }
    }

    #[test]
    fn the_wait_doubles_up_to_a_minute() {
        let waits: Vec<_> = (0..8).map(|in_row| back_off(in_row).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(back_off(u32::MAX), BACK_OFF_MAX);
        assert!(worked(true, Some(STABLE_RUN_TIME)));
        assert!(
            !worked(false, Some(STABLE_RUN_TIME)) && !worked(true, None) && !worked(true, Some(Duration::from_secs(9)))
        );
    }

    #[test]
    fn every_policy_uses_its_api_name() {
        for policy in RestartPolicy::ALL {
            assert_eq!(serde_json::to_value(policy).unwrap(), policy.word());
            assert_eq!(RestartPolicy::from_word(policy.word()), Some(policy));
        }
        assert_eq!(RestartPolicy::from_word("sometimes"), None);
    }
}
