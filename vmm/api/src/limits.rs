//! What a caller may make, and who owns it then. Pure.
//!
//! Invariant: what is absent does not limit, except that no secret is allowed then; a list that is there allows what is in it and nothing
//! else, also when it is empty. The core
//! asks here before it makes a VM, forks one, publishes a port or adds a rule, so that every front end has the same limits.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::egress::{covers, intersection};
use super::{AllowEntry, Caller, EgressRule, ForwardSpec, NetChoice, SecretUse, VmSpec};
use crate::error::{Code, Error, Result};
use crate::name::TemplateName;

/// How many rules a hint lists.
const RULES_LISTED: usize = 20;

/// Limits on the VMs of a caller.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// The most VMs at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_vms: Option<u32>,
    /// The most virtual CPUs of one VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_cpus: Option<u32>,
    /// The most memory of one VM, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_memory_mib: Option<u32>,
    /// The largest disk of one VM, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_disk_bytes: Option<u64>,
    /// The longest `ttl_ms`, in milliseconds. Every VM then needs one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_max_ms: Option<u64>,
    /// Every VM needs a `ttl_ms`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ttl_required: bool,
    /// Allowed networks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net: Option<Vec<NetChoice>>,
    /// Rules that a VM may have: each of its own must be covered. The network is then `restricted` or `none`. Presets stand for
    /// the rules that they have when the limit is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow: Option<Vec<AllowEntry>>,
    /// Addresses of the host on which ports may be published.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>)]
    pub publish: Option<Vec<IpAddr>>,
    /// Allowed templates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub templates: Option<Vec<TemplateName>>,
    /// Secrets that a VM may use, each with its host and header: `NAME@HOST[:HEADER]`. Absent: none, except for the user at the
    /// command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secrets: Option<Vec<SecretUse>>,
}

/// On whose behalf a VM is made, and within which limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Who owns it: [`Caller::owner`]. Absent for what nido makes for itself.
    pub owner: Option<String>,
    /// What it may be.
    pub limits: Limits,
}

impl Grant {
    /// Without limits: the user at the command line.
    #[must_use]
    pub fn unlimited(caller: &Caller) -> Self {
        Self::within(caller, Limits::default())
    }

    /// Within these limits.
    #[must_use]
    pub fn within(caller: &Caller, limits: Limits) -> Self {
        Self { owner: Some(caller.owner()), limits }
    }

    /// What nido makes for itself.
    pub fn own() -> Self {
        Self { owner: None, limits: Limits::default() }
    }
}

impl Limits {
    /// The addresses of this host that no other machine reaches.
    #[must_use]
    pub fn loopback() -> Vec<IpAddr> {
        vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
    }

