//! Throw-away VMs go with the session that they were made in.
//!
//! ```text
//!  over stdio                     a session is the process: until standard input ends, or it is told to end, or killed
//!  over HTTP, with `initialize`   until DELETE, until nobody has used it for too long, or the server's end
//!  over HTTP, without             there are none: the server's own life stands for one, and such a VM always has a ttl
//! ```
//!
//! A session over HTTP that ends leaves its VMs for a while (`Settings::session_grace`): client libraries that open a session for
//! each call would lose them between two calls. The next session of the same caller takes them over with its first call, and
//! only then: a session that goes on beside another one does not keep that one's VMs.
//!
//! A lease of the core is a lock that this process holds, so whoever kills it ends all of them: the VMs' supervisors see to it.
//! What ends in order is done here, and written down.
//!
//! Invariant: what is over never has a lease again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nido_vmm::api::{LeaseId, Scope};
use nido_vmm::audit::{Caller, Face};
use nido_vmm::error::{Code, Error, Result};
use nido_vmm::name::VmName;
use nido_vmm::nido::Lease;
use serde_json::json;

use crate::answer::plain;
use crate::app::{App, Principal};

/// How long the VMs of one session may take to be gone. Their supervisors go on trying.
const GONE_WITHIN: Duration = Duration::from_secs(20);

/// Which session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(u64);

impl Key {
    /// The server's own life, for callers without sessions.
    pub const SERVER: Self = Self(0);
}

/// The sessions that go on, and the leases of those that have made throw-away VMs.
#[derive(Debug)]
pub struct Leases(Mutex<Open>);

#[derive(Debug)]
struct Open {
    last: u64,
    sessions: HashMap<Key, Ongoing>,
    /// Of sessions that have ended, and since when.
    resting: Vec<(Instant, Held)>,
}

/// What a session that goes on has.
#[derive(Debug, Default)]
struct Ongoing {
    /// The first is the one for new VMs; the others were taken over.
    held: Vec<Held>,
    /// Whether it has called a tool.
    called: bool,
}

/// A lease, and who was the first to need it.
#[derive(Debug)]
struct Held {
    lease: Lease,
    who: Caller,
}

impl Default for Leases {
    fn default() -> Self {
        Self(Mutex::new(Open {
            last: 0,
            sessions: HashMap::from([(Key::SERVER, Ongoing::default())]),
            resting: Vec::new(),
        }))
    }
}

impl Leases {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lease of a session, opened with the first throw-away VM.
    ///
    /// # Errors
    /// `interrupted` if the session is over; those of opening one.
    pub fn of(&self, app: &App, key: Key, who: &Caller) -> Result<LeaseId> {
        let mut open = self.open();
        let session = open.sessions.get_mut(&key);
        let session = session.ok_or_else(|| Error::new(Code::Interrupted, "the session is over"))?;
        if let Some(held) = session.held.first() {
            return Ok(held.lease.id().clone());
        }
        let held = Held { lease: app.unsettled().lease_open()?, who: who.clone() };
        let id = held.lease.id().clone();
        session.held.push(held);
        Ok(id)
    }

    /// This session calls a tool. With its first call it takes over what earlier ones of the same caller have left.
    pub fn take_over(&self, key: Key, who: &Caller) {
        let mut open = self.open();
        let Open { sessions, resting, .. } = &mut *open;
        let Some(session) = sessions.get_mut(&key).filter(|_| key != Key::SERVER) else { return };
        if std::mem::replace(&mut session.called, true) {
            return;
        }
        let same = |held: &Held| (&held.who.actor, &held.who.agent) == (&who.actor, &who.agent);
        session.held.extend(resting.extract_if(.., |(_, held)| same(held)).map(|(_, held)| held));
    }

    /// Whatever goes on still; nothing begins any more.
    fn take_all(&self) -> Vec<(Key, Held)> {
        let mut open = self.open();
        let resting: Vec<_> = open.resting.drain(..).map(|(_, held)| (Key(u64::MAX), held)).collect();
        open.sessions
            .drain()
            .flat_map(|(key, session)| session.held.into_iter().map(move |held| (key, held)))
            .chain(resting)
            .collect()
    }
}

