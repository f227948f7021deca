//! VMs that the store does not know: directories that hold data and have no row, because the store was lost or replaced.
//!
//! They are reported, and get a row again only when a user requests it.

use nido_api::VmSpec;
use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::state::VmState;
use nido_engine::home::{DISK, SUPERVISOR_LOCK, VM_LOCK, VmDir};
use nido_files::lock::{HeldLock, is_held};
use nido_store::{AdoptedStart, Store, Transition, VmRow};
use nido_supervisor::control::Request;
use nido_supervisor::vm_record::VmRecord;
use std::time::Duration;

use super::inventory::unknown_vms;
use crate::nido::Nido;

/// How long the supervisor of an adopted VM may take to report that its agent is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest name of a VM, in bytes.
const NAME_MAX: usize = 63;

/// What adopting the directories without a row has done.
#[derive(Debug, Default)]
pub struct Adoption {
    /// The VMs that have a row again: their name, and the name they had, if that one is taken.
    pub adopted: Vec<(VmName, Option<VmName>)>,
    /// Directories that have none still, each with the reason.
    pub skipped: Vec<(String, String)>,
}

impl Nido {
    /// The ids of directories that have no row and hold data: VMs that the store does not know.
    ///
    /// # Errors
    /// Of the store or the disk.
    pub fn unknown_vms(&self) -> Result<Vec<String>> {
        unknown_vms(self)
    }

    /// Gives every VM that the store does not know its row again. What is ephemeral is kept from then on; a name that is taken
    /// is replaced.
    ///
    /// # Errors
    /// Of the store or the disk.
    pub async fn adopt_unknown_vms(&self) -> Result<Adoption> {
        let mut done = Adoption::default();
        for id in self.unknown_vms()? {
            match self.adopt(&id).await {
                Ok(adopted) => done.adopted.push(adopted),
                Err(why) => done.skipped.push((id, why.to_string())),
            }
        }
        Ok(done)
    }

    async fn adopt(&self, id: &str) -> Result<(VmName, Option<VmName>)> {
        let dir = self.vm_dir(id);
        let broken = |why: String| Error::new(Code::Internal, why);
        let record = VmRecord::read(&dir, id).map_err(broken)?;
        if !record.is_of_user() {
            return Err(broken(format!("nido created it for itself ({}), and no longer needs it", record.purpose)));
        }
        let held = match HeldLock::try_take(&dir.file(SUPERVISOR_LOCK)) {
            Ok(held) => held,
            Err(e) => return Err(Error::io("it cannot be locked", e)),
        };
        let runs = held.is_none() || is_held(&dir.file(VM_LOCK));
        let (mut row, last_start) = recovered_row(&dir, &record, runs)?;
        let wanted = insert_recovered(&self.store(), &mut row, last_start)?;
        self.context.write_record(&row)?;
        drop(held);
        if runs {
            self.reconcile_vm(&row).await?;
            self.await_ready(&row).await;
        }
        Ok((row.spec.name, wanted))
    }

    /// Waits for a while until the supervisor of an adopted VM has recorded that the agent replies.
    pub(in crate::nido) async fn await_ready(&self, row: &VmRow) {
        let is_ready = self.request(row, &Request::Ready);
        if !matches!(tokio::time::timeout(READY_TIMEOUT, is_ready).await, Ok(Ok(_))) {
            tracing::warn!("the guest agent of VM {} does not reply yet", row.spec.name);
        }
    }
}

/// The row of a VM that the store does not know, from its directory, and what is to be changed in it once it is inserted. A
/// user's ephemeral VM is kept from now on.
///
/// # Errors
/// Its record was written by a nido that is too different.
pub(in crate::nido) fn recovered_row(dir: &VmDir, record: &VmRecord, runs: bool) -> Result<(VmRow, AdoptedStart)> {
    let mut row = record.row()?;
    if record.is_of_user() {
        row.spec = VmSpec { ephemeral: false, lease: None, ..row.spec };
    }
    row.state = match (runs, dir.file(DISK).exists()) {
        (true, _) => VmState::Running,
        (false, true) => VmState::Stopped,
        (false, false) => VmState::Created,
    };
    let last_start = AdoptedStart {
        machine: row.machine.clone(),
        origin: row.origin.clone(),
        cid: row.cid.filter(|_| runs),
        started_at: record.started_at().or_else(|| runs.then(jiff::Timestamp::now)),
        expires_at: record.expires_at().filter(|_| runs),
    };
    Ok((row, last_start))
}

/// Inserts such a row. A name that is taken gets a number. Returns the name that it had then.
///
/// # Errors
/// Of the store.
pub(in crate::nido) fn insert_recovered(
    store: &Store,
    row: &mut VmRow,
    last_start: AdoptedStart,
) -> Result<Option<VmName>> {
    let wanted = row.spec.name.clone();
    for number in 1_u32.. {
        row.spec.name = if number == 1 { wanted.clone() } else { numbered(&wanted, number)? };
        match store.insert_vm(row) {
            Err(error) if error.code() == Code::VmExists && number < 1000 => {}
            inserted => {
                inserted?;
                break;
            }
        }
    }
    store.transition(&row.id, &Transition::Adopted(Box::new(last_start)))?.log(&row.id, "its last start");
    Ok((row.spec.name != wanted).then_some(wanted))
}

/// A name with a number behind it, no longer than names may be.
fn numbered(name: &VmName, number: u32) -> Result<VmName> {
    let tail = format!("-{number}");
    let head: String = name.as_str().chars().take(NAME_MAX - tail.len()).collect();
    format!("{}{tail}", head.trim_end_matches('-')).parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_numbered_name_is_a_name() {
        let name = |text: &str| text.parse::<VmName>().unwrap();
        assert_eq!(numbered(&name("web"), 2).unwrap(), name("web-2"));
        let long = name(&format!("{}-{}", "a".repeat(60), "b".repeat(2)));
        assert_eq!(numbered(&long, 2).unwrap().as_str().len(), 62);
    }
}
