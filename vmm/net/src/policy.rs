//! Decides what a guest may reach: pure.
//!
//! Invariants: the host's loopback is reached through the gateway's address and a rule for `host` only; a name allows only what it
//! has resolved to, and no address that is private; one path of code decides for both families.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nido_api::egress::{DenialReason, DomainName, EgressRule, Protocol, embedded_v4, is_global};

use crate::subnet::{is_gateway, is_inside, is_name_server};

/// Whether the guest reaches what is not forbidden, or only what is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Everything that the host reaches, except the host itself and what only it may reach.
    Nat,
    /// Only what rules allow.
    Restricted,
}

/// What a guest may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// What holds without a rule.
    pub mode: Mode,
    /// What is allowed.
    pub rules: Vec<EgressRule>,
}

/// What is done about a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is reached at this address of the host's view.
    Allowed(SocketAddr),
    /// It is reached if it turns out to be one of these names.
    ByName(SocketAddr, Vec<DomainName>),
    /// It is refused; the domain name that it was known by.
    Denied(DenialReason, Option<DomainName>),
}

impl Policy {
    /// Decides about a destination, for which the name server has given these names.
    #[must_use]
    pub fn decide(&self, destination: SocketAddr, protocol: Protocol, names: &[DomainName]) -> Verdict {
        let (address, port) = (destination.ip(), destination.port());
        let applies = |rule: &&EgressRule| rule.protocol == protocol && rule.matches_port(port);
        if is_gateway(address) {
            return if self.rules.iter().filter(applies).any(EgressRule::is_host) {
                let loopback =
                    if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { IpAddr::from(Ipv6Addr::LOCALHOST) };
                Verdict::Allowed((loopback, port).into())
            } else {
                Verdict::Denied(DenialReason::AddressPrivate, "host".parse().ok())
            };
        }
        if is_never_reached(address) || is_inside(address) || is_name_server(address) {
            return Verdict::Denied(DenialReason::AddressPrivate, None);
        }
        if self.rules.iter().filter(applies).any(|rule| rule.matches_address(address)) {
            return Verdict::Allowed(destination);
        }
        match self.mode {
            Mode::Nat if is_closed_to_nat(address) => Verdict::Denied(DenialReason::AddressPrivate, None),
            Mode::Nat => Verdict::Allowed(destination),
            Mode::Restricted => self.decide_by_name(destination, protocol, names),
        }
    }

    fn decide_by_name(&self, destination: SocketAddr, protocol: Protocol, names: &[DomainName]) -> Verdict {
        if !is_global(destination.ip()) {
            return Verdict::Denied(DenialReason::AddressPrivate, None);
        }
        let allows = |rule: &EgressRule, name: &DomainName| {
            rule.protocol == protocol && rule.matches_port(destination.port()) && rule.matches_name(name)
        };
        let allowed: Vec<_> =
            names.iter().filter(|name| self.rules.iter().any(|rule| allows(rule, name))).cloned().collect();
        if !allowed.is_empty() {
            return Verdict::ByName(destination, allowed);
        }
        let names_address = self.rules.iter().any(|rule| rule.matches_address(destination.ip()));
        match names.first() {
            Some(name) if self.allows_question(name) => {
                Verdict::Denied(DenialReason::PortNotAllowed, Some(name.clone()))
            }
            Some(name) => Verdict::Denied(DenialReason::NameNotAllowed, Some(name.clone())),
            None if names_address => Verdict::Denied(DenialReason::PortNotAllowed, None),
            None => Verdict::Denied(DenialReason::AddressNotLearned, None),
        }
    }

    /// Whether the name server resolves a name: some rule names it.
    #[must_use]
    pub fn allows_question(&self, name: &DomainName) -> bool {
        self.mode == Mode::Nat || self.rules.iter().any(|rule| rule.matches_name(name))
    }

    /// The rule with a wildcard that alone allows a question; names below it are limited in number.
    #[must_use]
    pub fn wildcard(&self, name: &DomainName) -> Option<&EgressRule> {
        let mut matching = self.rules.iter().filter(|rule| rule.matches_name(name));
        let first = matching.next()?;
        let is_exact = |rule: &EgressRule| matches!(rule.target, nido_api::egress::Target::Name(_));
        (!is_exact(first) && !matching.any(is_exact)).then_some(first)
    }

    /// Whether an address is part of the answer to a question about a name: not one that only the host may reach, unless a rule
    /// names it.
    #[must_use]
    pub fn allows_answer(&self, address: IpAddr) -> bool {
        match self.mode {
            Mode::Nat => true,
            Mode::Restricted => {
                let named = || self.rules.iter().any(|rule| rule.matches_address(address));
                !is_never_reached(address) && (is_global(address) || named())
            }
        }
    }
}

/// Addresses that no rule opens: the loopback of the host, which has a rule of its own, and what is not one host.
fn is_never_reached(address: IpAddr) -> bool {
    match embedded_v4(address).map_or(address, IpAddr::V4) {
        IpAddr::V4(v4) => v4.is_loopback() || v4.octets()[0] == 0 || v4.is_multicast() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unspecified() || v6.is_multicast() || v6.segments()[..6] == [0; 6],
    }
}

