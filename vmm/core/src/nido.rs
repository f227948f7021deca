//! `Nido`: the core API, one method per operation. Every front end calls these and nothing else.
//!
//! The methods are spread over `nido/*.rs` by noun; this file opens a home and holds what they share.
//!
//! Invariant: a command that changes or starts a stopped VM holds its `supervisor.lock`, and passes the lock to the supervisor
//! with the start. So a killed command leaves either nothing, or a VM whose row is correct once the next command has
//! reconciled it (`nido/reconcile.rs`).

mod approvals;
mod audit;
mod audit_events;
mod bake;
mod claim;
mod create;
mod delete;
mod delivery;
mod delivery_worker;
mod denied;
mod doctor;
mod events;
mod exec;
pub mod execute;
mod files;
mod fork;
mod forwards;
mod guardian;
mod idempotency;
mod jobs;
mod leases;
mod lifecycle;
mod list;
mod logs;
mod network;
mod own_agent;
mod pool;
mod presets;
mod rebuild;
mod receipt;
mod reconcile;
mod restart_policy;
mod run;
mod secrets;
mod snapshots;
mod supervise;
mod supervisor_client;
mod template_archive;
mod template_store;
mod templates;
mod tokens;
mod vm_in_progress;
mod webhooks;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use events::{EventFeed, Watch};
pub use exec::{ExecControl, ExecEvents};
pub use fork::ForkSecrets;
pub use leases::Lease;
pub use list::Intent;
pub use logs::LogStream;
pub use rebuild::{RebuildReport, RestoredRows, RestoredVm, SkippedDirectory};
pub use reconcile::Adoption;
pub use run::RUN_IDLE_MS;
pub use vm_in_progress::VmInProgress;

use nido_api::VmRef;
use nido_api::error::{Code, Error, Result};
use nido_engine::home::{Home, VmDir};
use nido_engine::host::{HostFacts, QemuFacts, facts, qemu};
use nido_engine::liveness::LivenessLock;
use nido_engine::space_reserve::SpaceReserve;
use nido_files::lock::HeldLock;
use nido_store::VmRow;
pub use nido_supervisor::context::OpenOptions;
use nido_supervisor::context::{Context, StoreGuard};

use tokio::sync::Notify;

use crate::audit::log::Log;
use crate::audit::repeats::Repeats;

/// How old the last backup of the store is when another one is made.
const BACKUP_INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// The core API over one home. Clones are the same: they share the home, its locks and what is counted.
#[derive(Debug, Clone)]
pub struct Nido {
    context: Arc<Context>,
    /// The liveness lock of this process, once it is needed.
    liveness_lock: Arc<Mutex<Option<LivenessLock>>>,
    /// What this process was asked to show, for the audit log.
    reads: Arc<Repeats>,
    /// Notified when this process requests the cancellation of a job.
    job_cancelled: Arc<Notify>,
}

impl Nido {
    /// Opens (and creates, the first time) a home. Also reconciles what killed processes left.
    ///
    /// # Errors
    /// `denied` if the home belongs to another user, `permission_denied`, `read_only`, `disk_full`, `internal`.
    pub async fn open(options: OpenOptions) -> Result<Self> {
        let nido = Self::open_unreconciled(options)?;
        if !nido.is_read_only() {
            nido.reconcile().await?;
            if !nido.context.frees_space() {
                SpaceReserve::of(nido.home()).keep();
            }
            nido.resume_deliveries();
        }
        Ok(nido)
    }

    /// Opens a home and leaves everything as it is: for supervisors.
    pub(crate) fn open_unreconciled(options: OpenOptions) -> Result<Self> {
        let context = Arc::new(Context::open(options)?);
        let reads = Arc::new(Repeats::new(Log::reads(context.home().audit())));
        Ok(Self { context, liveness_lock: Arc::default(), reads, job_cancelled: Arc::default() })
    }

