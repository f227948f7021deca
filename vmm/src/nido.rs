//! `Nido`: the core API, one method per operation. Every face calls these and nothing else.
//!
//! The methods are spread over `nido/*.rs` by noun; this file opens a home and holds what they share.
//!
//! Invariant: whoever changes a VM at rest, or starts it, holds its `supervisor.lock`; the lock is handed on to the
//! supervisor with the start. So a killed command leaves either nothing, or a VM whose row tells the truth once the next
//! command has settled it (`nido/settle.rs`).

mod answers;
mod approvals;
mod audit;
mod background;
mod bake;
mod claim;
mod copies;
mod create;
mod delete;
mod deliverer;
mod doctor;
mod events;
mod exec;
mod fork;
mod forwards;
mod jobs;
mod leases;
mod lifecycle;
mod list;
mod logs;
mod pool;
mod settle;
mod snapshots;
mod supervision;
mod templates;
mod tokens;
mod travel;
mod webhooks;

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

pub(crate) use create::guest_network;
pub(crate) use deliverer::StoreGuard;
pub use events::{EventFeed, Watch};
pub use exec::{ExecControl, ExecEvents};
pub use leases::Lease;
pub(crate) use lifecycle::random_cid;
pub use logs::LogStream;

use crate::error::{Code, Error, Result};
use crate::home::{Home, VmDir};
use crate::host::{HostFacts, QemuFacts, facts, qemu};
use crate::presence::Presence;
use crate::store::Store;

/// How nido is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Where everything is kept. Absent: `NIDO_HOME`, else `/var/lib/nido` for root, else `$XDG_DATA_HOME/nido`.
    pub home: Option<PathBuf>,
    /// The QEMU to use. Absent: `NIDO_QEMU`, else `qemu-system-x86_64` in `PATH`.
    pub qemu: Option<PathBuf>,
    /// The program that supervises VMs: nido's own. Absent: the running program.
    pub supervisor: Option<PathBuf>,
}

/// The core API over one home.
#[derive(Debug)]
pub struct Nido {
    home: Home,
    store: Mutex<Store>,
    options: OpenOptions,
    /// That this process lives, once somebody has to know.
    presence: Mutex<Option<Presence>>,
}

impl Nido {
    /// Opens (and makes, the first time) a home. Also settles what a crash may have left behind.
    ///
    /// # Errors
    /// `denied` if the home belongs to somebody else, `disk_full`, `internal`.
    pub async fn open(options: OpenOptions) -> Result<Self> {
        let nido = Self::open_unsettled(options)?;
        nido.settle_all().await?;
        nido.go_on_delivering();
        Ok(nido)
    }

    /// Opens a home and leaves everything as it is: for supervisors.
    pub(crate) fn open_unsettled(mut options: OpenOptions) -> Result<Self> {
        let named =
            options.home.clone().or_else(|| std::env::var_os("NIDO_HOME").filter(|v| !v.is_empty()).map(PathBuf::from));
        let home = Home::open(&named.map_or_else(Home::default_root, Ok)?)?;
        let store = Mutex::new(Store::open(&home.database())?);
        let named = options.qemu.or_else(|| std::env::var_os("NIDO_QEMU").filter(|v| !v.is_empty()).map(PathBuf::from));
        // A supervisor works in another directory: a relative path would mean another file there.
        let absolute = |p: PathBuf| if p.components().count() > 1 { std::path::absolute(&p).unwrap_or(p) } else { p };
        options.qemu = named.map(absolute);
        Ok(Self { home, store, options, presence: Mutex::default() })
    }

    /// Where everything is kept.
    #[must_use]
    pub fn home(&self) -> &Home {
        &self.home
    }

    pub(crate) fn options(&self) -> &OpenOptions {
        &self.options
    }

    /// The store, until the guard is dropped. If deliveries were queued meanwhile, that sees to it that they are sent.
    pub(crate) fn store(&self) -> StoreGuard<'_> {
        // Each method of the store is a transaction of its own: a panic in one leaves nothing half-done.
        StoreGuard::new(self, self.store.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn vm_dir(&self, id: &str) -> VmDir {
        self.home.vm(id)
    }

    /// What the host and its QEMU offer.
    async fn host_facts(&self) -> Result<(HostFacts, QemuFacts)> {
        let (cache, named) = (self.home.cache(), self.options.qemu.clone());
        // Both may run programs the first time after a boot or an upgrade.
        let gathered = tokio::task::spawn_blocking(move || {
            let program = qemu::find(named.as_deref())?;
            let qemu = qemu::probe(&program, &cache)?;
            Ok::<_, Error>((facts::gather(&cache), qemu))
        });
        gathered.await.map_err(|e| Error::internal(format!("the host could not be looked at: {e}")))?
    }

    fn supervisor_program(&self) -> Result<PathBuf> {
        self.options.supervisor.clone().map_or_else(own_program, Ok)
    }
}

/// The program that runs. One that was replaced since it was started is run as it is now.
fn own_program() -> Result<PathBuf> {
    let program = std::env::current_exe().map_err(|e| Error::io("cannot find nido's own program", e))?;
    Ok(match program.to_str().and_then(|path| path.strip_suffix(" (deleted)")) {
        Some(path) if !program.exists() => PathBuf::from(path),
        _ => program,
    })
}

/// A random id: 16 hex digits.
///
/// # Errors
/// `internal` if the system has no random numbers.
pub fn random_id() -> Result<String> {
    new_id()
}

fn new_id() -> Result<String> {
    Ok(crate::hex::encode(&random_bytes::<8>()?))
}

/// Bytes that nobody can guess.
fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| Error::new(Code::Internal, format!("no random numbers: {e}")))?;
    Ok(bytes)
}

/// Servers call the API from several threads.
#[cfg(test)]
mod tests {
    use super::*;

    fn send<T: Send>(_: &T) {}

    #[test]
    fn every_operation_can_wander_between_threads() {
        let check = |nido: &Nido, name: &crate::name::VmName| {
            let mut stage = |_: crate::api::StartStage| ();
            let mut stages = |_: &crate::name::VmName, _: crate::api::StartStage| ();
            let spec = crate::api::VmSpec::named(name.clone());
            send(&nido.spawn(spec.clone(), crate::api::StartRequest::default(), &mut stage));
            send(&nido.create(spec));
            send(&nido.start(name, crate::api::StartRequest::default(), &mut stage));
            send(&nido.stop(name, crate::api::StopRequest::default()));
            send(&nido.delete(name, true));
            send(&nido.info(name));
            send(&nido.lease_end(nido.lease_open().unwrap()));
            send(&nido.fork(name, &[], &mut stages));
            let snapshot = "s".parse().unwrap();
            send(&nido.snapshot_create(name, &snapshot));
            send(&nido.snapshot_restore(name, &snapshot, crate::api::RestoreRequest::default(), &mut stage));
        };
        let _ = check;
        send(&Nido::open(OpenOptions::default()));
    }
}
