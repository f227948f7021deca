//! One rule: who may be reached, on which ports, by which protocol.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::shared::warning_about;
use super::{DomainName, Ports, Target};
use crate::FrontEnd;
use crate::error::{Code, Error};
use crate::sanitize::head;

/// The longest rule, in bytes: the longest name, and ports.
const RULE_BYTES_MAX: usize = 1024;
/// The suffix of a rule for UDP.
const UDP: &str = "/udp";

/// The protocol of a rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Without a suffix.
    #[default]
    Tcp,
    /// `/udp`
    Udp,
}

/// A destination that a guest may reach.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EgressRule {
    /// What may be reached.
    pub target: Target,
    /// On which ports.
    pub ports: Ports,
    /// By which protocol.
    pub protocol: Protocol,
}

impl EgressRule {
    /// Whether the rule names this domain. The port and the protocol count as well: see [`Self::matches_port`].
    #[must_use]
    pub fn matches_name(&self, name: &DomainName) -> bool {
        self.target.matches_name(name)
    }

    /// Whether the rule names this address. What a name resolves to is not named by it.
    #[must_use]
    pub fn matches_address(&self, address: IpAddr) -> bool {
        self.target.matches_address(address)
    }

    /// Whether the rule holds for this port.
    #[must_use]
    pub fn matches_port(&self, port: u16) -> bool {
        self.ports.contains(port)
    }

    /// Whether it is about the host's loopback.
    #[must_use]
    pub const fn is_host(&self) -> bool {
        matches!(self.target, Target::Host)
    }

    /// Whether it is about domain names.
    #[must_use]
    pub const fn is_name(&self) -> bool {
        matches!(self.target, Target::Name(_) | Target::Subdomains(_))
    }

    /// Why the rule allows more than its text suggests.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        warning_about(&self.target, &self.ports).map(|why| format!("rule '{self}' {why}"))
    }
}

/// The rule, or the end of a sentence about what is wrong.
fn parse(text: &str) -> Result<EgressRule, String> {
    if text.len() > RULE_BYTES_MAX {
        return Err(format!("it is longer than {RULE_BYTES_MAX} bytes"));
    }
    if text.contains("://") {
        return Err("it is a URL".into());
    }
    let (rest, protocol) = match text.strip_suffix(UDP) {
        Some(rest) => (rest, Protocol::Udp),
        None => (text, Protocol::Tcp),
    };
    // The colons of an IPv6 address are within brackets.
    let after_brackets = if rest.starts_with('[') { rest.find(']').unwrap_or(rest.len()) } else { 0 };
    let (target, ports) = match rest[after_brackets..].split_once(':') {
        Some((_, ports)) => (&rest[..rest.len() - ports.len() - 1], Some(ports)),
        None => (rest, None),
    };
    if ports.is_some_and(|ports| ports.contains(':')) {
        return Err("an IPv6 address needs brackets, and a rule has one list of ports".into());
    }
    let target = Target::parse(target)?;
    let ports = match ports {
        None if target == Target::Host => return Err("'host' needs a port".into()),
        None => Ports::default(),
        Some(ports) => Ports::parse(ports).ok_or("ports are numbers from 1 to 65535, ranges or '*'")?,
    };
    Ok(EgressRule { target, ports, protocol })
}

/// How to write what was probably intended.
fn hint(text: &str) -> &'static str {
    match text.get(..1) {
        Some("@") => "name the domains instead, for example pypi.org",
        _ => "write NAME, *.NAME, ADDRESS, NETWORK or host:PORT, for example example.com:443 or 10.0.0.0/8:53/udp",
    }
}

impl FromStr for EgressRule {
    type Err = Error;

    /// `TARGET[:PORTS][/udp]`
    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).map_err(|why| {
            let shown: String = head(text, 80).chars().flat_map(char::escape_debug).collect();
            Error::new(Code::SpecInvalid, format!("'{shown}' is not a network rule: {why}")).hint(hint(text))
        })
    }
}

impl fmt::Display for EgressRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.target.fmt(f)?;
        if self.is_host() || self.ports != Ports::default() {
            write!(f, ":{}", self.ports)?;
        }
        f.write_str(if self.protocol == Protocol::Udp { UDP } else { "" })
    }
}

impl Serialize for EgressRule {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for EgressRule {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(|error: Error| {
            // What reads a body or a tool's arguments keeps the message only.
            let hint = error.hint_for(FrontEnd::Api).unwrap_or_default();
            serde::de::Error::custom(format!("{error}; {hint}"))
        })
    }
}
