//! What commands and supervisors share of an opened home: its paths, its store, the programs that they start, and what both of
//! them do to a VM's directory and row.
//!
//! Invariant: nothing here reconciles, and nothing here knows an operation of the core API.

mod background;
mod credentials;
mod delivery;
mod erase;
mod guardian;
mod guest_config;
mod record;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nido_api::LeaseId;
use nido_api::error::{Code, Result};
use nido_engine::home::{Home, VmDir};
use nido_engine::liveness::is_gone;
use nido_engine::space_reserve::SpaceReserve;
use nido_store::{Store, VmRow};

pub use self::background::open_log;
pub use self::delivery::StoreGuard;
pub use self::erase::remove_tree;
pub use self::guardian::{open_home, restart_unawaited, start_supervisor_unawaited};
pub use self::guest_config::{guest_network, read_token, write_guest_config};

/// How nido is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Where everything is kept. Absent: `NIDO_HOME`, else `/var/lib/nido` for root, else `$XDG_DATA_HOME/nido`.
    pub home: Option<PathBuf>,
    /// The QEMU to use. Absent: `NIDO_QEMU`, else `qemu-system-x86_64` in `PATH`.
    pub qemu: Option<PathBuf>,
    /// The program that supervises VMs: nido's own. Absent: the running program.
    pub supervisor: Option<PathBuf>,
    /// What is about to be done gives space back: on a full disk it may use what is kept for that.
    pub frees_space: bool,
}

/// Where the home that the options name is.
fn home_root(options: &OpenOptions) -> Result<PathBuf> {
    let variable = || std::env::var_os("NIDO_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    options.home.clone().or_else(variable).map_or_else(Home::default_root, Ok)
}

/// An opened home.
#[derive(Debug)]
pub struct Context {
    home: Home,
    is_read_only: bool,
    store: Mutex<Store>,
    options: OpenOptions,
}

impl Context {
    /// Opens a home, and makes it the first time. What a crash has left stays as it is.
    ///
    /// # Errors
    /// `denied` if the home belongs to another user, `permission_denied`, `read_only`, `disk_full`, `internal`.
    pub fn open(mut options: OpenOptions) -> Result<Self> {
        let home = Home::open(&home_root(&options)?)?;
        // A home that cannot be written can still be read: `ls`, `info`, `template ls` and `doctor` need no more.
        let is_read_only = !home.is_writable();
        let open = || {
            if is_read_only { Store::open_to_read(&home.database()) } else { Store::open(&home.database()) }
        };
        let store = match open() {
            Err(error)
                if error.code() == Code::DiskFull && options.frees_space && SpaceReserve::of(&home).release() =>
            {
                open()
            }
            opened => opened,
        };
        let store = Mutex::new(store?);
        let named = options.qemu.or_else(|| std::env::var_os("NIDO_QEMU").filter(|v| !v.is_empty()).map(PathBuf::from));
        // A supervisor works in another directory: a relative path would mean another file there.
        let absolute = |p: PathBuf| if p.components().count() > 1 { std::path::absolute(&p).unwrap_or(p) } else { p };
        options.qemu = named.map(absolute);
        Ok(Self { home, is_read_only, store, options })
    }

    /// Whether the home could only be opened for reading. What writes fails as `read_only` then.
    #[must_use]
    pub const fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// Where everything is kept.
    #[must_use]
    pub const fn home(&self) -> &Home {
        &self.home
    }

    /// The QEMU that was named, if any.
    #[must_use]
    pub fn qemu(&self) -> Option<&Path> {
        self.options.qemu.as_deref()
    }

    /// Whether what is about to be done gives space back.
    #[must_use]
    pub const fn frees_space(&self) -> bool {
        self.options.frees_space
    }

    /// The store, until the guard is dropped. If deliveries were queued meanwhile, that starts a delivery worker.
    pub fn store(&self) -> StoreGuard<'_> {
        // Each method of the store is a transaction of its own: a panic in one leaves nothing half-done.
        StoreGuard::new(self, self.store.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The directory of a VM.
    #[must_use]
    pub fn vm_dir(&self, id: &str) -> VmDir {
        self.home.vm(id)
    }

    /// Removes the control group of a VM whose QEMU has ended, if nido has made one. The caller holds the VM's lock.
    pub fn remove_control_group(&self, id: &str) {
        crate::control_group::remove(self.vm_dir(id).path(), id);
    }

    /// Whether a VM belongs to a session that is over, or to an operation that ended before it had made all its VMs.
    #[must_use]
    pub fn is_abandoned(&self, row: &VmRow) -> bool {
        let (lease, made_by) = (row.spec.lease.as_ref(), row.made_by.as_ref());
        self.is_abandoned_by(&row.id, lease.map(LeaseId::as_str), made_by.map(LeaseId::as_str))
    }

    /// The same for a VM whose row is not decoded.
    #[must_use]
    pub fn is_abandoned_by(&self, id: &str, lease: Option<&str>, made_by: Option<&str>) -> bool {
        let is_over = |holder: &str| is_gone(&self.home.present(), holder);
        // The operation may have ended well since the row was read.
        lease.is_some_and(is_over) || made_by.is_some_and(is_over) && self.store().is_being_made(id).unwrap_or(false)
    }
}
