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

/// How long the result of the last reconciliation is used.
const RECONCILE_CACHE_TTL: Duration = Duration::from_millis(100);
/// How long a call may take until its result is a job, by default: clients give up after 60 s.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(40);
/// How long an unused session over HTTP is kept, by default.
pub const SESSION_IDLE: Duration = Duration::from_secs(1800);
/// How long the ephemeral VMs of a session over HTTP that has ended wait for the next one of the same caller.
pub const SESSION_GRACE: Duration = Duration::from_secs(60);
/// How many VMs are remembered with their creators.
const OWN_MAX: usize = 4096;
/// How long interrupted work may take to clean up when the server ends.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);

/// How the server was started.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What callers may do at all.
    pub policy: Policy,
    /// Only these tools, if given.
    pub tools: Option<Vec<String>>,
    /// Not these.
    pub exclude: Vec<String>,
    /// How long a call may take until it is answered with a job.
    pub answer_within: Duration,
    /// What a client on standard input and output may do.
    pub scope: Scope,
    /// How long an unused session over HTTP is kept. Its ephemeral VMs are deleted with it.
    pub session_idle: Duration,
    /// How long its ephemeral VMs wait for the next session of the same caller; not at all over stdio.
    pub session_grace: Duration,
}

impl Settings {
    /// The same, with rules in place of the presets in the policy's limits.
    ///
    /// # Errors
    /// `spec_invalid`: a preset does not exist or cannot be used.
    pub async fn with_plain_rules(mut self, nido: &Nido) -> Result<Self> {
        self.policy.limits = nido.with_plain_rules(self.policy.limits).await?;
        Ok(self)
    }
}

impl Default for Settings {
    fn default() -> Self {
        let (policy, tools, exclude) = Default::default();
        Self {
            policy,
            tools,
            exclude,
            answer_within: CALL_TIMEOUT,
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
    /// The creator of each ephemeral VM, by its id.
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

    /// The owner of ephemeral VMs.
    pub(crate) fn leases(&self) -> &Arc<SessionLeases> {
        &self.leases
    }

    /// The forms that users are being shown.
    pub(crate) fn open_forms(&self) -> &OpenForms {
        &self.open_forms
    }

    /// Records that this caller has created this ephemeral VM.
    pub(crate) fn remember(&self, actor: &str, vm: &str) {
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        // For a VM that is no longer recorded, a confirmation is required; that is harmless.
        if own.len() >= OWN_MAX {
            own.clear();
        }
        own.insert(vm.into(), actor.into());
    }

    /// Whether this caller has created this ephemeral VM since the server started.
    pub(crate) fn made(&self, actor: &str, vm: &str) -> bool {
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        own.get(vm).is_some_and(|maker| maker == actor)
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The limits of VMs that this caller creates. By default, no other machine reaches them.
    pub(crate) fn limits(&self, principal: &Principal) -> Limits {
        let mut limits = self.settings.policy.limits.and(&principal.limits);
        limits.publish.get_or_insert_with(Limits::loopback);
        limits
    }

    /// The core as it is: for the audit log, which must not wait for anything.
    pub(crate) fn unreconciled(&self) -> &Arc<Nido> {
        &self.nido
    }

    /// The core. A crash since the last call is reconciled first, as every command does.
    pub(crate) async fn nido(&self) -> Result<&Nido> {
        let mut settled = self.settled.lock().await;
        if settled.is_none_or(|at| at.elapsed() > RECONCILE_CACHE_TTL) {
            self.nido.reconcile().await?;
            *settled = Some(Instant::now());
        }
        Ok(&self.nido)
    }

    /// Work that continues even if the session that requested it ends.
    pub(crate) fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Done when the server ends.
    pub(crate) fn ending(&self) -> &CancellationToken {
        &self.ending
    }

    /// Completes when no listener remains, at the latest when the server ends.
    pub(crate) fn quiet(&self) -> &CancellationToken {
        &self.quiet
    }

    /// Ends what is under way, and every session with its ephemeral VMs; waits until it has cleaned up.
    pub async fn finish(&self) {
        self.ending.cancel();
        self.tasks.close();
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, self.tasks.wait()).await.is_err() {
            tracing::warn!("work was interrupted: the server ends");
        }
        self.leases.end_all().await;
        // Sessions that have ended by themselves meanwhile.
        let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, self.tasks.wait()).await;
    }
}
