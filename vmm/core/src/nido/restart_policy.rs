//! Restart policies, as commands and the guardian carry them out. What they mean is decided in `nido_api::restart`.
//!
//! Invariant: a restart is counted, and a user's stop is recorded, under the lock of the VM. So a VM that a user has stopped stays
//! stopped, also if its restart was about to begin.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::restart::{Restart, decide, worked};
use nido_api::{StartRequest, StartStage, StopRequest, VmInfo, VmRef};
use nido_engine::home::SUPERVISOR_LOCK;
use nido_files::lock::HeldLock;
use nido_store::{RestartFacts, VmRow};

use super::Nido;

/// How long a stop waits for a process that works on the VM.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// What starts a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StartOrigin {
    /// A user: the restart count begins again.
    User,
    /// Its restart policy, after so many restarts in a row that did not work.
    Policy {
        /// How many.
        in_row: u32,
    },
}

impl Nido {
    /// The VMs that their restart policies want to run and that do not, because they failed, powered off, or the host restarted.
    ///
    /// # Errors
    /// Of the store.
    pub fn wanted(&self) -> Result<Vec<VmName>> {
        let wanted =
            self.store().vms_to_restart()?.into_iter().filter(|vm| decide(vm.policy, vm.ended) != Restart::Never);
        let ids: Vec<_> = wanted.map(|vm| vm.id).collect();
        let rows = self.store().vms()?.into_iter();
        Ok(rows.filter(|row| ids.contains(&row.id)).map(|row| row.spec.name).collect())
    }

    /// Starts a VM because its restart policy requires it, after so many restarts in a row that did not work: for the guardian.
    ///
    /// # Errors
    /// Those of [`Nido::start`]; `vm_busy` if a user keeps it stopped.
    pub async fn restart_by_policy(&self, id: &str, in_row: u32) -> Result<()> {
        let all = self.store().vms_to_restart()?;
        if !all.iter().any(|vm| vm.id == id && decide(vm.policy, vm.ended) == Restart::Soon) {
            return Ok(());
        }
        let Some(row) = self.store().vm_by_id(id)?.filter(|row| row.unreadable.is_none()) else { return Ok(()) };
        let starter = StartOrigin::Policy { in_row: in_row.saturating_add(1) };
        let start = StartRequest { wait: false, ..StartRequest::default() };
        let vm = VmRef { name: &row.spec.name, id: Some(&row.id) };
        self.start_for(vm, start, starter, &mut |_| {}).await.map(drop)
    }

    /// Starts a VM that its restart policy wants to run, after the host has booted. If that fails, the guardian tries again.
    ///
    /// # Errors
    /// Those of [`Nido::start`].
    pub async fn start_wanted(
        &self,
        name: &VmName,
        start: StartRequest,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<VmInfo> {
        self.start_for(name.into(), start, StartOrigin::Policy { in_row: 1 }, progress).await
    }

    /// Counts a start. The caller holds the VM's lock.
    pub(super) fn count_start(&self, row: &VmRow, starter: StartOrigin) -> Result<()> {
        match starter {
            _ if row.spec.restart.is_no() => Ok(()),
            StartOrigin::User => self.store().allow_restarts(&row.id),
            StartOrigin::Policy { in_row } if self.store().count_restart(&row.id, in_row)? => Ok(()),
            StartOrigin::Policy { .. } => {
                Err(Error::new(Code::VmBusy, format!("VM '{}' was stopped by a user meanwhile", row.spec.name)))
            }
        }
    }

    /// A user stops a VM that does not run: it may wait for its restart.
    pub(super) async fn keep_stopped(&self, row: &VmRow, stop: StopRequest) -> Result<VmInfo> {
        if row.spec.restart.is_no() || !row.state.is_inactive() {
            return Ok(self.describe(row));
        }
        let lock = self.vm_dir(&row.id).file(SUPERVISOR_LOCK);
        // Without its directory it cannot be started anyway.
        let held = HeldLock::take(&lock, Instant::now() + LOCK_TIMEOUT).await.ok().flatten();
        let now = self.store().vm_by_id(&row.id)?;
        match now {
            // Its restart was quicker.
            Some(now) if !now.state.is_inactive() => {
                drop(held);
                self.stop_row(&now, stop).await
            }
            _ => {
                self.store().hold_restarts(&row.id)?;
                self.describe_current(row)
            }
        }
    }

    /// How often its restart policy started the VM since a user did.
    pub(super) fn restart_count(&self, row: &VmRow) -> u32 {
        if row.spec.restart.is_no() { 0 } else { self.store().restart_count(&row.id).unwrap_or(0) }
    }
}

/// How many restarts in a row did not work, for a VM that was seen to have ended at that time.
pub(super) fn in_row(vm: &RestartFacts, seen: Timestamp) -> u32 {
    let ran = vm.started_ms.and_then(|at| u64::try_from(seen.as_millisecond().saturating_sub(at)).ok());
    if worked(vm.was_ready, ran.map(Duration::from_millis)) { 0 } else { vm.in_row }
}
