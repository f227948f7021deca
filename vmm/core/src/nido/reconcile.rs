//! Reconciling what a crash left behind: rows whose state no process stands for any more.
//!
//! ```text
//!  directory  supervisor.lock  vm.lock   then
//!  there      held             any       a process takes care of it
//!  there      free             held      QEMU lost its supervisor: start another
//!  there      free             free      QEMU is gone and its end was not written down: do that now
//!  gone       -                -         failed: its files are lost; a deletion that was cut short is finished
//! ```
//!
//! A VM that was made for a session which is over is removed, too: at rest here, running by its supervisor.

use nido_api::error::{Error, Result};
use nido_api::state::{Fact, FailureCause, VmState, advance};
use nido_api::{AgentInfo, Failure};
use nido_engine::home::{CONSOLE_LOG, QEMU_LOG, SUPERVISOR_LOCK, VM_LOCK};
use nido_engine::host::removed_dir;
use nido_engine::logs::log_tail;
use nido_files::lock::{Held, is_held};
use nido_store::{VmRow, VmUpdate};
use nido_supervisor::lagging;

use super::Nido;

impl Nido {
    /// Reconciles every VM that needs it, as opening does: for processes that keep a home open for long. Cheap when nothing
    /// needs it.
    ///
    /// # Errors
    /// Of the store.
    pub async fn settle_all(&self) -> Result<()> {
        let rows = self.store().vms_in_motion()?;
        for row in rows {
            // Made for a session that goes on.
            if row.state == VmState::Created && !row.deleting && !self.context.is_orphan(&row) {
                continue;
            }
            // One VM that cannot be reconciled is no reason to refuse everything else.
            if let Err(error) = self.settle(&row).await {
                tracing::warn!("VM {} cannot be reconciled: {error}", row.spec.name);
            }
        }
        self.collect_parts_if_due().await;
        self.back_up_store();
        Ok(())
    }

    /// The row with what its supervisor could not write into it yet.
    pub(crate) fn current(&self, row: VmRow) -> VmRow {
        if row.state.at_rest() {
            return row;
        }
        match lagging(&self.vm_dir(&row.id), &row) {
            Some(now) => VmRow { state: now.state, cause: now.cause, failure: now.failure, ..row },
            None => row,
        }
    }

    /// Reconciles one VM. Returns its row as it is now; `None` if it is gone.
    pub(super) async fn settle(&self, row: &VmRow) -> Result<Option<VmRow>> {
        let dir = self.vm_dir(&row.id);
        let lock = dir.file(SUPERVISOR_LOCK);
        let held = match Held::try_take_existing(&lock) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                if self.files_are_gone(&row.id) {
                    return self.settle_without_files(&row.id);
                }
                // Only the lock's file is missing.
                Held::try_take(&lock)
            }
            held => held,
        };
        let held = match held {
            Ok(Some(held)) => held,
            Ok(None) => return self.store().vm_by_id(&row.id),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return self.store().vm_by_id(&row.id),
            Err(e) => {
                tracing::warn!("cannot look at VM {}: {e}", row.spec.name);
                return Ok(Some(row.clone()));
            }
        };
        let Some(row) = self.store().vm_by_id(&row.id)? else { return Ok(None) };
        if is_held(&dir.file(VM_LOCK)) {
            tracing::info!("VM {} lost its supervisor; starting another", row.spec.name);
            if row.state.at_rest() {
                // A QEMU that outlived its row.
                let update = VmUpdate { state: Some(VmState::Running), failure: Some(None), ..VmUpdate::default() };
                self.store().update_vm(&row.id, &update)?;
            }
            if self.supervise_again(&row.id, held).await? {
                return self.store().vm_by_id(&row.id);
            }
            // QEMU ended in this very moment.
            return Box::pin(self.settle(&row)).await;
        }
        if row.deleting {
            self.context.erase(&row.id)?;
            return Ok(None);
        }
        if !row.state.at_rest() {
            // A supervisor that saw the end, and could not write it into the store, wrote it into the VM's directory.
            let update = match lagging(&dir, &row) {
                Some(known) if known.state.at_rest() => {
                    VmUpdate { cause: Some(known.cause), ..at_rest(&row, known.state, known.failure) }
                }
                _ => {
                    let state = advance(row.state, Fact::QemuExited { clean: false });
                    let failure = (state == VmState::Failed).then(|| Failure {
                        cause: FailureCause::HostRestart,
                        message:
                            "QEMU and its supervisor ended without a report: the host restarted, or both were killed"
                                .into(),
                        log_tail: log_tail(&dir, &[QEMU_LOG, CONSOLE_LOG]),
                    });
                    at_rest(&row, state, failure)
                }
            };
            self.store().update_vm(&row.id, &update)?;
        }
        self.remove_if_unwanted(&row.id)
    }

    /// Reconciles a VM whose directory is not there.
    fn settle_without_files(&self, id: &str) -> Result<Option<VmRow>> {
        let Some(row) = self.store().vm_by_id(id)? else { return Ok(None) };
        if row.deleting {
            self.context.erase(id)?;
            return Ok(None);
        }
        if !row.state.at_rest() {
            let dir = self.vm_dir(id);
            let message = format!("its directory {} is gone, and its disk with it", dir.path().display());
            let processes = removed_dir::count_processes_in(dir.path());
            let message = match processes {
                0 => message,
                _ => format!("{message}; {processes} processes of it live on until it is deleted"),
            };
            let failure = Failure { cause: FailureCause::FilesLost, message, log_tail: Vec::new() };
            self.store().update_vm(id, &at_rest(&row, VmState::Failed, Some(failure)))?;
        }
        self.remove_if_unwanted(id)
    }

    /// Removes a VM at rest that is ephemeral, or was made for a session that is over.
    fn remove_if_unwanted(&self, id: &str) -> Result<Option<VmRow>> {
        let row = self.store().vm_by_id(id)?;
        if let Some(row) = &row
            && (row.spec.ephemeral && matches!(row.state, VmState::Stopped | VmState::Failed)
                || row.state.at_rest() && self.context.is_orphan(row))
        {
            self.context.erase(&row.id)?;
            return Ok(None);
        }
        Ok(row)
    }

    /// The error for a VM whose directory is not there.
    pub(super) fn files_lost(&self, row: &VmRow, done: &str) -> Error {
        let (name, dir) = (&row.spec.name, self.vm_dir(&row.id));
        let words = format!("VM '{name}' cannot be {done}: its directory {} is gone", dir.path().display());
        Error::new(nido_api::error::Code::VmNotRunning, words)
            .hint(format!("its disk is lost: nido delete {name}, or bring the directory back"))
    }
}

/// What changes in the row of a VM that has ended.
fn at_rest(row: &VmRow, state: VmState, failure: Option<Failure>) -> VmUpdate {
    VmUpdate {
        state: Some(state),
        cid: Some(None),
        expires_at: Some(None),
        agent: Some(AgentInfo { ready: false, ..row.agent.clone() }),
        ip_address: Some(None),
        failure: Some(failure),
        ..VmUpdate::default()
    }
}
