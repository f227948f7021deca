//! Limits of a VM's network that its user sets. Pure.
//!
//! Invariant: what is absent has the default of the network; each value is within the range of its key.

use serde::{Deserialize, Serialize};

use super::NetChoice;
use crate::error::{Code, Error, Result};

/// The largest number of bytes that a limit can be: what a store and a JSON reader hold exactly.
const BYTES_MAX: u64 = (1 << 53) - 1;

/// Limits of a VM's network. Absent fields have the defaults.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NetLimits {
    /// Connections of TCP at a time; 512 if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 4096, nullable = false)]
    pub connections: Option<u64>,
    /// New connections, and pairs of ends of UDP, in a second; 200 if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 10000, nullable = false)]
    pub new_connections: Option<u64>,
    /// Pairs of ends of UDP at a time; 128 if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1024, nullable = false)]
    pub udp: Option<u64>,
    /// Questions for names in a second; 50 if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1000, nullable = false)]
    pub questions: Option<u64>,
    /// Bytes that the guest may send after a start [no limit].
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 9007199254740991_i64, nullable = false)]
    pub sent_bytes: Option<u64>,
    /// Bytes that the guest may receive after a start [no limit].
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 9007199254740991_i64, nullable = false)]
    pub received_bytes: Option<u64>,
}

/// A limit that can be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetLimitKey {
    /// [`NetLimits::connections`]
    Connections,
    /// [`NetLimits::new_connections`]
    NewConnections,
    /// [`NetLimits::udp`]
    Udp,
    /// [`NetLimits::questions`]
    Questions,
    /// [`NetLimits::sent_bytes`]
    Sent,
    /// [`NetLimits::received_bytes`]
    Received,
}

impl NetLimitKey {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 6] =
        [Self::Connections, Self::NewConnections, Self::Udp, Self::Questions, Self::Sent, Self::Received];

    /// The word for it on the command line.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::NewConnections => "new-connections",
            Self::Udp => "udp",
            Self::Questions => "questions",
            Self::Sent => "sent",
            Self::Received => "received",
        }
    }

    /// Whether its values are sizes.
    #[must_use]
    pub const fn is_bytes(self) -> bool {
        matches!(self, Self::Sent | Self::Received)
    }

    const fn field(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::NewConnections => "new_connections",
            Self::Udp => "udp",
            Self::Questions => "questions",
            Self::Sent => "sent_bytes",
            Self::Received => "received_bytes",
        }
    }

    const fn most(self) -> u64 {
        match self {
            Self::Connections => 4096,
            Self::NewConnections => 10_000,
            Self::Udp => 1024,
            Self::Questions => 1000,
            Self::Sent | Self::Received => BYTES_MAX,
        }
    }
}

impl NetLimits {
    /// Whether all limits are the defaults.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The value of a limit; `None` for the default.
    #[must_use]
    pub const fn get(&self, key: NetLimitKey) -> Option<u64> {
        match key {
            NetLimitKey::Connections => self.connections,
            NetLimitKey::NewConnections => self.new_connections,
            NetLimitKey::Udp => self.udp,
            NetLimitKey::Questions => self.questions,
            NetLimitKey::Sent => self.sent_bytes,
            NetLimitKey::Received => self.received_bytes,
        }
    }

    /// Sets a limit.
    pub const fn set(&mut self, key: NetLimitKey, value: u64) {
        let field = match key {
            NetLimitKey::Connections => &mut self.connections,
            NetLimitKey::NewConnections => &mut self.new_connections,
            NetLimitKey::Udp => &mut self.udp,
            NetLimitKey::Questions => &mut self.questions,
            NetLimitKey::Sent => &mut self.sent_bytes,
            NetLimitKey::Received => &mut self.received_bytes,
        };
        *field = Some(value);
    }

    /// The limits that are set, with their keys.
    pub fn iter(&self) -> impl Iterator<Item = (NetLimitKey, u64)> + '_ {
        NetLimitKey::ALL.into_iter().filter_map(|key| Some((key, self.get(key)?)))
    }

    /// Whether a VM with this network can have these limits.
    ///
    /// # Errors
    /// `spec_invalid`: a value is out of range, or the VM has no network.
    pub fn check(&self, net: NetChoice) -> Result<()> {
        let invalid = |words: String| Error::new(Code::SpecInvalid, format!("net_limits: {words}"));
        if !self.is_empty() && !net.has_card() {
            let words = "a VM with the network none has no network to limit".to_owned();
            return Err(invalid(words).hint("leave out the limits, or set the network to nat or restricted"));
        }
        match self.iter().find(|(key, value)| !(1..=key.most()).contains(value)) {
            None => Ok(()),
            Some((key, value)) => {
                let words = format!("{} is {value}; it must be from 1 to {}", key.field(), key.most());
                Err(invalid(words).hint("leave it out for the default, or set the network to none"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_has_a_range() {
        for key in NetLimitKey::ALL {
            let with = |value| {
                let mut limits = NetLimits::default();
                limits.set(key, value);
                limits
            };
            for (value, fits) in [(0, false), (1, true), (key.most(), true), (key.most() + 1, false)] {
                let checked = with(value).check(NetChoice::Restricted);
                assert_eq!(checked.is_ok(), fits, "{} {value}", key.word());
                if let Err(error) = checked {
                    assert!(error.code() == Code::SpecInvalid && error.to_string().contains(key.field()), "{error}");
                }
            }
            assert_eq!(with(7).iter().collect::<Vec<_>>(), [(key, 7)]);
            assert!(with(1).check(NetChoice::None).is_err());
        }
        NetLimits::default().check(NetChoice::None).unwrap();
    }

    #[test]
    fn unknown_limits_are_refused() {
        serde_json::from_str::<NetLimits>(r#"{"sent": 1}"#).unwrap_err();
        serde_json::from_str::<NetLimits>(r#"{"sent_bytes": -1}"#).unwrap_err();
        let limits: NetLimits = serde_json::from_str(r#"{"sent_bytes": 1}"#).unwrap();
        assert_eq!(serde_json::to_string(&limits).unwrap(), r#"{"sent_bytes":1}"#);
    }
}
