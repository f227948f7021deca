use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::FrontEnd;
use crate::error::Code;

fn rule(text: &str) -> EgressRule {
    text.parse().unwrap()
}

fn name(text: &str) -> DomainName {
    text.parse().unwrap()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn names_have_one_form() {
    for (text, canonical) in [
        ("Example.COM", "example.com"),
        ("example.com.", "example.com"),
        ("_http._tcp.deb.debian.org", "_http._tcp.deb.debian.org"),
        ("r3---sn-4g5e.example", "r3---sn-4g5e.example"),
        ("b\u{fc}cher.de", "xn--bcher-kva.de"),
        ("xn--bcher-kva.de", "xn--bcher-kva.de"),
        ("\u{ff45}xample\u{3002}com", "example.com"),
        ("fa\u{df}.de", "xn--fa-hia.de"),
        ("db", "db"),
    ] {
        assert_eq!(name(text).as_str(), canonical, "{text}");
    }
}

#[test]
fn wrong_names_are_refused() {
    let (label, long) = (format!("{}.de", "a".repeat(64)), format!("{}de", "abcdefg.".repeat(32)));
    for bad in [
        "",
        ".",
        "..",
        "a..b",
        ".a",
        "a.de..",
        "-a.de",
        "a-.de",
        "a b.de",
        "a\n.de",
        "a/b",
        "a:b",
        "*.de",
        "a@b",
        "xn--a",
        "xn--\u{fc}",
        "1.2.3.4",
        "10.0.0.300",
        "a.0x7f",
        "0x",
        "1",
        "a%2e.de",
        "\u{200b}",
        &label,
        &long,
    ] {
        let error = bad.parse::<DomainName>().unwrap_err();
        assert_eq!(error.code(), Code::SpecInvalid, "{bad}");
        assert!(!error.message().contains('\n') && error.hint_for(FrontEnd::Cli).is_some());
    }
    assert_eq!(name(&format!("{}.de", "a".repeat(63))).as_str().len(), 66);
    assert_eq!(name(&format!("{}abcde", "abcdefg.".repeat(31))).as_str().len(), 253);
}

#[test]
fn every_form_of_rule_parses() {
    for (text, shown) in [
        ("example.com", "example.com"),
        ("Example.com:80,443", "example.com"),
        ("example.com:443", "example.com:443"),
        ("example.com:443,80,80-90", "example.com:80-90,443"),
        ("example.com:1-65535", "example.com:*"),
        ("example.com:*", "example.com:*"),
        ("example.com/udp", "example.com/udp"),
        ("*.example.com:8000-8010/udp", "*.example.com:8000-8010/udp"),
        ("10.0.0.1", "10.0.0.1"),
        ("10.0.0.0/8:53/udp", "10.0.0.0/8:53/udp"),
        ("10.0.0.1/32:22", "10.0.0.1:22"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("[2001:db8::1]", "[2001:db8::1]"),
        ("[2001:DB8::/32]:443", "[2001:db8::/32]:443"),
        ("[2001:db8::1/128]:53/udp", "[2001:db8::1]:53/udp"),
        ("[::ffff:10.0.0.1]:22", "10.0.0.1:22"),
        ("[::ffff:10.0.0.0/104]:22", "10.0.0.0/8:22"),
        ("host:8080", "host:8080"),
        ("HOST:80,443", "host:80,443"),
        ("host:53/udp", "host:53/udp"),
    ] {
        assert_eq!(rule(text).to_string(), shown, "{text}");
        assert_eq!(rule(shown), rule(text), "{text}");
        assert_eq!(serde_json::to_value(rule(text)).unwrap(), shown);
        assert_eq!(serde_json::from_value::<EgressRule>(shown.into()).unwrap(), rule(text));
    }
}

#[test]
fn wrong_rules_are_refused_with_the_reason() {
    for (bad, why) in [
        ("", "it is empty"),
        (":443", "it is empty"),
        ("*", "every name"),
        ("*:443", "every name"),
        ("*.com", "every name below 'com'"),
        ("*.", "every name"),
        ("*.*.com", "characters"),
        ("a*.example.com", "first label"),
        ("**.example.com", "first label"),
        ("@pip", "preset"),
        ("host", "needs a port"),
        ("host/udp", "needs a port"),
        ("localhost:80", "host:8080"),
        ("https://example.com", "URL"),
        ("example.com/path", "not a path"),
        ("example.com/tcp", "/udp"),
        ("example.com:0", "ports are"),
        ("example.com:", "ports are"),
        ("example.com:443,", "ports are"),
        ("example.com:90-80", "ports are"),
        ("example.com:65536", "ports are"),
        ("example.com:+80", "ports are"),
        ("example.com:https", "ports are"),
        ("example.com:80:90", "brackets"),
        ("2001:db8::1", "brackets"),
        ("2001:db8::/32", "brackets"),
        ("[2001:db8::1", "']' must be"),
        ("[2001:db8::1]443", "']' must be"),
        ("[10.0.0.1]", "only IPv6"),
        ("[fe80::1%eth0]", "address or network"),
        ("10.0.0.300", "address or network"),
        ("10.0.0.1/33", "address or network"),
        ("10.1.2.3/8", "which is 10.0.0.0/8"),
        ("010.0.0.1", "address or network"),
        ("127.1", "address or network"),
        ("0x7f.1", "ends in a number"),
    ] {
        let error = bad.parse::<EgressRule>().unwrap_err();
        assert!(error.code() == Code::SpecInvalid && error.message().contains(why), "{bad}: {error}");
        assert!(error.message().starts_with(&format!("'{bad}' is not a network rule: ")), "{error}");
        assert!(error.hint_for(FrontEnd::Cli).is_some() && error.hint_for(FrontEnd::Mcp).is_some());
        let of_json = serde_json::from_value::<EgressRule>(bad.into()).unwrap_err().to_string();
        assert!(of_json.contains(why) && of_json.contains("for example"), "{of_json}");
    }
    assert!("a".repeat(5000).parse::<EgressRule>().unwrap_err().message().len() < 200);
}

#[test]
fn names_match_label_by_label() {
    let (one, below) = (rule("example.com"), rule("*.example.com"));
    for (text, is_one, is_below) in [
        ("example.com", true, false),
        ("EXAMPLE.com.", true, false),
        ("www.example.com", false, true),
        ("a.b.example.com", false, true),
        ("notexample.com", false, false),
        ("www.notexample.com", false, false),
        ("example.com.evil.net", false, false),
        ("com", false, false),
    ] {
        assert_eq!((one.matches_name(&name(text)), below.matches_name(&name(text))), (is_one, is_below), "{text}");
    }
    assert!(!rule("host:80").matches_name(&name("host.example.com")));
    assert!(!rule("0.0.0.0/0").matches_name(&name("example.com")));
}

#[test]
fn addresses_match_by_network_only() {
    let net = rule("10.0.0.0/8");
    for (text, matches) in
        [("10.1.2.3", true), ("::ffff:10.1.2.3", true), ("11.0.0.1", false), ("2002:a01:203::", false)]
    {
        assert_eq!(net.matches_address(address(text)), matches, "{text}");
    }
    assert!(rule("[2001:db8::/32]").matches_address(address("2001:db8:1::1")));
    assert!(!rule("[::/0]").matches_address(address("::ffff:10.1.2.3")));
    assert!(!rule("example.com").matches_address(address("10.1.2.3")));
    assert!(!rule("host:80").matches_address(address("127.0.0.1")));
    assert!(rule("host:80").is_host() && !net.is_host());
}

#[test]
fn ports_match_their_ranges() {
    let some = rule("example.com:80,8000-8010");
    for (port, matches) in [(80, true), (8000, true), (8010, true), (8011, false), (443, false), (0, false)] {
        assert_eq!(some.matches_port(port), matches, "{port}");
    }
    assert!(rule("example.com:*").matches_port(1) && !rule("example.com:*").matches_port(0));
    assert!(rule("example.com").matches_port(443) && !rule("example.com").matches_port(22));
}

#[test]
fn rules_that_allow_more_than_they_seem_to_have_a_warning() {
    for wide in [
        "*.github.io",
        "*.amazonaws.com",
        "*.s3.eu-west-1.amazonaws.com",
        "*.azure.com",
        "*.cloudfront.net",
        "*.workers.dev",
        "169.254.0.0/16",
        "169.254.169.254",
        "[::/0]",
        "host:*",
    ] {
        assert!(rule(wide).warning().is_some_and(|text| text.contains(wide)), "{wide}");
    }
    for plain in ["example.com", "*.example.com", "alice.github.io", "*.alice.github.io", "10.0.0.0/8", "host:8080"] {
        assert_eq!(rule(plain).warning(), None, "{plain}");
    }
}

fn any_target() -> impl Strategy<Value = Target> {
    let label = "[a-z0-9]([a-z0-9_-]{0,8}[a-z0-9])?";
    let names = proptest::collection::vec(label, 1..4).prop_map(|labels| labels.join(".") + ".net");
    let v4 = (any::<u32>(), 0u8..=32)
        .prop_map(|(bits, len)| ipnet::IpNet::new(std::net::Ipv4Addr::from(bits).into(), len).unwrap().trunc());
    // Mapped addresses are displayed as IPv4.
    let v6 = (any::<u128>(), 0u8..=128).prop_map(|(bits, len)| {
        ipnet::IpNet::new(std::net::Ipv6Addr::from(bits | 1 << 127).into(), len).unwrap().trunc()
    });
    let valid = names.prop_filter_map("not a valid IDN", |text| text.parse::<DomainName>().ok()).boxed();
    prop_oneof![
        valid.clone().prop_map(Target::Name),
        valid.prop_map(Target::Subdomains),
        v4.prop_map(Target::Network),
        v6.prop_map(Target::Network),
        Just(Target::Host),
    ]
}

fn any_rule() -> impl Strategy<Value = EgressRule> {
    let range = (1u16.., 1u16..).prop_map(|(a, b)| PortRange::new(a.min(b), a.max(b)).unwrap());
    let ports = prop_oneof![
        Just(Ports::All),
        Just(Ports::default()),
        proptest::collection::vec(range, 1..5).prop_map(Ports::of)
    ];
    (any_target(), ports, prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp)])
        .prop_map(|(target, ports, protocol)| EgressRule { target, ports, protocol })
}

