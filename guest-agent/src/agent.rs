//! What all sessions share.
//!
//! Invariant: the count of open sessions is right whatever ends a session, because [`Seat`] keeps it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nido_guest_agent::places;
use nido_guest_agent::wire::{Fault, MAX_QUEUED, MAX_SESSIONS, MAX_TUNNELS, MAX_WORK, Power, QUEUE_LIMIT_MS};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;

use crate::access::Access;
use crate::children::Children;
use crate::freeze::Freezer;
use crate::scope::Scopes;

/// How long a command or copy waits for its turn.
const QUEUE_LIMIT: Duration = Duration::from_millis(QUEUE_LIMIT_MS);
/// Longest text of a refusal, in bytes: it must fit in a frame, whatever the request named.
const MAX_REFUSAL: usize = 4096;

/// What the agent is in its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The guest's first process.
    Init,
    /// A service of the guest's.
    Service,
    /// An ordinary process that leaves the machine alone.
    Visitor,
}

/// The agent.
pub struct Agent {
    /// Who may talk to it.
    pub access: Access,
    /// What it is in its machine.
    pub role: Role,
    /// What it has started.
    pub children: Arc<Children>,
    /// The root file system, as far as it is frozen.
    pub freezer: Freezer,
    /// Held by the session that renews the guest.
    pub renewing: tokio::sync::Mutex<()>,
    /// Whether commands must get a neutral out-of-memory score, because the agent has another.
    pub resets_oom_score: bool,
    /// Where a request to go down goes.
    pub power: mpsc::Sender<Power>,
    /// Where commands are kept together.
    pub scopes: Scopes,
    sessions: AtomicUsize,
    places: Places,
    /// Whether memory was used that is worth giving back once nobody is there.
    was_busy: AtomicBool,
}

impl Agent {
    /// An agent without sessions.
    pub fn new(token: Vec<u8>, role: Role, power: mpsc::Sender<Power>) -> Self {
        Self {
            access: Access::new(token),
            role,
            children: Arc::default(),
            freezer: Freezer::new(role != Role::Visitor),
            renewing: tokio::sync::Mutex::default(),
            resets_oom_score: has_oom_score(),
            power,
            scopes: Scopes::new(role),
            sessions: AtomicUsize::new(0),
            places: Places::default(),
            was_busy: AtomicBool::new(false),
        }
    }

    /// Takes a seat for one more session, if there is one.
    pub fn sit(self: &Arc<Self>) -> Option<Seat> {
        let taken = self.sessions.fetch_add(1, Ordering::Relaxed);
        let seat = Seat(self.clone());
        (taken < MAX_SESSIONS).then_some(seat)
    }

    /// A place for a command or a copy, which waits for its turn; none if that does not come soon. Connections have places
    /// of their own, and pings and power requests need none: so neither idle connections nor many commands keep a guest
    /// from being commanded or stopped.
    pub async fn work_place(&self) -> Option<Place> {
        if let Ok(permit) = self.places.work.clone().try_acquire_owned() {
            return Some(Place::Work(permit));
        }
        let _queued = self.places.queue.try_acquire().ok()?;
        let permit = timeout(QUEUE_LIMIT, self.places.work.clone().acquire_owned()).await.ok()?.ok()?;
        Some(Place::Work(permit))
    }

    /// A place for a connection to a port of the guest, if there is one or a half-closed connection can make room.
    pub fn tunnel_place(&self) -> Option<Place> {
        let tunnels = &self.places.tunnels;
        let ended = Arc::new(Notify::new());
        let (number, evicted) = lock(tunnels).enter(ended.clone(), Instant::now())?;
        if let Some(evicted) = evicted {
            evicted.notify_one();
        }
        Some(Place::Tunnel(TunnelPlace { tunnels: tunnels.clone(), number, ended }))
    }

    /// Says that large buffers are in use.
    pub fn takes_memory(&self) {
        self.was_busy.store(true, Ordering::Relaxed);
    }

    /// How many sessions are open.
    pub fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }
}

/// What sessions compete for, each kind by itself.
struct Places {
    work: Arc<Semaphore>,
    queue: Semaphore,
    tunnels: Arc<Mutex<places::Places<Arc<Notify>>>>,
}

impl Default for Places {
    fn default() -> Self {
        let tunnels = Arc::new(Mutex::new(places::Places::new(MAX_TUNNELS)));
        Self { work: Arc::new(Semaphore::new(MAX_WORK)), queue: Semaphore::new(MAX_QUEUED), tunnels }
    }
}

/// One place, held while the command, copy or connection lasts.
pub enum Place {
    /// Of a command or a copy.
    Work(#[allow(dead_code)] OwnedSemaphorePermit),
    /// Of a connection.
    Tunnel(TunnelPlace),
}

/// The place of a connection.
pub struct TunnelPlace {
    tunnels: Arc<Mutex<places::Places<Arc<Notify>>>>,
    number: u64,
    ended: Arc<Notify>,
}

impl TunnelPlace {
    /// Says that one direction is closed, and that a byte has come, or the end of the other.
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
        lock(&self.tunnels).leave(self.number);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the agent has an out-of-memory score that its children should not inherit.
pub fn has_oom_score() -> bool {
    let score = std::fs::read("/proc/self/oom_score_adj").unwrap_or_default();
    score.trim_ascii() != b"0" && !score.is_empty()
}

/// One open session.
pub struct Seat(Arc<Agent>);

impl Drop for Seat {
    fn drop(&mut self) {
        let left = self.0.sessions.fetch_sub(1, Ordering::Relaxed) - 1;
        if left == 0 && self.0.was_busy.swap(false, Ordering::Relaxed) {
            crate::sys::trim_allocator();
        }
    }
}

/// A request that was not carried out: what the host is told.
#[derive(Debug)]
pub struct Refusal {
    /// What went wrong, for programs.
    pub fault: Fault,
    /// What went wrong, for people.
    pub message: String,
}

impl Refusal {
    /// A refusal with its sentence.
    pub fn new(fault: Fault, message: impl Into<String>) -> Self {
        let mut message = message.into();
        message.truncate(message.floor_char_boundary(MAX_REFUSAL));
        Self { fault, message }
    }

    /// A refusal because a call on `subject` failed.
    pub fn from_io(subject: &str, error: &std::io::Error) -> Self {
        Self::new(fault_of(error), format!("{subject}: {error}"))
    }
}

/// The fault that an operating system error amounts to.
pub fn fault_of(error: &std::io::Error) -> Fault {
    use std::io::ErrorKind::{
        DirectoryNotEmpty, IsADirectory, NotADirectory, NotFound, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem,
        StorageFull,
    };
    match error.kind() {
        // The path itself is wrong: a name that is too long, or symlinks in a circle.
        _ if matches!(error.raw_os_error(), Some(libc::ENAMETOOLONG | libc::ELOOP)) => Fault::Invalid,
        NotFound => Fault::NotFound,
        PermissionDenied | ReadOnlyFilesystem => Fault::Denied,
        StorageFull | QuotaExceeded => Fault::DiskFull,
        IsADirectory | NotADirectory | DirectoryNotEmpty => Fault::WrongType,
        _ => Fault::Other,
    }
}
