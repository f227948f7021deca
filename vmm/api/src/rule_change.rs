//! Changes of the rules of a VM that exists. Pure.
//!
//! Invariants: a change is made whole or not at all; the rules that it leaves are ones that the VM could have been created with.

use serde::{Deserialize, Serialize};

use super::egress::{AllowEntry, NetworkInfo, PresetRules, effective_rules};
use super::{EGRESS_RULES_MAX, EgressRule, NetChoice, NetLimits, VmSpec};
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
    /// Presets, with the rules that they add. Absent: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub presets: Vec<PresetRules>,
    /// Its limits. Absent: the defaults.
    #[serde(default, skip_serializing_if = "NetLimits::is_empty")]
    pub limits: NetLimits,
    /// What it has done. Absent for a VM that does not run or has no network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub network: Option<NetworkInfo>,
    /// What the user should know about these rules: what allows more than its text suggests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// Rules to add.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RulesRequest {
    /// The rules and presets. Those that the VM has already are kept; a preset gets the rules that it has now.
    #[schema(min_items = 1, max_items = 256)]
    pub allow: Vec<AllowEntry>,
}

/// What a change of rules did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RuleChangeResult {
    /// The rules that the VM has now, without those of its presets.
    pub allow: Vec<EgressRule>,
    /// The presets that it has now. Absent: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub presets: Vec<PresetRules>,
    /// Rules and presets that were added or removed, and presets that have other rules now.
    pub changed: Vec<AllowEntry>,
    /// Rules and presets that were to be added, and were there already.
    pub unchanged: Vec<AllowEntry>,
    /// What the user should know about what was added.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A change of the rules of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuleChange {
    /// Rules and presets are added.
    Allow(Vec<EgressRule>, Vec<PresetRules>),
    /// Rules and presets are removed.
    Deny(Vec<AllowEntry>),
}

impl RuleChange {
    /// What the change makes of the rules of a VM with this specification.
    ///
    /// # Errors
    /// `spec_invalid` if the VM cannot have these rules, `rule_not_found`.
    pub fn apply(&self, spec: &VmSpec) -> Result<RuleChangeResult> {
        let name = &spec.name;
        let is_empty = match self {
            Self::Allow(rules, presets) => rules.is_empty() && presets.is_empty(),
            Self::Deny(entries) => entries.is_empty(),
        };
        if is_empty {
            return Err(Error::new(Code::SpecInvalid, "allow: no rule is named")
                .hint("name at least one rule, for example example.com:443"));
        }
        if !spec.net.has_card() {
            return Err(Error::new(Code::SpecInvalid, format!("allow: VM '{name}' has no network, and so no rules"))
                .hint("create a VM with the network restricted"));
        }
        match self {
            Self::Allow(rules, presets) => added(spec, rules, presets),
            Self::Deny(entries) => removed(spec, entries),
        }
    }
}

fn added(spec: &VmSpec, rules: &[EgressRule], presets: &[PresetRules]) -> Result<RuleChangeResult> {
    let checked = spec.net.check_rules(rules).and_then(|()| spec.net.check_presets(presets));
    checked.map_err(|error| match spec.net {
        // The network of a VM cannot be changed.
        NetChoice::Nat if rules.len() <= EGRESS_RULES_MAX => {
            error.hint("leave the rule out, or create a VM with the network restricted")
        }
        _ => error,
    })?;
    let mut changed = RuleChangeResult::none(spec);
    for rule in rules {
        let entry = AllowEntry::Rule(rule.clone());
        if !changed.allow.contains(rule) {
            changed.allow.push(rule.clone());
            changed.warnings.extend(rule.warning());
            changed.changed.push(entry);
        } else if !changed.changed.contains(&entry) && !changed.unchanged.contains(&entry) {
            changed.unchanged.push(entry);
        }
    }
    for preset in presets {
        let entry = AllowEntry::Preset(preset.preset.clone());
        match changed.presets.iter_mut().find(|own| own.preset == preset.preset) {
            Some(own) if own.rules == preset.rules => changed.unchanged.push(entry),
            Some(own) => {
                *own = preset.clone();
                changed.warnings.extend(preset.warnings.iter().cloned());
                changed.changed.push(entry);
            }
            None => {
                changed.presets.push(preset.clone());
                changed.warnings.extend(preset.warnings.iter().cloned());
                changed.changed.push(entry);
            }
        }
    }
    spec.net.check_rules(&effective_rules(&changed.allow, &changed.presets))?;
    Ok(changed)
}

