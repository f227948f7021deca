//! Lists and describes VMs. Nothing here touches a socket but the question what a VM does: for how long it has been idle, and what
//! its network has refused.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use nido_api::egress::NetworkInfo;
use nido_api::error::Result;
use nido_api::machine::Machine;
use nido_api::name::{SnapshotName, TemplateName, VmName};
use nido_api::state::{Admission, Request as StateRequest, StateCause, VmState, admit};
use nido_api::{ForwardSpec, Limits, VmInfo, VmList, VmPage, VmQuery, VmRef, VmSpec, moment};
use nido_store::{Purpose, VmRow};
use nido_supervisor::control::{Reply, Request};
use nido_supervisor::lagging;

use super::Nido;
use super::denied::denied;

/// How long a list, or a description, waits for one supervisor.
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);

/// What is to be done to a VM.
#[derive(Debug, Clone, Copy)]
pub enum Intent<'a> {
    /// It is deleted.
    Delete {
        /// Also if it runs.
        force: bool,
    },
    /// It is what it was in a snapshot.
    Restore {
        /// Its name.
        snapshot: &'a SnapshotName,
    },
    /// Commands and copies.
    UseAgent,
    /// It is copied.
    Fork {
        /// The names of the copies.
        copies: &'a [VmName],
        /// What the copies may be.
        limits: &'a Limits,
    },
}

impl Nido {
    /// The row with what its supervisor could not write into it yet.
    pub(crate) fn current(&self, row: VmRow) -> VmRow {
        if row.state.is_inactive() {
            return row;
        }
        match lagging(&self.vm_dir(&row.id), &row) {
            Some(now) => VmRow { state: now.state, cause: now.cause, failure: now.failure, ..row },
            None => row,
        }
    }

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
                .map(|row| self.describe(&self.current(row.clone())))
                .collect(),
        })
    }

    /// When a VM ends because it is idle, if no client uses it until then.
    async fn idle_at(&self, row: &VmRow) -> Option<Timestamp> {
        let (Some(idle_ms), VmState::Running) = (row.spec.idle_ms, row.state) else { return None };
        let Ok(Reply::Status { idle_ms: Some(quiet_ms), .. }) = self.request(row, &Request::Status).await else {
            return None;
        };
        idle_end(idle_ms, quiet_ms)
    }

    /// What only the supervisor of a running VM knows: when it ends because it is idle, and what its network has done.
    pub(super) async fn status(&self, row: &VmRow) -> (Option<Timestamp>, Option<NetworkInfo>) {
        let is_of_interest = row.spec.net.has_card() || row.spec.idle_ms.is_some();
        if !matches!(row.state, VmState::Running | VmState::Paused) || !is_of_interest {
            return (None, None);
        }
        match tokio::time::timeout(STATUS_TIMEOUT, self.request(row, &Request::Status)).await {
            Ok(Ok(Reply::Status { idle_ms, network })) => {
                let idle = row.spec.idle_ms.zip(idle_ms).filter(|_| row.state == VmState::Running);
                (idle.and_then(|(limit, quiet)| idle_end(limit, quiet)), network.map(|network| *network))
            }
            _ => (None, None),
        }
    }

    /// The requested VMs, a page at a time, with the time at which each running VM ends for being idle. A supervisor that does not
    /// reply at once leaves its own out; only those of the page are asked.
    ///
    /// # Errors
    /// `spec_invalid` for a limit or a cursor that cannot be; of the store.
    pub async fn list_page(&self, query: &VmQuery) -> Result<VmPage> {
        let rows: Vec<_> = self.store().vms()?.into_iter().map(|row| self.current(row)).collect();
        let shown = rows.iter().filter(|row| !row.deleting && row.purpose == Purpose::Use);
        let mut page = query.page(shown.map(|row| self.describe(row)).collect())?;
        let by_id: HashMap<&str, &VmRow> = rows.iter().map(|row| (row.id.as_str(), row)).collect();
        let asked = page.vms.iter().map(async |vm| {
            let row = by_id.get(vm.id.as_str())?;
            tokio::time::timeout(STATUS_TIMEOUT, self.idle_at(row)).await.ok().flatten()
        });
        let ends = futures::future::join_all(asked).await;
        for (vm, idle_at) in page.vms.iter_mut().zip(ends) {
            vm.idle_at = idle_at;
        }
        Ok(page)
    }

    /// What a VM was asked to be.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub fn spec<'a>(&self, vm: impl Into<VmRef<'a>>) -> Result<VmSpec> {
        Ok(self.resolve(vm.into())?.spec)
    }

    /// The id of a VM.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub fn vm_id(&self, name: &VmName) -> Result<String> {
        Ok(self.store().vm_to_show(name)?.id)
    }

    /// What of a VM a policy is about: its id and its template.
    ///
    /// # Errors
    /// `vm_not_found`, `vm_replaced`.
    pub fn identity<'a>(&self, vm: impl Into<VmRef<'a>>) -> Result<(String, TemplateName)> {
        let row = self.resolve_to_show(vm.into())?;
        Ok((row.id, row.spec.template))
    }

    /// Whether an operation would be begun as things are: for who is asked before it is.
    ///
    /// # Errors
    /// Those with which the operation would fail at once.
    pub fn admits<'a>(&self, vm: impl Into<VmRef<'a>>, intent: &Intent<'_>) -> Result<()> {
        let row = match intent {
            Intent::Delete { .. } => self.resolve_to_show(vm.into())?,
            _ => self.resolve(vm.into())?,
        };
        match intent {
            Intent::Delete { force } => super::delete::check(&row, *force),
            Intent::Restore { snapshot } => super::snapshots::check(&row, &self.vm_dir(&row.id), snapshot),
            Intent::Fork { copies, limits } => self.check_fork(&row, copies, limits),
            Intent::UseAgent => match admit(row.state, StateRequest::UseAgent) {
                Admission::Denied(why) => Err(denied(&row, "used", why)),
                Admission::Do | Admission::AlreadySo => Ok(()),
            },
        }
    }

    /// Who made a VM, as far as it is known: [`crate::audit::Caller::owner`].
    ///
    /// # Errors
    /// `vm_not_found`, `vm_replaced`.
    pub fn owner<'a>(&self, vm: impl Into<VmRef<'a>>) -> Result<Option<String>> {
        Ok(self.resolve_to_show(vm.into())?.owner)
    }

    /// One VM.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub async fn info(&self, vm: impl Into<VmRef<'_>>) -> Result<VmInfo> {
        let row = self.current(self.resolve_to_show(vm.into())?);
        let mut info = self.describe(&row);
        (info.idle_at, info.network) = self.status(&row).await;
        Ok(info)
    }

    /// A row as the API describes it.
    pub(crate) fn describe(&self, row: &VmRow) -> VmInfo {
        let machine = row.machine.as_ref();
        let mut agent = row.agent.clone();
        agent.transport = machine.map(|m| m.transport.name().into());
        VmInfo {
            name: row.spec.name.clone(),
            id: row.id.clone(),
            status: row.state,
            status_cause: row.cause,
            status_detail: status_detail(row),
            template: row.spec.template.clone(),
            machine: machine.map(|m| m.machine.name().into()),
            machine_reason: machine.map(|m| m.reason.clone()),
            accel: machine.map(|m| m.accel.name().into()),
            isolation: machine.map(|m| m.accel.isolation().into()),
            confinement: machine.map(Machine::confinement_names).unwrap_or_default(),
            host_limits: machine.map(|m| m.host_limits.clone()).unwrap_or_default(),
            nested: row.spec.nested,
            cpus: row.spec.cpus,
            memory_mib: row.spec.memory_mib,
            disk_bytes: row.disk_bytes,
            disk_quota_bytes: row.spec.disk_quota_bytes,
            max_processes: row.spec.max_processes,
            net: row.spec.net,
            allow: row.spec.allow.clone(),
            net_limits: row.spec.net_limits,
            presets: row.spec.presets.clone(),
            secrets: row.spec.secrets.clone(),
            secret_env: row.spec.secret_env.clone(),
            ip_address: reachable_address(row),
            ssh_command: ssh_command(row),
            forwards: row.forwards.clone(),
            labels: row.spec.labels.clone(),
            ephemeral: row.spec.ephemeral,
            restart: row.spec.restart,
            restarts: self.restart_count(row),
            lease: row.spec.lease.clone(),
            agent,
            created_at: row.created_at,
            limits_hit: row.limits_hit.clone(),
            started_at: row.started_at,
            expires_at: row.expires_at,
            idle_at: None,
            network: None,
            failure: row.failure.clone(),
            timings: row.timings,
            warnings: warnings(row),
        }
    }
}

