//! Copies of a running VM, which runs on.
//!
//! ```text
//!  snapshot of the VM - loaded once, with its memory in a file - baked - each copy goes on from the bake, renewed
//! ```
//!
//! The snapshot becomes the bake's own and goes with it; the bake's parts stay as long as a copy needs them.

use std::time::Instant;

use super::Nido;
use super::bake::{FORSAKEN_MS, frozen, random_name, saved};
use super::lifecycle::denied;
use crate::api::{ForkResult, PathChoice, StartRequest, StartStage, VmSpec};
use crate::error::{Code, Error, Result};
use crate::lock::Held;
use crate::name::{SnapshotName, VmName};
use crate::snapshot;
use crate::state::VmState;
use crate::store::{BootParts, Origin, Purpose, VmRow};
use crate::supervisor::control::Request;

/// A snapshot of a running VM that is not among its snapshots: it lies in the directory of a VM of its own, which vanishes
/// when nobody holds it any more. So nothing stays behind of a command that is killed.
pub(super) struct Aside {
    /// The VM that has it.
    pub row: VmRow,
    /// Its lock.
    pub held: Held,
    /// The snapshot's name there.
    pub name: SnapshotName,
}

impl Nido {
    /// Makes copies of a running VM under new names: the same memory, disk and processes, each renewed. Ports are not
    /// published for them. Either all copies are ready, or there is none.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_not_running`, `vm_exists`, those of a snapshot and of a start.
    pub async fn fork(
        &self,
        vm: &VmName,
        copies: &[VmName],
        progress: &mut (dyn FnMut(&VmName, StartStage) + Send),
    ) -> Result<ForkResult> {
        let row = self.store().vm_by_name(vm)?;
        if row.state != VmState::Running {
            return Err(denied(&row, "forked", "it is not running"));
        }
        if copies.is_empty() {
            return Err(Error::new(Code::SpecInvalid, "no copy is named").hint("nido fork VM NEW..."));
        }
        for (number, copy) in copies.iter().enumerate() {
            if copies[..number].contains(copy) {
                return Err(Error::new(Code::SpecInvalid, format!("'{copy}' is named twice")));
            }
            if self.store().vm_by_name(copy).is_ok() {
                return Err(Error::new(Code::VmExists, format!("a VM named '{copy}' exists already")));
            }
        }
        progress(vm, StartStage::Preparing);
        let _parts_stay = self.templates_shared().await?;
        let (parts, origin) = self.bake_running(&row, progress).await?;
        let mut made = Vec::new();
        for copy in copies {
            match self.start_copy(&row, copy, parts.clone(), origin.clone(), progress).await {
                Ok(info) => made.push(info),
                Err(error) => {
                    for vm in &made {
                        let _ = self.delete(&vm.name, true).await;
                    }
                    return Err(error);
                }
            }
        }
        Ok(ForkResult { vm: vm.clone(), copies: made })
    }

    /// Saves a running VM so that others can go on from it.
    async fn bake_running(
        &self,
        source: &VmRow,
        progress: &mut (dyn FnMut(&VmName, StartStage) + Send),
    ) -> Result<(BootParts, Origin)> {
        let vm = &source.spec.name;
        let Aside { row, held, name } = self.snapshot_aside(source).await?;
        let dir = self.vm_dir(&row.id);
        let token = snapshot::open(&dir, vm, &name).and_then(|record| {
            snapshot::take_back_disk(&dir, &name)?;
            let token = record.running.map(|running| running.token);
            token.ok_or_else(|| Error::internal("a snapshot of a running VM without memory"))
        });
        let token = match token {
            Ok(token) => token,
            Err(error) => {
                self.erase(&row.id)?;
                return Err(error);
            }
        };
        let from = Some(Origin::Restore { snapshot: name, token });
        let bake = self.await_bake(&row, held, None, from, &mut |stage| progress(vm, stage)).await?;
        let mut parts = source.parts.clone();
        parts.frozen.push(frozen(&bake));
        Ok((parts, Origin::Fork(saved(&bake))))
    }

    /// Takes a snapshot of a running VM that is not among its snapshots.
    pub(super) async fn snapshot_aside(&self, source: &VmRow) -> Result<Aside> {
        let spec = VmSpec {
            name: random_name("bake")?,
            ephemeral: true,
            idle_ms: Some(FORSAKEN_MS),
            ttl_ms: None,
            forwards: Vec::new(),
            lease: None,
            ..source.spec.clone()
        };
        let (id, disk_bytes) = (super::new_id()?, source.disk_bytes);
        let row = VmRow::new(id, spec, Purpose::Bake, VmState::Starting, source.parts.clone(), disk_bytes);
        let (row, held) = self.insert(row).await?;
        let name: SnapshotName = "aside".parse()?;
        let taken = async {
            self.ask(source, &Request::Ready).await?;
            self.ask(source, &Request::Snapshot { name: name.clone(), into: Some(row.id.clone()) }).await
        };
        match taken.await {
            Ok(_) => Ok(Aside { row, held, name }),
            Err(error) => {
                self.erase(&row.id)?;
                Err(error)
            }
        }
    }

    async fn start_copy(
        &self,
        source: &VmRow,
        name: &VmName,
        parts: BootParts,
        origin: Origin,
        progress: &mut (dyn FnMut(&VmName, StartStage) + Send),
    ) -> Result<crate::api::VmInfo> {
        let asked_at = Instant::now();
        let spec = VmSpec { name: name.clone(), forwards: Vec::new(), ..source.spec.clone() };
        let (id, disk_bytes) = (super::new_id()?, source.disk_bytes);
        let row = VmRow::new(id, spec, Purpose::Use, VmState::Starting, parts, disk_bytes);
        let (row, held) = self.insert(row).await?;
        let start = StartRequest { wait: true, timeout_ms: None, path: PathChoice::Fork };
        let outcome = match self.launch_from(&row, held, start, asked_at, Some(origin)).await {
            Ok(()) => self.await_start(&row, start, &mut |stage| progress(name, stage)).await,
            Err(error) => Err(error),
        };
        if outcome.is_err()
            && let Err(left) = self.delete(name, true).await
            && left.code() != Code::VmNotFound
        {
            tracing::warn!("VM {name} could not be removed: {left}");
        }
        outcome
    }
}