/// A session, until it is dropped.
#[derive(Debug)]
pub struct Session {
    app: Arc<App>,
    key: Key,
}

impl Session {
    pub fn begin(app: &Arc<App>) -> Self {
        let mut open = app.leases().open();
        open.last += 1;
        let key = Key(open.last);
        // One that begins when the server has ended is over at once.
        if !app.ending().is_cancelled() {
            open.sessions.insert(key, Ongoing::default());
        }
        drop(open);
        Self { app: Arc::clone(app), key }
    }

    pub const fn key(&self) -> Key {
        self.key
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut open = self.app.leases().open();
        let held = open.sessions.remove(&self.key).unwrap_or_default().held;
        // Without a runtime there is nobody to wait for the end; letting go of the lock is enough for the supervisors.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (app, grace) = (Arc::clone(&self.app), self.app.settings().session_grace);
        if held.is_empty() {
            return;
        }
        if grace.is_zero() || app.ending().is_cancelled() {
            self.app.tasks().spawn_on(
                async move { drop(futures::future::join_all(held.into_iter().map(|held| end(&app, held))).await) },
                &runtime,
            );
            return;
        }
        let now = Instant::now();
        open.resting.extend(held.into_iter().map(|held| (now, held)));
        self.app.tasks().spawn_on(async move { end_after(&app, grace).await }, &runtime);
    }
}

/// Ends what nobody has taken over for so long.
async fn end_after(app: &App, grace: Duration) {
    tokio::select! {
        () = tokio::time::sleep(grace) => {}
        // Then it is ended with everything else.
        () = app.ending().cancelled() => return,
    }
    let over: Vec<_> = app.leases().open().resting.extract_if(.., |(since, _)| since.elapsed() >= grace).collect();
    futures::future::join_all(over.into_iter().map(|(_, held)| end(app, held))).await;
}

/// The server ends, and every session with it.
pub async fn end_all(app: &App) {
    let ends = app.leases().take_all().into_iter().map(|(key, mut held)| {
        if key == Key::SERVER {
            // It was for everybody.
            held.who = Caller { actor: Principal::own_user(Scope::Run).actor, agent: None, face: Face::Mcp };
        }
        end(app, held)
    });
    futures::future::join_all(ends).await;
}

/// Destroys the VMs of a session that is over. What cannot be written down is done all the same: the session is over in any case.
async fn end(app: &App, held: Held) {
    let Held { lease, who } = held;
    let nido = Arc::clone(app.unsettled());
    let id = lease.id().clone();
    let vms: Vec<VmName> = nido.list().map_or_else(
        |_| Vec::new(),
        |list| list.vms.into_iter().filter(|vm| vm.lease.as_ref() == Some(&id)).map(|vm| vm.name).collect(),
    );
    let mut line = None;
    if !vms.is_empty() {
        let arguments = json!({ "lease": &id, "vms": vms });
        let begun = tokio::task::spawn_blocking(move || nido.audit_begin(&who, "session_end", &arguments)).await;
        match begun {
            Ok(Ok(audited)) => line = Some(audited),
            Ok(Err(error)) => tracing::error!("{}", plain(error.message())),
            Err(error) => tracing::error!("the audit log broke down: {error}"),
        }
    }
    let ended = tokio::time::timeout(GONE_WITHIN, app.unsettled().lease_end(lease)).await;
    let ended = ended.unwrap_or_else(|_| Err(Error::new(Code::Timeout, "the VMs of a session did not end in time")));
    if let Err(error) = &ended {
        tracing::warn!("{}; their supervisors go on trying", plain(error.message()));
    }
    if let Some(line) = line
        && let Ok(Err(error)) = tokio::task::spawn_blocking(move || line.end(&ended)).await
    {
        tracing::error!("{}", plain(error.message()));
    }
}
