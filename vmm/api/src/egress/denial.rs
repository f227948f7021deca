//! What a guest tried to reach and may not.

use std::net::IpAddr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{DomainName, EgressRule, PortRange, Ports, Protocol, Target};

/// The name that rules, and refusals, have for the loopback of the host.
const HOST: &str = "host";

/// Why the network refused something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DenialReason {
    /// No rule names this domain.
    NameNotAllowed,
    /// No rule names this address, and no allowed name has resolved to it.
    AddressNotLearned,
    /// The address is the host's, link-local, private or reserved, and no rule names it.
    AddressPrivate,
    /// Rules name the destination, but not this port.
    PortNotAllowed,
    /// The TLS server name is not one that rules allow at this address.
    SniMismatch,
    /// A connection to an allowed name began without a TLS server name.
    SniMissing,
    /// The host of an HTTP request is not one that rules allow at this address.
    HostMismatch,
    /// No rule allows this protocol.
    ProtocolNotAllowed,
    /// The certificate of a server that would get a secret is not valid.
    CertificateInvalid,
    /// A secret that a request needs cannot be read.
    SecretUnavailable,
    /// The VM has as many connections as it may have.
    ConnectionLimit,
    /// The VM opens connections, or asks for names, faster than it may.
    RateLimit,
    /// The VM has sent, or received, as many bytes as it may.
    ByteLimit,
}

impl DenialReason {
    /// The word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NameNotAllowed => "name_not_allowed",
            Self::AddressNotLearned => "address_not_learned",
            Self::AddressPrivate => "address_private",
            Self::PortNotAllowed => "port_not_allowed",
            Self::SniMismatch => "sni_mismatch",
            Self::SniMissing => "sni_missing",
            Self::HostMismatch => "host_mismatch",
            Self::ProtocolNotAllowed => "protocol_not_allowed",
            Self::CertificateInvalid => "certificate_invalid",
            Self::SecretUnavailable => "secret_unavailable",
            Self::ConnectionLimit => "connection_limit",
            Self::RateLimit => "rate_limit",
            Self::ByteLimit => "byte_limit",
        }
    }
}

/// A protocol that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeniedProtocol {
    /// A connection of TCP.
    Tcp,
    /// A datagram of UDP.
    Udp,
    /// A question to the name server.
    Dns,
    /// A message of ICMP.
    Icmp,
    /// Another protocol of IP.
    Other,
}

impl DeniedProtocol {
    /// The word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Dns => "dns",
            Self::Icmp => "icmp",
            Self::Other => "other",
        }
    }
}

/// Something that a guest tried to reach and may not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Denial {
    /// By which protocol.
    pub protocol: DeniedProtocol,
    /// The domain name, if one was involved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The address, if it came to that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, value_type = Option<String>)]
    pub address: Option<IpAddr>,
    /// The port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Why.
    pub reason: DenialReason,
    /// How often.
    pub count: u64,
    /// When first.
    pub first_at: Timestamp,
    /// When last.
    pub last_at: Timestamp,
    /// The rule that would have allowed it. Absent if no rule does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub rule: Option<EgressRule>,
}

/// What a VM's network has done: bytes since the VM's start, the rest since its supervisor started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct NetworkInfo {
    /// Bytes that the guest has sent since the VM was started.
    pub sent_bytes: u64,
    /// Bytes that it has received since then.
    pub received_bytes: u64,
    /// Connections that were begun since its supervisor started.
    pub connections: u64,
    /// Connections, and pairs of ends of UDP, that are open.
    pub open: u64,
    /// How often something was refused.
    pub denied: u64,
    /// What was refused, the most frequent first; 20 destinations at most.
    pub denials: Vec<Denial>,
}

impl Denial {
    /// What was refused, for people: `tcp to example.com port 443`.
    #[must_use]
    pub fn what(&self) -> String {
        let to = match (&self.name, self.address) {
            (Some(name), Some(address)) => format!("{name} ({address})"),
            (Some(name), None) => name.clone(),
            (None, Some(address)) => address.to_string(),
            (None, None) => "an unknown destination".into(),
        };
        let port = self.port.map_or_else(String::new, |port| format!(" port {port}"));
        format!("{} to {to}{port}", self.protocol.name())
    }

    /// The rule that would allow it; `None` if no rule does.
    #[must_use]
    pub fn remedy(&self) -> Option<EgressRule> {
        use DenialReason as Why;
        if matches!(
            self.reason,
            Why::ConnectionLimit
                | Why::RateLimit
                | Why::ByteLimit
                | Why::SniMissing
                | Why::CertificateInvalid
                | Why::SecretUnavailable
        ) {
            return None;
        }
        let protocol = match self.protocol {
            DeniedProtocol::Tcp | DeniedProtocol::Dns => Protocol::Tcp,
            DeniedProtocol::Udp => Protocol::Udp,
            DeniedProtocol::Icmp | DeniedProtocol::Other => return None,
        };
        let name = self.name.as_deref().and_then(|name| name.parse::<DomainName>().ok());
        let target = match (name, self.address) {
            (Some(name), _) if name.as_str() == HOST => Target::Host,
            // No rule for a name allows a private address.
            (Some(_), address) if self.reason == Why::AddressPrivate => Target::Network(address?.to_canonical().into()),
            (Some(name), _) => Target::Name(name),
            (None, address) => Target::Network(address?.to_canonical().into()),
        };
        let ports = match self.port {
            Some(port) => Ports::of(vec![PortRange::new(port, port)?]),
            None => Ports::default(),
        };
        Some(EgressRule { target, ports, protocol })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denial(name: Option<&str>, address: Option<&str>, port: Option<u16>, reason: DenialReason) -> Denial {
        let at = Timestamp::UNIX_EPOCH;
        Denial {
            protocol: if port.is_some() { DeniedProtocol::Tcp } else { DeniedProtocol::Dns },
            name: name.map(str::to_owned),
            address: address.map(|address| address.parse().unwrap()),
            port,
            reason,
            count: 1,
            first_at: at,
            last_at: at,
            rule: None,
        }
    }

    #[test]
    fn the_remedy_is_a_rule_that_would_have_allowed_it() {
        use DenialReason as Why;
        for (denial, rule) in [
            (denial(Some("host"), Some("10.0.2.2"), Some(8080), Why::AddressPrivate), Some("host:8080")),
            (denial(None, Some("1.1.1.1"), Some(53), Why::AddressNotLearned), Some("1.1.1.1:53")),
            (denial(Some("example.com"), Some("1.1.1.1"), Some(22), Why::PortNotAllowed), Some("example.com:22")),
            (denial(Some("example.com"), None, None, Why::NameNotAllowed), Some("example.com")),
            (denial(Some("example.com"), Some("10.1.2.3"), None, Why::AddressPrivate), Some("10.1.2.3")),
            (denial(Some("not a name"), None, None, Why::NameNotAllowed), None),
            (denial(None, Some("1.1.1.1"), Some(53), Why::RateLimit), None),
            (denial(Some("example.com"), None, Some(443), Why::ByteLimit), None),
        ] {
            assert_eq!(denial.remedy().map(|rule| rule.to_string()).as_deref(), rule, "{denial:?}");
        }
    }
}
