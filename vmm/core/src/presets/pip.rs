//! pip: its environment, its files, or its default. Later files replace what earlier ones say, as in pip.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::host::{Found, Host};
use super::ini;

/// What names servers.
const KEYS: [&str; 3] = ["index-url", "extra-index-url", "find-links"];
/// The sections of the commands that download.
const SECTIONS: [&str; 4] = ["global", "install", "download", "wheel"];
/// Where the index of PyPI keeps files.
const FILES: &str = "files.pythonhosted.org:443";

/// The servers of the host's pip.
pub(super) fn read(host: &Host, found: &mut Found) {
    // By key, then by section: a section does not replace what another one says.
    let mut values: BTreeMap<&str, BTreeMap<String, (String, String)>> = BTreeMap::new();
    for path in paths(host) {
        let Some(text) = found.file(&path) else { continue };
        for (section, key, value) in ini::entries(&text) {
            let key = KEYS.iter().copied().find(|known| *known == key);
            if let (Some(key), true) = (key, SECTIONS.contains(&section.as_str())) {
                values.entry(key).or_default().insert(section, (path.display().to_string(), value));
            }
        }
    }
    for key in KEYS {
        let variable = format!("PIP_{}", key.to_uppercase().replace('-', "_"));
        if let Some(value) = host.variable(&variable) {
            found.read.push(variable.clone());
            values.insert(key, BTreeMap::from([(String::new(), (variable, value.to_owned()))]));
        }
    }
    let is_default = !values.contains_key("index-url");
    for (key, (origin, value)) in values.iter().flat_map(|(key, by)| by.values().map(move |value| (key, value))) {
        let urls = value.split_whitespace();
        // Links may be directories of the host, which need no network.
        urls.filter(|url| *key != "find-links" || url.contains("://") && !url.starts_with("file:"))
            .for_each(|url| found.url(origin, url));
    }
    if is_default {
        found.defaults(&["pypi.org:443"]);
    }
    if found.has_name("pypi.org") {
        found.defaults(&[FILES]);
    }
}

/// Its files: those of the system, then those of the user.
fn paths(host: &Host) -> Vec<PathBuf> {
    match host.variable("PIP_CONFIG_FILE") {
        // Only the environment counts.
        Some("/dev/null") => return Vec::new(),
        Some(path) => return [host.system("/etc/pip.conf"), path.into()].into(),
        None => {}
    }
    let user = [host.user(".pip/pip.conf"), host.user_config("pip/pip.conf")];
    [host.system("/etc/xdg/pip/pip.conf"), host.system("/etc/pip.conf")]
        .into_iter()
        .chain(user.into_iter().flatten())
        .collect()
}
