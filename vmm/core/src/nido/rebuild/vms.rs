//! The VMs of a store that is rebuilt: rows that could be read stay as they are; the others come from the VMs' directories.

use std::collections::HashSet;

use nido_api::error::Result;
use nido_engine::home::{Home, VM_LOCK};
use nido_files::lock::is_held;
use nido_store::{Purpose, Store};
use nido_supervisor::vm_record::VmRecord;

use super::{RebuildReport, RestoredVm, SkippedDirectory};
use crate::nido::Nido;
use crate::nido::reconcile::{insert_recovered, recovered_row};

/// Completes the rows of VMs. Returns the ids of running VMs whose rows come from their directories.
pub(super) fn take_vms(
    store: &Store,
    home: &Home,
    directories: &[String],
    done: &mut RebuildReport,
) -> Result<Vec<String>> {
    let there: HashSet<_> = directories.iter().collect();
    let mut known = HashSet::new();
    for row in store.vms()? {
        let has_directory = there.contains(&row.id);
        if row.unreadable.is_none() && has_directory {
            if row.purpose == Purpose::Use {
                let name = row.spec.name.to_string();
                done.vms.push(RestoredVm { name, from_directory: false, renamed_from: None });
            }
            known.insert(row.id);
            continue;
        }
        if !has_directory && row.purpose == Purpose::Use {
            done.lost.push(format!("VM {}: its directory is gone", row.spec.name));
        }
        store.discard_vm(&row.id)?;
    }
    let mut running = Vec::new();
    for id in directories.iter().filter(|id| !known.contains(*id)) {
        match take_vm(store, home, id) {
            Ok(Some(vm)) => done.vms.push(vm),
            Ok(None) => {}
            Err(why) => {
                done.skipped.push(SkippedDirectory { id: id.clone(), reason: why });
                continue;
            }
        }
        if is_held(&home.vm(id).file(VM_LOCK)) {
            running.push(id.clone());
        }
    }
    done.vms.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(running)
}

/// Gives the VM in a directory its row again. `None`: it is nido's own, and reconciliation ends it.
fn take_vm(store: &Store, home: &Home, id: &str) -> Result<Option<RestoredVm>, String> {
    let dir = home.vm(id);
    let record = VmRecord::read(&dir, id)?;
    let told = |error: nido_api::error::Error| error.to_string();
    let (mut row, last_start) = recovered_row(&dir, &record, is_held(&dir.file(VM_LOCK))).map_err(told)?;
    let wanted = insert_recovered(store, &mut row, last_start).map_err(told)?;
    Ok(record.is_of_user().then(|| RestoredVm {
        name: row.spec.name.to_string(),
        from_directory: true,
        renamed_from: wanted.map(|name| name.to_string()),
    }))
}

impl Nido {
    /// Waits until the agents of adopted VMs have replied, and records it.
    pub(super) async fn await_agents(&self, ids: &[String]) -> Result<()> {
        for id in ids {
            // Not within the condition: the store would stay locked.
            let row = self.store().vm_by_id(id)?;
            if let Some(row) = row.filter(|row| row.purpose == Purpose::Use) {
                self.await_ready(&row).await;
            }
        }
        Ok(())
    }
}