    /// Whether there are no limits.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// What both allow.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self {
            max_vms: least(self.max_vms, other.max_vms),
            max_cpus: least(self.max_cpus, other.max_cpus),
            max_memory_mib: least(self.max_memory_mib, other.max_memory_mib),
            max_disk_bytes: least(self.max_disk_bytes, other.max_disk_bytes),
            ttl_max_ms: least(self.ttl_max_ms, other.ttl_max_ms),
            ttl_required: self.ttl_required || other.ttl_required,
            net: both(self.net.as_deref(), other.net.as_deref()),
            allow: both_rules(self.allow.as_deref(), other.allow.as_deref()),
            publish: both(self.publish.as_deref(), other.publish.as_deref()),
            templates: both(self.templates.as_deref(), other.templates.as_deref()),
            secrets: both(self.secrets.as_deref(), other.secrets.as_deref()),
        }
    }

    /// Whether a VM may be this. The store checks their number when it is created.
    ///
    /// # Errors
    /// `limit_exceeded`, `denied`.
    pub fn check(&self, spec: &VmSpec, disk_bytes: u64) -> Result<()> {
        at_most("cpus", u64::from(spec.cpus), self.max_cpus.map(u64::from))?;
        at_most("memory_mib", u64::from(spec.memory_mib), self.max_memory_mib.map(u64::from))?;
        at_most("disk_bytes", disk_bytes, self.max_disk_bytes)?;
        match (spec.ttl_ms, self.ttl_max_ms) {
            (None, Some(most)) => Err(exceeded(format!("ttl_ms: required here, at most {most}"))),
            (None, None) if self.ttl_required => Err(exceeded("ttl_ms: required here".into())),
            (ttl, most) => at_most("ttl_ms", ttl.unwrap_or(0), most),
        }?;
        self.check_net(spec.net)?;
        self.check_rules(spec.net, &spec.rules())?;
        if self.templates.as_ref().is_some_and(|templates| !templates.contains(&spec.template)) {
            let allowed = self.templates.iter().flatten().map(|name| name.as_str().to_owned());
            return Err(not_among("template", spec.template.as_str(), allowed));
        }
        spec.forwards.iter().try_for_each(|forward| self.check_forward(forward))
    }

    /// Whether a VM with this network may have these rules.
    ///
    /// # Errors
    /// `denied`.
    pub fn check_rules(&self, net: NetChoice, rules: &[EgressRule]) -> Result<()> {
        let Some(entries) = &self.allow else { return Ok(()) };
        check_within(&plain_rules(entries), "your limits", net, rules)
    }

    /// The network of a VM for which none is requested: the first that may have all that a limit allows.
    #[must_use]
    pub fn default_net(&self) -> NetChoice {
        let is_allowed = |net: &NetChoice| self.net.as_ref().is_none_or(|allowed| allowed.contains(net));
        let bounded = self.allow.is_some();
        let candidates = [NetChoice::Nat, NetChoice::Restricted, NetChoice::None];
        let found = candidates.into_iter().find(|net| is_allowed(net) && !(bounded && *net == NetChoice::Nat));
        // What is refused then has a reason.
        found.unwrap_or_default()
    }

    /// Whether a VM may have this network.
    ///
    /// # Errors
    /// `denied`.
    pub fn check_net(&self, net: NetChoice) -> Result<()> {
        match &self.net {
            Some(allowed) if !allowed.contains(&net) => {
                Err(not_among("net", net.name(), allowed.iter().map(|net| net.name().to_owned())))
            }
            _ => Ok(()),
        }
    }

    /// Whether a port may be published there.
    ///
    /// # Errors
    /// `denied`.
    pub fn check_forward(&self, forward: &ForwardSpec) -> Result<()> {
        match &self.publish {
            Some(addresses) if !addresses.contains(&forward.host) => {
                let allowed = addresses.iter().map(ToString::to_string);
                Err(not_among("forwards", &format!("publishing on {}", forward.host), allowed))
            }
            _ => Ok(()),
        }
    }

    /// Whether a VM of another caller than the user at the command line may use these secrets: exactly those that are listed.
    ///
    /// # Errors
    /// `denied`.
    pub fn check_secrets(&self, uses: &[SecretUse]) -> Result<()> {
        let allowed = self.secrets.as_deref().unwrap_or_default();
        match uses.iter().find(|used| !allowed.contains(used)) {
            Some(used) => Err(not_among("secrets", &used.to_string(), allowed.iter().map(ToString::to_string))),
            None => Ok(()),
        }
    }

    /// The refusal of one VM more.
    pub fn too_many(most: u32) -> Error {
        exceeded(format!("you have {most} VMs, which is your limit")).hint("delete one that you no longer need")
    }
}

fn at_most(field: &str, value: u64, most: Option<u64>) -> Result<()> {
    match most {
        Some(most) if value > most => Err(exceeded(format!("{field}: {value} is more than your limit of {most}"))),
        _ => Ok(()),
    }
}

fn exceeded(words: String) -> Error {
    Error::new(Code::LimitExceeded, words).hint("request less; the operator of this server has set the limit")
}

fn not_among(field: &str, what: &str, allowed: impl Iterator<Item = String>) -> Error {
    let allowed: Vec<_> = allowed.collect();
    let allowed = if allowed.is_empty() { "nothing".to_owned() } else { allowed.join(", ") };
    Error::new(Code::Denied, format!("{field}: {what} is not allowed here; allowed is {allowed}"))
        .hint("the operator of this server has set the limit")
}

/// Whether a VM with this network may have these rules, where those of a ceiling bound them; `whose` they are, in words.
///
/// # Errors
/// `denied`.
pub fn check_within(ceiling: &[EgressRule], whose: &str, net: NetChoice, rules: &[EgressRule]) -> Result<()> {
    match net {
        NetChoice::None => return Ok(()),
        NetChoice::Restricted => {}
        NetChoice::Nat => {
            let words = format!("net: nat is not allowed here, because it reaches more than {whose} allow");
            return Err(Error::new(Code::Denied, words).hint("set the network to restricted or none"));
        }
    }
    match rules.iter().find(|rule| !covers(ceiling, rule)) {
        None => Ok(()),
        Some(rule) => Err(Error::new(Code::Denied, format!("allow: the rule '{rule}' is not within {whose}"))
            .hint(allowed_rules(ceiling))),
    }
}

