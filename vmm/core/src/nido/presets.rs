//! Presets: what this home and this host make of them.

use nido_api::error::{Error, Result};
use nido_api::{AllowEntry, Limits, PresetList, PresetRules, VmSpec};

use super::Nido;
use crate::presets::{self, Host};

impl Nido {
    /// The presets that rules may name, with the rules that they have now.
    ///
    /// # Errors
    /// `internal`.
    pub async fn net_presets(&self) -> Result<PresetList> {
        self.with_host(presets::list).await
    }

    /// The specification with the rules of its presets.
    ///
    /// # Errors
    /// `spec_invalid`: a preset does not exist or cannot be used.
    pub async fn with_presets(&self, mut spec: VmSpec) -> Result<VmSpec> {
        spec.presets = self.expanded(spec.presets).await?;
        Ok(spec)
    }

    /// The limits, with rules in place of presets: they keep the rules that these have now.
    ///
    /// # Errors
    /// As those of [`Nido::with_presets`].
    pub async fn with_plain_rules(&self, mut limits: Limits) -> Result<Limits> {
        let is_preset = |entry: &AllowEntry| matches!(entry, AllowEntry::Preset(_));
        if let Some(entries) = limits.allow.take_if(|entries| entries.iter().any(is_preset)) {
            limits.allow = Some(self.with_host(move |home, host| presets::plain(&entries, home, host)).await?);
        }
        Ok(limits)
    }

    /// The same presets, with their rules.
    pub(super) async fn expanded(&self, mut presets: Vec<PresetRules>) -> Result<Vec<PresetRules>> {
        if presets.iter().all(PresetRules::is_expanded) {
            return Ok(presets);
        }
        self.with_host(move |home, host| {
            for preset in presets.iter_mut().filter(|preset| !preset.is_expanded()) {
                *preset = presets::expand(&preset.preset, home, host)?;
            }
            Ok(presets)
        })
        .await
    }

    /// Reads configuration on a thread of its own: a home directory may be on a slow disk.
    async fn with_host<T: Send + 'static>(
        &self,
        read: impl FnOnce(&std::path::Path, &Host) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let home = self.home().root().to_owned();
        let reading = tokio::task::spawn_blocking(move || read(&home, &Host::of_process()));
        reading.await.map_err(|e| Error::internal(format!("the presets could not be read: {e}")))?
    }
}
