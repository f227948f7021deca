//! What has to be done about an inventory. Pure.
//!
//! ```text
//!  row       directory  supervisor.lock  vm.lock   repairs
//!  any       any        held             any       none: the process that holds it takes care of the VM
//!  any       any        free             held      start a supervisor: QEMU lost its own
//!  deleting  any        free             free      finish the deletion
//!  running   there      free             free      record the unrecorded end
//!  running   missing    -                -         record that the files are lost
//!  stopped   any        free             free      delete it, if it is ephemeral or its session is over; else remove what an
//!                                                  interrupted snapshot or restore left
//!  none      empty      free             free      remove the directory
//!  none      with data  any              any       none: it is reported
//! ```

use nido_api::state::VmState;

use super::inventory::{Directory, Inventory, Lock, VmFacts};
use super::parts::{PartFacts, PartRepair, plan_parts};

/// What is done about a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::nido) enum VmRepair {
    /// Starts a supervisor for a QEMU that has none.
    Supervise,
    /// Records that the VM has ended.
    RecordEnd {
        /// Its directory, and its disk with it, is gone.
        files_lost: bool,
    },
    /// Removes its directory and its row.
    Delete,
    /// Removes what an interrupted snapshot or restore left in its directory.
    RemoveUnfinished,
    /// Writes the copy of its row into its directory.
    WriteRecord,
    /// Removes a directory that has no row and holds no data.
    RemoveEmptyDirectory,
}

/// What is done about the home.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::nido) enum Repair {
    /// Repairs of one VM, in this order.
    Vm {
        /// Its id.
        id: String,
        /// What is done.
        repairs: Vec<VmRepair>,
    },
    /// Removes the rest of a VM's directory whose deletion was interrupted.
    RemoveDeletedDirectory(String),
    /// Removes the file of a process that has ended.
    RemoveLivenessFile(String),
    /// Removes the scratch directory of a build that was killed.
    RemoveBuild(std::path::PathBuf),
    /// Removes a temporary file of a process that was killed.
    RemoveTemporaryFile(std::path::PathBuf),
    /// Removes template parts, and records that nothing is left to remove.
    Parts(Vec<PartRepair>),
}

/// What is reported, and left as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::nido) enum Finding {
    /// A directory with data has no row.
    UnknownVm(String),
    /// The directory of a VM is gone.
    FilesLost(String),
    /// The state of a VM is not one that this version of nido knows.
    UnknownState(String),
    /// It is unknown which template parts are used.
    PartsUnknown(String),
}

impl Finding {
    /// The id of a VM that has no row.
    pub(in crate::nido) fn unknown_vm(&self) -> Option<&str> {
        match self {
            Self::UnknownVm(id) => Some(id),
            _ => None,
        }
    }

    /// Why it is unknown which template parts are used.
    pub(in crate::nido) fn unknown_parts(&self) -> Option<&str> {
        match self {
            Self::PartsUnknown(why) => Some(why),
            _ => None,
        }
    }

    /// The id of a VM whose directory is gone.
    pub(in crate::nido) fn lost_files(&self) -> Option<&str> {
        match self {
            Self::FilesLost(id) => Some(id),
            _ => None,
        }
    }
}

/// What has to be done, and what is only reported.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::nido) struct Plan {
    /// In the order in which it is done: template parts last, because deleted VMs no longer own theirs.
    pub repairs: Vec<Repair>,
    /// What is reported.
    pub findings: Vec<Finding>,
}

/// Plans the repairs of everything that was found.
pub(super) fn plan(inventory: &Inventory) -> Plan {
    let mut plan = Plan::default();
    for vm in &inventory.vms {
        let repairs = plan_vm(vm);
        if !repairs.is_empty() {
            plan.repairs.push(Repair::Vm { id: vm.id.clone(), repairs });
        }
        plan.findings.extend(finding(vm));
    }
    plan.repairs.extend(inventory.deleted_directories.iter().cloned().map(Repair::RemoveDeletedDirectory));
    plan.repairs.extend(inventory.dead_processes.iter().cloned().map(Repair::RemoveLivenessFile));
    plan.repairs.extend(inventory.orphaned_builds.iter().cloned().map(Repair::RemoveBuild));
    plan.repairs.extend(inventory.temporary_files.iter().cloned().map(Repair::RemoveTemporaryFile));
    if let Some(parts) = &inventory.parts {
        let repairs = plan_parts(parts);
        if parts.is_due || !repairs.is_empty() {
            plan.repairs.push(Repair::Parts(repairs));
        }
        if let PartFacts { owned: Err(why), .. } = parts {
            plan.findings.push(Finding::PartsUnknown(why.clone()));
        }
    }
    plan
}

/// Plans the repairs of one VM, in order. After them nothing is left to repair.
pub(super) fn plan_vm(vm: &VmFacts) -> Vec<VmRepair> {
    let Some(row) = &vm.row else {
        let is_orphan = vm.directory == Directory::WithoutData && vm.is_unattended() && vm.qemu == Lock::Free;
        return if is_orphan { vec![VmRepair::RemoveEmptyDirectory] } else { Vec::new() };
    };
    match (vm.is_unattended(), vm.qemu) {
        (false, _) | (_, Lock::Unknown) => return Vec::new(),
        // A supervisor could not read the row.
        (true, Lock::Held) if row.state.is_none() => return Vec::new(),
        (true, Lock::Held) => return vec![VmRepair::Supervise],
        (true, Lock::Free) => {}
    }
    if row.deleting {
        return vec![VmRepair::Delete];
    }
    let Some(state) = row.state else { return Vec::new() };
    let mut repairs = Vec::new();
    if !state.is_inactive() {
        repairs.push(VmRepair::RecordEnd { files_lost: vm.directory == Directory::Missing });
    }
    let has_ended = state != VmState::Created;
    if row.ephemeral && has_ended || vm.abandoned {
        repairs.push(VmRepair::Delete);
        return repairs;
    }
    if vm.unfinished {
        repairs.push(VmRepair::RemoveUnfinished);
    }
    if vm.without_record {
        repairs.push(VmRepair::WriteRecord);
    }
    repairs
}

fn finding(vm: &VmFacts) -> Option<Finding> {
    let id = || vm.id.clone();
    match &vm.row {
        None => (vm.directory == Directory::WithData).then(|| Finding::UnknownVm(id())),
        Some(row) if row.deleting => None,
        Some(row) if row.state.is_none() => Some(Finding::UnknownState(id())),
        Some(_) => (vm.directory == Directory::Missing).then(|| Finding::FilesLost(id())),
    }
}

#[cfg(test)]
mod tests;
