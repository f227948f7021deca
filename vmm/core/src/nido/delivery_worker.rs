//! The delivery worker: one process at a time, while anything is to be delivered, started by the process that queued it.
//!
//! ```text
//!  a command, a supervisor ── event and deliveries, committed ── deliver.lock free? ──> nido deliver ── drains, ends
//!  any command, at its start; a server, all the time ── anything pending, deliver.lock free? ─────────────────────^
//! ```
//!
//! Invariant: a process that queues checks the lock afterwards, and a worker checks the queue after it has released the lock. So
//! nothing is overlooked; and what a process that was killed in between has queued, the next nido command finds.

use nido_api::error::{Error, Result};
use nido_files::lock::HeldLock;

use super::delivery::drain;
use super::{Nido, OpenOptions};

impl Nido {
    /// The hidden verb: delivers what is pending, unless another process does, and returns when nothing is.
    ///
    /// # Errors
    /// What keeps it from that; the next nido command tries again.
    pub async fn deliver(options: OpenOptions) -> Result<()> {
        // Reconciling would start another worker, for this one does not hold the lock yet.
        let nido = Self::open_unreconciled(options)?;
        let path = nido.home().delivery_lock();
        loop {
            let held = HeldLock::try_take(&path).map_err(|e| Error::io("cannot lock the deliveries", e))?;
            let Some(held) = held else { return Ok(()) };
            let drained = drain(&nido).await;
            drop(held);
            drained?;
            // A process that saw the lock held in between relies on this.
            if !nido.store().has_pending()? {
                return Ok(());
            }
        }
    }
}
