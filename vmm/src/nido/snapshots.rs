//! Snapshots, seen from the API: of a running VM its supervisor takes them, of one at rest this process.

use std::time::Instant;

use super::Nido;
use super::lifecycle::{LET_GO, denied};
use crate::api::{
    PathChoice, RestoreRequest, SnapshotInfo, SnapshotList, StartRequest, StartStage, StopRequest, VmInfo, Which,
};
use crate::error::{Code, Error, Result};
use crate::home::{DISK, SUPERVISOR_LOCK};
use crate::lock::Held;
use crate::name::{SnapshotName, VmName};
use crate::snapshot::{self, Record, Unfinished};
use crate::state::VmState;
use crate::store::{Origin, VmRow, VmUpdate};
use crate::supervisor::control::Request;

impl Nido {
    /// Takes a snapshot: of a running VM memory, devices and disk, of one at rest the disk.
    ///
    /// # Errors
    /// `vm_not_found`, `snapshot_exists`, `vm_busy`, `vm_not_running` if it never ran, `agent_unreachable`, `disk_full`.
    pub async fn snapshot_create(&self, vm: &VmName, name: &SnapshotName) -> Result<SnapshotInfo> {
        let row = self.store().vm_by_name(vm)?;
        let dir = self.vm_dir(&row.id);
        match row.state {
            VmState::Starting | VmState::Running => {
                self.ask(&row, &Request::Ready).await?;
                self.ask(&row, &Request::Snapshot { name: name.clone(), into: None }).await?;
            }
            VmState::Paused => return Err(denied(&row, "snapshotted", "it is paused; resume it")),
            VmState::Stopping => return Err(denied(&row, "snapshotted", "it is being stopped")),
            VmState::Created | VmState::Stopped | VmState::Failed => {
                let (_held, row) = self.hold_at_rest(&row).await?;
                if !dir.file(DISK).exists() {
                    return Err(denied(&row, "snapshotted", "it has never been started"));
                }
                let unfinished = Unfinished::begin(&dir, &dir, name)?;
                unfinished.copy_disk(&dir)?;
                unfinished.publish(&Record::now(None))?;
            }
        }
        let info = snapshot::info(&dir, vm, name)?;
        self.store().announce_snapshot(&row, name, info.created_at)?;
        Ok(info)
    }

    /// A VM's snapshots, the oldest first.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub fn snapshot_list(&self, vm: &VmName) -> Result<SnapshotList> {
        let row = self.store().vm_by_name(vm)?;
        let snapshots = snapshot::list(&self.vm_dir(&row.id), vm)?;
        for found in &snapshots {
            self.store().announce_snapshot(&row, &found.name, found.created_at)?;
        }
        Ok(SnapshotList { snapshots })
    }

    /// Deletes a snapshot; how it was is the answer. The VM may run meanwhile.
    ///
    /// # Errors
    /// `vm_not_found`, `snapshot_not_found`.
    pub fn snapshot_delete(&self, vm: &VmName, name: &SnapshotName) -> Result<SnapshotInfo> {
        let row = self.store().vm_by_name(vm)?;
        let dir = self.vm_dir(&row.id);
        let info = snapshot::info(&dir, vm, name)?;
        snapshot::delete(&dir, vm, name)?;
        Ok(info)
    }

    /// Makes a VM what it was. One that runs is ended for it; what it has done since is lost. Of a snapshot with memory the VM
    /// goes on where it was, with the time, the random numbers and the token of now.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_replaced`, `snapshot_not_found`, `template_mismatch` if this host cannot load it, `spec_invalid` for an
    /// ephemeral VM that runs, and those of a start.
    pub async fn snapshot_restore(
        &self,
        vm: impl Into<Which<'_>>,
        name: &SnapshotName,
        request: RestoreRequest,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<VmInfo> {
        let asked_at = Instant::now();
        let which = vm.into();
        let vm = which.name;
        let row = self.store().vm_by_name(vm)?;
        which.is(&row.id)?;
        let dir = self.vm_dir(&row.id);
        let record = snapshot::open(&dir, vm, name)?;
        let saved = record.running.filter(|_| !request.disk_only);
        if let Some(saved) = &saved {
            self.check_loadable(&row, name, saved).await?;
        }
        if !row.state.at_rest() {
            if row.spec.ephemeral {
                let words = format!("VM '{vm}' is ephemeral: it vanishes when it stops");
                return Err(Error::new(Code::SpecInvalid, words).hint("a VM that shall be restored is not ephemeral"));
            }
            self.stop_row(&row, StopRequest { force: true, ..StopRequest::default() }).await?;
        }
        let (held, row) = self.hold_at_rest(&row).await?;
        progress(StartStage::Preparing);
        snapshot::take_back_disk(&dir, name)?;
        let Some(saved) = saved else {
            let update = VmUpdate {
                state: Some(VmState::Stopped),
                failure: Some(None),
                restored: Some(name.clone()),
                ..VmUpdate::default()
            };
            self.store().update_vm(&row.id, &update)?;
            return self.describe_current(&row);
        };
        let start = StartRequest { wait: true, timeout_ms: request.timeout_ms, path: PathChoice::Auto };
        self.store().update_vm(&row.id, &VmUpdate { state: Some(VmState::Starting), ..VmUpdate::default() })?;
        let origin = Origin::Restore { snapshot: name.clone(), token: saved.token };
        if let Err(error) = self.launch_from(&row, held, start, asked_at, Some(origin)).await {
            self.store().update_vm(&row.id, &VmUpdate { state: Some(VmState::Stopped), ..VmUpdate::default() })?;
            return Err(error);
        }
        self.await_start(&row, start, progress).await
    }

    async fn check_loadable(&self, row: &VmRow, name: &SnapshotName, saved: &snapshot::Running) -> Result<()> {
        let (host, qemu) = self.host_facts().await?;
        let request = super::create::machine_request(&row.spec, row.disk_bytes, *crate::machine::GUEST_CIDS.start());
        let machine = crate::machine::decide(&request, &host, &qemu)?;
        let wanted = crate::bake::shape(&machine, &host);
        crate::bake::fits((&saved.machine, &saved.qemu), &wanted, &crate::bake::qemu_id(&qemu)).map_err(|unfit| {
            let words = format!("snapshot '{name}' of VM '{}' cannot be loaded here: {}", row.spec.name, unfit.why());
            Error::new(Code::TemplateMismatch, words).hint("with --disk-only its disk is restored")
        })
    }

    /// Locks this very VM at rest, whatever has its name meanwhile.
    pub(super) async fn hold_at_rest(&self, row: &VmRow) -> Result<(Held, VmRow)> {
        let name = &row.spec.name;
        let lock = self.vm_dir(&row.id).file(SUPERVISOR_LOCK);
        let gone = || Error::new(Code::VmNotFound, format!("VM '{name}' is gone: it was deleted meanwhile"));
        let held = Held::take(&lock, Instant::now() + LET_GO).await.map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => gone(),
            _ => Error::io("cannot lock the VM", e),
        })?;
        let busy = || Error::new(Code::VmBusy, format!("VM '{name}' is held by another nido process"));
        let held = held.ok_or_else(busy)?;
        let row = self.store().vm_by_id(&row.id)?.ok_or_else(gone)?;
        if row.state.at_rest() { Ok((held, row)) } else { Err(busy()) }
    }
}
