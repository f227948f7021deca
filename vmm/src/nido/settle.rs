//! Settling what a crash left behind: rows whose state nobody stands for any more.
//!
//! ```text
//!  supervisor.lock  vm.lock   then
//!  held             any       somebody takes care of it
//!  free             held      QEMU lost its supervisor: start another
//!  free             free      QEMU is gone and nobody wrote it down: do that now
//! ```
//!
//! A VM that was made for a session which is over goes, too: at rest here, running by its supervisor.

use super::Nido;
use crate::api::{AgentInfo, Failure};
use crate::error::Result;
use crate::home::{CONSOLE_LOG, QEMU_LOG, SUPERVISOR_LOCK, VM_LOCK};
use crate::lock::{Held, is_held};
use crate::state::{Fact, FailureCause, VmState, advance};
use crate::store::{VmRow, VmUpdate};
use crate::supervisor::log_tail;

impl Nido {
    /// Settles every VM that needs it, as opening does: for who keeps a home open for long. Cheap when nothing needs it.
    ///
    /// # Errors
    /// Of the store.
    pub async fn settle_all(&self) -> Result<()> {
        let rows = self.store().vms_in_motion()?;
        for row in rows {
            // Made for a session that goes on.
            if row.state == VmState::Created && !row.deleting && !self.is_orphan(&row) {
                continue;
            }
            // One VM that cannot be settled is no reason to refuse everything else.
            if let Err(error) = self.settle(&row).await {
                tracing::warn!("VM {} cannot be settled: {error}", row.spec.name);
            }
        }
        Ok(())
    }

    /// Settles one VM. Returns its row as it is now; `None` if it is gone.
    pub(super) async fn settle(&self, row: &VmRow) -> Result<Option<VmRow>> {
        let dir = self.vm_dir(&row.id);
        let held = match Held::try_take(&dir.file(SUPERVISOR_LOCK)) {
            Ok(Some(held)) => held,
            Ok(None) => return self.store().vm_by_id(&row.id),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                // The directory is gone: a deletion was cut short after its files went.
                let now = self.store().vm_by_id(&row.id)?;
                if now.is_some_and(|now| now.deleting) {
                    self.store().remove_vm(&row.id)?;
                }
                return self.store().vm_by_id(&row.id);
            }
            Err(e) => {
                tracing::warn!("cannot look at VM {}: {e}", row.spec.name);
                return Ok(Some(row.clone()));
            }
        };
        let Some(row) = self.store().vm_by_id(&row.id)? else { return Ok(None) };
        if is_held(&dir.file(VM_LOCK)) {
            tracing::info!("VM {} lost its supervisor; starting another", row.spec.name);
            if self.supervise_again(&row.id, held).await? {
                return self.store().vm_by_id(&row.id);
            }
            // QEMU ended in this very moment.
            return Box::pin(self.settle(&row)).await;
        }
        if row.deleting {
            self.erase(&row.id)?;
            return Ok(None);
        }
        if !row.state.at_rest() {
            let state = advance(row.state, Fact::QemuExited { clean: false });
            let failure = (state == VmState::Failed).then(|| Failure {
                cause: FailureCause::HostRestart,
                message: "QEMU and its supervisor ended without a word: the host restarted, or both were killed".into(),
                log_tail: log_tail(&dir, &[QEMU_LOG, CONSOLE_LOG]),
            });
            let update = VmUpdate {
                state: Some(state),
                cid: Some(None),
                expires_at: Some(None),
                agent: Some(AgentInfo { ready: false, ..row.agent.clone() }),
                ip_address: Some(None),
                failure: Some(failure),
                ..VmUpdate::default()
            };
            self.store().update_vm(&row.id, &update)?;
        }
        let row = self.store().vm_by_id(&row.id)?;
        if let Some(row) = &row
            && (row.spec.ephemeral && matches!(row.state, VmState::Stopped | VmState::Failed)
                || row.state.at_rest() && self.is_orphan(row))
        {
            self.erase(&row.id)?;
            return Ok(None);
        }
        Ok(row)
    }
}
