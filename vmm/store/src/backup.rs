//! Backups of the store: a whole copy, once a day, the last two kept.
//!
//! Invariant: a backup appears under its name only when it is complete and on the disk.

use std::fs;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nido_api::error::{Error, Result};
use nido_files::atomic_file::{Durability, rename_synced};

use super::{Store, fault};

impl Store {
    /// Writes a copy of the store to `path`; what was there becomes `older`.
    ///
    /// # Errors
    /// `disk_full`, `internal`; then both are as they were.
    pub fn back_up(&self, path: &Path, older: &Path) -> Result<()> {
        let temporary = path.with_extension("backup.new");
        let broken = |e| Error::io("cannot write a backup of the store", e);
        let _ = fs::remove_file(&temporary);
        let copied = || -> Result<()> {
            // It holds secrets. SQLite writes into a file that is there, if it is empty.
            let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary);
            let file = file.map_err(broken)?;
            let name = temporary.to_string_lossy();
            self.connection.execute("VACUUM INTO ?1", [name.as_ref()]).map_err(fault)?;
            file.sync_all().map_err(broken)
        };
        if let Err(error) = copied() {
            let _ = fs::remove_file(&temporary);
            return Err(error);
        }
        match rename_synced(path, older, Durability::Kill) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(broken(e)),
            _ => {}
        }
        rename_synced(&temporary, path, Durability::PowerCut).map_err(broken)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_backup_can_be_opened_and_the_one_before_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("nido.db")).unwrap();
        let (last, older) = (dir.path().join("nido.db.backup"), dir.path().join("nido.db.backup.1"));
        store.back_up(&last, &older).unwrap();
        assert!(last.exists() && !older.exists());
        store.back_up(&last, &older).unwrap();
        for backup in [&last, &older] {
            assert_eq!(fs::metadata(backup).unwrap().permissions().mode() & 0o777, 0o600);
            assert!(Store::open(backup).unwrap().vms().unwrap().is_empty());
        }
    }
}
