//! What every call needs: the core, how the server was started, and the work that is under way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nido_vmm::api::Scope;
use nido_vmm::error::Result;
use nido_vmm::nido::Nido;
use nido_vmm::policy::Policy;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long the last look for VMs without a supervisor counts.
const SETTLED_FOR: Duration = Duration::from_millis(100);
/// How long work that is cut off may take to clear up behind itself when the server ends.
const FINISH_WITHIN: Duration = Duration::from_secs(30);

/// Who calls, as far as it is known for certain.
#[derive(Debug, Clone)]
pub struct Principal {
    /// For the audit log: `uid:N` or `token:NAME`.
    pub actor: String,
    /// What they may do.
    pub scope: Scope,
}

impl Principal {
    /// The user who runs this program: the one at the other end of its standard input.
    #[must_use]
    pub fn own_user() -> Self {
        Self { actor: format!("uid:{}", rustix::process::getuid().as_raw()), scope: Scope::Admin }
    }
}

/// How the server was started.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// What callers may do at all.
    pub policy: Policy,
    /// Only these tools, if that is said.
    pub tools: Option<Vec<String>>,
    /// Not these.
    pub exclude: Vec<String>,
}

/// One server: what its sessions share.
#[derive(Debug)]
pub struct App {
    nido: Arc<Nido>,
    settings: Settings,
    settled: Mutex<Option<Instant>>,
    tasks: TaskTracker,
    ending: CancellationToken,
}

impl App {
    /// A server over this core.
    #[must_use]
    pub fn new(nido: Arc<Nido>, settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            nido,
            settings,
            settled: Mutex::new(None),
            tasks: TaskTracker::new(),
            ending: CancellationToken::new(),
        })
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The core as it is: for the audit log, which must not wait for anything.
    pub(crate) fn unsettled(&self) -> &Arc<Nido> {
        &self.nido
    }

    /// The core. What a crash has left since the last call is settled first, as every command does.
    pub(crate) async fn nido(&self) -> Result<&Nido> {
        let mut settled = self.settled.lock().await;
        if settled.is_none_or(|at| at.elapsed() > SETTLED_FOR) {
            self.nido.settle_all().await?;
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

    /// Ends what is under way and waits until it has cleared up.
    pub async fn finish(&self) {
        self.ending.cancel();
        self.tasks.close();
        if tokio::time::timeout(FINISH_WITHIN, self.tasks.wait()).await.is_err() {
            tracing::warn!("work was cut off: the server ends");
        }
    }
}
