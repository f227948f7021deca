//! Deleting a VM: its process first, its files next, its row last.
//!
//! ```text
//!  row: deleting - vms/ID -> vms/.gone-ID - files removed - row removed
//! ```
//!
//! Invariants: the directory leaves its name in one step, so no concurrent command works in it while it is removed. Nothing is
//! removed while QEMU holds `vm.lock`. A VM whose directory is gone already can be deleted in every state.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::operation as op;
use nido_api::state::{Admission, Request, VmState, admit};
use nido_api::{StopRequest, VmInfo, VmRef};
use nido_engine::home::{SUPERVISOR_LOCK, VM_LOCK};
use nido_engine::host::vm_processes;
use nido_files::lock::{HeldLock, is_held};
use nido_store::{Purpose, VmRow};
use nido_supervisor::control::Request as Control;

use super::Nido;

/// How long another process may take to release the VM.
const LOCK_TIMEOUT: Duration = Duration::from_secs(15);
/// How long processes may take to end after SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// Whether a VM may be deleted as it is.
pub(super) fn check(row: &VmRow, force: bool) -> Result<()> {
    let name = &row.spec.name;
    match admit(row.state, Request::Delete) {
        Admission::Denied(why) if !force => {
            Err(Error::new(Code::VmBusy, format!("VM '{name}' cannot be deleted: {why}"))
                .hint(Hint::run_on(op::VM_STOP, name))
                .or_hint(Hint::run_on(op::VM_DELETE, name).forced()))
        }
        _ => Ok(()),
    }
}

impl Nido {
    /// Deletes a VM and everything of it; a running one only with `force`. The answer is how it was, a running one as it was
    /// when it had been stopped.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_replaced`, `vm_busy`.
    pub async fn delete(&self, vm: impl Into<VmRef<'_>>, force: bool) -> Result<VmInfo> {
        let vm = vm.into();
        let row = self.store().any_vm_by_name(vm.name)?;
        // From here on everything is done to that id.
        vm.check(&row.id)?;
        self.delete_row(&row, force).await
    }

    /// The same for this very VM, whichever VM has its name now.
    pub(super) async fn delete_row(&self, row: &VmRow, force: bool) -> Result<VmInfo> {
        let mut info = self.describe(row);
        if self.end_for_deletion(row, force).await? {
            info.status = VmState::Stopped;
            info.agent.ready = false;
            (info.expires_at, info.idle_at) = (None, None);
        }
        nido_files::failpoint!("delete.ended");
        let Some((held, now)) = self.hold_for_deletion(row).await? else { return Ok(info) };
        if held.is_some() && is_held(&self.vm_dir(&row.id).file(VM_LOCK)) {
            drop(held);
            self.end_unrecorded_qemu(&now, force).await?;
            let Some((_held, _)) = self.hold_for_deletion(row).await? else { return Ok(info) };
            self.context.erase(&row.id)?;
        } else {
            self.context.erase(&row.id)?;
        }
        nido_files::failpoint!("delete.erased");
        self.remove_unowned_parts_if_due().await;
        Ok(info)
    }

    /// Ends the VM's process, if its state implies one. Returns whether it was stopped as any VM in use is.
    async fn end_for_deletion(&self, row: &VmRow, force: bool) -> Result<bool> {
        match admit(row.state, Request::Delete) {
            Admission::Do | Admission::AlreadySo => Ok(false),
            // No process can be asked to end it; deleting its files ends a remaining QEMU.
            Admission::Denied(_) if (force || row.purpose == Purpose::Pool) && self.files_are_gone(&row.id) => {
                Ok(false)
            }
            Admission::Denied(_) if force && row.unreadable.is_some() => self.end_unreadable(row).map(|()| true),
            Admission::Denied(_) if row.purpose == Purpose::Pool => {
                // Unless another command claims it at this moment.
                if let Err(error) = self.request(row, &Control::Retire).await
                    && self.store().vm_by_id(&row.id)?.is_some_and(|now| now.purpose != Purpose::Pool)
                {
                    return Err(error);
                }
                Ok(false)
            }
            Admission::Denied(_) if force => {
                self.stop_row(row, StopRequest { force: true, ..StopRequest::default() }).await.map(|_| true)
            }
            Admission::Denied(_) => check(row, force).map(|()| false),
        }
    }

