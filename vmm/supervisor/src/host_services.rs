//! What the supervisor arranges with the host when QEMU runs: a watcher of the time to live, and a systemd scope.

use nido_engine::host::scope;
use nido_engine::qemu::QemuProcess;

use super::state::Supervisor;

impl Supervisor {
    /// Has a small process end QEMU when its time is up, should this supervisor not be there to.
    pub(super) fn watch_ttl(&self, qemu: &QemuProcess) {
        if let Some(at) = self.row.expires_at
            && let Err(error) = self.context.start_ttl_watcher(&self.row.id, at, qemu)
        {
            tracing::error!("the time to live ends only while the supervisor runs: {error}");
        }
    }

    /// Where there is systemd, QEMU and this supervisor leave the unit of the process that started them.
    pub(super) fn leave_callers_unit(&self, qemu: &QemuProcess) {
        let Some(bus) = scope::bus() else { return };
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        let (id, name, pids) = (self.row.id.clone(), self.row.spec.name.to_string(), [own, qemu.pid()]);
        tokio::spawn(async move {
            match scope::adopt(bus, &id, &name, &pids).await {
                Ok(()) => tracing::info!("the VM has its own systemd scope"),
                Err(why) => tracing::warn!("the VM stays in the unit that it was started in: {why}"),
            }
        });
    }
}
