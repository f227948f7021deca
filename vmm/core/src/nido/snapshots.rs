//! Snapshots, as the API has them: the supervisor takes those of a running VM, this process those of a stopped one.

use std::time::Instant;

use nido_api::error::{Code, Error, Result};
use nido_api::name::SnapshotName;
use nido_api::state::VmState;
use nido_api::{RestoreRequest, SnapshotInfo, SnapshotList, StartRequest, StartStage, VmInfo, VmRef};
use nido_engine::disk_quota::DiskUsage;
use nido_engine::home::{DISK, SUPERVISOR_LOCK, VmDir};
use nido_engine::snapshot::{self, DiskCopy, PendingSnapshot, PreviousDisk, Record};
use nido_files::lock::HeldLock;
use nido_store::{Origin, Transition, VmRow};
use nido_supervisor::control::Request;

use super::Nido;
use super::denied::denied;
use super::lifecycle::LOCK_TIMEOUT;

/// Whether a VM may be what it was in a snapshot.
pub(super) fn check(row: &VmRow, dir: &VmDir, name: &SnapshotName) -> Result<()> {
    snapshot::info(dir, &row.spec.name, name).map(drop)
}

impl Nido {
    /// Takes a snapshot: of a running VM memory, devices and disk, of a stopped one the disk.
    ///
    /// # Errors
    /// `vm_not_found`, `snapshot_exists`, `vm_busy`, `vm_not_running` if it never ran, `agent_unreachable`, `disk_full`.
    pub async fn snapshot_create(&self, vm: impl Into<VmRef<'_>>, name: &SnapshotName) -> Result<SnapshotInfo> {
        let which = vm.into();
        let vm = which.name;
        let row = self.resolve(which)?;
        let dir = self.vm_dir(&row.id);
        match row.state {
            VmState::Starting | VmState::Running | VmState::Paused => {
                self.request(&row, &Request::Ready).await?;
                self.request(&row, &Request::Snapshot { name: name.clone(), into: None }).await?;
            }
            VmState::Stopping => return Err(denied(&row, "snapshotted", "it is being stopped")),
            VmState::Unknown => return Err(denied(&row, "snapshotted", "its row in the store cannot be read")),
            VmState::Created | VmState::Stopped | VmState::Failed => {
                let (_held, row) = self.lock_stopped(&row).await?;
                if !dir.file(DISK).exists() {
                    return Err(denied(&row, "snapshotted", "it has never been started"));
                }
                self.check_snapshot_quota(&row, &dir)?;
                let unfinished = PendingSnapshot::begin(&dir, &dir, name)?;
                nido_files::failpoint!("snapshot.begun");
                unfinished.copy_disk(&dir)?;
                unfinished.publish(&Record::now(None))?;
            }
        }
        nido_files::failpoint!("snapshot.published");
        let info = snapshot::info(&dir, vm, name)?;
        self.store().announce_snapshot(&row, name, info.created_at)?;
        Ok(info)
    }

    /// Refuses a snapshot of a stopped VM that does not fit into its disk quota.
    fn check_snapshot_quota(&self, row: &VmRow, dir: &VmDir) -> Result<()> {
        let Some(quota) = row.spec.disk_quota_bytes else { return Ok(()) };
        let usage = DiskUsage::of(dir).map_err(|e| Error::io("cannot read the VM's directory", e))?;
        let Err(refused) = usage.check_snapshot(quota, row.spec.name.as_str(), usage.layer) else { return Ok(()) };
        let (error, hit) = *refused;
        self.store()
            .transition(&row.id, &Transition::LimitHit(Box::new(hit)))?
            .log(&row.id, "a limit that was reached");
        Err(error)
    }

