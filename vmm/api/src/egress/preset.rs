//! Presets: names for rules that belong together, `@pip`. Pure; `nido-core` knows which rules a preset has.
//!
//! Invariant: rules that come from a preset stay beneath its name, so that removing the preset removes them, and no other rule.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{DomainName, EgressRule, PortRange, Ports, Protocol, Target};
use crate::FrontEnd;
use crate::error::{Code, Error};
use crate::sanitize::head;

/// The longest name, in bytes, without the `@`.
const NAME_BYTES_MAX: usize = 32;

/// Name of a preset: 1 to 32 lower-case letters, digits and `-`. It is written with a leading `@`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PresetName(String);

impl PresetName {
    /// The name without the `@`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PresetName {
    type Err = Error;

    /// `@NAME`; the `@` may be absent.
    fn from_str(text: &str) -> Result<Self, Error> {
        let name = text.strip_prefix('@').unwrap_or(text);
        let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(is_plain) {
            let shown: String = head(text, 80).chars().flat_map(char::escape_debug).collect();
            let rule = format!("1 to {NAME_BYTES_MAX} lower-case letters, digits and '-' after '@'");
            return Err(Error::new(Code::SpecInvalid, format!("'{shown}' is not the name of a preset: {rule}"))
                .hint("for example: @pip"));
        }
        Ok(Self(name.to_owned()))
    }
}

impl fmt::Display for PresetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "@{}", self.0)
    }
}

impl Serialize for PresetName {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PresetName {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What a user allows: a rule, or a preset.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum AllowEntry {
    /// A rule.
    Rule(EgressRule),
    /// All rules of a preset.
    Preset(PresetName),
}

impl FromStr for AllowEntry {
    type Err = Error;

    /// `@NAME`, or a rule.
    fn from_str(text: &str) -> Result<Self, Error> {
        if text.starts_with('@') { text.parse().map(Self::Preset) } else { text.parse().map(Self::Rule) }
    }
}

impl fmt::Display for AllowEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(rule) => rule.fmt(f),
            Self::Preset(preset) => preset.fmt(f),
        }
    }
}

impl Serialize for AllowEntry {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for AllowEntry {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(|error: Error| {
            // What reads a body or a tool's arguments keeps the message only.
            let hint = error.hint_for(FrontEnd::Api).unwrap_or_default();
            serde::de::Error::custom(format!("{error}; {hint}"))
        })
    }
}

/// A preset of a VM, with the rules that it had when it was added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PresetRules {
    /// Its name.
    #[schema(value_type = String, example = "@pip")]
    pub preset: PresetName,
    /// Its rules.
    pub rules: Vec<EgressRule>,
    /// What its user should know: what it allows besides, and what of the host's configuration is no rule.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl PresetRules {
    /// A preset whose rules are not known yet.
    #[must_use]
    pub const fn unexpanded(preset: PresetName) -> Self {
        Self { preset, rules: Vec::new(), warnings: Vec::new() }
    }

    /// Whether its rules are known: no preset is without rules.
    #[must_use]
    pub const fn is_expanded(&self) -> bool {
        !self.rules.is_empty()
    }
}

/// A preset, as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PresetInfo {
    /// Its name.
    #[schema(value_type = String, example = "@pip")]
    pub name: PresetName,
    /// What it is for.
    pub description: String,
    /// Where its rules come from: `host` (the configuration of the host's own client), `built-in 1` (version 1 of nido's
    /// list), or a file in `presets.d`.
    pub source: String,
    /// Files and variables of the host that were read. Absent: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub read: Vec<String>,
    /// Its rules. Empty if `error` is set.
    pub rules: Vec<EgressRule>,
    /// What its user should know. Absent: nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Why it cannot be used. Absent: it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub error: Option<String>,
}

/// The presets that `--allow` accepts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PresetList {
    /// Presets, by name.
    pub presets: Vec<PresetInfo>,
    /// Files in `presets.d` that cannot be read, one sentence each. Absent: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<String>,
}

/// The rules and the presets of a list, each once.
#[must_use]
pub fn split_entries(entries: Vec<AllowEntry>) -> (Vec<EgressRule>, Vec<PresetRules>) {
    let (mut rules, mut presets) = (Vec::new(), Vec::<PresetRules>::new());
    for entry in entries {
        match entry {
            AllowEntry::Rule(rule) => rules.push(rule),
            AllowEntry::Preset(name) if presets.iter().any(|known| known.preset == name) => {}
            AllowEntry::Preset(name) => presets.push(PresetRules::unexpanded(name)),
        }
    }
    (rules, presets)
}

