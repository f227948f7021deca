//! What every call needs: the core, how the server was started, and the work that is under way.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use nido_api::error::Result;
use nido_api::{Limits, Scope};
use nido_core::Nido;
use nido_core::host_paths::{DefaultPaths, HostPaths};
use nido_core::policy::Policy;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::open_forms::OpenForms;
use crate::output_store::OutputStore;
use crate::principal::Principal;
use crate::session_leases::SessionLeases;
use crate::subscriptions::ChangeFeed;

/// How long the last look for VMs without a supervisor counts.
const SETTLED_FOR: Duration = Duration::from_millis(100);
/// How long a call may take until it is answered with a job, unless somebody says otherwise: clients give up after 60 s.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(40);
/// How long a session over HTTP goes on that nobody uses, unless somebody says otherwise.
pub const SESSION_IDLE: Duration = Duration::from_secs(1800);
/// How long the throw-away VMs of a session over HTTP that has ended wait for the next one of the same caller.
pub const SESSION_GRACE: Duration = Duration::from_secs(60);
/// How many VMs are remembered as somebody's own.
const OWN_MAX: usize = 4096;
/// How long work that is cut off may take to clear up behind itself when the server ends.
const FINISH_WITHIN: Duration = Duration::from_secs(30);

/// How the server was started.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What callers may do at all.
    pub policy: Policy,
    /// Only these tools, if that is said.
    pub tools: Option<Vec<String>>,
    /// Not these.
    pub exclude: Vec<String>,
    /// How long a call may take until it is answered with a job.
    pub answer_within: Duration,
    /// What a client on standard input and output may do.
    pub scope: Scope,
    /// How long a session over HTTP goes on that nobody uses. Its throw-away VMs go with it.
    pub session_idle: Duration,
    /// How long its throw-away VMs wait for the next session of the same caller; not at all over stdio.
    pub session_grace: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        let (policy, tools, exclude) = Default::default();
        Self {
            policy,
            tools,
            exclude,
            answer_within: ANSWER_WITHIN,
            scope: Scope::Admin,
            session_idle: SESSION_IDLE,
            session_grace: SESSION_GRACE,
        }
    }
}

/// One server: what its sessions share.
#[derive(Debug)]
pub struct App {
    nido: Arc<Nido>,
    settings: Settings,
    settled: Mutex<Option<Instant>>,
    tasks: TaskTracker,
    ending: CancellationToken,
    quiet: CancellationToken,
    host_paths: HostPaths,
    outputs: OutputStore,
    changes: Arc<ChangeFeed>,
    leases: Arc<SessionLeases>,
    open_forms: OpenForms,
    /// Who made which throw-away VM, by its id.
    own: std::sync::Mutex<HashMap<String, String>>,
}

impl App {
    /// The state of a server over this core; the settings have been checked. Files of the host are those below the policy's
    /// roots, or below `defaults` where it names none.
    ///
    /// # Errors
    /// Of a root that cannot be opened.
    pub(crate) fn open(nido: Arc<Nido>, settings: Settings, defaults: &DefaultPaths) -> Result<Arc<Self>> {
        let host_paths = HostPaths::open(&settings.policy, defaults)?;
        let (tasks, ending) = (TaskTracker::new(), CancellationToken::new());
        let quiet = ending.child_token();
        Ok(Arc::new(Self {
            changes: ChangeFeed::new(Arc::clone(&nido), tasks.clone(), quiet.clone()),
            leases: SessionLeases::new(Arc::clone(&nido), tasks.clone(), ending.clone(), settings.session_grace),
            nido,
            settings,
            host_paths,
            outputs: OutputStore::default(),
            open_forms: OpenForms::default(),
            own: std::sync::Mutex::default(),
            settled: Mutex::new(None),
            tasks,
            quiet,
            ending,
        }))
    }

    /// The files of the host that may be named.
    pub fn host_paths(&self) -> &HostPaths {
        &self.host_paths
    }

    /// What commands wrote.
    pub(crate) fn outputs(&self) -> &OutputStore {
        &self.outputs
    }

    /// What notifies listeners of changes.
    pub(crate) fn changes(&self) -> &Arc<ChangeFeed> {
        &self.changes
    }

    /// What throw-away VMs belong to.
    pub(crate) fn leases(&self) -> &Arc<SessionLeases> {
        &self.leases
    }

    /// The forms that users are being shown.
    pub(crate) fn open_forms(&self) -> &OpenForms {
        &self.open_forms
    }

    /// This caller has made this throw-away VM.
    pub(crate) fn remember(&self, actor: &str, vm: &str) {
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever is forgotten is asked; that is no harm.
        if own.len() >= OWN_MAX {
            own.clear();
        }
        own.insert(vm.into(), actor.into());
    }

    /// Whether this caller has made this throw-away VM since the server started.
    pub(crate) fn made(&self, actor: &str, vm: &str) -> bool {
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        own.get(vm).is_some_and(|maker| maker == actor)
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What VMs may be that this caller creates. Where nobody says otherwise, no other machine reaches them.
    pub(crate) fn limits(&self, principal: &Principal) -> Limits {
        let mut limits = self.settings.policy.limits.and(&principal.limits);
        limits.publish.get_or_insert_with(Limits::loopback);
        limits
    }

    /// The core as it is: for the audit log, which must not wait for anything.
    pub(crate) fn unreconciled(&self) -> &Arc<Nido> {
        &self.nido
    }

    /// The core. What a crash has left since the last call is settled first, as every command does.
    pub(crate) async fn nido(&self) -> Result<&Nido> {
        let mut settled = self.settled.lock().await;
        if settled.is_none_or(|at| at.elapsed() > SETTLED_FOR) {
            self.nido.reconcile().await?;
            *settled = Some(Instant::now());
        }
        Ok(&self.nido)
    }

    /// Work that goes on whatever becomes of the session that asked for it.
    pub(crate) fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Done when the server ends.
    pub(crate) fn ending(&self) -> &CancellationToken {
        &self.ending
    }

    /// Done when nobody listens any more, at the latest when the server ends.
    pub(crate) fn quiet(&self) -> &CancellationToken {
        &self.quiet
    }

    /// Ends what is under way, and every session with its throw-away VMs; waits until it has cleared up.
    pub async fn finish(&self) {
        self.ending.cancel();
        self.tasks.close();
        if tokio::time::timeout(FINISH_WITHIN, self.tasks.wait()).await.is_err() {
            tracing::warn!("work was interrupted: the server ends");
        }
        self.leases.end_all().await;
        // Sessions that have ended by themselves meanwhile.
        let _ = tokio::time::timeout(FINISH_WITHIN, self.tasks.wait()).await;
    }
}
