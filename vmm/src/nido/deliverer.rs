//! The deliverer's life: one process at a time, while anything is to be delivered, started by whoever queued it.
//!
//! ```text
//!  a command, a supervisor ── event and deliveries, committed ── deliver.lock free? ──> nido deliver ── drains, ends
//!  any command, at its start; a server, all the time ── anything pending, deliver.lock free? ─────────────────────^
//! ```
//!
//! Invariant: whoever queues looks at the lock after that, and a deliverer looks for more after it has let go of the lock. So
//! nothing is overlooked; and what a process that was killed in between has queued, the next nido command finds.

use std::ops::Deref;
use std::sync::MutexGuard;

use super::{Nido, OpenOptions};
use crate::error::{Error, Result};
use crate::lock::{Held, is_held};
use crate::store::Store;
use crate::webhook::deliver::drain;

/// Held by the process that delivers.
const DELIVER_LOCK: &str = "deliver.lock";

/// The store, locked within this process. Where deliveries were queued, it starts a deliverer when it has let go.
pub(crate) struct StoreGuard<'a> {
    // In this order: the bell is rung after the store was let go.
    store: MutexGuard<'a, Store>,
    bell: Bell<'a>,
}

impl<'a> StoreGuard<'a> {
    pub(super) fn new(nido: &'a Nido, store: MutexGuard<'a, Store>) -> Self {
        Self { store, bell: Bell { nido, rings: false } }
    }
}

impl Deref for StoreGuard<'_> {
    type Target = Store;

    fn deref(&self) -> &Store {
        &self.store
    }
}

impl Drop for StoreGuard<'_> {
    fn drop(&mut self) {
        self.bell.rings = self.store.take_queued();
    }
}

/// Wakes a deliverer when it is dropped.
struct Bell<'a> {
    nido: &'a Nido,
    rings: bool,
}

impl Drop for Bell<'_> {
    fn drop(&mut self) {
        if self.rings {
            self.nido.start_deliverer();
        }
    }
}

impl Nido {
    /// The hidden verb: delivers what is pending, unless another process does, and returns when nothing is.
    ///
    /// # Errors
    /// What keeps it from that; the next nido command tries again.
    pub async fn deliver(options: OpenOptions) -> Result<()> {
        // Settling would start another deliverer, for this one does not hold the lock yet.
        let nido = Self::open_unsettled(options)?;
        let path = nido.home.root().join(DELIVER_LOCK);
        loop {
            let held = Held::try_take(&path).map_err(|e| Error::io("cannot lock the deliveries", e))?;
            let Some(held) = held else { return Ok(()) };
            let drained = drain(&nido).await;
            drop(held);
            drained?;
            // Whoever saw the lock held in between relies on this.
            if !nido.store().has_pending()? {
                return Ok(());
            }
        }
    }

    /// Starts a deliverer for what others have left behind, as opening does: for who keeps a home open for long. Cheap when
    /// nothing waits or somebody delivers.
    pub fn go_on_delivering(&self) {
        let pending = self.store().has_pending();
        match pending {
            Ok(false) => {}
            Ok(true) => self.start_deliverer(),
            Err(error) => tracing::warn!("the deliveries cannot be looked at: {error}"),
        }
    }

    /// Starts a deliverer if none runs. Returns at once; a failure is no trouble of the caller's.
    fn start_deliverer(&self) {
        if is_held(&self.home.root().join(DELIVER_LOCK)) || tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        if let Err(error) = self.start_in_background("deliver", "deliver.log") {
            tracing::warn!("events are not delivered for now: {error}");
        }
    }
}
