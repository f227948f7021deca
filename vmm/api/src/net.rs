//! The network of a VM, and which rules it can have. Pure.

use serde::{Deserialize, Serialize};

use super::{EGRESS_RULES_MAX, EgressRule, PresetRules};
use crate::error::{Code, Error, Result};

/// Network of a VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum NetChoice {
    /// nido's user-mode network: the guest reaches what the host reaches, except the host's loopback, link-local addresses
    /// and cloud metadata services, unless a rule allows them. Nothing reaches the guest.
    #[default]
    Nat,
    /// The same network, but the guest reaches only what its rules allow.
    Restricted,
    /// No network card. Commands, file copies and published ports work.
    None,
}

impl NetChoice {
    /// The word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nat => "nat",
            Self::Restricted => "restricted",
            Self::None => "none",
        }
    }

    /// Whether the VM has a network card.
    #[must_use]
    pub const fn has_card(self) -> bool {
        match self {
            Self::Nat | Self::Restricted => true,
            Self::None => false,
        }
    }

    /// The network of a VM that has the same hardware and no rules. What the guest cannot distinguish has one word in warm images
    /// and pools.
    #[must_use]
    pub const fn hardware(self) -> Self {
        if self.has_card() { Self::Nat } else { Self::None }
    }

    /// Whether a VM with this network can have these rules.
    ///
    /// # Errors
    /// `spec_invalid`.
    pub fn check_rules(self, allow: &[EgressRule]) -> Result<()> {
        let refused = |words: String| Err(Error::new(Code::SpecInvalid, words));
        let restricted = |error: Error| error.hint("set the network to restricted, or leave the rule out");
        if allow.len() > EGRESS_RULES_MAX {
            let words = format!("allow: {} rules are too many; a VM has at most {EGRESS_RULES_MAX}", allow.len());
            return refused(words).map_err(|error| error.hint("combine rules, for example with *.NAME or a network"));
        }
        match self {
            Self::Restricted => Ok(()),
            Self::None if allow.is_empty() => Ok(()),
            Self::None => refused("allow: a VM without a network cannot reach anything".into()).map_err(restricted),
            // A user who names domains expects that the guest reaches no others.
            Self::Nat => match allow.iter().position(EgressRule::is_name) {
                None => Ok(()),
                Some(at) => {
                    let words =
                        format!("allow[{at}]: with net nat the guest reaches '{}' and all other names", allow[at]);
                    refused(words).map_err(restricted)
                }
            },
        }
    }
}

impl NetChoice {
    /// Whether a VM with this network can have these presets.
    ///
    /// # Errors
    /// `spec_invalid`.
    pub fn check_presets(self, presets: &[PresetRules]) -> Result<()> {
        let names = |preset: &&PresetRules| preset.rules.iter().any(EgressRule::is_name);
        let words = match self {
            Self::Restricted => return Ok(()),
            Self::None if presets.is_empty() => return Ok(()),
            Self::None => "allow: a VM without a network cannot reach anything".to_owned(),
            Self::Nat => match presets.iter().find(names) {
                None => return Ok(()),
                Some(wrong) => {
                    let preset = &wrong.preset;
                    format!("allow: with net nat the guest reaches the names of '{preset}' and all other names")
                }
            },
        };
        Err(Error::new(Code::SpecInvalid, words).hint("set the network to restricted, or leave the preset out"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FrontEnd;

    fn rules(texts: &[&str]) -> Vec<EgressRule> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn rules_fit_the_network() {
        let all = rules(&["example.com", "*.example.com:*", "10.0.0.0/8", "host:80"]);
        NetChoice::Restricted.check_rules(&all).unwrap();
        NetChoice::Nat.check_rules(&all[2..]).unwrap();
        for net in [NetChoice::Nat, NetChoice::Restricted, NetChoice::None] {
            net.check_rules(&[]).unwrap();
        }
        let many = vec![all[3].clone(); EGRESS_RULES_MAX + 1];
        NetChoice::Restricted.check_rules(&many[1..]).unwrap();
        for (net, wrong) in
            [(NetChoice::Nat, &all[..]), (NetChoice::None, &all[3..]), (NetChoice::Restricted, &many[..])]
        {
            let error = net.check_rules(wrong).unwrap_err();
            assert_eq!(error.code(), Code::SpecInvalid);
            assert!(
                [FrontEnd::Cli, FrontEnd::Api, FrontEnd::Mcp]
                    .iter()
                    .all(|front_end| error.hint_for(*front_end).is_some()),
                "{error}"
            );
        }
    }

    #[test]
    fn networks_with_a_card_are_the_same_hardware() {
        assert_eq!(NetChoice::Restricted.hardware(), NetChoice::Nat.hardware());
        assert_ne!(NetChoice::None.hardware(), NetChoice::Nat.hardware());
        for net in [NetChoice::Nat, NetChoice::Restricted, NetChoice::None] {
            assert_eq!(serde_json::to_value(net).unwrap(), net.name());
            assert_eq!(net.has_card(), net.hardware().has_card());
        }
    }
}
