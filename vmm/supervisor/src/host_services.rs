//! What the supervisor arranges with the host when QEMU runs: a guardian, and a systemd scope.

use nido_api::{HostLimits, LimitHit, LimitKind};
use nido_engine::host::limits::{self, ScopeGroup};
use nido_engine::host::scope;
use nido_engine::qemu::QemuExit;
use nido_store::Transition;

use super::state::{Report, Supervisor};

impl Supervisor {
    /// Starts the guardian if none runs, unless this VM is about to end. While there is a supervisor, a guardian that was killed
    /// is replaced.
    pub(super) fn ensure_guardian(&self) {
        if !self.lifecycle.is_ending() {
            self.context.ensure_guardian();
        }
    }

    /// Where there is systemd, QEMU and this supervisor leave the unit of the process that started them.
    pub(super) fn leave_callers_unit(&self, qemu: Option<i32>) {
        let (Some(bus), Some(qemu)) = (scope::bus(), qemu) else { return };
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        let (id, name, pids) = (self.row.id.clone(), self.row.spec.name.to_string(), [own, qemu]);
        let in_memory = crate::jobs::is_in_memory(self.dir.path());
        let (planned, reports) = (limits::plan(&self.machine, in_memory), self.reports.0.clone());
        tokio::spawn(async move {
            match scope::adopt(bus, &id, &name, &pids, &planned).await {
                Ok(()) => {
                    tracing::info!("the VM has its own systemd scope");
                    let found = own_group(&id).map(|group| group.in_force()).unwrap_or_default();
                    let _ = reports.send(Report::HostLimits(Box::new(found))).await;
                }
                Err(why) => tracing::warn!("the VM stays in the unit that it was started in: {why}"),
            }
        });
    }

    /// Records what the kernel limits.
    pub(super) fn on_host_limits(&mut self, found: HostLimits) {
        if found != self.machine.host_limits {
            self.machine.host_limits = found;
            self.write(Transition::MachineChanged(self.machine.clone()));
        }
    }

    /// Finds out whether the kernel killed QEMU because the VM's memory on the host was used up.
    pub(super) fn note_memory_limit(&mut self, exit: QemuExit) {
        let was_killed = matches!(exit, QemuExit::Signal(9) | QemuExit::Unknown);
        let Some(group) = own_group(&self.row.id).filter(|_| was_killed) else { return };
        let (kills, limit) = (group.oom_kills(), group.in_force().memory_bytes);
        if kills == 0 {
            return;
        }
        self.lifecycle.evidence().memory_limit = limit;
        let hit = LimitHit::new(LimitKind::Memory, limit, "QEMU was killed: the VM's memory on the host was used up");
        let hit = hit.with("oom_kill", kills);
        self.on_limit_hit(group.memory_peak().map_or(hit.clone(), |peak| hit.with("peak_bytes", peak)));
    }
}

/// The control group of this supervisor and its QEMU, if it is the VM's own.
fn own_group(id: &str) -> Option<ScopeGroup> {
    ScopeGroup::of_process(std::process::id(), id)
}
