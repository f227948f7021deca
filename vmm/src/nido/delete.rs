//! Deleting a VM: its process first, its files next, its row last.

use std::time::{Duration, Instant};

use super::Nido;
use crate::api::{StopRequest, VmInfo, Which};
use crate::error::{Code, Error, Result};
use crate::home::SUPERVISOR_LOCK;
use crate::lock::Held;
use crate::state::{Admission, Request, admit};
use crate::store::{Purpose, VmRow};
use crate::supervisor::control::Request as Control;

/// How long whoever still works on the VM may take to let go of it.
const LET_GO: Duration = Duration::from_secs(15);

impl Nido {
    /// Deletes a VM and everything of it; a running one only with `force`. The answer is how it was.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_replaced`, `vm_busy`.
    pub async fn delete(&self, vm: impl Into<Which<'_>>, force: bool) -> Result<VmInfo> {
        let vm = vm.into();
        let row = self.store().any_vm_by_name(vm.name)?;
        // From here on everything is done to that id.
        vm.is(&row.id)?;
        self.delete_row(&row, force).await
    }

    /// The same for this very VM, whatever has its name meanwhile.
    pub(super) async fn delete_row(&self, row: &VmRow, force: bool) -> Result<VmInfo> {
        let name = &row.spec.name;
        let info = self.describe(row);
        match admit(row.state, Request::Delete) {
            Admission::Denied(_) if row.purpose == Purpose::Pool => {
                // Unless somebody claims it in this moment.
                if let Err(error) = self.ask(row, &Control::Retire).await
                    && self.store().vm_by_id(&row.id)?.is_some_and(|now| now.purpose != Purpose::Pool)
                {
                    return Err(error);
                }
            }
            Admission::Denied(_) if force => {
                self.stop_row(row, StopRequest { force: true, ..StopRequest::default() }).await?;
            }
            Admission::Denied(why) => {
                return Err(Error::new(Code::VmBusy, format!("VM '{name}' cannot be deleted: {why}"))
                    .hint(format!("nido stop {name}, or: nido delete --force {name}")));
            }
            Admission::Do | Admission::AlreadySo => {}
        }
        let lock = self.vm_dir(&row.id).file(SUPERVISOR_LOCK);
        let held = match Held::take(&lock, Instant::now() + LET_GO).await {
            Ok(Some(held)) => Some(held),
            Ok(None) => return Err(Error::new(Code::VmBusy, format!("VM '{name}' is held by another nido process"))),
            // An ephemeral VM that was stopped above is gone by now.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(Error::io("cannot lock the VM", e)),
        };
        // Somebody may have started it while we waited for the lock.
        let Some(now) = self.store().vm_by_id(&row.id)? else { return Ok(info) };
        if now.purpose != row.purpose {
            return Err(Error::new(
                Code::VmBusy,
                format!("'{name}' was claimed meanwhile; it is VM '{}' now", now.spec.name),
            ));
        }
        if !now.state.at_rest()
            && held.is_some()
            && crate::lock::is_held(&self.vm_dir(&row.id).file(crate::home::VM_LOCK))
        {
            return Err(Error::new(Code::VmBusy, format!("VM '{name}' was started meanwhile")));
        }
        self.erase(&row.id)?;
        if row.parts.frozen.len() > 1 {
            // A copy of a running VM stands on parts that no template names.
            self.drop_private_parts().await;
        }
        Ok(info)
    }

    /// Removes a VM that is at rest. The caller holds its lock (or its directory is gone).
    pub(crate) fn erase(&self, id: &str) -> Result<()> {
        self.store().mark_deleting(id)?;
        match std::fs::remove_dir_all(self.vm_dir(id).path()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("cannot remove the VM's files", e));
            }
            _ => {}
        }
        self.store().remove_vm(id)
    }
}