    /// Locks the VM, and reads its row again. The lock is `None` if its directory is gone; everything is if its row is.
    async fn hold_for_deletion(&self, row: &VmRow) -> Result<Option<(Option<HeldLock>, VmRow)>> {
        let name = &row.spec.name;
        let lock = self.vm_dir(&row.id).file(SUPERVISOR_LOCK);
        let held = match HeldLock::take(&lock, Instant::now() + LOCK_TIMEOUT).await {
            Ok(Some(held)) => Some(held),
            Ok(None) => return Err(Error::new(Code::VmBusy, format!("VM '{name}' is held by another nido process"))),
            // An ephemeral VM that was stopped above is gone by now.
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(Error::io("cannot lock the VM", e)),
        };
        // Another command may have started it before the lock was free.
        let Some(now) = self.store().vm_by_id(&row.id)? else { return Ok(None) };
        if now.purpose != row.purpose {
            let words = format!("'{name}' was claimed meanwhile; it is VM '{}' now", now.spec.name);
            return Err(Error::new(Code::VmBusy, words));
        }
        if !now.state.is_inactive() && held.is_some() && is_held(&self.vm_dir(&row.id).file(VM_LOCK)) {
            return Err(Error::new(Code::VmBusy, format!("VM '{name}' was started meanwhile")));
        }
        Ok(Some((held, now)))
    }

    /// Ends a QEMU that runs although the VM's row states that it is stopped.
    async fn end_unrecorded_qemu(&self, row: &VmRow, force: bool) -> Result<()> {
        let name = &row.spec.name;
        if !force {
            let words = format!("VM '{name}' cannot be deleted: a QEMU of it still runs");
            return Err(Error::new(Code::VmBusy, words).hint(Hint::run_on(op::VM_DELETE, name).forced()));
        }
        let Some(now) = self.reconcile_vm(row).await? else { return Ok(()) };
        self.stop_row(&now, StopRequest { force: true, ..StopRequest::default() }).await.map(drop)
    }

    /// Ends the processes of a VM whose row no supervisor can read.
    fn end_unreadable(&self, row: &VmRow) -> Result<()> {
        let dir = self.vm_dir(&row.id);
        // The supervisor first: otherwise it would see QEMU's end, and write a row that it may have misread.
        let locks = [SUPERVISOR_LOCK, VM_LOCK];
        let alive = locks.map(|lock| vm_processes::kill_lock_holders(&dir.file(lock), KILL_TIMEOUT));
        if alive.iter().sum::<usize>() > 0 {
            let words = format!("the processes of VM '{}' do not end", row.spec.name);
            return Err(Error::new(Code::VmBusy, words));
        }
        Ok(())
    }

    /// Whether the directory of a VM is not there.
    pub(super) fn files_are_gone(&self, id: &str) -> bool {
        std::fs::symlink_metadata(self.vm_dir(id).path()).is_err_and(|e| e.kind() == ErrorKind::NotFound)
    }

    /// The error for a VM whose directory is not there.
    pub(super) fn files_lost(&self, row: &VmRow, done: &str) -> Error {
        let (name, dir) = (&row.spec.name, self.vm_dir(&row.id));
        let words = format!("VM '{name}' cannot be {done}: its directory {} is gone", dir.path().display());
        Error::new(Code::VmNotRunning, words)
            .hint(Hint::run_on(op::VM_DELETE, name).to("its disk is lost"))
            .or_hint(Hint::host("bring the directory back"))
    }
}
