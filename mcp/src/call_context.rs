//! What a tool knows of the call that it serves, and what it reports beside its result.

use std::sync::{Arc, Mutex, PoisonError};

use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::{Caller, Grant, LeaseId, Limits, Scope, VmInfo, VmRef};
use nido_core::Nido;
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::progress::Progress;
use crate::session_leases::SessionKey;

/// What a tool knows of the call that it serves.
#[derive(Debug, Clone)]
pub struct CallContext {
    pub app: Arc<App>,
    pub who: Caller,
    /// What the caller may do.
    pub scope: Scope,
    pub progress: Progress,
    /// The client no longer needs the result.
    pub cancelled: CancellationToken,
    /// The owner of the ephemeral VMs that it creates.
    pub session: SessionKey,
    /// What VMs may be that it makes.
    pub limits: Limits,
    /// The id of the only VM that it may be done to, where that was decided (confirmation.rs).
    pub vm: Option<String>,
    pub notes: Arc<Mutex<RefusalNotes>>,
}

/// What is known of a refusal beside its error.
#[derive(Debug, Default)]
pub struct RefusalNotes {
    /// Why, in a word for the audit log.
    pub reason: Option<&'static str>,
    /// What would make it possible.
    pub approval: Option<String>,
    /// What to do next, if not the error code's default.
    pub next_step: Option<&'static str>,
    /// What was not as it should be with the arguments, and did no harm.
    pub arguments: Vec<String>,
}

impl CallContext {
    pub async fn nido(&self) -> Result<&Nido> {
        self.app.nido().await
    }

    /// The VM of that name, if it is the one that was decided about.
    pub fn which<'a>(&'a self, name: &'a VmName) -> VmRef<'a> {
        VmRef { name, id: self.vm.as_deref() }
    }

    /// Does `work` unless the call is cancelled; then it is dropped.
    pub async fn unless_cancelled<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            outcome = work => outcome,
            () = self.cancelled.cancelled() => Err(Error::new(Code::Interrupted, "the call was cancelled")),
        }
    }

    /// Why it will be refused, in a word for the audit log.
    pub fn refused_because(&self, reason: &'static str) {
        self.notes().reason = Some(reason);
    }

    /// Which approval would make it possible.
    pub fn needs_approval(&self, id: &str) {
        self.notes().approval = Some(id.into());
    }

    /// What is known of a refusal so far.
    pub fn notes(&self) -> std::sync::MutexGuard<'_, RefusalNotes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to do next, where the error's code alone does not imply it.
    pub fn next_step(&self, words: &'static str) {
        self.notes().next_step = Some(words);
    }

    /// On whose behalf a VM is made.
    pub fn grant(&self) -> Grant {
        Grant::within(&self.who, self.limits.clone())
    }

    /// From now on it is done to the VM of this id, or not at all.
    pub fn decided_about(&mut self, vm: Option<String>) {
        self.vm = vm;
    }

    /// This caller has created this VM: if it is ephemeral, its end needs no confirmation.
    pub fn created(&self, vm: &VmInfo) {
        if vm.ephemeral {
            self.app.remember(&self.who.actor, &vm.id);
        }
    }

    /// The lease that an ephemeral VM gets.
    pub fn lease(&self) -> Result<LeaseId> {
        self.app.leases().of(self.session, &self.who)
    }
}
