//! npm: its environment, its files, or its default. What the environment says replaces the user's file, and that the system's.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::host::{Found, Host};
use super::ini;

/// The registry if none is configured.
const DEFAULT: &str = "registry.npmjs.org:443";

/// The servers of the host's npm.
pub(super) fn read(host: &Host, found: &mut Found) {
    found.warn("a channel out: any account can publish through the registry".to_owned());
    let mut values: BTreeMap<String, (String, String)> = BTreeMap::new();
    for path in paths(host) {
        let Some(text) = found.file(&path) else { continue };
        for (section, key, value) in registries(&text) {
            if section.is_empty() {
                values.insert(key, (path.display().to_string(), value));
            }
        }
    }
    for variable in ["NPM_CONFIG_REGISTRY", "npm_config_registry"] {
        if let Some(value) = host.variable(variable) {
            found.read.push(variable.to_owned());
            values.insert("registry".to_owned(), (variable.to_owned(), value.to_owned()));
        }
    }
    if !values.contains_key("registry") {
        found.defaults(&[DEFAULT]);
    }
    for (origin, value) in values.values() {
        let value = value.trim_matches(['"', '\'']);
        match with_variables(value, host) {
            Some(url) => found.url(origin, &url),
            None => found.warn(format!("a registry in {origin} has no rule: it names a variable that is not set")),
        }
    }
}

/// Keys `registry` and `@scope:registry`. The colon of a scope is part of the key.
fn registries(text: &str) -> Vec<(String, String, String)> {
    let spelled = text.lines().map(|line| match line.split_once(":registry") {
        Some((scope, rest)) if scope.trim_start().starts_with('@') => {
            format!("{}/registry{rest}\n", scope.trim_start())
        }
        _ => format!("{}\n", line.trim_start()),
    });
    let entries = ini::entries(&spelled.collect::<String>());
    entries.into_iter().filter(|(_, key, _)| key == "registry" || key.ends_with("/registry")).collect()
}

/// A value with `${NAME}` replaced.
fn with_variables(value: &str, host: &Host) -> Option<String> {
    let mut parts = value.split("${");
    let mut whole = parts.next()?.to_owned();
    for part in parts {
        let (name, rest) = part.split_once('}')?;
        whole.push_str(host.variable(name)?);
        whole.push_str(rest);
    }
    Some(whole)
}

/// Its files: those of the system, then that of the user.
fn paths(host: &Host) -> Vec<PathBuf> {
    let global = ["/usr/etc/npmrc", "/usr/local/etc/npmrc", "/etc/npmrc"].map(|path| host.system(path));
    let variable = |name: &str| host.variable(&name.to_uppercase()).or_else(|| host.variable(name)).map(PathBuf::from);
    let user = variable("npm_config_userconfig").or_else(|| host.user(".npmrc"));
    match variable("npm_config_globalconfig") {
        Some(global) => [Some(global), user].into_iter().flatten().collect(),
        None => global.into_iter().chain(user).collect(),
    }
}
