//! Where messages may be posted: which URLs, and which addresses behind them.
//!
//! The user who adds an endpoint chooses its URL, and the owner of its domain the address: without a check either
//! could make nido post to services that only this host or its network reaches. So an address counts only if it is one of
//! the Internet's; what is in doubt is not.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nido_api::error::{Code, Error, Hint, Result};
use reqwest::Url;

/// The longest URL, in bytes.
const URL_MAX: usize = 2048;

/// The URL of an endpoint, checked as far as that is possible without requesting the name's addresses.
///
/// # Errors
/// `webhook_invalid`.
pub fn parse(url: &str, allow_private: bool) -> Result<Url> {
    let refused = |why: &str, hint: &str| Err(Error::new(Code::WebhookInvalid, format!("the URL {why}")).hint(hint));
    let example = "for example https://example.com/hooks/nido";
    if url.len() > URL_MAX {
        return refused("is longer than 2048 bytes", example);
    }
    // The parser repairs what it reads: `https:///x` would be the host `x`.
    let has_host = url.split_once("://").is_some_and(|(_, rest)| !rest.starts_with('/'));
    if !has_host || url.contains(|c: char| c.is_whitespace() || c.is_control() || c == '\\') {
        return refused("cannot be parsed", example);
    }
    let Ok(mut parsed) = Url::parse(url) else { return refused("cannot be parsed", example) };
    match parsed.scheme() {
        "https" => {}
        "http" if allow_private => {}
        "http" => {
            return refused("is not encrypted", "use https, or permit private networks if the endpoint is in yours");
        }
        _ => return refused("is not an http or https URL", example),
    }
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return refused("holds a user name or a password", "messages are signed; let the endpoint check that");
    }
    if parsed.port() == Some(0) {
        return refused("names port 0", example);
    }
    let Some(host) = parsed.host_str() else { return refused("has no host", example) };
    if let Some(address) = literal(host)
        && !allow_private
    {
        check(address)?;
    }
    parsed.set_fragment(None);
    Ok(parsed)
}

/// The address that a URL names by itself.
#[must_use]
pub fn literal(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Refuses an address that is not one of the Internet's.
///
/// # Errors
/// `webhook_invalid`.
pub fn check(address: IpAddr) -> Result<()> {
    if is_global(address) {
        return Ok(());
    }
    Err(Error::new(Code::WebhookInvalid, format!("the endpoint's address {address} is not a public one"))
        .hint("permit private networks if the endpoint is in one, or on this host")
        .or_hint(Hint::command_line("pass --allow-private")))
}

/// Whether an address is one of the Internet's.
#[must_use]
pub fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_global_v4(v4),
        IpAddr::V6(v6) => is_global_v6(v6),
    }
}

fn is_global_v4(v4: Ipv4Addr) -> bool {
    let [a, b, c, _] = v4.octets();
    let special = matches!(
        (a, b, c),
        (0 | 10 | 127, ..)              // this network, private, loopback
            | (100, 64..=127, _)        // behind a carrier's translation
            | (169, 254, _)             // link-local; clouds keep their secrets at 169.254.169.254
            | (172, 16..=31, _)
            | (192, 0, 0 | 2)           // protocols, documentation
            | (192, 31, 196) | (192, 52, 193) | (192, 175, 48) // AS112, AMT
            | (192, 88, 99)             // 6to4 relays
            | (192, 168, _)
            | (198, 18..=19, _)         // measurements
            | (198, 51, 100) | (203, 0, 113) // documentation
            | (224..=255, ..) // multicast, reserved, broadcast
    );
    !special
}

