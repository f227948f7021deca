//! What the supervisor arranges with the host when QEMU runs: a guardian, and a systemd scope.

use nido_engine::host::scope;

use super::state::Supervisor;

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
        tokio::spawn(async move {
            match scope::adopt(bus, &id, &name, &pids).await {
                Ok(()) => tracing::info!("the VM has its own systemd scope"),
                Err(why) => tracing::warn!("the VM stays in the unit that it was started in: {why}"),
            }
        });
    }
}
