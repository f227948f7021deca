//! The secrets that a VM's requests get, and the certificate authority under which its connections are ended.
//!
//! Invariant: the authority is the VM's own and stays the same while the VM exists. Its key is sealed in the VM's directory, because
//! QEMU may read what is there.

use std::sync::Arc;

use nido_api::error::{Error, Result};
use nido_api::name::SecretName;
use nido_engine::home::AUTHORITY;
use nido_engine::secrets::Secrets;
use nido_files::atomic_file::{Durability, write_private};
use nido_net::{Authority, Credentials, SecretSource, UseReport};
use nido_store::{Purpose, VmRow};
use tokio::sync::mpsc;

use super::Context;

impl Context {
    /// What the network of a VM needs for its secrets, and the certificate that its guest has to trust; `None` if it has none.
    ///
    /// # Errors
    /// The authority can be neither read nor made.
    pub fn credentials(&self, row: &VmRow, reports: mpsc::Sender<UseReport>) -> Result<Option<(Credentials, String)>> {
        if row.purpose != Purpose::Use || row.spec.secrets.is_empty() || !row.spec.net.has_card() {
            return Ok(None);
        }
        let secrets = Secrets::of(self.home());
        let authority = Arc::new(self.authority(row, &secrets)?);
        let certificate = authority.certificate().to_owned();
        let source: SecretSource = Arc::new(move |name: &SecretName| secrets.get(name));
        Ok(Some((Credentials::new(row.spec.secrets.clone(), source, authority, reports), certificate)))
    }

    fn authority(&self, row: &VmRow, secrets: &Secrets) -> Result<Authority> {
        let invalid = |e| Error::internal(format!("the VM's certificate authority cannot be made: {e}"));
        let path = self.vm_dir(&row.id).file(AUTHORITY);
        let about = format!("authority/{}", row.id);
        match std::fs::read(&path) {
            Ok(sealed) => Authority::of_key(&secrets.open(&about, &sealed)?).map_err(invalid),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let authority = Authority::generate().map_err(invalid)?;
                let sealed = secrets.seal(&about, authority.key())?;
                write_private(&path, &sealed, Durability::PowerCut).map_err(|e| Error::io_at("write", &path, e))?;
                Ok(authority)
            }
            Err(error) => Err(Error::io_at("read", &path, error)),
        }
    }
}