/// The hint about the rules that a limit allows.
fn allowed_rules(ceiling: &[EgressRule]) -> String {
    let listed: Vec<_> = ceiling.iter().take(RULES_LISTED).map(ToString::to_string).collect();
    match (listed.is_empty(), ceiling.len() - listed.len()) {
        (true, _) => "no rule is allowed".to_owned(),
        (_, 0) => format!("allowed is {}", listed.join(" ")),
        (_, more) => format!("allowed is {} and {more} more", listed.join(" ")),
    }
}

/// The rules of a limit. A preset whose rules are not known allows nothing.
#[must_use]
pub fn plain_rules(entries: &[AllowEntry]) -> Vec<EgressRule> {
    let rule = |entry: &AllowEntry| match entry {
        AllowEntry::Rule(rule) => Some(rule.clone()),
        AllowEntry::Preset(_) => None,
    };
    entries.iter().filter_map(rule).collect()
}

fn both_rules(one: Option<&[AllowEntry]>, other: Option<&[AllowEntry]>) -> Option<Vec<AllowEntry>> {
    match (one, other) {
        (Some(one), Some(other)) => {
            Some(intersection(&plain_rules(one), &plain_rules(other)).into_iter().map(AllowEntry::Rule).collect())
        }
        (one, other) => one.or(other).map(<[AllowEntry]>::to_vec),
    }
}

fn least<T: Ord>(one: Option<T>, other: Option<T>) -> Option<T> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

