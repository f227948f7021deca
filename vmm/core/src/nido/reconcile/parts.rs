//! Template parts: who owns which, and which of them nothing owns.
//!
//! | owner | where it is recorded |
//! |---|---|
//! | a template | its manifest |
//! | a VM | the table `part_owners`, in the transaction that changes its row |
//! | a VM without a row | `vm.json` in its directory |
//!
//! An operation that makes a part before its owner exists holds `templates.lock` shared; removing takes it exclusively.

use std::collections::HashSet;
use std::time::Duration;

use nido_api::error::{Error, Result};
use nido_images::{Store as ImageStore, StoreContents};
use nido_supervisor::vm_record::VmRecord;

use crate::nido::Nido;
use crate::nido::template_store::TEMPLATES_LOCK_TIMEOUT;

/// Template parts and their owners.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PartFacts {
    /// A part may have lost its last owner since the last removal.
    pub is_due: bool,
    /// What is stored.
    pub stored: StoreContents,
    /// Hashes of the parts that have an owner. The error is the reason why that is unknown.
    pub owned: Result<HashSet<String>, String>,
}

/// What is done about template parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::nido) enum PartRepair {
    /// Removes a part that nothing owns.
    RemovePart {
        /// Its hash.
        sha256: String,
        /// Its size.
        bytes: u64,
    },
    /// Removes a manifest whose writer was killed.
    RemoveManifest(String),
}

/// Plans which parts are removed. Pure. While one owner is unknown, none is.
pub(super) fn plan_parts(facts: &PartFacts) -> Vec<PartRepair> {
    let Ok(owned) = &facts.owned else { return Vec::new() };
    let unowned = facts.stored.parts.iter().filter(|part| !owned.contains(&part.sha256));
    let parts = unowned.map(|part| PartRepair::RemovePart { sha256: part.sha256.clone(), bytes: part.bytes });
    parts.chain(facts.stored.unfinished_manifests.iter().cloned().map(PartRepair::RemoveManifest)).collect()
}

/// How many bytes of parts a plan removes.
pub(super) fn part_bytes(repairs: &[PartRepair]) -> u64 {
    let bytes = |repair: &PartRepair| match repair {
        PartRepair::RemovePart { bytes, .. } => *bytes,
        PartRepair::RemoveManifest(_) => 0,
    };
    repairs.iter().map(bytes).sum()
}

impl PartFacts {
    /// Lists the parts of a home. What cannot be read makes the owners unknown.
    ///
    /// # Errors
    /// Of the store.
    pub fn read(nido: &Nido) -> Result<Self> {
        let images = nido.images();
        let is_due = nido.store().parts_due()? != 0;
        // What is stored first: a part whose owner is added meanwhile is not taken for unowned.
        let (stored, owned_by_vms) = (images.stored(), nido.store().owned_parts()?);
        let owned = owned_by_vms.ok_or_else(|| "the store has a VM without recorded parts".to_owned());
        let owned = owned.and_then(|owned| with_other_owners(nido, &images, owned));
        Ok(match stored {
            Ok(stored) => Self { is_due, stored, owned },
            Err(error) => Self { is_due, stored: StoreContents::default(), owned: Err(error.to_string()) },
        })
    }
}

/// Adds the parts of templates, and of VMs that have no row.
fn with_other_owners(nido: &Nido, images: &ImageStore, mut owned: HashSet<String>) -> Result<HashSet<String>, String> {
    owned.extend(images.named_parts().map_err(|error| error.to_string())?);
    for id in nido.unknown_vms().map_err(|error| error.to_string())? {
        let record = VmRecord::read(&nido.vm_dir(&id), &id);
        owned.extend(record.map_err(|why| format!("directory {id} has no row, and {why}"))?.hashes());
    }
    Ok(owned)
}

impl Nido {
    /// Removes the template parts that nothing owns; how many bytes that freed.
    ///
    /// # Errors
    /// `vm_busy` if another process works with parts for so long; `internal` with the reason if an owner is unknown.
    pub(in crate::nido) async fn remove_unowned_parts(&self, lock_timeout: Duration) -> Result<u64> {
        let _lock = self.templates_exclusive(lock_timeout).await?;
        let due = self.store().parts_due()?;
        let removed = self.remove_unowned_parts_locked().await;
        nido_files::failpoint!("parts.removed");
        // Where it failed it would fail at each command; the next change of a template tries again.
        self.store().parts_collected(due)?;
        removed
    }

    async fn remove_unowned_parts_locked(&self) -> Result<u64> {
        let facts = PartFacts::read(self)?;
        if let Err(why) = &facts.owned {
            return Err(Error::internal(format!("the owners of template parts are unknown: {why}")));
        }
        if plan_parts(&facts).is_empty() {
            return Ok(0);
        }
        let PartFacts { is_due, owned, .. } = facts;
        let remove = move |images: &ImageStore| {
            let lock = images.lock()?;
            // Under the lock, so that no manifest is being written.
            let named = images.named_parts()?;
            let owned = owned.map(|owned| owned.union(&named).cloned().collect());
            let repairs = plan_parts(&PartFacts { is_due, stored: images.stored()?, owned });
            for repair in &repairs {
                nido_files::failpoint!("parts.removing");
                match repair {
                    PartRepair::RemovePart { sha256, .. } => images.remove_part(sha256, &lock)?,
                    PartRepair::RemoveManifest(name) => images.remove_unfinished_manifest(name, &lock)?,
                }
            }
            Ok(part_bytes(&repairs))
        };
        Ok(self.with_images(remove).await?)
    }

    /// The same for an operation that has done its work already: a failure is logged.
    pub(in crate::nido) async fn drop_unowned_parts(&self) {
        if let Err(error) = self.remove_unowned_parts(TEMPLATES_LOCK_TIMEOUT).await {
            tracing::warn!("unused template parts stay: {error}");
        }
    }

    /// The same if a part has lost its last owner, unless another process works with parts just now: then the next command
    /// does it.
    pub(crate) async fn remove_unowned_parts_if_due(&self) {
        if !self.store().parts_due().is_ok_and(|due| due != 0) {
            return;
        }
        if let Err(error) = self.remove_unowned_parts(Duration::ZERO).await {
            tracing::info!("unused template parts stay for now: {error}");
        }
    }
}
