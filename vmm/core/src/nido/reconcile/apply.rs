//! Repairs, one by one. Each is planned again from facts that are read under the lock of what it changes.

use std::io::ErrorKind;

use nido_api::Failure;
use nido_api::error::{Error, Result};
use nido_api::state::{Fact, FailureCause, VmState, advance};
use nido_engine::home::{CONSOLE_LOG, QEMU_LOG, SUPERVISOR_LOCK};
use nido_engine::host::vm_processes;
use nido_engine::logs::log_tail;
use nido_engine::temporary_files::remove_temporary_files;
use nido_engine::{liveness, snapshot};
use nido_files::lock::HeldLock;
use nido_store::{Origin, Transition, VmEnd, VmRow};
use nido_supervisor::context::remove_tree;
use nido_supervisor::lagging;
use nido_supervisor::vm_record::remove_without_data;

use super::inventory::{Inventory, Scope, VmFacts};
use super::parts::part_bytes;
use super::plan::{Plan, Repair, VmRepair, plan, plan_vm};
use crate::nido::Nido;
use crate::nido::template_store::TEMPLATES_LOCK_TIMEOUT;

/// How often a VM is planned again, if its QEMU ends while a supervisor is being started for it.
const ROUNDS_MAX: u32 = 3;

/// What repairs have removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::nido) struct RemovalCounts {
    /// Directories of VMs and builds.
    pub directories: usize,
    /// VMs in whose directories a snapshot or a restore was interrupted.
    pub interrupted: usize,
    /// Template parts.
    pub part_bytes: u64,
}

impl Plan {
    /// What the plan removes that no VM and no template needs.
    pub(in crate::nido) fn removes(&self) -> RemovalCounts {
        let mut removed = RemovalCounts::default();
        for repair in &self.repairs {
            match repair {
                Repair::Vm { repairs, .. } => {
                    removed.directories += usize::from(repairs.contains(&VmRepair::RemoveEmptyDirectory));
                    removed.interrupted += usize::from(repairs.contains(&VmRepair::RemoveUnfinished));
                }
                Repair::RemoveDeletedDirectory(_) | Repair::RemoveBuild(_) => removed.directories += 1,
                Repair::Parts(parts) => removed.part_bytes += part_bytes(parts),
                Repair::RemoveLivenessFile(_) | Repair::RemoveTemporaryFile(_) => {}
            }
        }
        removed
    }
}

impl Nido {
    /// Reconciles what killed processes left, as every command does when it opens the home: for processes that keep a home open
    /// for long. Cheap when nothing has to be repaired.
    ///
    /// # Errors
    /// Of the store.
    pub async fn reconcile(&self) -> Result<()> {
        self.reconcile_scope(Scope::Open).await?;
        if self.needs_guardian()? {
            self.context.ensure_guardian();
        }
        self.back_up_store();
        Ok(())
    }

    /// Finds and repairs what belongs to a scope. A repair that fails is logged.
    ///
    /// # Errors
    /// Of the store.
    pub(in crate::nido) async fn reconcile_scope(&self, scope: Scope) -> Result<()> {
        for repair in self.plan_reconciliation(scope)?.repairs {
            // One VM that cannot be repaired is no reason to refuse everything else.
            if let Err(error) = self.apply(&repair, scope).await {
                tracing::warn!("{repair:?} failed: {error}");
            }
        }
        Ok(())
    }

    /// Takes the home's inventory, and plans the repairs.
    ///
    /// # Errors
    /// Of the store or the disk.
    pub(in crate::nido) fn plan_reconciliation(&self, scope: Scope) -> Result<Plan> {
        Ok(plan(&Inventory::take(self, scope)?))
    }