fn removed(spec: &VmSpec, entries: &[AllowEntry]) -> Result<RuleChangeResult> {
    let mut changed = RuleChangeResult::none(spec);
    for entry in entries {
        let is_there = match entry {
            AllowEntry::Rule(rule) => spec.allow.contains(rule),
            AllowEntry::Preset(name) => spec.presets.iter().any(|own| own.preset == *name),
        };
        if !is_there {
            return Err(not_found(spec, entry));
        }
        if !changed.changed.contains(entry) {
            changed.changed.push(entry.clone());
        }
    }
    changed.allow.retain(|rule| !entries.iter().any(|entry| matches!(entry, AllowEntry::Rule(gone) if gone == rule)));
    changed
        .presets
        .retain(|own| !entries.iter().any(|entry| matches!(entry, AllowEntry::Preset(gone) if *gone == own.preset)));
    Ok(changed)
}

fn not_found(spec: &VmSpec, entry: &AllowEntry) -> Error {
    let (what, of_preset) = match entry {
        AllowEntry::Rule(rule) => ("rule", spec.presets.iter().find(|preset| preset.rules.contains(rule))),
        AllowEntry::Preset(_) => ("preset", None),
    };
    let error = Error::new(Code::RuleNotFound, format!("VM '{}' has no {what} '{entry}'", spec.name));
    if let Some(PresetRules { preset, .. }) = of_preset {
        return error.hint(format!("the rule belongs to {preset}: remove {preset}"));
    }
    let own = spec.presets.iter().map(|preset| preset.preset.to_string());
    let own = spec.allow.iter().map(ToString::to_string).chain(own);
    let count = spec.allow.len() + spec.presets.len();
    let listed: Vec<_> = own.take(RULES_LISTED).collect();
    let more = count - listed.len();
    let hint = match (listed.is_empty(), more) {
        (true, _) => "it has no rules".to_owned(),
        (_, 0) => format!("its rules are {}", listed.join(" ")),
        _ => format!("its rules are {} and {more} more", listed.join(" ")),
    };
    let error = error.hint(hint);
    if more > 0 { error.or_hint(Hint::run_on(op::NET_SHOW, &spec.name).to("list them all")) } else { error }
}

