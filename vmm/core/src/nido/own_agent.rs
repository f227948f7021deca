//! A VM boots with the guest agent of this nido: its initramfs is composed of its template's base and the agent
//! inside this program. So a VM outlives changes of the protocol between nido and its agent, and its disk stays reachable.
//!
//! Guests that are loaded from saved memory have the agent that they were saved with; `wire::VERSION_OLDEST` is the oldest supported version.

use nido_api::error::{Error, Result};
use nido_images::{AGENT, agent_sha256, compose_initramfs};
use nido_store::BootParts;

use super::Nido;

impl Nido {
    /// The parts that a boot of these parts uses. Makes the initramfs if no VM has booted from such parts with this agent before.
    pub(super) async fn with_own_agent(&self, parts: BootParts) -> Result<BootParts> {
        if parts.agent.as_deref() == Some(agent_sha256()) {
            return Ok(parts);
        }
        // An agent that comes later in an initramfs replaces an earlier one.
        let base = parts.initramfs_base.clone().unwrap_or_else(|| parts.initramfs.clone());
        let store = nido_images::Store::new(self.home().root());
        let (path, below) = (self.home().blob(&base), base.clone());
        let made = tokio::task::spawn_blocking(move || compose_initramfs(&store, &path, AGENT));
        let made = made.await.map_err(|e| Error::internal(format!("the initramfs could not be created: {e}")))??;
        tracing::info!("the VM boots with this nido's guest agent");
        Ok(BootParts {
            initramfs: made.sha256,
            initramfs_base: Some(below),
            agent: Some(agent_sha256().to_owned()),
            ..parts
        })
    }
}
