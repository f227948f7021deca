//! A VM for one command: created, used, deleted.
//!
//! Invariant: when [`Nido::run`] returns, the VM is gone. If its future is dropped, the caller deletes it with [`Nido::undo`]; should
//! the caller be killed, the VM is ephemeral and its idle limit ends it.

use nido_api::error::Result;
use nido_api::{Grant, StartRequest, StartStage, VmInfo, VmSpec};

use super::Nido;
use super::vm_in_progress::VmInProgress;

/// How long the VM of a run outlives a caller that was killed, in milliseconds.
pub const RUN_IDLE_MS: u64 = 60_000;

impl Nido {
    /// Creates a VM from `spec` for `run`, does `work` with it, and deletes it, also if `work` fails. `begun` holds which
    /// VM that is, from the moment it exists.
    ///
    /// # Errors
    /// Those of [`Nido::spawn`] and of `work`; of a VM that cannot be deleted.
    pub async fn run<T, W>(
        &self,
        (spec, start): (VmSpec, StartRequest),
        grant: &Grant,
        begun: &VmInProgress,
        progress: &mut (dyn FnMut(StartStage) + Send),
        work: impl FnOnce(VmInfo) -> W + Send,
    ) -> Result<T>
    where
        W: Future<Output = Result<T>> + Send,
        T: Send,
    {
        let spec = VmSpec { ephemeral: true, idle_ms: spec.idle_ms.or(Some(RUN_IDLE_MS)), ..spec };
        let vm = Box::pin(self.spawn_tracked(spec, start, grant, begun, progress)).await?;
        let outcome = work(vm).await;
        let deleted = self.undo(begun).await;
        let outcome = outcome?;
        deleted.map(|()| outcome)
    }
}
