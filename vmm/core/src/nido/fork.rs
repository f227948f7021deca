//! Copies of a running VM, which keeps running.
//!
//! ```text
//!  snapshot of the VM - loaded once, with its memory in a file - saved as a warm image - each copy is forked from it
//! ```
//!
//! The snapshot becomes the bake's own and goes with it; the bake's parts stay as long as a copy needs them.

use std::time::Instant;

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::name::{SnapshotName, VmName};
use nido_api::restart::RestartPolicy;
use nido_api::state::VmState;
use nido_api::{ForkResult, Grant, Limits, PathChoice, StartRequest, StartStage, VmInfo, VmRef, VmSpec};
use nido_engine::home::NAME_PINS;
use nido_engine::snapshot;
use nido_files::atomic_file::{Durability, write_private};
use nido_files::lock::HeldLock;
use nido_files::random;
use nido_store::{BootParts, Origin, Purpose, StoredBake, VmRow};
use nido_supervisor::control::Request;

use super::Nido;
use super::bake::{ABANDONED_VM_TTL_MS, frozen, saved};
use super::denied::denied;
use super::secrets::check_secrets;

/// A snapshot of a running VM that is not among its snapshots: it is in the directory of a hidden VM, which is deleted
/// when no process holds its lock any more. So a killed command leaves nothing.
pub(super) struct HiddenSnapshot {
    /// The VM that has it.
    pub row: VmRow,
    /// Its lock.
    pub held: HeldLock,
    /// The snapshot's name there.
    pub name: SnapshotName,
}

/// What copies of a running VM are made from.
struct CopiedGuest {
    parts: BootParts,
    origin: Origin,
    /// What the guest has resolved, as it is stored.
    pins: Option<Vec<u8>>,
    /// For how long the VM was paused.
    paused_ms: Option<u64>,
}

/// Which secrets the copies of a VM use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForkSecrets {
    /// None.
    None,
    /// Those of the VM.
    Same,
}

impl Nido {
    /// Creates copies of a running VM under new names: the same memory, disk and processes, each with its own identity. Ports are not
    /// published for them. Either all copies are ready, or none exists.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_not_running`, `vm_exists`, `limit_exceeded` or `denied` by the grant, those of a snapshot and of a start.
    pub async fn fork(
        &self,
        vm: impl Into<VmRef<'_>>,
        copies: &[VmName],
        grant: &Grant,
        progress: &mut (dyn FnMut(&VmName, StartStage) + Send),
    ) -> Result<ForkResult> {
        self.fork_with(vm, copies, ForkSecrets::None, grant, progress).await
    }

    /// The same; the copies use the secrets of the VM if that is requested.
    ///
    /// # Errors
    /// As [`Self::fork`].
    pub async fn fork_with(
        &self,
        vm: impl Into<VmRef<'_>>,
        copies: &[VmName],
        secrets: ForkSecrets,
        grant: &Grant,
        progress: &mut (dyn FnMut(&VmName, StartStage) + Send),
    ) -> Result<ForkResult> {
        let which = vm.into();
        let vm = which.name;
        let row = self.resolve(which)?;
        self.check_fork(&row, copies, &grant.limits)?;
        progress(vm, StartStage::Preparing);
        let mut source = row;
        match secrets {
            ForkSecrets::None => {
                source.spec.secrets.clear();
                source.spec.secret_env.clear();
            }
            ForkSecrets::Same => check_secrets(&source.spec, grant)?,
        }
        let forked = self.fork_row(&source, copies, grant, progress).await;
        // The parts that no copy needs any more.
        self.remove_unowned_parts_if_due().await;
        let (copies, paused_ms) = forked?;
        Ok(ForkResult { vm: vm.clone(), copies, paused_ms })
    }

    /// Whether a VM can be copied under these names.
    pub(super) fn check_fork(&self, row: &VmRow, copies: &[VmName], limits: &Limits) -> Result<()> {
        if !matches!(row.state, VmState::Running | VmState::Paused) {
            return Err(denied(row, "forked", "it is not running"));
        }
        if copies.is_empty() {
            return Err(Error::new(Code::SpecInvalid, "the name of a copy is missing")
                .hint(Hint::command_line("nido fork VM NEW...")));
        }
        for (number, copy) in copies.iter().enumerate() {
            if copies[..number].contains(copy) {
                return Err(Error::new(Code::SpecInvalid, format!("'{copy}' is named twice")));
            }
            if self.store().vm_by_name(copy).is_ok() {
                return Err(Error::new(Code::VmExists, format!("a VM named '{copy}' exists already")));
            }
        }
        let copy = VmSpec { forwards: Vec::new(), ..row.spec.clone() };
        limits.check(&copy, row.disk_bytes)
    }

