//! Changes of the rules of a VM that exists. Pure.
//!
//! Invariants: a change is made whole or not at all; the rules that it leaves are ones that the VM could have been created with.

use serde::{Deserialize, Serialize};

use super::egress::NetworkInfo;
use super::{EGRESS_RULES_MAX, EgressRule, NetChoice, VmSpec};
use crate::error::{Code, Error, Hint, Result};
use crate::operation as op;

/// How many rules a hint lists.
const RULES_LISTED: usize = 10;

/// The network of a VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VmNetwork {
    /// Network.
    pub net: NetChoice,
    /// Its rules: with `restricted` all that the guest reaches, with `nat` what it reaches in addition.
    pub allow: Vec<EgressRule>,
    /// What it has done since its supervisor started. Absent for a VM that does not run or has no network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub network: Option<NetworkInfo>,
    /// Rules that allow more than their text suggests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// Rules to add.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RulesRequest {
    /// The rules. Those that the VM has already are kept.
    #[schema(min_items = 1, max_items = 256)]
    pub allow: Vec<EgressRule>,
}

/// What a change of rules did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RuleChangeResult {
    /// The rules that the VM has now.
    pub allow: Vec<EgressRule>,
    /// Rules that were added or removed.
    pub changed: Vec<EgressRule>,
    /// Rules that were to be added, and were there already.
    pub unchanged: Vec<EgressRule>,
    /// Added rules that allow more than their text suggests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A change of the rules of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuleChange {
    /// Rules are added.
    Allow(Vec<EgressRule>),
    /// Rules are removed.
    Deny(Vec<EgressRule>),
}

impl RuleChange {
    /// What the change makes of the rules of a VM with this specification.
    ///
    /// # Errors
    /// `spec_invalid` if the VM cannot have these rules, `rule_not_found`.
    pub fn apply(&self, spec: &VmSpec) -> Result<RuleChangeResult> {
        let (Self::Allow(rules) | Self::Deny(rules)) = self;
        let name = &spec.name;
        if rules.is_empty() {
            return Err(Error::new(Code::SpecInvalid, "allow: no rule is named")
                .hint("name at least one rule, for example example.com:443"));
        }
        if !spec.net.has_card() {
            return Err(Error::new(Code::SpecInvalid, format!("allow: VM '{name}' has no network, and so no rules"))
                .hint("create a VM with the network restricted"));
        }
        match self {
            Self::Allow(rules) => added(spec, rules),
            Self::Deny(rules) => removed(spec, rules),
        }
    }
}

fn added(spec: &VmSpec, rules: &[EgressRule]) -> Result<RuleChangeResult> {
    spec.net.check_rules(rules).map_err(|error| match spec.net {
        // The network of a VM cannot be changed.
        NetChoice::Nat if rules.len() <= EGRESS_RULES_MAX => {
            error.hint("leave the rule out, or create a VM with the network restricted")
        }
        _ => error,
    })?;
    let mut changed = RuleChangeResult::none(spec);
    for rule in rules {
        if !changed.allow.contains(rule) {
            changed.allow.push(rule.clone());
            changed.changed.push(rule.clone());
        } else if !changed.changed.contains(rule) && !changed.unchanged.contains(rule) {
            changed.unchanged.push(rule.clone());
        }
    }
    spec.net.check_rules(&changed.allow)?;
    changed.warnings = changed.changed.iter().filter_map(EgressRule::warning).collect();
    Ok(changed)
}

fn removed(spec: &VmSpec, rules: &[EgressRule]) -> Result<RuleChangeResult> {
    let mut changed = RuleChangeResult::none(spec);
    for rule in rules {
        if !spec.allow.contains(rule) {
            return Err(not_found(spec, rule));
        }
        if !changed.changed.contains(rule) {
            changed.changed.push(rule.clone());
        }
    }
    changed.allow.retain(|rule| !rules.contains(rule));
    Ok(changed)
}

fn not_found(spec: &VmSpec, rule: &EgressRule) -> Error {
    let listed: Vec<_> = spec.allow.iter().take(RULES_LISTED).map(ToString::to_string).collect();
    let more = spec.allow.len() - listed.len();
    let hint = match (listed.is_empty(), more) {
        (true, _) => "it has no rules".to_owned(),
        (_, 0) => format!("its rules are {}", listed.join(" ")),
        _ => format!("its rules are {} and {more} more", listed.join(" ")),
    };
    let error = Error::new(Code::RuleNotFound, format!("VM '{}' has no rule '{rule}'", spec.name)).hint(hint);
    if more > 0 { error.or_hint(Hint::run_on(op::NET_SHOW, &spec.name).to("list them all")) } else { error }
}

