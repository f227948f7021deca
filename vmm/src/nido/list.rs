//! Telling about VMs. Nothing here touches a socket but the question for how long a VM has been idle.

use jiff::{SignedDuration, Timestamp};

use super::Nido;
use crate::api::{VmInfo, VmList, VmSpec};
use crate::error::Result;
use crate::name::VmName;
use crate::state::VmState;
use crate::store::{Purpose, VmRow};
use crate::supervisor::control::{Answer, Request};

impl Nido {
    /// All VMs, in order of creation.
    ///
    /// # Errors
    /// Of the store.
    pub fn list(&self) -> Result<VmList> {
        let rows = self.store().vms()?;
        Ok(VmList {
            vms: rows
                .iter()
                .filter(|row| !row.deleting && row.purpose == Purpose::Use)
                .map(|row| self.describe(row))
                .collect(),
        })
    }

    /// What a VM was asked to be.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub fn spec(&self, name: &VmName) -> Result<VmSpec> {
        Ok(self.store().vm_by_name(name)?.spec)
    }

    /// One VM.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub async fn info(&self, name: &VmName) -> Result<VmInfo> {
        let row = self.store().vm_by_name(name)?;
        let mut info = self.describe(&row);
        if let (Some(idle_ms), VmState::Running) = (row.spec.idle_ms, row.state)
            && let Ok(Answer::Status { idle_ms: Some(quiet_ms) }) = self.ask(&row, &Request::Status).await
        {
            let left = i64::try_from(idle_ms.saturating_sub(quiet_ms)).unwrap_or(i64::MAX);
            info.idle_at = Timestamp::now().checked_add(SignedDuration::from_millis(left)).ok();
        }
        Ok(info)
    }

    /// A row as it is told.
    pub(crate) fn describe(&self, row: &VmRow) -> VmInfo {
        let machine = row.machine.as_ref();
        let mut agent = row.agent.clone();
        agent.transport = machine.map(|m| m.transport.name().into());
        VmInfo {
            name: row.spec.name.clone(),
            id: row.id.clone(),
            status: row.state,
            template: row.spec.template.clone(),
            machine: machine.map(|m| m.machine.name().into()),
            machine_reason: machine.map(|m| m.reason.clone()),
            accel: machine.map(|m| m.accel.name().into()),
            isolation: machine.map(|m| m.accel.isolation().into()),
            nested: row.spec.nested,
            cpus: row.spec.cpus,
            memory_mib: row.spec.memory_mib,
            disk_bytes: row.disk_bytes,
            net: row.spec.net,
            ip_address: row.ip_address.clone(),
            // No template of ours has an ssh server.
            ssh_command: None,
            forwards: row.forwards.clone(),
            labels: row.spec.labels.clone(),
            ephemeral: row.spec.ephemeral,
            lease: row.spec.lease.clone(),
            agent,
            created_at: row.created_at,
            started_at: row.started_at,
            expires_at: row.expires_at,
            idle_at: None,
            failure: row.failure.clone(),
            timings: row.timings,
            warnings: machine.map(|m| m.warnings.clone()).unwrap_or_default(),
        }
    }
}
