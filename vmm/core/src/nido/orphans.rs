//! Directories below `vms/` that have no row: what a killed command left, or VMs whose row was lost with the store.
//!
//! ```text
//!  no data in it, locks free   removed by the next command that makes a VM
//!  data in it                  kept, whatever the store says; reported by doctor, and adopted only when that is asked for
//!  .gone-ID                    a deletion that was cut short: removed
//! ```
//!
//! Invariant: nothing that holds a disk or a snapshot is removed because a row is missing, and no template part that it stands on.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::time::Duration;

use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::state::VmState;
use nido_api::{AgentInfo, VmSpec};
use nido_engine::home::{DISK, REMOVED_PREFIX, SUPERVISOR_LOCK, VM_LOCK};
use nido_files::lock::{Held, is_held};
use nido_store::VmUpdate;
use nido_supervisor::context::remove_tree;
use nido_supervisor::control::Request;
use nido_supervisor::vm_record::{VmRecord, holds_data, remove_without_data};

use super::Nido;

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
    /// The ids of all directories below `vms/` that have no row.
    fn directories_without_row(&self) -> Result<Vec<String>> {
        // In this order: what gets its row meanwhile is not taken for an orphan.
        let entries = match std::fs::read_dir(self.home().vms()) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|e| Error::io("cannot list the VMs' directories", e))?,
        };
        let ids: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        let known = self.store().vm_ids()?;
        Ok(ids.into_iter().filter(|id| !id.starts_with(REMOVED_PREFIX) && !known.contains(id)).collect())
    }

    /// The ids of directories that have no row and hold data: VMs that the store does not know.
    ///
    /// # Errors
    /// Of the store or the disk.
    pub fn unknown_vms(&self) -> Result<Vec<String>> {
        let mut unknown = self.directories_without_row()?;
        unknown.retain(|id| holds_data(&self.vm_dir(id)));
        unknown.sort();
        Ok(unknown)
    }

    /// Removes directories that hold no data and have no row (a command was killed between making one and its row), and those
    /// whose deletion was cut short. Returns how many.
    pub(super) fn remove_orphans(&self) -> usize {
        let mut removed = 0;
        for id in self.directories_without_row().unwrap_or_default() {
            let dir = self.vm_dir(&id);
            if holds_data(&dir) {
                continue;
            }
            let Ok(Some(_held)) = Held::try_take(&dir.file(SUPERVISOR_LOCK)) else { continue };
            let is_orphan = matches!(self.store().vm_by_id(&id), Ok(None)) && !is_held(&dir.file(VM_LOCK));
            removed += usize::from(is_orphan && remove_without_data(&dir).is_ok());
        }
        removed + self.half_removed().filter(|path| remove_tree(path).is_ok()).count()
    }

    /// How many of them there are.
    pub(super) fn count_orphans(&self) -> Result<usize> {
        let ids = self.directories_without_row()?;
        Ok(ids.iter().filter(|id| !holds_data(&self.vm_dir(id))).count() + self.half_removed().count())
    }

    fn half_removed(&self) -> impl Iterator<Item = std::path::PathBuf> {
        let entries = std::fs::read_dir(self.home().vms()).into_iter().flatten().flatten();
        let removed = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(REMOVED_PREFIX));
        removed.map(|entry| entry.path())
    }

    /// Hashes of all template parts that VMs stand on, those of VMs without a row included. Where it cannot be told what such a
    /// VM stands on, that is every part.
    pub(super) fn parts_in_use(&self) -> Result<HashSet<String>> {
        let unknown = self.unknown_vms()?;
        let mut used = self.store().parts_in_use()?;
        for id in unknown {
            match VmRecord::read(&self.vm_dir(&id), &id) {
                Ok(record) => used.extend(record.hashes()),
                Err(why) => {
                    tracing::warn!("all template parts are kept: directory {id} has no row, and {why}");
                    used.extend(self.all_parts()?);
                }
            }
        }
        Ok(used)
    }

    fn all_parts(&self) -> Result<Vec<String>> {
        match std::fs::read_dir(self.home().blobs()) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            entries => {
                let entries = entries.map_err(|e| Error::io("cannot list the template parts", e))?;
                Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
            }
        }
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
            return Err(broken(format!("nido made it for itself ({}), and nobody needs it", record.purpose)));
        }
        let held = match Held::try_take(&dir.file(SUPERVISOR_LOCK)) {
            Ok(held) => held,
            Err(e) => return Err(Error::io("it cannot be locked", e)),
        };
        let runs = held.is_none() || is_held(&dir.file(VM_LOCK));
        let mut row = record.row()?;
        let (machine, origin, cid) = (row.machine.clone(), row.origin.clone(), row.cid);
        row.spec = VmSpec { ephemeral: false, lease: None, ..row.spec };
        row.state = match (runs, dir.file(DISK).exists()) {
            (true, _) => VmState::Running,
            (false, true) => VmState::Stopped,
            (false, false) => VmState::Created,
        };
        let wanted = row.spec.name.clone();
        for number in 1_u32.. {
            row.spec.name = if number == 1 { wanted.clone() } else { numbered(&wanted, number)? };
            match self.store().insert_vm(&row) {
                Err(error) if error.code() == Code::VmExists && number < 1000 => {}
                inserted => {
                    inserted?;
                    break;
                }
            }
        }
        let update = VmUpdate {
            machine,
            origin: Some(origin),
            cid: Some(cid.filter(|_| runs)),
            started_at: runs.then(jiff::Timestamp::now),
            ..VmUpdate::default()
        };
        self.store().update_vm(id, &update)?;
        self.context.write_record(&row)?;
        drop(held);
        if runs {
            self.settle(&row).await?;
            if let Ok(Ok(_)) = tokio::time::timeout(READY_TIMEOUT, self.ask(&row, &Request::Ready)).await {
                let agent = Some(AgentInfo { ready: true, ..AgentInfo::default() });
                self.store().update_vm(id, &VmUpdate { agent, ..VmUpdate::default() })?;
            }
        }
        let renamed = (row.spec.name != wanted).then_some(wanted);
        Ok((row.spec.name, renamed))
    }
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
