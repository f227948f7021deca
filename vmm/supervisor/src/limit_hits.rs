//! Limits that the VM reached: recorded with the VM, and as events.

use std::time::Instant;

use nido_api::LimitHit;
use nido_store::Transition;

use super::state::Supervisor;

impl Supervisor {
    /// Records a limit that was reached.
    pub(super) fn on_limit_hit(&mut self, hit: LimitHit) {
        if self.recorded_limits.is_due(&hit, Instant::now()) {
            tracing::warn!(evidence = ?hit.evidence, "VM {} reached a limit: {}", self.row.spec.name, hit.describe());
            self.write(Transition::LimitHit(Box::new(hit)));
        }
    }
}
