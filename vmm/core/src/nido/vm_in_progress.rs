//! The VM that an operation has begun to make, known by its id, so that undoing the operation never meets another VM that has
//! got the same name meanwhile.

use std::sync::{Arc, Mutex, PoisonError};

use nido_api::error::Result;

use super::Nido;

/// Which VM an operation has begun to make. Clones are the same value.
#[derive(Debug, Clone, Default)]
pub struct VmInProgress(Arc<Mutex<Option<String>>>);

impl VmInProgress {
    /// Its id, if one was begun.
    #[must_use]
    pub fn id(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set(&self, id: &str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(id.to_owned());
    }
}

impl Nido {
    /// Deletes the VM that was begun, in any state; does nothing if there was none, or it is deleted already.
    ///
    /// # Errors
    /// Those of [`Nido::delete`].
    pub async fn undo(&self, begun: &VmInProgress) -> Result<()> {
        match begun.id() {
            Some(id) => self.delete_id(&id).await,
            None => Ok(()),
        }
    }

    /// Removes the VM of this id, whatever its state and its name.
    pub(super) async fn delete_id(&self, id: &str) -> Result<()> {
        let Some(row) = self.store().vm_by_id(id)? else { return Ok(()) };
        match self.delete_row(&row, true).await {
            // Its supervisor may have been quicker.
            Err(error) if self.store().vm_by_id(id)?.is_some() => Err(error),
            _ => Ok(()),
        }
    }
}
