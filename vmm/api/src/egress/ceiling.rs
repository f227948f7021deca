//! Rules that bound other rules: pure.
//!
//! Invariant: what rules allow that are covered by a ceiling, the ceiling allows as well (`vmm/net/tests/ceiling.rs` compares both
//! with the decisions of the engine).

use super::{EgressRule, PortRange, Ports, Target};

/// Whether the ceiling allows all that the rule allows. Ports may be covered by several rules, a target by one.
#[must_use]
pub fn covers(ceiling: &[EgressRule], rule: &EgressRule) -> bool {
    let wider = |bound: &&EgressRule| bound.protocol == rule.protocol && target_covers(&bound.target, &rule.target);
    let ranges = ceiling.iter().filter(wider).flat_map(|bound| ranges(&bound.ports)).collect();
    let allowed = Ports::of(ranges);
    let is_inside = |range: &PortRange| {
        let holds = |wide: &PortRange| wide.first() <= range.first() && range.last() <= wide.last();
        self::ranges(&allowed).iter().any(holds)
    };
    self::ranges(&rule.ports).iter().all(is_inside)
}

/// The rules that allow what both lists allow. Of two targets, one is within the other, or they have nothing in common.
#[must_use]
pub fn intersection(one: &[EgressRule], other: &[EgressRule]) -> Vec<EgressRule> {
    let mut common: Vec<EgressRule> = Vec::new();
    for (a, b) in one.iter().flat_map(|a| other.iter().map(move |b| (a, b))) {
        if let Some(rule) = both(a, b).filter(|rule| !common.contains(rule)) {
            common.push(rule);
        }
    }
    common
}

fn both(a: &EgressRule, b: &EgressRule) -> Option<EgressRule> {
    let narrow = match (target_covers(&a.target, &b.target), target_covers(&b.target, &a.target)) {
        _ if a.protocol != b.protocol => return None,
        (true, _) => b,
        (_, true) => a,
        (false, false) => return None,
    };
    let (of_a, of_b) = (ranges(&a.ports), ranges(&b.ports));
    let pairs = of_a.iter().flat_map(|x| of_b.iter().map(move |y| (x, y)));
    let overlap = |(x, y): (&PortRange, &PortRange)| PortRange::new(x.first().max(y.first()), x.last().min(y.last()));
    let ports: Vec<_> = pairs.filter_map(overlap).collect();
    (!ports.is_empty()).then(|| EgressRule { ports: Ports::of(ports), ..narrow.clone() })
}

fn target_covers(wide: &Target, narrow: &Target) -> bool {
    match (wide, narrow) {
        (Target::Name(a), Target::Name(b)) => a == b,
        (Target::Subdomains(suffix), Target::Name(name)) => name.is_subdomain_of(suffix),
        (Target::Subdomains(a), Target::Subdomains(b)) => a == b || b.is_subdomain_of(a),
        (Target::Network(a), Target::Network(b)) => a.contains(b),
        (Target::Host, Target::Host) => true,
        _ => false,
    }
}

fn ranges(ports: &Ports) -> Vec<PortRange> {
    match ports {
        Ports::All => PortRange::new(1, u16::MAX).into_iter().collect(),
        Ports::Ranges(ranges) => ranges.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> Vec<EgressRule> {
        text.split_whitespace().map(|rule| rule.parse().unwrap()).collect()
    }

    fn is_covered(ceiling: &str, rule: &str) -> bool {
        covers(&rules(ceiling), &rule.parse().unwrap())
    }

    #[test]
    fn a_rule_is_covered_by_one_that_allows_as_much() {
        for (ceiling, rule) in [
            ("example.com", "example.com:443"),
            ("*.example.com:*", "a.b.example.com:22"),
            ("*.example.com", "*.b.example.com:80"),
            ("10.0.0.0/8:1-100", "10.1.0.0/16:22"),
            ("10.0.0.0/8:22", "10.1.2.3:22"),
            ("host:8000-8010", "host:8001"),
            ("example.com:80 example.com:443", "example.com"),
            ("*.example.com:80 a.example.com:81-90", "a.example.com:80-90"),
            ("10.0.0.53:53/udp", "10.0.0.53:53/udp"),
        ] {
            assert!(is_covered(ceiling, rule), "{ceiling} {rule}");
        }
        for (ceiling, rule) in [
            ("", "example.com"),
            ("example.com:443", "example.com"),
            ("*.example.com", "example.com"),
            ("example.com:*", "*.example.com"),
            ("*.b.example.com:*", "*.example.com"),
            ("*.example.com", "notexample.com"),
            ("10.1.0.0/16:*", "10.0.0.0/8"),
            ("0.0.0.0/0:*", "example.com"),
            ("0.0.0.0/0:*", "[2001:db8::1]"),
            ("[::/0]:*", "10.0.0.1"),
            ("0.0.0.0/0:*", "host:80"),
            ("host:80", "host:81"),
            ("10.0.0.53:53", "10.0.0.53:53/udp"),
            ("10.0.0.53:53/udp", "10.0.0.53:53"),
            ("example.com:1-79 example.com:81-65535", "example.com:*"),
        ] {
            assert!(!is_covered(ceiling, rule), "{ceiling} {rule}");
        }
    }

    #[test]
    fn an_intersection_is_covered_by_both_lists() {
        let (one, other) =
            (rules("*.example.com 10.0.0.0/8:22 host:1-9"), rules("a.example.com:443,8080 10.1.0.0/16:* x.org"));
        let common = intersection(&one, &other);
        assert_eq!(common, rules("a.example.com:443 10.1.0.0/16:22"));
        assert!(common.iter().all(|rule| covers(&one, rule) && covers(&other, rule)));
        assert!(intersection(&one, &[]).is_empty());
    }
}
