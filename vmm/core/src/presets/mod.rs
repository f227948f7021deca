//! Presets: which rules a name such as `@pip` stands for.
//!
//! ```text
//!  presets.d/*.toml of the home   else   configuration of the host's client   else   presets.toml of nido
//! ```
//!
//! Invariants: the process that creates a VM reads them, as its own user; what it reads has a limit; a preset has rules, or an
//! error; a server that is configured and cannot become a rule is reported.

mod apt;
mod cargo;
mod file;
mod host;
mod ini;
mod npm;
mod pip;

use std::collections::BTreeMap;
use std::path::Path;

use nido_api::egress::effective_rules;
use nido_api::error::{Code, Error, Hint, Result};
use nido_api::operation as op;
use nido_api::{AllowEntry, EGRESS_RULES_MAX, PresetInfo, PresetList, PresetName, PresetRules};

use self::file::{PresetFile, parse};
pub use self::host::Host;

/// nido's own presets.
const BUILT_IN: &str = include_str!("presets.toml");
/// The directory of a home whose files add and replace presets.
pub const DIRECTORY: &str = "presets.d";
/// How many names an error suggests.
const SUGGESTED: usize = 3;

/// How the servers of one client are found.
type Reader = fn(&Host, &mut host::Found);

/// The presets that follow the host's configuration.
const OF_HOST: [(&str, &str, Reader); 4] = [
    ("apt", "Debian and Ubuntu packages, as the host's apt is configured", apt::read),
    ("cargo", "Rust crates, as the host's cargo is configured", cargo::read),
    ("npm", "JavaScript packages, as the host's npm is configured; a channel out", npm::read),
    ("pip", "Python packages, as the host's pip is configured", pip::read),
];

/// All presets: those of the home, of the host and of nido.
///
/// # Errors
/// nido's own list cannot be read.
pub fn list(home: &Path, host: &Host) -> Result<PresetList> {
    let mut presets: BTreeMap<PresetName, PresetInfo> = BTreeMap::new();
    for preset in built_in()?.presets() {
        presets.insert(preset.name.clone(), preset);
    }
    for (name, description, reader) in OF_HOST {
        let preset = of_host(name.parse()?, description, reader, host);
        presets.insert(preset.name.clone(), preset);
    }
    let (files, damaged) = files(home);
    for preset in files.iter().flat_map(PresetFile::presets) {
        presets.insert(preset.name.clone(), preset);
    }
    Ok(PresetList { presets: presets.into_values().collect(), damaged })
}

/// The rules that a preset has now.
///
/// # Errors
/// `spec_invalid`: there is no such preset, a file in `presets.d` is damaged, or the host has no configuration for it.
pub fn expand(name: &PresetName, home: &Path, host: &Host) -> Result<PresetRules> {
    let list = list(home, host)?;
    // A damaged file might define this preset: what it means is then not known.
    if let Some(damage) = list.damaged.first() {
        return Err(Error::new(Code::SpecInvalid, format!("preset '{name}' cannot be used: {damage}"))
            .hint("correct the file")
            .or_hint(Hint::run(op::NET_PRESETS).to("check it")));
    }
    let Some(found) = list.presets.iter().find(|preset| preset.name == *name) else {
        return Err(unknown(name, &list.presets));
    };
    if let Some(why) = &found.error {
        return Err(Error::new(Code::SpecInvalid, format!("preset '{name}' cannot be used: {why}"))
            .hint("name the servers instead, for example deb.debian.org"));
    }
    let warnings = found.warnings.iter().map(|warning| format!("{name}: {warning}")).collect();
    Ok(PresetRules { preset: name.clone(), rules: found.rules.clone(), warnings })
}

/// Rules in place of presets, for lists that bound what VMs may have.
///
/// # Errors
/// As those of [`expand`].
pub fn plain(entries: &[AllowEntry], home: &Path, host: &Host) -> Result<Vec<AllowEntry>> {
    let (rules, mut presets) = nido_api::egress::split_entries(entries.to_vec());
    for preset in &mut presets {
        *preset = expand(&preset.preset, home, host)?;
    }
    Ok(effective_rules(&rules, &presets).into_iter().map(AllowEntry::Rule).collect())
}

fn built_in() -> Result<PresetFile> {
    let file = parse(BUILT_IN).map_err(|why| Error::internal(format!("nido's own presets: {why}")))?;
    Ok(PresetFile { source: format!("built-in {}", file.version), ..file })
}

fn of_host(name: PresetName, description: &str, reader: Reader, host: &Host) -> PresetInfo {
    let mut found = host::Found::default();
    reader(host, &mut found);
    let error = match (found.rules.len(), found.error.take()) {
        (_, Some(error)) => Some(error),
        (0, None) => Some("the host's configuration names no server".to_owned()),
        (count, None) if count > EGRESS_RULES_MAX => Some(format!("the host's configuration names {count} servers")),
        _ => None,
    };
    PresetInfo {
        name,
        description: description.to_owned(),
        source: "host".to_owned(),
        read: found.read,
        rules: if error.is_some() { Vec::new() } else { found.rules },
        warnings: found.warnings,
        error,
    }
}

/// The files of a home that can be read, in the order of their names, and sentences about the others.
fn files(home: &Path) -> (Vec<PresetFile>, Vec<String>) {
    let directory = home.join(DIRECTORY);
    let (mut files, mut damaged) = (Vec::new(), Vec::new());
    let names = match host::names_in(&directory, &["toml"]) {
        Ok(names) => names,
        Err(why) => return (files, vec![format!("{DIRECTORY}: {why}")]),
    };
    for name in names {
        let shown = format!("{DIRECTORY}/{}", name.escape_debug());
        match host::read_text(&directory.join(&name)) {
            Ok(Some(text)) => match parse(&text) {
                Ok(file) => files.push(PresetFile { source: shown, ..file }),
                Err(why) => damaged.push(format!("{shown}: {why}")),
            },
            Ok(None) => {}
            Err(why) => damaged.push(format!("{shown}: {why}")),
        }
    }
    (files, damaged)
}

fn unknown(name: &PresetName, known: &[PresetInfo]) -> Error {
    let mut near: Vec<_> =
        known.iter().map(|preset| (distance(name.as_str(), preset.name.as_str()), &preset.name)).collect();
    near.sort();
    let near: Vec<_> = near.iter().take(SUGGESTED).map(|(_, name)| name.to_string()).collect();
    Error::new(Code::SpecInvalid, format!("there is no preset '{name}'"))
        .hint(format!("the nearest are {}", near.join(", ")))
        .or_hint(Hint::run(op::NET_PRESETS).to("list all"))
}

/// How many letters have to be inserted, removed or replaced.
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, b) in other.bytes().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests;
