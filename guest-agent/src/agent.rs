//! What all sessions share.
//!
//! Invariant: the count of open sessions is right whatever ends a session, because [`Seat`] keeps it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nido_guest_agent::wire::{Fault, Power};
use tokio::sync::mpsc;

use crate::access::Access;
use crate::children::Children;
use crate::freeze::Freezer;

/// How many sessions may be open at once.
pub const MAX_SESSIONS: usize = 64;

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
    sessions: AtomicUsize,
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
            sessions: AtomicUsize::new(0),
            was_busy: AtomicBool::new(false),
        }
    }

    /// Takes a seat for one more session, if there is one.
    pub fn sit(self: &Arc<Self>) -> Option<Seat> {
        let taken = self.sessions.fetch_add(1, Ordering::Relaxed);
        let seat = Seat(self.clone());
        (taken < MAX_SESSIONS).then_some(seat)
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
        Self { fault, message: message.into() }
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
        NotFound => Fault::NotFound,
        PermissionDenied | ReadOnlyFilesystem => Fault::Denied,
        StorageFull | QuotaExceeded => Fault::DiskFull,
        IsADirectory | NotADirectory | DirectoryNotEmpty => Fault::WrongType,
        _ => Fault::Other,
    }
}
