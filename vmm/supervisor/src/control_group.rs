//! The control group of a VM's QEMU in a delegated tree: made before QEMU is started, removed when it has ended. A systemd scope is
//! systemd's to remove.
//!
//! Invariant: the path of a group is in the VM's directory before the group is made and until it is removed, so the process that finds
//! the end of a killed VM can remove it.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::{Duration, Instant};

use nido_api::error::{Code, Error, Hint, Result};
use nido_engine::home::CONTROL_GROUP;
use nido_engine::host::control_group::{ControlGroup, GroupEvents};
use nido_engine::host::delegation::{Delegation, HostGroups, VARIABLE, host_groups};
use nido_engine::host::facts::is_in_memory;
use nido_engine::host::limits::plan;
use nido_engine::machine::Machine;
use nido_engine::qemu::GroupToJoin;
use nido_files::atomic_file::{Durability, write_private};

/// How long the kernel may take to see a group whose processes have ended as empty.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(1);
/// How often that is tried.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// The control group that limits a VM, and what of its events was seen.
#[derive(Debug)]
pub(crate) struct LimitedGroup {
    pub(crate) group: ControlGroup,
    pub(crate) seen: GroupEvents,
}

/// Makes the group of a QEMU that is about to be started, with the limits of its machine, if the host has a tree for it. The caller
/// holds the VM's lock.
///
/// # Errors
/// `spec_invalid` if the user has named a tree in which no group can be made. Otherwise the VM starts without limits, which `info`
/// shows.
pub(crate) fn make(dir: &Path, id: &str, machine: &Machine) -> Result<Option<GroupToJoin>> {
    remove(dir, id);
    let delegation = match host_groups() {
        Ok(HostGroups::Delegated(delegation)) => delegation,
        Ok(HostGroups::Scopes(_) | HostGroups::None(_)) => return Ok(None),
        Err(why) => return Err(unusable(&why.describe())),
    };
    match make_in(&delegation, dir, id, machine) {
        Ok(group) => Ok(Some(group)),
        Err(error) if delegation.is_named => {
            let shown = delegation.path.display();
            Err(unusable(&format!("no control group with limits can be made in {shown}: {error}")))
        }
        Err(error) => {
            tracing::warn!("the VM has no limits on the host: no control group can be made: {error}");
            Ok(None)
        }
    }
}

fn unusable(why: &str) -> Error {
    Error::new(Code::SpecInvalid, format!("{VARIABLE} cannot be used: {why}"))
        .hint(Hint::host(format!("name a delegated control group that has no processes, or unset {VARIABLE}")))
}

fn make_in(delegation: &Delegation, dir: &Path, id: &str, machine: &Machine) -> io::Result<GroupToJoin> {
    let group = delegation.group(id);
    write_private(&dir.join(CONTROL_GROUP), group.path().as_os_str().as_encoded_bytes(), Durability::Kill)?;
    delegation.enable_controllers();
    group.make(&plan(machine, is_in_memory(dir)))?;
    Ok(GroupToJoin { members: group.members()?, is_required: delegation.is_named })
}

/// Removes the group of a QEMU that has ended, if nido has made one. What cannot be removed stays recorded, and is logged.
pub(crate) fn remove(dir: &Path, id: &str) {
    let record = dir.join(CONTROL_GROUP);
    let text = match fs::read_to_string(&record) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return,
        Err(error) => return tracing::warn!("cannot read {}: {error}", record.display()),
    };
    let removed = ControlGroup::of_record(&text, id).map_or(Ok(()), |group| remove_when_empty(&group));
    if let Err(error) = removed.and_then(|()| fs::remove_file(&record)) {
        tracing::warn!("the control group {} stays for now: {error}", text.escape_debug());
    }
}

fn remove_when_empty(group: &ControlGroup) -> io::Result<()> {
    let deadline = Instant::now() + EMPTY_TIMEOUT;
    loop {
        match group.remove() {
            Err(error) if error.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(RETRY_INTERVAL);
            }
            removed => return removed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_group_is_removed_and_then_its_record() {
        let dir = tempfile::tempdir().unwrap();
        let (group, record) = (dir.path().join("nido-00ff"), dir.path().join(CONTROL_GROUP));
        remove(dir.path(), "00ff");
        let note = || fs::write(&record, group.as_os_str().as_encoded_bytes()).unwrap();
        note();
        fs::create_dir(&group).unwrap();
        remove(dir.path(), "00ff");
        assert!(!group.exists() && !record.exists());
        // The host has restarted.
        note();
        remove(dir.path(), "00ff");
        assert!(!record.exists());
        // It cannot be removed: the record stays for the next attempt.
        note();
        fs::create_dir_all(group.join("member")).unwrap();
        remove(dir.path(), "00ff");
        assert!(group.exists() && record.exists());
        // A record of another VM's group is not followed.
        fs::remove_dir(group.join("member")).unwrap();
        remove(dir.path(), "00fe");
        assert!(group.exists() && !record.exists());
    }
}