impl RuleChangeResult {
    /// No change of these rules.
    fn none(spec: &VmSpec) -> Self {
        Self {
            allow: spec.allow.clone(),
            presets: spec.presets.clone(),
            changed: Vec::new(),
            unchanged: Vec::new(),
            warnings: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FrontEnd;

    fn rules(texts: &[&str]) -> Vec<EgressRule> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn entries(texts: &[&str]) -> Vec<AllowEntry> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn allow(texts: &[&str]) -> RuleChange {
        RuleChange::Allow(rules(texts), Vec::new())
    }

    fn preset(name: &str, texts: &[&str]) -> PresetRules {
        PresetRules { rules: rules(texts), ..PresetRules::unexpanded(name.parse().unwrap()) }
    }

    fn spec(net: NetChoice, allow: &[&str]) -> VmSpec {
        VmSpec { net, allow: rules(allow), ..VmSpec::named("web".parse().unwrap()) }
    }

    #[test]
    fn rules_are_added_once_and_those_that_are_there_are_unchanged() {
        let web = spec(NetChoice::Restricted, &["example.com", "host:80"]);
        let change = allow(&["*.github.io", "Example.com:80,443", "*.github.io", "host:80"]);
        let changed = change.apply(&web).unwrap();
        assert_eq!(changed.allow, rules(&["example.com", "host:80", "*.github.io"]));
        assert_eq!(changed.changed, entries(&["*.github.io"]));
        assert_eq!(changed.unchanged, entries(&["example.com", "host:80"]));
        assert!(changed.warnings.len() == 1 && changed.warnings[0].contains("*.github.io"), "{changed:?}");
        let again = change.apply(&VmSpec { allow: changed.allow.clone(), ..web }).unwrap();
        assert!(again.allow == changed.allow && again.changed.is_empty() && again.warnings.is_empty(), "{again:?}");
    }

    #[test]
    fn rules_are_removed_all_or_none() {
        let web = spec(NetChoice::Nat, &["10.0.0.0/8:22", "host:80", "host:81"]);
        let changed = RuleChange::Deny(entries(&["host:80", "10.0.0.0/8:22", "host:80"])).apply(&web).unwrap();
        assert_eq!(changed.allow, rules(&["host:81"]));
        assert_eq!(changed.changed, entries(&["host:80", "10.0.0.0/8:22"]));
        let error = RuleChange::Deny(entries(&["host:80", "host:82"])).apply(&web).unwrap_err();
        assert_eq!(error.code(), Code::RuleNotFound);
        let hint = error.hint_for(FrontEnd::Api).unwrap();
        assert!(hint.contains("10.0.0.0/8:22 host:80 host:81"), "{hint}");
        let none = RuleChange::Deny(entries(&["host:80"])).apply(&spec(NetChoice::Nat, &[])).unwrap_err();
        assert_eq!(none.hint_for(FrontEnd::Cli).unwrap(), "it has no rules");
    }

    #[test]
    fn rules_that_the_vm_could_not_have_been_created_with_are_refused() {
        let full: Vec<_> = (1..=EGRESS_RULES_MAX).map(|port| format!("host:{port}")).collect();
        let full: Vec<_> = full.iter().map(String::as_str).collect();
        for (vm, change) in [
            (spec(NetChoice::None, &[]), allow(&["host:80"])),
            (spec(NetChoice::None, &[]), RuleChange::Deny(entries(&["host:80"]))),
            (spec(NetChoice::Nat, &["host:80"]), allow(&["host:81", "example.com"])),
            (spec(NetChoice::Restricted, &full), allow(&["host:999"])),
            (spec(NetChoice::Restricted, &[]), allow(&[])),
        ] {
            let error = change.apply(&vm).unwrap_err();
            assert_eq!(error.code(), Code::SpecInvalid, "{error}");
            assert!(error.hint_for(FrontEnd::Mcp).is_some(), "{error}");
        }
        // One that is there already is not counted twice.
        let full = spec(NetChoice::Restricted, &full);
        allow(&["host:7"]).apply(&full).unwrap();
        let error = RuleChange::Deny(entries(&["host:999"])).apply(&full).unwrap_err();
        let hint = error.hint_for(FrontEnd::Cli).unwrap();
        assert!(hint.contains("host:10 and 246 more") && hint.contains("nido net show web"), "{hint}");
    }

    #[test]
    fn removing_a_preset_removes_its_rules_and_no_others() {
        let pip = preset("@pip", &["pypi.org:443", "files.pythonhosted.org:443"]);
        let web = spec(NetChoice::Restricted, &["pypi.org:443"]);
        let added = RuleChange::Allow(Vec::new(), vec![pip.clone(), preset("@x", &["x.org"])]).apply(&web).unwrap();
        assert_eq!((&added.allow, &added.changed), (&web.allow, &entries(&["@pip", "@x"])));
        let web = VmSpec { presets: added.presets, ..web };
        assert_eq!(web.rules(), rules(&["pypi.org:443", "files.pythonhosted.org:443", "x.org"]));
        // Again: the rules that it has now.
        let again = RuleChange::Allow(Vec::new(), vec![pip, preset("@x", &["y.org"])]).apply(&web).unwrap();
        assert_eq!((again.unchanged, again.changed), (entries(&["@pip"]), entries(&["@x"])));
        let error = RuleChange::Deny(entries(&["files.pythonhosted.org:443"])).apply(&web).unwrap_err();
        assert_eq!(error.hint_for(FrontEnd::Cli).unwrap(), "the rule belongs to @pip: remove @pip");
        let removed = RuleChange::Deny(entries(&["@pip"])).apply(&web).unwrap();
        let web = VmSpec { presets: removed.presets, ..web };
        assert_eq!(web.rules(), rules(&["pypi.org:443", "x.org"]));
        let error = RuleChange::Deny(entries(&["@pip"])).apply(&web).unwrap_err();
        assert_eq!(error.hint_for(FrontEnd::Cli).unwrap(), "its rules are pypi.org:443 @x");
        let nat = spec(NetChoice::Nat, &[]);
        let names = RuleChange::Allow(Vec::new(), web.presets).apply(&nat).unwrap_err();
        assert!(names.code() == Code::SpecInvalid && names.message().contains("'@x'"), "{names}");
    }
}
