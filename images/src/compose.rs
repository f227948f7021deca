//! An initramfs for another agent than the template was built with: the template's own base and that agent, as a part of the store.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use nido_files::atomic_file::{PRIVATE, TemporaryFile};

use crate::error::ImageError;
use crate::initramfs::with_agent;
use crate::manifest::Part;
use crate::store::Store;

/// Puts `base` (an initramfs, with an agent or without) and `agent` together; gives the part that this makes. What is there already
/// is made no second time.
///
/// # Errors
/// [`ImageError::Io`] if the base cannot be read or the part cannot be written.
pub fn compose_initramfs(store: &Store, base: &Path, agent: &[u8]) -> Result<Part, ImageError> {
    let below = fs::read(base).map_err(|error| ImageError::io("read", base, error))?;
    let too_large = |error| ImageError::io("create an initramfs from", base, std::io::Error::other(error));
    let bytes = with_agent(&below, agent).map_err(too_large)?;
    let part = Part { sha256: crate::digest::sha256(&bytes), bytes: bytes.len() as u64 };
    if store.blob_path(&part).exists() {
        return Ok(part);
    }
    store.create()?;
    let directory = base.parent().unwrap_or_else(|| Path::new("."));
    let failed = |error| ImageError::io("write in", directory, error);
    let mut temporary = TemporaryFile::beside(base, PRIVATE).map_err(failed)?;
    // Before the store is locked, so that it is not locked for long.
    temporary.file().write_all(&bytes).and_then(|()| temporary.file().sync_all()).map_err(failed)?;
    let lock = store.lock()?;
    store.import(temporary.path(), &part, &lock)?;
    Ok(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After a change of the agent's protocol, VMs that existed booted an agent that nido no longer talked to.
    #[test]
    fn another_agent_is_put_on_the_same_base() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::new(home.path());
        store.create().unwrap();
        let base = crate::initramfs::base(&[]).unwrap();
        let path = home.path().join("base");
        fs::write(&path, &base).unwrap();
        let part = compose_initramfs(&store, &path, b"new agent").unwrap();
        assert_eq!(fs::read(store.blob_path(&part)).unwrap(), with_agent(&base, b"new agent").unwrap());
        assert_eq!(compose_initramfs(&store, &path, b"new agent").unwrap(), part);
        // On one that has an agent already, the later one counts.
        let whole = store.blob_path(&part);
        let again = compose_initramfs(&store, &whole, b"newer agent").unwrap();
        let entries = crate::cpio::tests::read(&fs::read(store.blob_path(&again)).unwrap());
        let agents: Vec<_> = entries.iter().filter(|entry| entry.0 == "init").map(|entry| entry.2.clone()).collect();
        assert_eq!(agents.last().unwrap(), b"newer agent");
    }
}
