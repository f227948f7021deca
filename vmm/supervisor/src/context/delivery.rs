//! Starting the delivery worker (`nido deliver`) after a change that queued deliveries.
//!
//! Invariant: a process that queues looks at the lock afterwards, and a worker looks for more after it has released the lock. So
//! no delivery is overlooked.

use std::ops::Deref;
use std::sync::MutexGuard;

use nido_files::lock::is_held;
use nido_store::Store;

use super::Context;

/// The store, locked within this process. Where deliveries were queued, it starts a worker once the lock is released.
#[derive(Debug)]
pub struct StoreGuard<'a> {
    // In this order: the worker is started after the store was released.
    store: MutexGuard<'a, Store>,
    starter: Starter<'a>,
}

impl<'a> StoreGuard<'a> {
    pub(super) fn new(context: &'a Context, store: MutexGuard<'a, Store>) -> Self {
        Self { store, starter: Starter { context, is_due: false } }
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
        self.starter.is_due = self.store.take_queued();
    }
}

/// Starts a worker when it is dropped.
#[derive(Debug)]
struct Starter<'a> {
    context: &'a Context,
    is_due: bool,
}

impl Drop for Starter<'_> {
    fn drop(&mut self) {
        if self.is_due {
            self.context.start_delivery_worker();
        }
    }
}

impl Context {
    /// Starts a delivery worker for deliveries that other processes have queued, if there are any and no worker runs. Cheap
    /// otherwise.
    pub fn resume_deliveries(&self) {
        let pending = self.store().has_pending();
        match pending {
            Ok(false) => {}
            Ok(true) => self.start_delivery_worker(),
            Err(error) => tracing::warn!("cannot read pending deliveries: {error}"),
        }
    }

    /// Starts a delivery worker if none runs. Returns at once; a failure is logged.
    fn start_delivery_worker(&self) {
        if is_held(&self.home.delivery_lock()) || tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        if let Err(error) = self.start_in_background("deliver", "deliver.log") {
            tracing::warn!("events are not delivered for now: {error}");
        }
    }
}