fn is_global_v6(v6: Ipv6Addr) -> bool {
    let s = v6.segments();
    let v4_at = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        Ipv4Addr::new(a, b, c, d)
    };
    match s {
        // Addresses of IPv4 in other clothes: what they lead to counts.
        [0, 0, 0, 0, 0, 0xffff, high, low] => is_global_v4(v4_at(high, low)), // ::ffff:a.b.c.d
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => is_global_v4(v4_at(high, low)), // NAT64
        [0x2002, high, low, ..] => is_global_v4(v4_at(high, low)),            // 6to4
        // Of the rest only 2000::/3 is assigned; of that: protocols (Teredo, ORCHID …), documentation.
        [0x2001, 0..=0x01ff, ..] | [0x2001, 0xdb8, ..] | [0x3fff, 0..=0x0fff, ..] => false,
        [0x2620, 0x4f, 0x8000, ..] => false, // AS112
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_addresses_of_the_internet_are_reached() {
        let inside = "0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.127.255.255 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1 \
            172.31.255.255 192.0.0.8 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.19.255.255 198.51.100.7 203.0.113.9 \
            224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:10.1.2.3 \
            ::ffff:169.254.169.254 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 2002:7f00:1:: 2002:a00:1::1 2002:c0a8:101:: \
            2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:10::1 2001:20::1 2001:db8::1 3fff::1 100::1 fc00::1 \
            fd12:3456::1 fe80::1 fec0::1 ff02::1 ff0e::1 5f00::1 4000::1";
        for address in inside.split_whitespace() {
            assert!(!is_global(address.parse().unwrap()), "{address}");
        }
        let outside = "1.1.1.1 8.8.8.8 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 192.167.1.1 198.17.0.1 198.20.0.1 223.255.255.1 \
            2606:4700:4700::1111 2a00:1450::1 2001:4860:4860::8888 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1";
        for address in outside.split_whitespace() {
            assert!(is_global(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn a_url_is_http_without_credentials() {
        for bad in [
            "",
            "example.com",
            "ftp://example.com",
            "file:///etc/passwd",
            "https://",
            "http://example.com/",
            "https://u@example.com/",
            "https://u:p@example.com/",
            "https://127.0.0.1/",
            "https://2130706433/",
            "https://0x7f.1/",
            "https://0177.0.0.1/",
            "https://[::1]/",
            "https://[::ffff:10.0.0.1]/",
            "https://169.254.169.254/latest/meta-data/",
            "https://example.com:0/",
            "https://127.0.0.1./",
            "https:///example.com/",
            "https:example.com/",
            "https:/example.com/",
            "https:\\\\example.com/",
            "https://example.com/ a",
            " https://example.com/",
            "https://exam\tple.com/",
            &format!("https://example.com/{}", "a".repeat(URL_MAX)),
        ] {
            let error = parse(bad, false).unwrap_err();
            assert_eq!(error.code(), Code::WebhookInvalid, "{bad}");
            assert!(error.hint_for(nido_api::FrontEnd::Cli).is_some());
        }
        for good in
            ["https://example.com", "https://example.com:8443/a?b=c#d", "https://1.1.1.1/", "https://[2606:4700::1]/"]
        {
            assert!(parse(good, false).unwrap().fragment().is_none(), "{good}");
        }
        for own in ["http://127.0.0.1:8080/x", "http://[::1]/", "https://10.0.0.1/", "http://localhost/"] {
            parse(own, true).unwrap();
        }
        assert!(parse("gopher://127.0.0.1", true).is_err());
    }

    proptest! {
        #[test]
        fn an_address_in_other_clothes_is_the_same(v4 in any::<u32>()) {
            let (plain, [high, low]) = (Ipv4Addr::from(v4), [(v4 >> 16) as u16, v4 as u16]);
            let global = is_global(plain.into());
            prop_assert_eq!(is_global(plain.to_ipv6_mapped().into()), global);
            prop_assert_eq!(is_global(Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1).into()), global);
            prop_assert_eq!(is_global(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low).into()), global);
            prop_assert!(!is_global(plain.to_ipv6_compatible().into()));
        }

        #[test]
        fn special_addresses_are_refused(v4 in any::<u32>(), v6 in any::<u128>()) {
            let (v4, v6) = (Ipv4Addr::from(v4), Ipv6Addr::from(v6));
            if v4.is_private() || v4.is_loopback() || v4.is_link_local() || v4.is_multicast() || v4.is_documentation() {
                prop_assert!(!is_global(v4.into()));
            }
            if v6.is_multicast() || v6.is_unique_local() || v6.is_unicast_link_local() {
                prop_assert!(!is_global(v6.into()));
            }
        }
    }
}
