//! What all sessions share.
//!
//! Invariant: the count of open sessions is right whatever ends a session, because [`SessionGuard`] keeps it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nido_guest_agent::connection_table::ConnectionTable;
use nido_guest_agent::wire::{MAX_QUEUED, MAX_SESSIONS, MAX_TUNNELS, MAX_WORK, Power, QUEUE_LIMIT_MS};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;

use crate::access::Access;
use crate::freeze::Freezer;
use crate::reaper::Reaper;
use crate::role::Role;
use crate::scope::Scopes;
use crate::sys::{self, has_oom_score};

/// How long a command or copy waits for its turn.
const QUEUE_LIMIT: Duration = Duration::from_millis(QUEUE_LIMIT_MS);
/// The agent.
pub struct Agent {
    /// Which sessions are accepted.
    pub access: Access,
    /// What it is in its machine.
    pub role: Role,
    /// The processes that it has started.
    pub reaper: Arc<Reaper>,
    /// The root file system, as far as it is frozen.
    pub freezer: Freezer,
    /// Held by the session that resets the guest's identity.
    pub renewing: tokio::sync::Mutex<()>,
    /// Whether commands must get a neutral out-of-memory score, because the agent has another.
    pub resets_oom_score: bool,
    /// Where a request to go down goes.
    pub power: mpsc::Sender<Power>,
    /// Where commands are kept together.
    pub scopes: Scopes,
    sessions: AtomicUsize,
    places: SlotLimits,
    /// Whether memory was used that is worth returning once there is no session.
    was_busy: AtomicBool,
}

impl Agent {
    /// An agent without sessions.
    pub fn new(token: Vec<u8>, role: Role, power: mpsc::Sender<Power>) -> Self {
        Self {
            access: Access::new(token),
            role,
            reaper: Arc::default(),
            freezer: Freezer::new(role != Role::Visitor),
            renewing: tokio::sync::Mutex::default(),
            resets_oom_score: has_oom_score(),
            power,
            scopes: Scopes::new(role),
            sessions: AtomicUsize::new(0),
            places: SlotLimits::default(),
            was_busy: AtomicBool::new(false),
        }
    }

    /// Counts one more session, if there is room for it.
    pub fn open_session(self: &Arc<Self>) -> Option<SessionGuard> {
        let taken = self.sessions.fetch_add(1, Ordering::Relaxed);
        let guard = SessionGuard(self.clone());
        (taken < MAX_SESSIONS).then_some(guard)
    }

    /// A slot for a command or a copy, which is queued for a limited time; none if all stay in use. Connections have slots
    /// of their own, and pings and power requests need none: so neither idle connections nor many commands keep a guest
    /// from being commanded or stopped.
    pub async fn work_place(&self) -> Option<Slot> {
        if let Ok(permit) = self.places.work.clone().try_acquire_owned() {
            return Some(Slot::Work(permit));
        }
        let _queued = self.places.queue.try_acquire().ok()?;
        let permit = timeout(QUEUE_LIMIT, self.places.work.clone().acquire_owned()).await.ok()?.ok()?;
        Some(Slot::Work(permit))
    }

    /// A place for a connection to a port of the guest, if there is one or a half-closed connection can make room.
    pub fn tunnel_place(&self) -> Option<Slot> {
        let tunnels = &self.places.tunnels;
        let ended = Arc::new(Notify::new());
        let (number, evicted) = lock(tunnels).enter(ended.clone(), Instant::now())?;
        if let Some(evicted) = evicted {
            evicted.notify_one();
        }
        Some(Slot::Tunnel(TunnelPlace { tunnels: tunnels.clone(), number, ended }))
    }

    /// Records that large buffers are in use.
    pub fn takes_memory(&self) {
        self.was_busy.store(true, Ordering::Relaxed);
    }

    /// How many sessions are open.
    pub fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }
}

/// The slots that sessions compete for, each kind with its own limit.
struct SlotLimits {
    work: Arc<Semaphore>,
    queue: Semaphore,
    tunnels: Arc<Mutex<ConnectionTable<Arc<Notify>>>>,
}

impl Default for SlotLimits {
    fn default() -> Self {
        let tunnels = Arc::new(Mutex::new(ConnectionTable::new(MAX_TUNNELS)));
        Self { work: Arc::new(Semaphore::new(MAX_WORK)), queue: Semaphore::new(MAX_QUEUED), tunnels }
    }
}

/// One slot, held until the command, copy or connection ends.
pub enum Slot {
    /// Of a command or a copy.
    Work(#[allow(dead_code)] OwnedSemaphorePermit),
    /// Of a connection.
    Tunnel(TunnelPlace),
}

/// The place of a connection.
pub struct TunnelPlace {
    tunnels: Arc<Mutex<ConnectionTable<Arc<Notify>>>>,
    number: u64,
    ended: Arc<Notify>,
}

impl TunnelPlace {
    /// Records that one direction is closed, and that a byte, or the end of the other direction, has arrived.
    pub fn half_closed(&self) {
        lock(&self.tunnels).half_closed(self.number, Instant::now());
    }

    /// Ready once the place was given to another connection.
    pub async fn taken_away(&self) {
        self.ended.notified().await;
    }
}

impl Drop for TunnelPlace {
    fn drop(&mut self) {
        lock(&self.tunnels).release(self.number);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One open session.
pub struct SessionGuard(Arc<Agent>);

impl Drop for SessionGuard {
    fn drop(&mut self) {
        let left = self.0.sessions.fetch_sub(1, Ordering::Relaxed) - 1;
        if left == 0 && self.0.was_busy.swap(false, Ordering::Relaxed) {
            sys::trim_allocator();
        }
    }
}