    /// Whether the home could only be opened for reading. What writes fails as `read_only` then.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.context.is_read_only()
    }

    /// Where everything is kept.
    #[must_use]
    pub fn home(&self) -> &Home {
        self.context.home()
    }

    /// What commands share with supervisors.
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The store, until the guard is dropped.
    pub(crate) fn store(&self) -> StoreGuard<'_> {
        self.context.store()
    }

    /// Starts a delivery worker for deliveries that other processes have queued: for a process that keeps a home open for long.
    pub fn resume_deliveries(&self) {
        self.context.resume_deliveries();
    }

    /// Warnings about the home that was opened: a store that was recreated, and VMs that it does not list. They are repeated until
    /// it lists all.
    #[must_use]
    pub fn notice(&self) -> Option<String> {
        if self.store().is_complete().unwrap_or(true) {
            return None;
        }
        let unknown = self.unknown_vms().ok()?;
        if unknown.is_empty() {
            // Otherwise the next command looks again.
            let _ = self.store().set_complete();
            return None;
        }
        Some(lost_store(unknown.len(), self.home().root()))
    }

    /// Makes a backup of the store if the last one is a day old. Not while there are VMs that the store does not know: then an
    /// older backup may be the only one that does.
    fn back_up_store(&self) {
        let [last, older] = self.home().database_backups();
        let is_due = match std::fs::metadata(&last).and_then(|meta| meta.modified()) {
            Ok(made) => made.elapsed().map_or(true, |age| age > BACKUP_INTERVAL),
            Err(_) => self.store().vm_ids().is_ok_and(|ids| !ids.is_empty()),
        };
        if !is_due || self.unknown_vms().map_or(true, |unknown| !unknown.is_empty()) {
            return;
        }
        let Ok(Some(_held)) = HeldLock::try_take(&self.home().backup_lock()) else { return };
        if let Err(error) = self.store().back_up(&last, &older) {
            tracing::warn!("the store was not backed up: {error}");
        }
    }

    /// The row of the VM that a caller refers to.
    fn resolve(&self, vm: VmRef<'_>) -> Result<VmRow> {
        let row = self.store().vm_by_name(vm.name)?;
        vm.check(&row.id)?;
        Ok(row)
    }

    /// The same, also if the row cannot be read whole.
    fn resolve_to_show(&self, vm: VmRef<'_>) -> Result<VmRow> {
        let row = self.store().vm_to_show(vm.name)?;
        vm.check(&row.id)?;
        Ok(row)
    }

    pub(crate) fn vm_dir(&self, id: &str) -> VmDir {
        self.context.vm_dir(id)
    }

    /// What the host and its QEMU offer.
    async fn host_facts(&self) -> Result<(HostFacts, QemuFacts)> {
        let (cache, named) = (self.home().cache(), self.context.qemu().map(Path::to_owned));
        // Both may run programs the first time after a boot or an upgrade.
        let gathered = tokio::task::spawn_blocking(move || {
            let program = qemu::find(named.as_deref())?;
            let qemu = qemu::probe(&program, &cache)?;
            Ok::<_, Error>((facts::gather(&cache), qemu))
        });
        gathered.await.map_err(|e| Error::internal(format!("the host could not be checked: {e}")))?
    }
}

/// The sentence about a store that does not know VMs whose files are there.
pub(crate) fn lost_store(count: usize, root: &Path) -> String {
    let root = root.display();
    format!(
        "{root}/vms holds {count} VMs that the store {root}/nido.db does not know: it was lost, replaced or emptied; \
         nido doctor --adopt brings them back"
    )
}

/// The error for a VM that another command deleted while this one was working on it.
fn gone_meanwhile(name: &nido_api::name::VmName) -> Error {
    Error::new(Code::VmNotFound, format!("VM '{name}' was deleted meanwhile"))
}

/// Servers call the API from several threads.
#[cfg(test)]
mod tests {
    use super::*;

    fn send<T: Send>(_: &T) {}

    #[test]
    fn every_operation_can_wander_between_threads() {
        let check = |nido: &Nido, name: &nido_api::name::VmName| {
            let mut stage = |_: nido_api::StartStage| ();
            let mut stages = |_: &nido_api::name::VmName, _: nido_api::StartStage| ();
            let spec = nido_api::VmSpec::named(name.clone());
            let grant = &nido_api::Grant::own();
            send(&nido.spawn(spec.clone(), nido_api::StartRequest::default(), grant, &mut stage));
            send(&nido.create(spec, grant));
            send(&nido.start(name, nido_api::StartRequest::default(), &mut stage));
            send(&nido.stop(name, nido_api::StopRequest::default()));
            send(&nido.delete(name, true));
            send(&nido.info(name));
            send(&nido.lease_end(nido.lease_open().unwrap()));
            send(&nido.fork(name, &[], grant, &mut stages));
            let snapshot = "s".parse().unwrap();
            send(&nido.snapshot_create(name, &snapshot));
            send(&nido.snapshot_restore(name, &snapshot, nido_api::RestoreRequest::default(), &mut stage));
        };
        let _ = check;
        send(&Nido::open(OpenOptions::default()));
    }
}
