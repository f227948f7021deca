//! Why a guest's CPUs are paused, and how they are resumed.
//!
//! ```text
//!  STOP, a command, a take-over --query-status--> observed() --> the row: paused, with its cause
//!  resume, or space on a full disk --> resume(): query-status, free space, cont, look again --> the loop
//! ```
//!
//! Invariant: only QEMU knows whether the CPUs run; nothing here, and nothing in the row, is taken for its reply.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::state::StateCause;
use nido_engine::host::facts::disk_free_bytes;
use nido_engine::qemu::Monitor;
use qapi::qmp::{self, RunState};

use super::qmp::{QMP_TIMEOUT, qmp_error};

/// With less free space a VM that was paused by a full disk is not resumed on request.
const RESUME_NEEDS_BYTES: u64 = 1 << 20;
/// With this much it resumes by itself.
const RESUME_BY_ITSELF_BYTES: u64 = 32 << 20;
/// How long after a resume the same write may fail again, and how often that is looked at.
const REPEATED_IO_ERROR_WINDOW: Duration = Duration::from_millis(500);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Pauses between the attempts to resume by itself, at first and at most.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));

/// What QEMU's run state means for the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ObservedState {
    /// The CPUs run.
    Runs,
    /// The CPUs are paused, and a user must act.
    Paused(StateCause),
    /// KVM gave up.
    KvmFailed,
    /// The guest's kernel panicked.
    Panicked,
    /// QEMU is on its way to another state by itself.
    Passing,
}

/// What a run state means. `known` is the cause of the pause according to events and the row.
pub(super) const fn observed(state: RunState, known: Option<StateCause>) -> ObservedState {
    match state {
        RunState::running => ObservedState::Runs,
        RunState::internal_error => ObservedState::KvmFailed,
        RunState::guest_panicked => ObservedState::Panicked,
        RunState::io_error => ObservedState::Paused(match known {
            Some(StateCause::DiskFull) => StateCause::DiskFull,
            _ => StateCause::IoError,
        }),
        RunState::suspended => ObservedState::Paused(StateCause::GuestSuspended),
        RunState::shutdown | RunState::inmigrate => ObservedState::Passing,
        // Saved or not: a command, this supervisor's or another program's, has stopped the CPUs.
        RunState::paused
        | RunState::postmigrate
        | RunState::finish_migrate
        | RunState::save_vm
        | RunState::restore_vm
        | RunState::prelaunch => ObservedState::Paused(StateCause::User),
        _ => ObservedState::Paused(StateCause::Qemu),
    }
}

/// The cause of an I/O error that QEMU reported, or that is found without its report.
pub(super) fn io_cause(no_space_reported: Option<bool>, home: &Path) -> StateCause {
    let full =
        no_space_reported.unwrap_or_else(|| disk_free_bytes(home).is_ok_and(|free| free < RESUME_BY_ITSELF_BYTES));
    if full { StateCause::DiskFull } else { StateCause::IoError }
}

/// How long the CPUs were paused while something waited for the guest.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PausedTime {
    since: Option<Instant>,
    total: Duration,
}

impl PausedTime {
    /// Records that the CPUs are paused, or run, from now on.
    pub(super) fn note(&mut self, still: bool, now: Instant) {
        match (still, self.since) {
            (true, None) => self.since = Some(now),
            (false, Some(since)) => {
                self.total += now.saturating_duration_since(since);
                self.since = None;
            }
            _ => {}
        }
    }

    /// The total time; counting starts again.
    pub(super) fn take(&mut self, now: Instant) -> Duration {
        let open = self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let total = std::mem::take(&mut self.total) + open;
        self.since = self.since.map(|_| now);
        total
    }
}

/// When a VM that was paused by a full disk is resumed without a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct AutomaticResume {
    at: Instant,
    pause: Duration,
}

impl AutomaticResume {
    pub(super) fn new(now: Instant) -> Self {
        Self { at: now + RETRY_PAUSE.0, pause: RETRY_PAUSE.0 }
    }

    /// Whether it is time, and there is space. Each attempt makes the next one wait longer: where a quota or a thin volume is
    /// full, free space has no meaning.
    pub(super) fn is_due(&mut self, now: Instant, home: &Path) -> bool {
        if now < self.at || disk_free_bytes(home).is_ok_and(|free| free < RESUME_BY_ITSELF_BYTES) {
            return false;
        }
        self.pause = (self.pause * 2).min(RETRY_PAUSE.1);
        self.at = now + self.pause;
        true
    }
}