/// All rules that a guest with these rules and presets has, each once.
#[must_use]
pub fn effective_rules(allow: &[EgressRule], presets: &[PresetRules]) -> Vec<EgressRule> {
    let mut rules = allow.to_vec();
    for rule in presets.iter().flat_map(|preset| &preset.rules) {
        if !rules.contains(rule) {
            rules.push(rule.clone());
        }
    }
    rules
}

/// The rule for the server of a URL, or the end of a sentence about why it gives no rule. It never repeats the URL, which may hold
/// a password.
///
/// # Errors
/// It is not a URL of HTTP, or names nothing that a guest can reach.
pub fn rule_for_url(text: &str) -> Result<EgressRule, String> {
    let url = url::Url::parse(text.trim()).map_err(|_| "it is not a URL".to_owned())?;
    let port = match url.scheme() {
        "http" | "https" => url.port_or_known_default().filter(|port| *port != 0),
        _ => return Err("it is not a URL of http or https".into()),
    };
    let port = port.and_then(|port| PortRange::new(port, port)).ok_or("its port is not one")?;
    let loopback = |address: IpAddr| if address.is_loopback() { Target::Host } else { Target::Network(address.into()) };
    let target = match url.host() {
        Some(url::Host::Ipv4(v4)) => loopback(v4.into()),
        Some(url::Host::Ipv6(v6)) => loopback(IpAddr::V6(v6).to_canonical()),
        Some(url::Host::Domain(name)) if is_localhost(name) => Target::Host,
        Some(url::Host::Domain(name)) => {
            Target::Name(name.parse::<DomainName>().map_err(|_| "its host is not a domain name".to_owned())?)
        }
        None => return Err("it names no host".into()),
    };
    if matches!(&target, Target::Network(net) if is_unspecified(net)) {
        return Err("its address is not one of a server".into());
    }
    Ok(EgressRule { target, ports: Ports::of(vec![port]), protocol: Protocol::Tcp })
}

fn is_localhost(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    name == "localhost" || name.ends_with(".localhost")
}

fn is_unspecified(net: &IpNet) -> bool {
    net.addr().is_unspecified()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_mirrors_become_rules_for_their_servers() {
        for (url, rule) in [
            ("https://index.example/simple", "index.example:443"),
            ("http://mirror.example/debian", "mirror.example:80"),
            ("https://user:secret@Mirror.Example.com:8443/x", "mirror.example.com:8443"),
            ("http://127.0.0.1:3141/root/pypi", "host:3141"),
            ("http://localhost:4873/", "host:4873"),
            ("http://[::1]:81/", "host:81"),
            ("http://a.localhost/", "host:80"),
            ("http://192.168.7.9/simple", "192.168.7.9:80"),
            ("http://2130706433:8080/", "host:8080"),
            ("https://[2001:db8::1]/", "[2001:db8::1]:443"),
            ("https://bücher.example/", "xn--bcher-kva.example:443"),
        ] {
            assert_eq!(rule_for_url(url).unwrap().to_string(), rule, "{url}");
        }
        for url in ["", "pypi.org", "file:///srv/x", "ftp://a.example/", "https://", "http://0.0.0.0/", "http://x:0/"] {
            assert!(rule_for_url(url).is_err(), "{url}");
        }
        assert!(!rule_for_url("ftp://user:secret@example.com/").unwrap_err().contains("secret"));
    }

    #[test]
    fn entries_are_rules_or_presets() {
        for text in ["@pip", "example.com", "host:8080"] {
            assert_eq!(text.parse::<AllowEntry>().unwrap().to_string(), text);
        }
        for wrong in ["@", "@Pip", "@a b", "@pip:443", "pip@x", "@../x"] {
            assert_eq!(wrong.parse::<AllowEntry>().unwrap_err().code(), Code::SpecInvalid, "{wrong}");
        }
        assert!("@pip".parse::<EgressRule>().is_err());
        let entries = ["@pip", "example.com", "@pip"].map(|text| text.parse().unwrap());
        let (rules, presets) = split_entries(entries.into());
        assert!(rules.len() == 1 && presets.len() == 1 && !presets[0].is_expanded());
    }
}
