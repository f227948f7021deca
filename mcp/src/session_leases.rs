//! Ephemeral VMs are deleted with the session that created them.
//!
//! ```text
//!  over stdio                     a session is the process: until standard input ends, or it gets a signal, or is killed
//!  over HTTP, with `initialize`   until DELETE, until it was unused for too long, or the server's end
//!  over HTTP, without             there are none: the server's process counts as one, and such a VM always has a ttl
//! ```
//!
//! A session over HTTP that ends leaves its VMs for a while (`Settings::session_grace`): client libraries that open a session for
//! each call would lose them between two calls. The next session of the same caller takes them over with its first call, and
//! only then: another open session does not keep that one's VMs.
//!
//! A lease of the core is a lock that this process holds, so killing it ends all of them: the VMs' supervisors delete them.
//! What ends in order is done here, and recorded.
//!
//! Invariant: what is over never has a lease again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::{Caller, FrontEnd, LeaseId, Scope};
use nido_core::execute::{Request, Verdict};
use nido_core::{Lease, Nido};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::answer::plain;
use crate::principal::Principal;

/// How long deleting the VMs of one session may take. Their supervisors keep trying.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(20);

/// Names one session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionKey(u64);

impl SessionKey {
    /// The server's own life, for callers without sessions.
    pub const SERVER: Self = Self(0);
}

/// The open sessions, and the leases of those that have created ephemeral VMs.
#[derive(Debug)]
pub struct SessionLeases {
    nido: Arc<Nido>,
    /// The server's background work.
    tasks: TaskTracker,
    /// Done when the server ends.
    ending: CancellationToken,
    /// How long the leases of a session that has ended wait for the caller's next session.
    grace: Duration,
    table: Mutex<LeaseTable>,
}

#[derive(Debug)]
struct LeaseTable {
    last: u64,
    sessions: HashMap<SessionKey, SessionState>,
    /// Leases of sessions that have ended, and since when.
    resting: Vec<(Instant, OwnedLease)>,
}

/// The state of an open session.
#[derive(Debug, Default)]
struct SessionState {
    /// The first is the one for new VMs; the others were taken over.
    leases: Vec<OwnedLease>,
    /// Whether it has called a tool.
    called: bool,
}

/// A lease and the caller that was the first to need it.
#[derive(Debug)]
struct OwnedLease {
    lease: Lease,
    owner: Caller,
}

impl SessionLeases {
    /// No session yet. A session's background work is one of `tasks`; `ending` is done when the server ends.
    pub fn new(nido: Arc<Nido>, tasks: TaskTracker, ending: CancellationToken, grace: Duration) -> Arc<Self> {
        let table = LeaseTable {
            last: 0,
            sessions: HashMap::from([(SessionKey::SERVER, SessionState::default())]),
            resting: Vec::new(),
        };
        Arc::new(Self { nido, tasks, ending, grace, table: Mutex::new(table) })
    }

    fn table(&self) -> MutexGuard<'_, LeaseTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lease of a session, opened with the first ephemeral VM.
    ///
    /// # Errors
    /// `interrupted` if the session is over; those of opening one.
    pub fn of(&self, key: SessionKey, caller: &Caller) -> Result<LeaseId> {
        let mut table = self.table();
        let session = table.sessions.get_mut(&key);
        let session = session.ok_or_else(|| Error::new(Code::Interrupted, "the session is over"))?;
        if let Some(first) = session.leases.first() {
            return Ok(first.lease.id().clone());
        }
        let opened = OwnedLease { lease: self.nido.lease_open()?, owner: caller.clone() };
        let id = opened.lease.id().clone();
        session.leases.push(opened);
        Ok(id)
    }

    /// This session calls a tool. With its first call it takes over what earlier sessions of the same caller have left.
    pub fn take_over(&self, key: SessionKey, caller: &Caller) {
        let mut table = self.table();
        let LeaseTable { sessions, resting, .. } = &mut *table;
        let Some(session) = sessions.get_mut(&key).filter(|_| key != SessionKey::SERVER) else { return };
        if std::mem::replace(&mut session.called, true) {
            return;
        }
        let same = |lease: &OwnedLease| (&lease.owner.actor, &lease.owner.agent) == (&caller.actor, &caller.agent);
        session.leases.extend(resting.extract_if(.., |(_, lease)| same(lease)).map(|(_, lease)| lease));
    }