/// When a VM ends that may be idle for so long, and has been for this long.
fn idle_end(limit_ms: u64, quiet_ms: u64) -> Option<Timestamp> {
    let left = i64::try_from(limit_ms.saturating_sub(quiet_ms)).unwrap_or(i64::MAX);
    moment::now().checked_add(SignedDuration::from_millis(left)).ok()
}

/// What its user should know: about the machine, and about rules that allow more than they seem to.
fn warnings(row: &VmRow) -> Vec<String> {
    let of_machine = row.machine.iter().flat_map(|machine| machine.warnings.iter().cloned());
    of_machine.chain(row.spec.rule_warnings()).collect()
}

/// What the state does not include: why the VM is paused or stopped, or why its row cannot be read.
fn status_detail(row: &VmRow) -> Option<String> {
    let unreadable = row.unreadable.as_ref().map(|why| format!("its row in the store cannot be read: {why}"));
    let cause = row.cause.filter(|cause| *cause != StateCause::User);
    unreadable.or_else(|| cause.map(|cause| cause.detail().into()))
}

/// The port of ssh in a guest.
const SSH_PORT: u16 = 22;

/// An address at which this host reaches the guest: that of its forwards. The guest's own address is one on a network inside QEMU, which
/// nothing else reaches.
fn reachable_address(row: &VmRow) -> Option<String> {
    let forward = forward_to(row, SSH_PORT).or_else(|| forwards_in_use(row).next())?;
    Some(connectable(forward.host).to_string())
}

/// A command that opens an ssh session through a forward of the guest's ssh port. Without one there is nothing that connects.
fn ssh_command(row: &VmRow) -> Option<String> {
    let ForwardSpec { host, host_port, .. } = forward_to(row, SSH_PORT)?;
    Some(format!("ssh -p {host_port} root@{}", connectable(*host)))
}

fn forward_to(row: &VmRow, port: u16) -> Option<&ForwardSpec> {
    forwards_in_use(row).find(|forward| forward.guest_port == port)
}

/// The forwards that a supervisor listens for.
fn forwards_in_use(row: &VmRow) -> impl Iterator<Item = &ForwardSpec> {
    let listens = matches!(row.state, VmState::Running | VmState::Paused);
    row.forwards.iter().filter(move |forward| listens && forward.host_port != 0)
}

/// The address that reaches what listens on `host`.
fn connectable(host: IpAddr) -> IpAddr {
    match host {
        IpAddr::V4(address) if address.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(address) if address.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        other => other,
    }
}
