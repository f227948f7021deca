//! What rules within a limit allow, the limit allows as well: compared with the decisions of the engine.

#![allow(clippy::unwrap_used, reason = "a test that cannot continue must stop")]

use std::net::{IpAddr, SocketAddr};

use nido_api::egress::{DomainName, EgressRule, Protocol, covers, intersection};
use nido_net::policy::Verdict;
use nido_net::{Mode, Policy};
use proptest::prelude::*;
use proptest::sample::select;

const TARGETS: [&str; 14] = [
    "example.com",
    "a.example.com",
    "b.a.example.com",
    "x.org",
    "*.example.com",
    "*.a.example.com",
    "1.1.0.0/16",
    "1.1.1.0/24",
    "1.1.1.1",
    "0.0.0.0/0",
    "[2606:4700::/32]",
    "[::/0]",
    "10.1.0.0/16",
    "host",
];
const PORTS: [&str; 7] = [":443", ":80", ":80,443", ":440-450", ":*", ":1-79", ":81-65535"];
const NAMES: [&str; 4] = ["example.com", "a.example.com", "b.a.example.com", "x.org"];
const ADDRESSES: [&str; 7] = ["1.1.1.1", "1.1.2.2", "8.8.8.8", "10.1.2.3", "2606:4700::1", "10.0.2.2", "127.0.0.1"];

fn rule() -> impl Strategy<Value = EgressRule> {
    (select(&TARGETS[..]), select(&PORTS[..]), select(&["", "", "/udp"][..]))
        .prop_map(|(target, ports, udp)| format!("{target}{ports}{udp}").parse().unwrap())
}

/// What rules allow of a destination: nothing, an address, or names.
fn allowed(rules: &[EgressRule], to: SocketAddr, protocol: Protocol, names: &[DomainName]) -> Option<Vec<DomainName>> {
    match (Policy { mode: Mode::Restricted, rules: rules.to_vec() }).decide(to, protocol, names) {
        Verdict::Allowed(_) => Some(Vec::new()),
        Verdict::ByName(_, names) => Some(names),
        Verdict::Denied(..) => None,
    }
}

/// Whether all that the one list allows, the other one allows.
fn is_within(narrow: &[EgressRule], wide: &[EgressRule]) -> Result<(), TestCaseError> {
    let names: Vec<DomainName> = NAMES.iter().map(|name| name.parse().unwrap()).collect();
    for address in ADDRESSES.map(|address| address.parse::<IpAddr>().unwrap()) {
        for port in [1, 22, 79, 80, 81, 440, 443, 445, 451, 65535] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                for known in [&names[..], &names[..1], &[]] {
                    let to = SocketAddr::new(address, port);
                    let Some(reached) = allowed(narrow, to, protocol, known) else { continue };
                    let limit = allowed(wide, to, protocol, known);
                    let fits = limit.as_ref().is_some_and(|names| {
                        names.is_empty() || (!reached.is_empty() && reached.iter().all(|name| names.contains(name)))
                    });
                    prop_assert!(fits, "{narrow:?} reach {to} as {reached:?}, the limit {wide:?} allows {limit:?}");
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn rules_within_a_limit_reach_no_more_than_the_limit(
        limit in prop::collection::vec(rule(), 0..5),
        rules in prop::collection::vec(rule(), 0..5),
    ) {
        let rules: Vec<_> = rules.into_iter().filter(|rule| covers(&limit, rule)).collect();
        is_within(&rules, &limit)?;
    }

    #[test]
    fn what_two_limits_have_in_common_is_within_both(
        one in prop::collection::vec(rule(), 0..4),
        other in prop::collection::vec(rule(), 0..4),
    ) {
        let common = intersection(&one, &other);
        is_within(&common, &one)?;
        is_within(&common, &other)?;
        // A rule that both cover is covered by what they have in common, if each covers it with one rule.
        for rule in one.iter().filter(|rule| other.iter().any(|wide| covers(std::slice::from_ref(wide), rule))) {
            prop_assert!(covers(&common, rule), "{rule}");
        }
    }
}