proptest! {
    #[test]
    fn displayed_rules_parse(own in any_rule()) {
        prop_assert_eq!(own.to_string().parse::<EgressRule>().unwrap(), own);
    }

    #[test]
    fn any_text_is_parsed_or_refused(text in "[a-z@*\\[\\]/:,.0-9\u{fc}\u{df} -]{0,30}|.{0,40}") {
        match text.parse::<EgressRule>() {
            Ok(own) => prop_assert_eq!(own.to_string().parse::<EgressRule>().unwrap(), own),
            Err(error) => prop_assert!(error.code() == Code::SpecInvalid && !error.message().contains('\n')),
        }
    }

    #[test]
    fn a_name_is_its_own_canonical_form(text in ".{0,40}") {
        if let Ok(own) = text.parse::<DomainName>() {
            prop_assert_eq!(&own.as_str().parse::<DomainName>().unwrap(), &own);
            prop_assert!(own.as_str().len() <= 253 && own.as_str().is_ascii());
        }
    }

    #[test]
    fn the_ports_of_ranges_are_those_of_each(ranges in proptest::collection::vec((1u16.., 1u16..), 1..5), port in any::<u16>()) {
        let ranges: Vec<_> = ranges.iter().map(|(a, b)| PortRange::new(*a.min(b), *a.max(b)).unwrap()).collect();
        let one = ranges.iter().any(|range| range.contains(port));
        prop_assert_eq!(Ports::of(ranges).contains(port), one);
    }
}
