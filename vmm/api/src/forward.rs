//! Ports of a guest published on the host.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Code, Error};

/// A published port: connections to `host:host_port` reach `127.0.0.1:guest_port` in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForwardSpec {
    /// Address of the host to listen on.
    #[serde(default = "loopback")]
    #[schema(value_type = String, default = "127.0.0.1", example = "127.0.0.1")]
    pub host: IpAddr,
    /// Port of the host; 0 selects a free one.
    #[serde(default)]
    #[schema(maximum = 65535)]
    pub host_port: u16,
    /// Port in the guest.
    #[serde(deserialize_with = "port")]
    #[schema(minimum = 1, maximum = 65535)]
    pub guest_port: u16,
}

impl ForwardSpec {
    /// Whether both cannot be published at once: the same port of the same address.
    #[must_use]
    pub fn collides(&self, other: &Self) -> bool {
        self.host_port != 0 && (self.host, self.host_port) == (other.host, other.host_port)
    }
}

const fn loopback() -> IpAddr {
    IpAddr::V4(Ipv4Addr::LOCALHOST)
}

/// A port that something can listen on.
fn port<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    match u16::deserialize(deserializer)? {
        0 => Err(serde::de::Error::custom("a port is 1 to 65535")),
        port => Ok(port),
    }
}

/// A list of published ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ForwardList {
    /// In order of host port.
    pub forwards: Vec<ForwardSpec>,
}

impl FromStr for ForwardSpec {
    type Err = Error;

    /// `GUEST`, `PORT:GUEST`, `HOST:PORT:GUEST` or `[V6]:PORT:GUEST`. A port of 0 on the host takes a free one.
    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || {
            let shown: String = text.chars().take(80).flat_map(char::escape_debug).collect();
            Error::new(Code::SpecInvalid, format!("'{shown}' is not a port forward"))
                .hint("write GUEST, PORT:GUEST or ADDRESS:PORT:GUEST, for example 8080:80")
        };
        let port = |text: &str| text.parse::<u16>().map_err(|_| wrong());
        let mut parts = text.rsplitn(3, ':');
        let guest_port = port(parts.next().unwrap_or_default())?;
        let host_port = parts.next().map_or(Ok(0), port)?;
        let host = match parts.next() {
            None => loopback(),
            Some(address) => {
                let bare = address.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(address);
                // A name that means the same everywhere.
                if bare == "localhost" { loopback() } else { bare.parse().map_err(|_| wrong())? }
            }
        };
        if guest_port == 0 {
            return Err(wrong());
        }
        Ok(Self { host, host_port, guest_port })
    }
}

impl fmt::Display for ForwardSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host {
            IpAddr::V4(host) => write!(f, "{host}:{}:{}", self.host_port, self.guest_port),
            IpAddr::V6(host) => write!(f, "[{host}]:{}:{}", self.host_port, self.guest_port),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_form_parses() {
        for (text, shown) in [
            ("80", "127.0.0.1:0:80"),
            ("8080:80", "127.0.0.1:8080:80"),
            ("0.0.0.0:8080:80", "0.0.0.0:8080:80"),
            ("[::1]:8080:80", "[::1]:8080:80"),
            ("localhost:8080:80", "127.0.0.1:8080:80"),
        ] {
            assert_eq!(text.parse::<ForwardSpec>().unwrap().to_string(), shown);
        }
        for bad in ["", "x", "0", "1:0", "70000:1", "a:1:2", "1:2:3:4:5:g"] {
            assert_eq!(bad.parse::<ForwardSpec>().unwrap_err().code(), Code::SpecInvalid, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn displayed_forwards_parse(v4 in any::<[u8; 4]>(), host_port in any::<u16>(), guest_port in 1u16..) {
            let spec = ForwardSpec { host: v4.into(), host_port, guest_port };
            prop_assert_eq!(spec.to_string().parse::<ForwardSpec>().unwrap(), spec);
        }
    }
}
