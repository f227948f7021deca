//! Leases: VMs that are made for a session go with it, however it ends.
//!
//! ```text
//!  server:      lease_open (a lock, held) --- VMs made with its id --- lease_end, dropped, or killed
//!  supervisor:  checks every second whether the lock is held; if not, it ends and removes its VM
//!  command:     reconciliation starts a supervisor that checks it, or deletes a stopped VM
//! ```
//!
//! The VMs of an operation that makes several, or none (`fork`), name a lease of that operation in `made_by`, until one change of
//! the store keeps them all.
//!
//! Invariant: the lock is held before the first row names it. So a VM whose lease is not held is an orphan.

use nido_api::error::{Code, Error, Result};
use nido_api::{LeaseId, Limit, VmSpec};
use nido_engine::liveness::{LivenessLock, is_gone};
use nido_store::Transition;

use super::Nido;

/// A session that VMs belong to, until it is dropped or its process ends.
#[derive(Debug)]
pub struct Lease {
    id: LeaseId,
    _presence: LivenessLock,
}

impl Lease {
    /// What VMs are made with: `VmSpec::lease`.
    #[must_use]
    pub fn id(&self) -> &LeaseId {
        &self.id
    }
}

impl Nido {
    /// Opens a lease. Dropping it is enough to end it; [`Nido::lease_end`] does not wait for the supervisors to see that.
    ///
    /// # Errors
    /// `disk_full`, `internal`.
    pub fn lease_open(&self) -> Result<Lease> {
        let liveness_lock = LivenessLock::begin(&self.home().present())?;
        let id = liveness_lock.id().to_owned().try_into()?;
        Ok(Lease { id, _presence: liveness_lock })
    }

    /// Ends a lease, and destroys its VMs now. All are tried; the first error is the answer.
    ///
    /// # Errors
    /// `vm_busy`, `timeout` if one could not be ended. Its supervisor keeps trying.
    pub async fn lease_end(&self, lease: Lease) -> Result<()> {
        let id = lease.id.clone();
        // First: what is being made meanwhile finds it ended.
        drop(lease);
        let rows = self.store().vms()?;
        let mut ended = Ok(());
        for row in rows.into_iter().filter(|row| row.spec.lease.as_ref() == Some(&id)) {
            let told = self.store().transition(&row.id, &Transition::LimitReached(Limit::Session));
            let gone = self.delete_row(&row, true).await.map(drop).and(told.map(drop));
            // Its supervisor may have been quicker.
            if gone.is_err() && self.store().vm_by_id(&row.id)?.is_some() {
                ended = ended.and(gone);
            }
        }
        ended
    }

    /// A request as it is carried out: a VM of a session is ephemeral.
    ///
    /// # Errors
    /// `interrupted` if the session is over.
    pub(super) fn leased(&self, mut spec: VmSpec) -> Result<VmSpec> {
        if let Some(lease) = &spec.lease {
            if is_gone(&self.home().present(), lease.as_str()) {
                let words = format!("the session that requested VM '{}' has ended", spec.name);
                return Err(Error::new(Code::Interrupted, words));
            }
            spec.ephemeral = true;
        }
        Ok(spec)
    }
}