    /// Creates all copies, or none, and reports for how long the VM was paused. The copies belong to a lease of this operation until all are ready: a process that is killed before, or
    /// drops this future, leaves none.
    async fn fork_row(
        &self,
        row: &VmRow,
        copies: &[VmName],
        grant: &Grant,
        progress: &mut (dyn FnMut(&VmName, StartStage) + Send),
    ) -> Result<(Vec<VmInfo>, Option<u64>)> {
        let _parts_stay = self.templates_shared().await?;
        let operation = self.lease_open()?;
        nido_files::failpoint!("fork.leased");
        let making = async {
            let CopiedGuest { parts, origin, pins, paused_ms } = self.bake_running(row, progress).await?;
            nido_files::failpoint!("fork.baked");
            let mut made = Vec::new();
            for copy in copies {
                let copy = VmRow { made_by: Some(operation.id().clone()), ..copy_of(row, copy, parts.clone())? };
                made.push(self.start_copy(copy, (origin.clone(), pins.as_deref()), grant, progress).await?);
            }
            nido_files::failpoint!("fork.copied");
            self.store().keep_vms_made_by(operation.id(), copies.len())?;
            nido_files::failpoint!("fork.kept");
            Ok((made, paused_ms))
        };
        let made = making.await;
        if made.is_err() {
            let begun = self.store().vms_made_by(operation.id())?;
            for copy in begun {
                if let Err(left) = self.delete_id(&copy.id).await {
                    tracing::warn!("VM {} could not be deleted: {left}", copy.spec.name);
                }
            }
        }
        made
    }

    /// Saves a running VM as a warm image; reports for how long the VM was paused.
    async fn bake_running(
        &self,
        source: &VmRow,
        progress: &mut (dyn FnMut(&VmName, StartStage) + Send),
    ) -> Result<CopiedGuest> {
        let vm = &source.spec.name;
        let HiddenSnapshot { row, held, name } = self.take_hidden_snapshot(source).await?;
        nido_files::failpoint!("fork.saved");
        let dir = self.vm_dir(&row.id);
        let pins = snapshot::kept_pins(&dir, &name);
        let taken = snapshot::open(&dir, vm, &name).and_then(|record| {
            snapshot::DiskCopy::take(&dir, &name)?.put_in_place()?.remove();
            let token = record.running.map(|running| running.token);
            let token = token.ok_or_else(|| Error::internal("a snapshot of a running VM without memory"))?;
            Ok((token, record.paused_ms))
        });
        let (token, paused_ms) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                self.context.erase(&row.id)?;
                return Err(error);
            }
        };
        let from = Some(Origin::Restore { snapshot: name, token });
        let bake = self.await_bake(&row, held, None, from, &mut |stage| progress(vm, stage)).await?;
        let mut parts = source.parts.clone();
        parts.frozen.push(frozen(&bake));
        let origin = Origin::Fork(StoredBake { live: true, ..saved(&bake) });
        Ok(CopiedGuest { parts, origin, pins, paused_ms })
    }

    /// Takes a snapshot of a running VM that is not among its snapshots.
    pub(super) async fn take_hidden_snapshot(&self, source: &VmRow) -> Result<HiddenSnapshot> {
        let spec = VmSpec {
            name: random::vm_name("bake")?,
            ephemeral: true,
            idle_ms: Some(ABANDONED_VM_TTL_MS),
            ttl_ms: None,
            forwards: Vec::new(),
            lease: None,
            restart: RestartPolicy::No,
            ..source.spec.clone()
        };
        let (id, disk_bytes) = (random::id()?, source.disk_bytes);
        let row = VmRow::new(id, spec, Purpose::Bake, VmState::Starting, source.parts.clone(), disk_bytes);
        let (row, held) = self.insert(row, &Grant::own()).await?;
        let name: SnapshotName = "aside".parse()?;
        nido_files::failpoint!("fork.hidden-made");
        let taken = async {
            self.request(source, &Request::Ready).await?;
            self.request(source, &Request::Snapshot { name: name.clone(), into: Some(row.id.clone()) }).await
        };
        match taken.await {
            Ok(_) => Ok(HiddenSnapshot { row, held, name }),
            Err(error) => {
                self.context.erase(&row.id)?;
                Err(error)
            }
        }
    }

    async fn start_copy(
        &self,
        copy: VmRow,
        (origin, pins): (Origin, Option<&[u8]>),
        grant: &Grant,
        progress: &mut (dyn FnMut(&VmName, StartStage) + Send),
    ) -> Result<VmInfo> {
        let asked_at = Instant::now();
        let (row, held) = self.insert(copy, grant).await?;
        if let Some(pins) = pins {
            let path = self.vm_dir(&row.id).file(NAME_PINS);
            write_private(&path, pins, Durability::Kill).map_err(|e| Error::io("cannot prepare the copy", e))?;
        }
        let start = StartRequest { wait: true, timeout_ms: None, path: PathChoice::Fork, ..StartRequest::default() };
        Box::pin(self.launch_from(&row, held, start, asked_at, Some(origin))).await?;
        self.await_start(&row, start, &mut |stage| progress(&row.spec.name, stage)).await
    }
}

/// A copy of a VM, before it is started.
fn copy_of(source: &VmRow, name: &VmName, parts: BootParts) -> Result<VmRow> {
    let spec = VmSpec { name: name.clone(), forwards: Vec::new(), ..source.spec.clone() };
    Ok(VmRow::new(random::id()?, spec, Purpose::Use, VmState::Starting, parts, source.disk_bytes))
}
