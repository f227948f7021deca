//! Slots for connections: how many may be open at once, and which one is closed for a new one.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// The connections that may be open at once.
///
/// Invariant: while an unauthenticated connection is open, a new one finds a slot. The oldest unauthenticated connection is closed
/// for it, so idle clients without a token cannot lock others out.
#[derive(Debug)]
pub struct ConnectionSlots {
    room: Arc<Semaphore>,
    next: AtomicU64,
    unauthenticated: Arc<UnauthenticatedConnections>,
}

/// Connections without a valid token so far, the oldest first, each with the token that closes it.
type UnauthenticatedConnections = Mutex<BTreeMap<u64, CancellationToken>>;

impl ConnectionSlots {
    /// Room for so many connections.
    pub fn new(count: usize) -> Self {
        Self { room: Arc::new(Semaphore::new(count)), next: AtomicU64::new(0), unauthenticated: Arc::default() }
    }

    /// Waits for a free slot. If all are in use, closes the oldest unauthenticated connection.
    pub async fn permit(&self) -> std::io::Result<OwnedSemaphorePermit> {
        if let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() {
            return Ok(permit);
        }
        let oldest = self.unauthenticated.lock().unwrap_or_else(PoisonError::into_inner).pop_first();
        if let Some((_, close)) = oldest {
            close.cancel();
        }
        Arc::clone(&self.room).acquire_owned().await.map_err(std::io::Error::other)
    }

    /// The slot of a connection that has been admitted.
    pub fn take(&self, permit: OwnedSemaphorePermit, token: TaskTrackerToken) -> ConnectionSlot {
        let (number, close) = (self.next.fetch_add(1, Ordering::Relaxed), CancellationToken::new());
        self.unauthenticated.lock().unwrap_or_else(PoisonError::into_inner).insert(number, close.clone());
        let unauthenticated = Arc::clone(&self.unauthenticated);
        ConnectionSlot(Arc::new(SlotState { number, close, unauthenticated, _permit: permit, _token: token }))
    }
}

#[derive(Debug)]
struct SlotState {
    number: u64,
    close: CancellationToken,
    unauthenticated: Arc<UnauthenticatedConnections>,
    _permit: OwnedSemaphorePermit,
    _token: TaskTrackerToken,
}

impl Drop for SlotState {
    fn drop(&mut self) {
        self.unauthenticated.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

/// The slot of one connection, held for as long as anything uses the connection, also after an upgrade from HTTP. The server counts it,
/// and waits for it when it shuts down.
#[derive(Debug, Clone)]
pub struct ConnectionSlot(Arc<SlotState>);

impl ConnectionSlot {
    /// The client has sent a valid token: the connection is no longer closed to make room for others.
    pub fn mark_authenticated(&self) {
        self.0.unauthenticated.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0.number);
    }

    /// Cancelled when the connection is closed to make room for another one.
    pub fn evicted(&self) -> CancellationToken {
        self.0.close.clone()
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::task::TaskTracker;

    use super::*;

    // 600 idle connections without a token blocked all other clients, as long as they were reopened.
    #[tokio::test]
    async fn a_new_connection_replaces_the_oldest_unauthenticated_one() {
        let (slots, tracker) = (ConnectionSlots::new(3), TaskTracker::new());
        let mut open = Vec::new();
        for _ in 0..3 {
            open.push(slots.take(slots.permit().await.unwrap(), tracker.token()));
        }
        open[0].mark_authenticated();
        let waiting = slots.permit();
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        let evicted: Vec<_> = open.iter().map(|slot| slot.evicted().is_cancelled()).collect();
        assert_eq!(evicted, [false, true, false]);
        open.remove(1);
        let third = slots.take(waiting.await.unwrap(), tracker.token());
        // If all are known, a new one waits until one of them ends.
        open.iter().for_each(ConnectionSlot::mark_authenticated);
        third.mark_authenticated();
        let waiting = slots.permit();
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        drop(third);
        assert!(waiting.await.is_ok());
        assert!(open.iter().all(|slot| !slot.evicted().is_cancelled()));
    }
}