    /// Makes one planned repair.
    pub(in crate::nido) async fn apply(&self, repair: &Repair, scope: Scope) -> Result<()> {
        match repair {
            Repair::Vm { id, .. } => self.repair_vm(id, scope).await,
            Repair::RemoveDeletedDirectory(name) => {
                let path = self.home().vms().join(name);
                remove_tree(&path).map_err(|e| Error::io_at("remove", &path, e))
            }
            Repair::RemoveLivenessFile(id) => liveness::remove_orphan(&self.home().present(), id)
                .map_err(|e| Error::io("cannot remove the liveness file of a process that ended", e)),
            Repair::RemoveTemporaryFile(path) => match std::fs::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io_at("remove", path, error)),
                _ => Ok(()),
            },
            Repair::RemoveBuild(path) => Ok(nido_images::remove_orphaned_build(path)?),
            Repair::Parts(_) if scope == Scope::Open => {
                self.remove_unowned_parts_if_due().await;
                Ok(())
            }
            Repair::Parts(_) => self.remove_unowned_parts(TEMPLATES_LOCK_TIMEOUT).await.map(drop),
        }
    }

    /// Removes the scratch directories of builds that were killed. What cannot be removed is logged.
    pub(in crate::nido) async fn remove_orphaned_builds(&self) {
        for path in nido_images::orphaned_builds(self.home().root()) {
            if let Err(error) = self.apply(&Repair::RemoveBuild(path), Scope::Everything).await {
                tracing::warn!("the files of a killed build cannot be removed: {error}");
            }
        }
    }

    /// Reconciles one VM. Returns its row as it is now; `None` if the VM is gone.
    pub(in crate::nido) async fn reconcile_vm(&self, row: &VmRow) -> Result<Option<VmRow>> {
        self.repair_vm(&row.id, Scope::Open).await?;
        self.store().vm_by_id(&row.id)
    }

    /// Plans and makes the repairs of one VM.
    pub(in crate::nido) async fn repair_vm(&self, id: &str, scope: Scope) -> Result<()> {
        for _ in 0..ROUNDS_MAX {
            let Some(mut held) = self.lock_for_repair(id)? else { return Ok(()) };
            let row = self.store().row_facts_of(id)?;
            let facts = VmFacts::read_held(self, id.to_owned(), row, scope);
            let repairs = plan_vm(&facts);
            nido_files::failpoint!("reconcile.planned");
            let Some((VmRepair::Supervise, _)) = repairs.split_first() else {
                return repairs.into_iter().try_for_each(|repair| self.apply_to_vm(id, repair));
            };
            let Some(held) = held.take() else { return Ok(()) };
            if self.take_over(id, held).await? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Locks a VM that no process takes care of. `None`: one does, or the lock cannot be looked at. `Some(None)`: there is nothing
    /// to lock, because the VM's directory is gone.
    fn lock_for_repair(&self, id: &str) -> Result<Option<Option<HeldLock>>> {
        let lock = self.vm_dir(id).file(SUPERVISOR_LOCK);
        let held = match HeldLock::try_take_existing(&lock) {
            Err(e) if e.kind() == ErrorKind::NotFound && self.files_are_gone(id) => return Ok(Some(None)),
            // Only the lock's file is missing.
            Err(e) if e.kind() == ErrorKind::NotFound => HeldLock::try_take(&lock),
            held => held,
        };
        match held {
            Ok(held) => Ok(held.map(Some)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => {
                tracing::warn!("cannot lock VM {id}: {e}");
                Ok(None)
            }
        }
    }

    /// Starts a supervisor for a QEMU that lost its own. False if that QEMU has ended meanwhile.
    async fn take_over(&self, id: &str, held: HeldLock) -> Result<bool> {
        let Some(row) = self.store().vm_by_id(id)?.filter(|row| row.unreadable.is_none()) else { return Ok(true) };
        tracing::info!("VM {} lost its supervisor; starting another", row.spec.name);
        if row.state.is_inactive() {
            // A QEMU that outlived its row.
            self.store().transition(id, &Transition::FoundRunning)?.log(id, "that its QEMU runs");
        }
        self.supervise_again(id, held).await
    }

    /// Makes a repair of a VM that this process holds, or whose directory is gone.
    fn apply_to_vm(&self, id: &str, repair: VmRepair) -> Result<()> {
        match repair {
            VmRepair::RecordEnd { files_lost } => self.record_end(id, files_lost),
            VmRepair::Delete => self.context.erase(id),
            VmRepair::RemoveUnfinished => {
                self.remove_unfinished(id, None);
                Ok(())
            }
            VmRepair::WriteRecord => {
                self.context.refresh_record(id);
                Ok(())
            }
            VmRepair::RemoveEmptyDirectory => {
                let dir = self.vm_dir(id);
                remove_without_data(&dir).map_err(|e| Error::io_at("remove", dir.path(), e))
            }
            VmRepair::Supervise => Err(Error::internal("a supervisor is started with the lock of its VM")),
        }
    }

    /// Removes the temporary files of a killed operation from the directory of a stopped VM. The caller holds the VM's lock.
    pub(in crate::nido) fn remove_unfinished(&self, id: &str, from: Option<&Origin>) {
        let dir = self.vm_dir(id);
        snapshot::remove_unfinished(&dir);
        remove_temporary_files(&dir);
        // Those of a restore are in use until the VM has started.
        if !matches!(from, Some(Origin::Restore { .. })) {
            snapshot::remove_restore_files(&dir);
        }
    }

    /// Records that a VM has ended, which no supervisor could.
    fn record_end(&self, id: &str, files_lost: bool) -> Result<()> {
        let Some(row) = self.store().vm_by_id(id)?.filter(|row| row.unreadable.is_none()) else { return Ok(()) };
        let end = match lagging(&self.vm_dir(id), &row) {
            _ if files_lost => Transition::ended(VmState::Failed, Some(self.files_lost_failure(id))),
            // A supervisor that saw the end, and could not write it into the store, wrote it into the VM's directory.
            Some(known) if known.state.is_inactive() => Transition::Ended(Box::new(VmEnd {
                state: known.state,
                cause: known.cause,
                failure: known.failure,
                last_log_entries: Vec::new(),
            })),
            _ => {
                let state = advance(row.state, Fact::QemuExited { clean: false });
                let failure = (state == VmState::Failed).then(|| self.unreported_failure(id));
                Transition::ended(state, failure)
            }
        };
        self.context.remove_control_group(id);
        self.store().transition(id, &end)?.log(id, "its end");
        Ok(())
    }

    fn files_lost_failure(&self, id: &str) -> Failure {
        let dir = self.vm_dir(id);
        let message = format!("its directory {} is gone, and its disk with it", dir.path().display());
        let message = match vm_processes::count_processes_in_removed(dir.path()) {
            0 => message,
            processes => format!("{message}; {processes} of its processes run until it is deleted"),
        };
        Failure { cause: FailureCause::FilesLost, message, log_tail: Vec::new() }
    }

    fn unreported_failure(&self, id: &str) -> Failure {
        Failure {
            cause: FailureCause::HostRestart,
            message: "QEMU and its supervisor ended without a report: the host restarted, or both were killed".into(),
            log_tail: log_tail(&self.vm_dir(id), &[QEMU_LOG, CONSOLE_LOG]),
        }
    }
}