fn both<T: Clone + PartialEq>(one: Option<&[T]>, other: Option<&[T]>) -> Option<Vec<T>> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.iter().filter(|item| other.contains(item)).cloned().collect()),
        (one, other) => one.or(other).map(<[T]>::to_vec),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FrontEnd, PresetRules};

    fn spec() -> VmSpec {
        VmSpec { ttl_ms: Some(1000), ..VmSpec::named("web".parse().unwrap()) }
    }

    #[test]
    fn an_absent_limit_allows_everything_and_an_empty_list_nothing() {
        Limits::default().check(&VmSpec { ttl_ms: None, cpus: 64, ..spec() }, u64::MAX).unwrap();
        let code = |limits: &Limits, spec: &VmSpec| limits.check(spec, 1 << 30).map_err(|e| e.code()).err();
        let none = Limits { publish: Some(vec![]), net: Some(vec![]), ..Limits::default() };
        assert_eq!(code(&none, &spec()), Some(Code::Denied));
        let open = VmSpec { forwards: vec!["0.0.0.0:8443:80".parse().unwrap()], ..spec() };
        let publish = |addresses| Limits { publish: Some(addresses), ..Limits::default() };
        assert_eq!(code(&publish(vec![]), &open), Some(Code::Denied));
        assert_eq!(code(&publish(Limits::loopback()), &open), Some(Code::Denied));
        let near = VmSpec { forwards: vec!["8443:80".parse().unwrap()], ..spec() };
        assert_eq!(code(&publish(Limits::loopback()), &near), None);
    }

    #[test]
    fn each_limit_is_kept_to_the_last_unit() {
        let limits = Limits {
            max_cpus: Some(2),
            max_memory_mib: Some(1024),
            max_disk_bytes: Some(1 << 30),
            ttl_max_ms: Some(1000),
            net: Some(vec![NetChoice::None]),
            templates: Some(vec!["sandbox".parse().unwrap()]),
            ..Limits::default()
        };
        let fits = VmSpec { cpus: 2, memory_mib: 1024, net: NetChoice::None, ..spec() };
        limits.check(&fits, 1 << 30).unwrap();
        for (wrong, disk, code) in [
            (VmSpec { cpus: 3, ..fits.clone() }, 1 << 30, Code::LimitExceeded),
            (VmSpec { memory_mib: 1025, ..fits.clone() }, 1 << 30, Code::LimitExceeded),
            (fits.clone(), (1 << 30) + 1, Code::LimitExceeded),
            (VmSpec { ttl_ms: Some(1001), ..fits.clone() }, 1 << 30, Code::LimitExceeded),
            (VmSpec { ttl_ms: None, ..fits.clone() }, 1 << 30, Code::LimitExceeded),
            (VmSpec { net: NetChoice::Nat, ..fits.clone() }, 1 << 30, Code::Denied),
            (VmSpec { template: "debian-12".parse().unwrap(), ..fits.clone() }, 1 << 30, Code::Denied),
        ] {
            let error = limits.check(&wrong, disk).unwrap_err();
            assert!(error.code() == code && error.hint_for(FrontEnd::Cli).is_some(), "{error}");
        }
    }

    #[test]
    fn only_secrets_that_are_listed_with_their_host_and_header_are_allowed() {
        let uses = |text: &str| text.split_whitespace().map(|used| used.parse().unwrap()).collect::<Vec<SecretUse>>();
        let limits = |text: &str| Limits { secrets: Some(uses(text)), ..Limits::default() };
        let check = |limits: &Limits, text: &str| limits.check_secrets(&uses(text)).map_err(|error| error.code());
        assert_eq!(check(&Limits::default(), ""), Ok(()));
        assert_eq!(check(&Limits::default(), "key@example.com"), Err(Code::Denied));
        let listed = limits("key@example.com other@example.com:x-key");
        assert_eq!(check(&listed, "key@example.com:authorization"), Ok(()));
        for other in ["key@example.org", "key@example.com:x-key", "other@example.com", "key@example.com no@example.com"]
        {
            assert_eq!(check(&listed, other), Err(Code::Denied), "{other}");
        }
        // Of a policy and a token: what either lists alone, else what both do.
        assert_eq!(check(&listed.and(&Limits::default()), "key@example.com"), Ok(()));
        assert_eq!(check(&listed.and(&limits("")), "key@example.com"), Err(Code::Denied));
        assert_eq!(check(&listed.and(&limits("key@example.com")), "other@example.com:x-key"), Err(Code::Denied));
    }

    #[test]
    fn rules_are_kept_within_those_of_the_limit() {
        let entries = |text: &str| Some(text.split_whitespace().map(|entry| entry.parse().unwrap()).collect());
        let limits = Limits { allow: entries("*.example.com host:8000-8010"), ..Limits::default() };
        let vm = |net, allow: &str| {
            let allow = allow.split_whitespace().map(|rule| rule.parse().unwrap()).collect();
            VmSpec { net, allow, ..spec() }
        };
        for fits in [
            vm(NetChoice::None, ""),
            vm(NetChoice::Restricted, ""),
            vm(NetChoice::Restricted, "a.example.com:443 host:8001"),
        ] {
            limits.check(&fits, 0).unwrap();
        }
        let preset = |rule: &str| {
            let rules = vec![rule.parse().unwrap()];
            vec![PresetRules { rules, ..PresetRules::unexpanded("@x".parse().unwrap()) }]
        };
        let restricted = vm(NetChoice::Restricted, "");
        limits.check(&VmSpec { presets: preset("b.example.com"), ..restricted.clone() }, 0).unwrap();
        for wrong in [
            vm(NetChoice::Nat, ""),
            vm(NetChoice::Restricted, "a.example.com:22"),
            vm(NetChoice::Restricted, "host:8001 example.com"),
            VmSpec { presets: preset("x.org"), ..restricted.clone() },
        ] {
            let error = limits.check(&wrong, 0).unwrap_err();
            assert!(error.code() == Code::Denied && error.hint_for(FrontEnd::Api).is_some(), "{error}");
        }
        let both = limits.and(&Limits { allow: entries("a.example.com:443,8443 @pip"), ..Limits::default() });
        assert_eq!(both.allow, entries("a.example.com:443"));
        // Nothing stands for a preset whose rules are not known.
        let unknown = Limits { allow: entries("@pip"), ..Limits::default() };
        assert!(unknown.check(&vm(NetChoice::Restricted, "pypi.org:443"), 0).is_err());
        unknown.check(&restricted, 0).unwrap();
    }

    #[test]
    fn the_default_network_is_one_that_the_limits_allow() {
        use NetChoice::{Nat, None as Alone, Restricted};
        for (net, allow, default) in [
            (None, None, Nat),
            (None, Some(vec![]), Restricted),
            (Some(vec![Nat, Alone]), None, Nat),
            (Some(vec![Nat, Alone]), Some(vec![]), Alone),
            (Some(vec![Alone, Restricted]), None, Restricted),
            (Some(vec![]), None, Nat),
        ] {
            let limits = Limits { net: net.clone(), allow, ..Limits::default() };
            assert_eq!(limits.default_net(), default, "{net:?}");
        }
    }

    #[test]
    fn of_two_limits_the_narrower_counts() {
        let one = Limits { max_vms: Some(3), net: Some(vec![NetChoice::Nat]), ..Limits::default() };
        let other =
            Limits { max_vms: Some(5), max_cpus: Some(1), net: Some(vec![NetChoice::None]), ..Limits::default() };
        let both = one.and(&other);
        assert_eq!(both, other.and(&one));
        assert_eq!((both.max_vms, both.max_cpus, both.net), (Some(3), Some(1), Some(vec![])));
        assert_eq!(one.and(&Limits::default()), one);
    }
}