/// What `nat` does not reach without a rule: the link of the host, and where clouds keep the host's secrets.
fn is_closed_to_nat(address: IpAddr) -> bool {
    const METADATA_V4: [Ipv4Addr; 3] =
        [Ipv4Addr::new(168, 63, 129, 16), Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(192, 0, 0, 192)];
    match embedded_v4(address).map_or(address, IpAddr::V4) {
        IpAddr::V4(v4) => v4.is_link_local() || METADATA_V4.contains(&v4),
        IpAddr::V6(v6) => {
            let metadata =
                [Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)];
            v6.is_unicast_link_local() || metadata.contains(&v6)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(mode: Mode, rules: &[&str]) -> Policy {
        Policy { mode, rules: rules.iter().map(|rule| rule.parse().unwrap()).collect() }
    }

    fn names(names: &[&str]) -> Vec<DomainName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn decide(policy: &Policy, to: &str, known: &[&str]) -> Verdict {
        policy.decide(to.parse().unwrap(), Protocol::Tcp, &names(known))
    }

    fn is_denied(verdict: &Verdict, why: DenialReason) -> bool {
        matches!(verdict, Verdict::Denied(reason, _) if *reason == why)
    }

    #[test]
    fn nat_reaches_neither_the_host_nor_its_link_nor_metadata() {
        let open = policy(Mode::Nat, &[]);
        let closed = "10.0.2.2:22 10.0.2.3:80 10.0.2.77:80 127.0.0.1:22 127.9.9.9:22 0.0.0.0:22 169.254.169.254:80 224.0.0.1:80 \
            255.255.255.255:80 168.63.129.16:80 100.100.100.200:80 [::1]:22 [::]:22 [::ffff:127.0.0.1]:22 [::127.0.0.1]:22 \
            [64:ff9b::7f00:1]:22 [64:ff9b::a9fe:a9fe]:80 [2002:7f00:1::]:22 [fe80::1]:80 [fe80::2]:80 [ff02::1]:80 \
            [fd00:ec2::254]:80 [fd6e:6964:6f::2]:22 [fd6e:6964:6f::9]:22";
        for to in closed.split_whitespace() {
            assert!(is_denied(&decide(&open, to, &[]), DenialReason::AddressPrivate), "{to}");
        }
        for to in ["192.168.1.1:80", "10.1.2.3:22", "1.1.1.1:443", "[2606:4700::1]:443", "[fd12::1]:80"] {
            assert_eq!(decide(&open, to, &[]), Verdict::Allowed(to.parse().unwrap()));
        }
    }

    #[test]
    fn only_a_rule_for_the_host_opens_its_loopback() {
        for mode in [Mode::Nat, Mode::Restricted] {
            let opened = policy(mode, &["host:8080", "127.0.0.0/8:*", "10.0.2.0/24:*", "0.0.0.0/0:22"]);
            assert_eq!(decide(&opened, "10.0.2.2:8080", &[]), Verdict::Allowed("127.0.0.1:8080".parse().unwrap()));
            assert_eq!(decide(&opened, "[fd6e:6964:6f::2]:8080", &[]), Verdict::Allowed("[::1]:8080".parse().unwrap()));
            for to in ["10.0.2.2:8081", "127.0.0.1:8080", "127.0.0.1:22", "10.0.2.3:22", "[::ffff:127.0.0.1]:22"] {
                assert!(is_denied(&decide(&opened, to, &[]), DenialReason::AddressPrivate), "{mode:?} {to}");
            }
        }
        let link = policy(Mode::Nat, &["169.254.169.254:80"]);
        assert!(matches!(decide(&link, "169.254.169.254:80", &[]), Verdict::Allowed(_)));
        assert!(is_denied(&decide(&link, "169.254.169.254:81", &[]), DenialReason::AddressPrivate));
    }

    #[test]
    fn a_name_allows_only_what_it_has_resolved_to() {
        let policy = policy(Mode::Restricted, &["example.com:443", "*.example.net", "8.8.8.0/24:53", "host:8080"]);
        let allowed = decide(&policy, "1.1.1.1:443", &["other.org", "example.com"]);
        assert_eq!(allowed, Verdict::ByName("1.1.1.1:443".parse().unwrap(), names(&["example.com"])));
        assert!(is_denied(&decide(&policy, "1.1.1.1:443", &[]), DenialReason::AddressNotLearned));
        assert!(is_denied(&decide(&policy, "1.1.1.1:80", &["example.com"]), DenialReason::PortNotAllowed));
        assert!(is_denied(&decide(&policy, "1.1.1.1:443", &["example.net"]), DenialReason::NameNotAllowed));
        assert!(is_denied(&decide(&policy, "10.0.0.1:443", &["example.com"]), DenialReason::AddressPrivate));
        assert!(is_denied(&decide(&policy, "[64:ff9b::a00:1]:443", &["example.com"]), DenialReason::AddressPrivate));
        assert!(matches!(decide(&policy, "8.8.8.8:53", &[]), Verdict::Allowed(_)));
        assert!(is_denied(&decide(&policy, "8.8.8.8:443", &[]), DenialReason::PortNotAllowed));
        let udp = policy.decide("8.8.8.8:53".parse().unwrap(), Protocol::Udp, &[]);
        assert!(is_denied(&udp, DenialReason::PortNotAllowed));
    }

    #[test]
    fn answers_do_not_lead_inside() {
        let policy = policy(Mode::Restricted, &["example.com", "10.1.0.0/16:443", "127.0.0.1:443"]);
        for (address, allowed) in [
            ("1.1.1.1", true),
            ("10.1.2.3", true),
            ("10.2.2.3", false),
            ("127.0.0.1", false),
            ("::ffff:10.2.0.1", false),
            ("64:ff9b::a9fe:a9fe", false),
            ("169.254.169.254", false),
        ] {
            assert_eq!(policy.allows_answer(address.parse().unwrap()), allowed, "{address}");
        }
    }

    #[test]
    fn names_below_a_wildcard_are_known_as_such() {
        let policy = policy(Mode::Restricted, &["*.example.com", "www.example.com"]);
        let wildcard = |name: &str| policy.wildcard(&name.parse().unwrap()).is_some();
        assert!(wildcard("a.example.com") && !wildcard("www.example.com") && !wildcard("example.com"));
    }
}