impl RuleChangeResult {
    /// No change of these rules.
    fn none(spec: &VmSpec) -> Self {
        Self { allow: spec.allow.clone(), changed: Vec::new(), unchanged: Vec::new(), warnings: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FrontEnd;

    fn rules(texts: &[&str]) -> Vec<EgressRule> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn spec(net: NetChoice, allow: &[&str]) -> VmSpec {
        VmSpec { net, allow: rules(allow), ..VmSpec::named("web".parse().unwrap()) }
    }

    #[test]
    fn rules_are_added_once_and_those_that_are_there_are_unchanged() {
        let web = spec(NetChoice::Restricted, &["example.com", "host:80"]);
        let change = RuleChange::Allow(rules(&["*.github.io", "Example.com:80,443", "*.github.io", "host:80"]));
        let changed = change.apply(&web).unwrap();
        assert_eq!(changed.allow, rules(&["example.com", "host:80", "*.github.io"]));
        assert_eq!(changed.changed, rules(&["*.github.io"]));
        assert_eq!(changed.unchanged, rules(&["example.com", "host:80"]));
        assert!(changed.warnings.len() == 1 && changed.warnings[0].contains("*.github.io"), "{changed:?}");
        let again = change.apply(&VmSpec { allow: changed.allow.clone(), ..web }).unwrap();
        assert!(again.allow == changed.allow && again.changed.is_empty() && again.warnings.is_empty(), "{again:?}");
    }

    #[test]
    fn rules_are_removed_all_or_none() {
        let web = spec(NetChoice::Nat, &["10.0.0.0/8:22", "host:80", "host:81"]);
        let changed = RuleChange::Deny(rules(&["host:80", "10.0.0.0/8:22", "host:80"])).apply(&web).unwrap();
        assert_eq!(changed.allow, rules(&["host:81"]));
        assert_eq!(changed.changed, rules(&["host:80", "10.0.0.0/8:22"]));
        let error = RuleChange::Deny(rules(&["host:80", "host:82"])).apply(&web).unwrap_err();
        assert_eq!(error.code(), Code::RuleNotFound);
        let hint = error.hint_for(FrontEnd::Api).unwrap();
        assert!(hint.contains("10.0.0.0/8:22 host:80 host:81"), "{hint}");
        let none = RuleChange::Deny(rules(&["host:80"])).apply(&spec(NetChoice::Nat, &[])).unwrap_err();
        assert_eq!(none.hint_for(FrontEnd::Cli).unwrap(), "it has no rules");
    }

    #[test]
    fn rules_that_the_vm_could_not_have_been_created_with_are_refused() {
        let full: Vec<_> = (1..=EGRESS_RULES_MAX).map(|port| format!("host:{port}")).collect();
        let full: Vec<_> = full.iter().map(String::as_str).collect();
        for (vm, change) in [
            (spec(NetChoice::None, &[]), RuleChange::Allow(rules(&["host:80"]))),
            (spec(NetChoice::None, &[]), RuleChange::Deny(rules(&["host:80"]))),
            (spec(NetChoice::Nat, &["host:80"]), RuleChange::Allow(rules(&["host:81", "example.com"]))),
            (spec(NetChoice::Restricted, &full), RuleChange::Allow(rules(&["host:999"]))),
            (spec(NetChoice::Restricted, &[]), RuleChange::Allow(Vec::new())),
        ] {
            let error = change.apply(&vm).unwrap_err();
            assert_eq!(error.code(), Code::SpecInvalid, "{error}");
            assert!(error.hint_for(FrontEnd::Mcp).is_some(), "{error}");
        }
        // One that is there already is not counted twice.
        let full = spec(NetChoice::Restricted, &full);
        RuleChange::Allow(rules(&["host:7"])).apply(&full).unwrap();
        let error = RuleChange::Deny(rules(&["host:999"])).apply(&full).unwrap_err();
        let hint = error.hint_for(FrontEnd::Cli).unwrap();
        assert!(hint.contains("host:10 and 246 more") && hint.contains("nido net show web"), "{hint}");
    }
}
