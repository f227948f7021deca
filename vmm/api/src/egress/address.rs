//! Classes of addresses: which are the Internet's, and which of IPv6 lead to one of IPv4.
//!
//! Invariant: what is in doubt is not one of the Internet's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

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
    // What an embedded address of IPv4 leads to counts.
    if let Some(v4) = embedded_v4(v6.into()) {
        return is_global_v4(v4);
    }
    match v6.segments() {
        // Only 2000::/3 is assigned; of that: protocols (Teredo, ORCHID …), documentation.
        [0x2001, 0..=0x01ff, ..] | [0x2001, 0xdb8, ..] | [0x3fff, 0..=0x0fff, ..] => false,
        [0x2620, 0x4f, 0x8000, ..] => false, // AS112
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

/// The address of IPv4 to which a packet to this address of IPv6 is delivered: mapped, NAT64 or 6to4.
#[must_use]
pub fn embedded_v4(address: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(v6) = address else { return None };
    let (high, low) = match v6.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low] => (high, low),    // ::ffff:a.b.c.d
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => (high, low), // NAT64
        [0x2002, high, low, ..] => (high, low),               // 6to4
        _ => return None,
    };
    Some(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)))
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
    fn embedded_addresses_are_found() {
        for (address, embedded) in [
            ("::ffff:10.1.2.3", Some("10.1.2.3")),
            ("64:ff9b::a9fe:a9fe", Some("169.254.169.254")),
            ("2002:7f00:1::9", Some("127.0.0.1")),
            ("10.1.2.3", None),
            ("::10.1.2.3", None),
            ("2606:4700::1", None),
        ] {
            let expected: Option<Ipv4Addr> = embedded.map(|text| text.parse().unwrap());
            assert_eq!(embedded_v4(address.parse().unwrap()), expected, "{address}");
        }
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
