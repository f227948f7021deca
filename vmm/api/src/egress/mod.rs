//! What a guest may reach: domain names, rules and classes of addresses. Pure.
//!
//! ```text
//!  RULE   = TARGET [":" PORTS] ["/udp"]        PORTS = 443 | 80,443 | 8000-8010 | *      default 80,443
//!  TARGET = name | "*." name | IPv4 | IPv4 "/" bits | "[" IPv6 "]" | "[" IPv6 "/" bits "]" | "host"
//! ```
//!
//! Invariants: what a rule displays is the rule again when it is parsed; a name matches label by label, never as text; a rule
//! matches nothing that it does not name: no address by a name, and no name by an address.

mod address;
mod ceiling;
mod denial;
mod domain;
mod ports;
mod preset;
mod rule;
mod schema;
mod shared;
mod target;

pub use address::{embedded_v4, is_global};
pub use ceiling::{covers, intersection};
pub use denial::{Denial, DenialReason, DeniedProtocol, NetworkInfo};
pub use domain::DomainName;
pub use ports::{PortRange, Ports};
pub use preset::{
    AllowEntry, PresetInfo, PresetList, PresetName, PresetRules, effective_rules, rule_for_url, split_entries,
};
pub use rule::{EgressRule, Protocol};
pub use target::Target;

/// The most rules of one VM.
pub const EGRESS_RULES_MAX: usize = 256;

#[cfg(test)]
mod tests;
