//! cargo: the configuration of the user, or its default. A registry keeps the address of its downloads in its index, which is not
//! asked: only that of the default registry is known.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use super::host::{Found, Host};

/// The sparse index of crates.io, and its downloads.
const INDEX: &str = "index.crates.io:443";
const DOWNLOADS: &str = "static.crates.io:443";
/// The most replacements that are followed.
const REPLACEMENTS_MAX: usize = 16;

#[derive(Debug, Default, Deserialize)]
struct Config {
    #[serde(default)]
    source: BTreeMap<String, Source>,
    #[serde(default)]
    registries: BTreeMap<String, Registry>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Source {
    replace_with: Option<String>,
    registry: Option<String>,
    git: Option<String>,
    directory: Option<toml::Value>,
    local_registry: Option<toml::Value>,
}

#[derive(Debug, Default, Deserialize)]
struct Registry {
    index: Option<String>,
}

/// The servers of the host's cargo.
pub(super) fn read(host: &Host, found: &mut Found) {
    let Some(home) = host.variable("CARGO_HOME").map(PathBuf::from).or_else(|| host.user(".cargo")) else {
        return found.defaults(&[INDEX, DOWNLOADS]);
    };
    // cargo prefers the name without an extension.
    let files = ["config", "config.toml"].map(|name| home.join(name));
    let file = files.iter().find_map(|path| found.file(path).map(|text| (path.display().to_string(), text)));
    let (origin, text) = file.unwrap_or_default();
    let config: Config = match toml::from_str(&text) {
        Ok(config) => config,
        Err(e) => {
            let line = e.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            found.error.get_or_insert(format!("{origin}: line {line} is not what cargo reads"));
            return;
        }
    };
    crates_io(&config, &origin, found);
    let named = config.registries.iter().filter_map(|(name, registry)| Some((name.clone(), registry.index.clone()?)));
    let mut named: BTreeMap<_, _> = named.collect();
    let variables = host.environment.iter().filter_map(|(name, value)| {
        let name = name.strip_prefix("CARGO_REGISTRIES_")?.strip_suffix("_INDEX")?;
        Some((name.to_lowercase().replace('_', "-"), value.clone()))
    });
    named.extend(variables);
    named.values().for_each(|index| registry(index, &origin, found));
}

/// The source that stands for crates.io.
fn crates_io(config: &Config, origin: &str, found: &mut Found) {
    let mut name = "crates-io";
    for _ in 0..REPLACEMENTS_MAX {
        let Some(source) = config.source.get(name) else { break };
        match &source.replace_with {
            Some(next) => name = next,
            None => break,
        }
    }
    let is_default = name == "crates-io";
    match config.source.get(name) {
        Some(source) if source.replace_with.is_some() => {
            found.error.get_or_insert(format!("{origin}: its sources replace one another in a circle"));
        }
        Some(Source { registry: Some(url), .. }) => registry(url, origin, found),
        Some(Source { git: Some(url), .. }) => found.url(origin, url),
        Some(source) if source.directory.is_some() || source.local_registry.is_some() => {
            found.warn(format!("the crates in {origin} are files of the host, which the guest does not reach"));
        }
        _ if is_default => found.defaults(&[INDEX, DOWNLOADS]),
        // A registry of the table below, which is read as one.
        _ if config.registries.contains_key(name) => {}
        _ => {
            found.error.get_or_insert(format!("{origin}: it names a source that it does not define"));
        }
    }
}

/// A registry by its index.
fn registry(index: &str, origin: &str, found: &mut Found) {
    found.url(origin, index.strip_prefix("sparse+").unwrap_or(index));
    match index.contains("crates.io") {
        true => found.defaults(&[DOWNLOADS]),
        false => {
            found.warn(format!("a registry in {origin} may keep its crates on another server: add a rule for that"));
        }
    }
}