    /// Empties the table: every lease that is still held. No session begins any more.
    fn take_all(&self) -> Vec<(SessionKey, OwnedLease)> {
        let mut table = self.table();
        let resting: Vec<_> = table.resting.drain(..).map(|(_, lease)| (SessionKey(u64::MAX), lease)).collect();
        table
            .sessions
            .drain()
            .flat_map(|(key, session)| session.leases.into_iter().map(move |lease| (key, lease)))
            .chain(resting)
            .collect()
    }

    /// The server ends, and every session with it.
    pub async fn end_all(&self) {
        let ends = self.take_all().into_iter().map(|(key, mut lease)| {
            if key == SessionKey::SERVER {
                // It was for everybody.
                lease.owner = Caller { actor: Principal::own_user(Scope::Run).actor, agent: None, face: FrontEnd::Mcp };
            }
            end(&self.nido, lease)
        });
        futures::future::join_all(ends).await;
    }

    /// Ends the leases that no session has taken over for the grace period.
    async fn end_after_grace(&self) {
        tokio::select! {
            () = tokio::time::sleep(self.grace) => {}
            // Then it is ended with everything else.
            () = self.ending.cancelled() => return,
        }
        let over: Vec<_> = self.table().resting.extract_if(.., |(since, _)| since.elapsed() >= self.grace).collect();
        futures::future::join_all(over.into_iter().map(|(_, lease)| end(&self.nido, lease))).await;
    }
}

/// A session, until it is dropped.
#[derive(Debug)]
pub struct Session {
    leases: Arc<SessionLeases>,
    key: SessionKey,
}

impl Session {
    pub fn begin(leases: &Arc<SessionLeases>) -> Self {
        let mut table = leases.table();
        table.last += 1;
        let key = SessionKey(table.last);
        // One that begins when the server has ended is over at once.
        if !leases.ending.is_cancelled() {
            table.sessions.insert(key, SessionState::default());
        }
        drop(table);
        Self { leases: Arc::clone(leases), key }
    }

    pub const fn key(&self) -> SessionKey {
        self.key
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut table = self.leases.table();
        let held = table.sessions.remove(&self.key).unwrap_or_default().leases;
        // Without a runtime the end cannot be awaited; releasing the lock is enough for the supervisors.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let leases = Arc::clone(&self.leases);
        if held.is_empty() {
            return;
        }
        if leases.grace.is_zero() || leases.ending.is_cancelled() {
            self.leases.tasks.spawn_on(
                async move {
                    drop(futures::future::join_all(held.into_iter().map(|lease| end(&leases.nido, lease))).await);
                },
                &runtime,
            );
            return;
        }
        let now = Instant::now();
        table.resting.extend(held.into_iter().map(|lease| (now, lease)));
        self.leases.tasks.spawn_on(async move { leases.end_after_grace().await }, &runtime);
    }
}

/// Destroys the VMs of a session that is over. What cannot be recorded is done nevertheless: the session is over in any case.
async fn end(core: &Arc<Nido>, lease: OwnedLease) {
    let OwnedLease { lease, owner } = lease;
    let nido = Arc::clone(core);
    let id = lease.id().clone();
    let vms: Vec<VmName> = nido.list().map_or_else(
        |_| Vec::new(),
        |list| list.vms.into_iter().filter(|vm| vm.lease.as_ref() == Some(&id)).map(|vm| vm.name).collect(),
    );
    let mut line = None;
    if !vms.is_empty() {
        let arguments = json!({ "lease": &id, "vms": vms });
        match nido.attempt(Request { operation: op::SESSION_END, caller: owner, arguments }).await {
            Ok(attempt) => line = Some(attempt),
            Err(error) => tracing::error!("{}", plain(error.message())),
        }
    }
    let ended = tokio::time::timeout(CLEANUP_TIMEOUT, core.lease_end(lease)).await;
    let ended = ended.unwrap_or_else(|_| Err(Error::new(Code::Timeout, "the VMs of a session did not end in time")));
    if let Err(error) = &ended {
        tracing::warn!("{}; their supervisors keep trying", plain(error.message()));
    }
    if let Some(line) = line
        && let Err(error) = line.end(Verdict::of(&ended)).await
    {
        tracing::error!("{}", plain(error.message()));
    }
}