/// What a resume is done with.
pub(super) struct Resume {
    pub monitor: Monitor,
    /// Why the VM is paused, as far as known.
    pub cause: Option<StateCause>,
    /// A directory on the disk that may be full.
    pub home: PathBuf,
}

impl Resume {
    /// Resumes the CPUs. After an error they are still paused.
    pub(super) async fn run(self) -> Result<()> {
        let status = self.status().await?;
        if status == RunState::running {
            return Ok(());
        }
        let failed_io = status == RunState::io_error;
        if failed_io && self.cause == Some(StateCause::DiskFull) {
            let free = disk_free_bytes(&self.home).unwrap_or(u64::MAX);
            if free < RESUME_NEEDS_BYTES {
                return Err(still_full(&format!("{} KiB are free", free >> 10)));
            }
        }
        if status == RunState::suspended {
            self.monitor.execute(qmp::system_wakeup {}, QMP_TIMEOUT).await.map_err(|e| qmp_error(&e))?;
            return Ok(());
        }
        self.monitor.cont(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e))?;
        if failed_io { self.keeps_running().await } else { Ok(()) }
    }

    /// Whether the write that failed succeeds now: QEMU repeats it first.
    async fn keeps_running(&self) -> Result<()> {
        let deadline = Instant::now() + REPEATED_IO_ERROR_WINDOW;
        while Instant::now() < deadline {
            tokio::time::sleep(POLL_INTERVAL).await;
            if self.status().await? == RunState::io_error {
                return Err(match self.cause {
                    Some(StateCause::DiskFull) => still_full("the guest's write failed again"),
                    _ => Error::new(Code::QemuFailed, "the host still cannot read or write the VM's disk")
                        .hint(Hint::host("check the host's disk, then resume the VM again")),
                });
            }
        }
        Ok(())
    }

    async fn status(&self) -> Result<RunState> {
        self.monitor.query_status(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e))
    }
}

fn still_full(why: &str) -> Error {
    Error::new(Code::DiskFull, format!("the VM stays paused, because the host's disk is full: {why}"))
        .hint(Hint::host("free some space on the disk that holds nido's home; the VM then resumes automatically"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    // Every state but `running` and `internal-error` was taken for a pause that a user had asked for.
    #[test]
    fn every_run_state_has_its_meaning() {
        for (state, known, wanted) in [
            (RunState::running, Some(StateCause::DiskFull), ObservedState::Runs),
            (RunState::paused, None, ObservedState::Paused(StateCause::User)),
            (RunState::postmigrate, None, ObservedState::Paused(StateCause::User)),
            (RunState::io_error, None, ObservedState::Paused(StateCause::IoError)),
            (RunState::io_error, Some(StateCause::User), ObservedState::Paused(StateCause::IoError)),
            (RunState::io_error, Some(StateCause::DiskFull), ObservedState::Paused(StateCause::DiskFull)),
            (RunState::suspended, None, ObservedState::Paused(StateCause::GuestSuspended)),
            (RunState::watchdog, None, ObservedState::Paused(StateCause::Qemu)),
            (RunState::debug, None, ObservedState::Paused(StateCause::Qemu)),
            (RunState::internal_error, None, ObservedState::KvmFailed),
            (RunState::guest_panicked, None, ObservedState::Panicked),
            (RunState::shutdown, None, ObservedState::Passing),
            (RunState::inmigrate, None, ObservedState::Passing),
        ] {
            assert_eq!(observed(state, known), wanted, "{state:?}");
        }
    }

    #[test]
    fn time_that_the_cpus_stood_still_is_counted_once() {
        let start = Instant::now();
        let mut still = PausedTime::default();
        still.note(true, start);
        still.note(true, start + S);
        still.note(false, start + 3 * S);
        still.note(false, start + 9 * S);
        assert_eq!(still.take(start + 10 * S), 3 * S);
        assert_eq!(still.take(start + 10 * S), Duration::ZERO);
        still.note(true, start + 10 * S);
        assert_eq!(still.take(start + 12 * S), 2 * S);
        still.note(false, start + 15 * S);
        assert_eq!(still.take(start + 20 * S), 3 * S);
    }

    #[test]
    fn attempts_to_resume_become_rarer() {
        let (start, home) = (Instant::now(), std::env::temp_dir());
        let mut by_itself = AutomaticResume::new(start);
        assert!(!by_itself.is_due(start, &home));
        let mut due = Vec::new();
        for second in 0..100 {
            if by_itself.is_due(start + second * S, &home) {
                due.push(second);
            }
        }
        assert_eq!(due, [5, 15, 35, 75]);
    }
}
