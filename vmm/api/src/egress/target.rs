//! What a rule names.

use std::fmt;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};

use super::DomainName;

/// What a rule names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// One domain name.
    Name(DomainName),
    /// Every name below this one, at any depth, but not this one.
    Subdomains(DomainName),
    /// Addresses; one address is a network of that address alone.
    Network(IpNet),
    /// The loopback of the host.
    Host,
}

impl Target {
    /// The target that a rule names, or the end of a sentence about what is wrong.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if text.starts_with('@') {
            return Err("a preset is not accepted here".into());
        }
        if let Some(inner) = text.strip_prefix('[') {
            let inner = inner.strip_suffix(']').ok_or("']' must be the end of the address")?;
            let v6 = |net: IpNet| matches!(net, IpNet::V6(_)).then_some(net).ok_or("only IPv6 has brackets".to_owned());
            return network(inner).and_then(v6).and_then(in_short).map(Self::Network);
        }
        if text.contains(':') {
            return Err("an IPv6 address needs brackets, and a rule has one list of ports".into());
        }
        if text.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'/')) && !text.is_empty() {
            return network(text).map(Self::Network);
        }
        if text.contains('/') {
            return Err("it names a host, not a path; the only protocol is '/udp'".into());
        }
        let why = |error: crate::error::Error| {
            let message = error.message();
            message.rsplit_once("name: ").map_or(message, |(_, why)| why).to_owned()
        };
        if let Some(suffix) = text.strip_prefix("*.").or_else(|| (text == "*").then_some("")) {
            if suffix.is_empty() {
                return Err("it would allow every name".into());
            }
            let suffix: DomainName = suffix.parse().map_err(why)?;
            if suffix.label_count() < 2 {
                return Err(format!("it would allow every name below '{suffix}'"));
            }
            return Ok(Self::Subdomains(suffix));
        }
        if text.contains('*') {
            return Err("'*' may only be the first label, as in *.example.com".into());
        }
        let name: DomainName = text.parse().map_err(why)?;
        match name.as_str() {
            "host" => Ok(Self::Host),
            "localhost" => {
                Err("'localhost' is the guest itself; the host's loopback is 'host', as in host:8080".into())
            }
            _ => Ok(Self::Name(name)),
        }
    }

    /// Whether it names this domain.
    #[must_use]
    pub fn matches_name(&self, name: &DomainName) -> bool {
        match self {
            Self::Name(own) => own == name,
            Self::Subdomains(suffix) => name.is_subdomain_of(suffix),
            Self::Network(_) | Self::Host => false,
        }
    }

    /// Whether it names this address. One of IPv4 that is mapped into IPv6 is the one of IPv4.
    #[must_use]
    pub fn matches_address(&self, address: IpAddr) -> bool {
        matches!(self, Self::Network(network) if network.contains(&address.to_canonical()))
    }
}

/// One address, or a network.
fn network(text: &str) -> Result<IpNet, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(IpNet::from(address));
    }
    let network: IpNet = text.parse().map_err(|_| "it is not an address or network".to_owned())?;
    if network.addr() != network.network() {
        return Err(format!("the address has bits outside of the network, which is {}", network.trunc()));
    }
    Ok(network)
}

/// A network of mapped addresses as the network of IPv4 that it is.
fn in_short(network: IpNet) -> Result<IpNet, String> {
    match (network.addr().to_canonical(), network.prefix_len().checked_sub(96)) {
        (IpAddr::V4(v4), Some(bits)) => Ipv4Net::new(v4, bits).map(IpNet::V4).map_err(|e| e.to_string()),
        _ => Ok(network),
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Subdomains(suffix) => write!(f, "*.{suffix}"),
            Self::Network(network) => {
                let is_one = network.prefix_len() == network.max_prefix_len();
                let shown = if is_one { network.addr().to_string() } else { network.to_string() };
                if matches!(network, IpNet::V6(_)) { write!(f, "[{shown}]") } else { f.write_str(&shown) }
            }
            Self::Host => f.write_str("host"),
        }
    }
}
