//! The VM's disk quota while it runs: the limit of QEMU's files follows the snapshots and logs, and errors of the guest are explained.

use nido_engine::disk_quota::{DiskUsage, limit_file_size};
use nido_store::Purpose;

use super::launch::RunningQemu;
use super::state::Supervisor;

impl Supervisor {
    pub(super) fn disk_quota(&self) -> Option<u64> {
        self.row.spec.disk_quota_bytes.filter(|_| self.row.purpose == Purpose::Use)
    }

    /// What is left for the VM's own disk layer, for a QEMU that runs.
    pub(super) fn apply_disk_quota(&mut self, running: &RunningQemu) {
        let (Some(quota), Ok(pid)) = (self.disk_quota(), running.pid()) else { return };
        let Ok(usage) = DiskUsage::of(&self.dir) else { return };
        let limit = usage.layer_limit(quota);
        if self.layer_limit == Some(limit) {
            return;
        }
        match limit_file_size(pid, limit) {
            Ok(()) => self.layer_limit = Some(limit),
            Err(error) => tracing::error!("{error}"),
        }
    }

    /// A write of the guest has failed: whether for the quota.
    pub(super) fn explain_io_error(&mut self) {
        let Some(quota) = self.disk_quota() else { return };
        if let Some(hit) = DiskUsage::of(&self.dir).ok().and_then(|usage| usage.hit_by_guest(quota)) {
            self.on_limit_hit(hit);
        }
    }
}
