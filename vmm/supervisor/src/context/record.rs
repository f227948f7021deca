//! `vm.json` of a VM, kept up to date with its row.

use nido_api::error::Result;
use nido_files::atomic_file::Durability;
use nido_store::VmRow;

use super::Context;
use crate::vm_record::VmRecord;

impl Context {
    /// Writes down beside the VM's disk what its row needs.
    ///
    /// # Errors
    /// `disk_full`, `internal`.
    pub fn write_record(&self, row: &VmRow) -> Result<()> {
        self.prepare_record(row)?()
    }

    /// The same as a job for another thread: it waits for the disk.
    ///
    /// # Errors
    /// `internal`.
    pub fn prepare_record(&self, row: &VmRow) -> Result<impl FnOnce() -> Result<()> + Send + use<>> {
        let (record, dir) = (VmRecord::of(row)?, self.vm_dir(&row.id));
        // An ephemeral VM does not survive a power failure anyway.
        let durability = if row.spec.ephemeral { Durability::Kill } else { Durability::PowerCut };
        Ok(move || record.write(&dir, durability))
    }

    /// The same for a row that has changed in the store. A failure is logged: the row counts.
    pub fn refresh_record(&self, id: &str) {
        let row = self.store().vm_by_id(id);
        // What cannot be read must not replace what was written when it could.
        let readable = row.map(|row| row.filter(|row| row.unreadable.is_none()));
        let written = readable.and_then(|row| row.map_or(Ok(()), |row| self.write_record(&row)));
        if let Err(error) = written {
            tracing::warn!("the record of VM {id} is not up to date: {error}");
        }
    }
}