    /// A VM's snapshots, the oldest first.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub fn snapshot_list<'a>(&self, vm: impl Into<VmRef<'a>>) -> Result<SnapshotList> {
        let vm = vm.into();
        let (row, vm) = (self.resolve(vm)?, vm.name);
        let snapshots = snapshot::list(&self.vm_dir(&row.id), vm)?;
        for found in snapshots.iter().filter(|found| found.damaged.is_none()) {
            self.store().announce_snapshot(&row, &found.name, found.created_at)?;
        }
        Ok(SnapshotList { snapshots })
    }

    /// Deletes a snapshot; how it was is the answer. The VM may run meanwhile.
    ///
    /// # Errors
    /// `vm_not_found`, `snapshot_not_found`.
    pub fn snapshot_delete<'a>(&self, vm: impl Into<VmRef<'a>>, name: &SnapshotName) -> Result<SnapshotInfo> {
        let vm = vm.into();
        let (row, vm) = (self.resolve(vm)?, vm.name);
        let dir = self.vm_dir(&row.id);
        // A damaged one, too.
        let found = snapshot::list(&dir, vm)?.into_iter().find(|found| found.name == *name);
        snapshot::delete(&dir, vm, name)?;
        nido_files::failpoint!("snapshot.deleted");
        found.ok_or_else(|| Error::internal(format!("snapshot '{name}' appeared while it was deleted")))
    }

    /// Makes a VM what it was. One that runs is ended for it, once the snapshot's disk lies beside its own; what it has done since
    /// is lost. If the start fails, it has the disk from before. Of a snapshot with memory the VM
    /// resumes where it was, with new time, random numbers and token.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_replaced`, `snapshot_not_found`, `template_mismatch` if this host cannot load it, `spec_invalid` for an
    /// ephemeral VM that runs, and those of a start.
    pub async fn snapshot_restore(
        &self,
        vm: impl Into<VmRef<'_>>,
        name: &SnapshotName,
        request: RestoreRequest,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<VmInfo> {
        let asked_at = Instant::now();
        let which = vm.into();
        let vm = which.name;
        let row = self.resolve(which)?;
        let dir = self.vm_dir(&row.id);
        let record = snapshot::open(&dir, vm, name)?;
        let saved = record.running.filter(|_| !request.disk_only);
        if let Some(saved) = &saved {
            self.check_loadable(&row, name, saved).await?;
        }
        progress(StartStage::Preparing);
        // While it still runs: what fails here costs nothing.
        let copy = copy_of(&dir, name).await?;
        nido_files::failpoint!("restore.copied");
        if !row.state.is_inactive() {
            self.stop_to_restore(&row).await?;
        }
        nido_files::failpoint!("restore.stopped");
        let (held, row) = self.lock_stopped(&row).await?;
        let previous = copy.put_in_place()?;
        nido_files::failpoint!("restore.placed");
        let restored = match saved {
            None => self.restored_disk(&row, name),
            Some(saved) => {
                let origin = Origin::Restore { snapshot: name.clone(), token: saved.token };
                let start = StartRequest { wait: true, timeout_ms: request.timeout_ms, ..StartRequest::default() };
                self.start_restored(&row, held, start, (origin, asked_at), progress).await
            }
        };
        nido_files::failpoint!("restore.started");
        match &restored {
            Ok(_) => previous.remove(),
            Err(_) => self.undo_restore(&row, &previous).await,
        }
        restored
    }

    /// Records that a VM's disk is that of a snapshot.
    fn restored_disk(&self, row: &VmRow, name: &SnapshotName) -> Result<VmInfo> {
        let restored = Transition::DiskRestored { snapshot: name.clone(), to: stopped_state(row) };
        self.store().transition(&row.id, &restored)?.log(&row.id, "the restored disk");
        self.describe_current(row)
    }

    /// Starts a VM whose disk is that of a snapshot, with the snapshot's memory.
    async fn start_restored(
        &self,
        row: &VmRow,
        held: HeldLock,
        start: StartRequest,
        (origin, asked_at): (Origin, Instant),
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<VmInfo> {
        self.begin_start(row)?;
        if let Err(error) = Box::pin(self.launch_from(row, held, start, asked_at, Some(origin))).await {
            self.give_up_start(row, stopped_state(row));
            return Err(error);
        }
        self.await_start(row, start, progress).await
    }

    /// Gives a VM the disk back that it had before a restore that failed. If the VM runs in spite of the error, or cannot be
    /// locked, it keeps the snapshot's.
    async fn undo_restore(&self, row: &VmRow, previous: &PreviousDisk) {
        let undone = async {
            let (_held, _) = self.lock_stopped(row).await?;
            previous.put_back()
        };
        if let Err(error) = undone.await {
            tracing::warn!("VM {} keeps the disk of the snapshot: {error}", row.spec.name);
        }
    }

    /// Stops a VM that stays, also if it is ephemeral.
    async fn stop_to_restore(&self, row: &VmRow) -> Result<()> {
        match self.request(row, &Request::StopKept).await {
            // It may have ended by itself before it could be asked.
            Err(error) if self.store().vm_by_id(&row.id)?.is_some_and(|now| !now.state.is_inactive()) => Err(error),
            _ => Ok(()),
        }
    }

    async fn check_loadable(&self, row: &VmRow, name: &SnapshotName, saved: &snapshot::RunningState) -> Result<()> {
        let (host, qemu) = self.host_facts().await?;
        let request =
            super::create::machine_request(&row.spec, row.disk_bytes, *nido_engine::machine::GUEST_CIDS.start());
        let machine = nido_engine::machine::decide(&request, &host, &qemu)?;
        let wanted = nido_engine::bake::shape(&machine, &host);
        nido_engine::bake::fits((&saved.machine, &saved.qemu), &wanted, &nido_engine::bake::qemu_id(&qemu)).map_err(
            |unfit| {
                let words =
                    format!("snapshot '{name}' of VM '{}' cannot be loaded here: {}", row.spec.name, unfit.why());
                Error::new(Code::TemplateMismatch, words).hint("restore its disk only")
            },
        )
    }

    /// Locks exactly this VM, which must be stopped, even if another one has its name meanwhile.
    pub(super) async fn lock_stopped(&self, row: &VmRow) -> Result<(HeldLock, VmRow)> {
        let name = &row.spec.name;
        let lock = self.vm_dir(&row.id).file(SUPERVISOR_LOCK);
        let gone = || super::gone_meanwhile(name);
        let held = HeldLock::take(&lock, Instant::now() + LOCK_TIMEOUT).await.map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound if matches!(self.store().vm_by_id(&row.id), Ok(Some(_))) => {
                self.files_lost(row, "used")
            }
            std::io::ErrorKind::NotFound => gone(),
            _ => Error::io("cannot lock the VM", e),
        })?;
        let busy = || Error::new(Code::VmBusy, format!("VM '{name}' is held by another nido process"));
        let held = held.ok_or_else(busy)?;
        let row = self.store().vm_by_id(&row.id)?.ok_or_else(gone)?;
        if row.state.is_inactive() { Ok((held, row)) } else { Err(busy()) }
    }
}

/// Copies a snapshot's layer on a thread of its own: it may be many gigabytes.
async fn copy_of(dir: &VmDir, name: &SnapshotName) -> Result<DiskCopy> {
    let (dir, name) = (dir.clone(), name.clone());
    let copied = tokio::task::spawn_blocking(move || DiskCopy::take(&dir, &name)).await;
    copied.map_err(|e| Error::internal(format!("the copy broke down: {e}")))?
}

/// The state of a VM whose disk was restored. An ephemeral VM that has stopped is one to be removed, by whichever process sees it
/// first; so it counts as one that was never started.
fn stopped_state(row: &VmRow) -> VmState {
    if row.spec.ephemeral { VmState::Created } else { VmState::Stopped }
}
