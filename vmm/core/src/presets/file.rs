//! A file of presets: nido's own, and those in `presets.d`. Pure.
//!
//! ```toml
//! version = 1
//! [presets.corp]
//! description = "Our mirror"
//! rules = ["mirror.example.com:443"]
//! warning = "optional"
//! ```

use std::collections::BTreeMap;

use nido_api::{EGRESS_RULES_MAX, EgressRule, PresetInfo, PresetName};
use serde::Deserialize;

/// What a file defines.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PresetFile {
    /// The version of the list.
    #[serde(default)]
    pub(super) version: u32,
    /// Where it comes from, in the words of the list.
    #[serde(skip)]
    pub(super) source: String,
    #[serde(default)]
    pub(super) presets: BTreeMap<PresetName, Preset>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Preset {
    #[serde(default)]
    description: String,
    rules: Vec<EgressRule>,
    #[serde(default)]
    warning: Option<String>,
}

/// What the text of a file defines, or a sentence with the line that is wrong.
pub(super) fn parse(text: &str) -> Result<PresetFile, String> {
    let line = |at: usize| text[..at.min(text.len())].matches('\n').count() + 1;
    let file: PresetFile = toml::from_str(text).map_err(|e| {
        let at = e.span().map_or(1, |span| line(span.start));
        format!("line {at}: {}", e.message().replace('\n', " "))
    })?;
    for (name, preset) in &file.presets {
        if preset.rules.is_empty() || preset.rules.len() > EGRESS_RULES_MAX {
            let key = name.as_str();
            let at = text.find(&format!("presets.{key}]")).map_or(1, line);
            return Err(format!("line {at}: preset '{name}' needs 1 to {EGRESS_RULES_MAX} rules"));
        }
    }
    Ok(file)
}

impl PresetFile {
    /// What the list shows of it.
    pub(super) fn presets(&self) -> impl Iterator<Item = PresetInfo> + '_ {
        self.presets.iter().map(|(name, preset)| PresetInfo {
            name: name.clone(),
            description: preset.description.clone(),
            source: self.source.clone(),
            read: Vec::new(),
            rules: preset.rules.clone(),
            warnings: preset
                .warning
                .iter()
                .cloned()
                .chain(preset.rules.iter().filter_map(EgressRule::warning))
                .collect(),
            error: None,
        })
    }
}
