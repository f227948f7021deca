//! Address resolution: ARP, and for IPv6 neighbor discovery with the advertisement of the router.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::frame::{ARP, Packet};
use crate::packet::icmp;
use crate::subnet::{
    DNS_V4, DNS_V6, GATEWAY_LINK_LOCAL, GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, GUEST_MAC, MTU, NETWORK_V6,
};

/// Messages of neighbor discovery must not have passed a router.
const FRESH: u8 = 255;
/// All nodes of the link.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// For how long the guest may use this router without another advertisement, in seconds.
const ROUTER_LIFETIME: u16 = 9000;
/// For how long an address may be used, in seconds: a day.
const ADDRESS_LIFETIME: u32 = 86_400;

mod message {
    pub const ROUTER_SOLICITATION: u8 = 133;
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    pub const NEIGHBOR_SOLICITATION: u8 = 135;
    pub const NEIGHBOR_ADVERTISEMENT: u8 = 136;
    pub const REDIRECT: u8 = 137;
}

/// The reply to an ARP request for the gateway or the name server; `None` for any other packet.
#[must_use]
pub fn arp_reply(packet: &[u8]) -> Option<Vec<u8>> {
    let packet = packet.first_chunk::<28>()?;
    // Ethernet, IPv4, addresses of 6 and 4 bytes, a request.
    if packet[..8] != [0, 1, 8, 0, 6, 4, 0, 1] {
        return None;
    }
    let wanted = Ipv4Addr::new(packet[24], packet[25], packet[26], packet[27]);
    if wanted != GATEWAY_V4 && wanted != DNS_V4 {
        return None;
    }
    let mut frame = Vec::with_capacity(42);
    frame.extend(GUEST_MAC);
    frame.extend(GATEWAY_MAC);
    frame.extend(ARP.to_be_bytes());
    frame.extend([0, 1, 8, 0, 6, 4, 0, 2]);
    frame.extend(GATEWAY_MAC);
    frame.extend(wanted.octets());
    frame.extend(&packet[8..18]);
    Some(frame)
}

/// Whether a message of ICMPv6 is one of neighbor discovery.
#[must_use]
pub fn is_discovery(message: &[u8]) -> bool {
    message.first().is_some_and(|kind| (message::ROUTER_SOLICITATION..=message::REDIRECT).contains(kind))
}

/// The reply to a message of neighbor discovery. A router is advertised only if `routes`: if the host reaches IPv6 itself.
#[must_use]
pub fn discovery_reply(packet: &Packet<'_>, routes: bool) -> Option<Vec<u8>> {
    let IpAddr::V6(source) = packet.source else { return None };
    if packet.hops != FRESH {
        return None;
    }
    match *packet.payload.first()? {
        message::ROUTER_SOLICITATION if routes => Some(router_advertisement()),
        message::NEIGHBOR_SOLICITATION => neighbor_advertisement(source, packet.payload),
        _ => None,
    }
}

fn neighbor_advertisement(source: Ipv6Addr, solicitation: &[u8]) -> Option<Vec<u8>> {
    let target = Ipv6Addr::from(*solicitation.get(8..24)?.first_chunk::<16>()?);
    if target != GATEWAY_V6 && target != DNS_V6 && target != GATEWAY_LINK_LOCAL {
        return None;
    }
    let solicited = source != Ipv6Addr::UNSPECIFIED;
    // A router; solicited; its address overrides an older one.
    let flags = 0xa0 | if solicited { 0x40 } else { 0 };
    let mut body = vec![message::NEIGHBOR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    body.extend(target.octets());
    body.extend([2, 1]);
    body.extend(GATEWAY_MAC);
    Some(icmp(target.into(), if solicited { source } else { ALL_NODES }.into(), FRESH, body))
}

/// Advertises the router, the network and the largest packet.
#[must_use]
pub fn router_advertisement() -> Vec<u8> {
    let mut body = vec![message::ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0];
    body.extend(ROUTER_LIFETIME.to_be_bytes());
    body.extend([0; 8]);
    // The router's hardware address.
    body.extend([1, 1]);
    body.extend(GATEWAY_MAC);
    body.extend([5, 1, 0, 0]);
    body.extend((MTU as u32).to_be_bytes());
    // The network is on the link, and the guest selects its address in it.
    body.extend([3, 4, 64, 0xc0]);
    body.extend(ADDRESS_LIFETIME.to_be_bytes());
    body.extend(ADDRESS_LIFETIME.to_be_bytes());
    body.extend([0; 4]);
    body.extend(NETWORK_V6.octets());
    icmp(GATEWAY_LINK_LOCAL.into(), ALL_NODES.into(), FRESH, body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::protocol;

    fn request(wanted: Ipv4Addr) -> Vec<u8> {
        let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
        packet.extend(GUEST_MAC);
        packet.extend([10, 0, 2, 15]);
        packet.extend([0; 6]);
        packet.extend(wanted.octets());
        packet
    }

    #[test]
    fn only_the_gateway_and_the_name_server_are_there() {
        for there in [GATEWAY_V4, DNS_V4] {
            let reply = arp_reply(&request(there)).unwrap();
            assert_eq!(reply[14 + 8..14 + 14], GATEWAY_MAC);
            assert_eq!(reply[14 + 14..14 + 18], there.octets());
            assert_eq!(reply[14 + 24..], [10, 0, 2, 15]);
        }
        assert_eq!(arp_reply(&request(Ipv4Addr::new(10, 0, 2, 16))), None);
        assert_eq!(arp_reply(&request(GATEWAY_V4)[..27]), None);
    }

    #[test]
    fn a_router_is_advertised_only_where_it_leads_somewhere() {
        let source = IpAddr::from("fe80::15".parse::<Ipv6Addr>().unwrap());
        let solicitation = [message::ROUTER_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
        let packet = |hops| Packet {
            source,
            destination: ALL_NODES.into(),
            protocol: protocol::ICMPV6,
            hops,
            payload: &solicitation,
            bytes: &[],
        };
        assert!(discovery_reply(&packet(FRESH), true).is_some());
        assert!(discovery_reply(&packet(FRESH), false).is_none());
        assert!(discovery_reply(&packet(64), true).is_none());
    }
}
