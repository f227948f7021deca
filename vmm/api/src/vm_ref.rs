//! Which VM a request is about.

use crate::error::{Code, Error};
use crate::name::VmName;

/// A reference to a VM: by its name, or by its name and id, if another VM that has the name meanwhile must not be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmRef<'a> {
    /// Its name.
    pub name: &'a VmName,
    /// Its id, if the request is about exactly that VM.
    pub id: Option<&'a str>,
}

impl<'a> From<&'a VmName> for VmRef<'a> {
    fn from(name: &'a VmName) -> Self {
        Self { name, id: None }
    }
}

impl VmRef<'_> {
    /// Checks that the VM that has the name now, which has this id, is the one that is referred to.
    ///
    /// # Errors
    /// `vm_replaced`.
    pub fn check(&self, id: &str) -> Result<(), Error> {
        if self.id.is_none_or(|meant| meant == id) {
            return Ok(());
        }
        let words = format!("VM '{}' has been replaced: the VM that you referred to no longer exists", self.name);
        Err(Error::new(Code::VmReplaced, words).hint("check the VM that has this name now, then repeat the request"))
    }
}
