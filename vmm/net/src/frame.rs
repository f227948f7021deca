//! What the guest sends: Ethernet frames with ARP, IPv4 or IPv6, and what of them is dropped.
//!
//! Invariants: only the guest's own addresses are sources; a packet is as long as its header states, which the frame holds;
//! fragments, IPv4 options and IPv6 extension headers are dropped, so what follows the IP header is the transport's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::subnet::{ETHERNET_HEADER, GUEST_MAC, is_guest};

/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd;

/// Protocol numbers of IP.
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
}

/// A frame of the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A packet of ARP.
    Arp(&'a [u8]),
    /// A packet of IP.
    Ip(Packet<'a>),
}

/// An IP packet of the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Source: the guest, or no address yet.
    pub source: IpAddr,
    /// Destination.
    pub destination: IpAddr,
    /// The transport's protocol number.
    pub protocol: u8,
    /// Time to live, or hop limit.
    pub hops: u8,
    /// What follows the IP header.
    pub payload: &'a [u8],
    /// The whole packet.
    pub bytes: &'a [u8],
}

/// Why a frame is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// It is shorter than its headers state, or a header is invalid.
    Malformed,
    /// Its source is another than the guest.
    Spoofed,
    /// It is a fragment, or has options or extension headers.
    Unsupported,
}

/// Reads a frame.
///
/// # Errors
/// It is dropped.
pub fn parse(frame: &[u8]) -> Result<Frame<'_>, Dropped> {
    let (header, payload) = frame.split_at_checked(ETHERNET_HEADER).ok_or(Dropped::Malformed)?;
    if header[6..12] != GUEST_MAC {
        return Err(Dropped::Spoofed);
    }
    match u16::from_be_bytes([header[12], header[13]]) {
        ARP => Ok(Frame::Arp(payload)),
        IPV4 => ipv4(payload).map(Frame::Ip),
        IPV6 => ipv6(payload).map(Frame::Ip),
        _ => Err(Dropped::Unsupported),
    }
}

/// Reads an IP packet without its frame.
///
/// # Errors
/// It is dropped.
pub fn parse_packet(bytes: &[u8]) -> Result<Packet<'_>, Dropped> {
    match bytes.first().map(|first| first >> 4) {
        Some(4) => ipv4(bytes),
        Some(6) => ipv6(bytes),
        _ => Err(Dropped::Malformed),
    }
}

fn ipv4(bytes: &[u8]) -> Result<Packet<'_>, Dropped> {
    const HEADER: usize = 20;
    let header = bytes.first_chunk::<HEADER>().ok_or(Dropped::Malformed)?;
    if header[0] >> 4 != 4 {
        return Err(Dropped::Malformed);
    }
    let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let bytes = bytes.get(..length).filter(|_| length >= HEADER).ok_or(Dropped::Malformed)?;
    // All but the flag "do not fragment".
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0xbfff;
    if header[0] != 0x45 || fragment != 0 {
        return Err(Dropped::Unsupported);
    }
    let four = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
    let packet = Packet {
        source: four(12).into(),
        destination: four(16).into(),
        protocol: header[9],
        hops: header[8],
        payload: &bytes[HEADER..],
        bytes,
    };
    // A client of DHCP has no address yet.
    let is_unset = packet.source == Ipv4Addr::UNSPECIFIED && packet.protocol == protocol::UDP;
    if is_guest(packet.source) || is_unset { Ok(packet) } else { Err(Dropped::Spoofed) }
}

fn ipv6(bytes: &[u8]) -> Result<Packet<'_>, Dropped> {
    const HEADER: usize = 40;
    let header = bytes.first_chunk::<HEADER>().ok_or(Dropped::Malformed)?;
    if header[0] >> 4 != 6 {
        return Err(Dropped::Malformed);
    }
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let bytes = bytes.get(..HEADER + length).ok_or(Dropped::Malformed)?;
    let sixteen = |at: usize| {
        let mut octets = [0; 16];
        octets.copy_from_slice(&header[at..at + 16]);
        Ipv6Addr::from(octets)
    };
    let packet = Packet {
        source: sixteen(8).into(),
        destination: sixteen(24).into(),
        protocol: header[6],
        hops: header[7],
        payload: &bytes[HEADER..],
        bytes,
    };
    // The numbers of extension headers: hop by hop, routing, fragment, ESP, AH, destination, mobility, HIP, shim6, and two for
    // experiments.
    if matches!(packet.protocol, 0 | 43 | 44 | 50 | 51 | 60 | 135 | 139 | 140 | 253 | 254) {
        return Err(Dropped::Unsupported);
    }
    // A card that checks whether its address is free has none yet.
    let is_unset = packet.source == Ipv6Addr::UNSPECIFIED && packet.protocol == protocol::ICMPV6;
    if is_guest(packet.source) || is_unset { Ok(packet) } else { Err(Dropped::Spoofed) }
}

/// The ports of a packet of TCP or UDP: source, destination.
#[must_use]
pub fn ports(payload: &[u8]) -> Option<(u16, u16)> {
    let [a, b, c, d] = *payload.first_chunk::<4>()?;
    Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
}

/// The payload of a UDP datagram.
#[must_use]
pub fn datagram(payload: &[u8]) -> Option<&[u8]> {
    const HEADER: usize = 8;
    let header = payload.first_chunk::<HEADER>()?;
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    payload.get(HEADER..length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn udp_frame() -> Vec<u8> {
        let mut frame = vec![0x52, 0x55, 0x0a, 0, 2, 2];
        frame.extend(GUEST_MAC);
        frame.extend(IPV4.to_be_bytes());
        frame.extend([0x45, 0, 0, 30, 0, 0, 0x40, 0, 64, protocol::UDP, 0, 0, 10, 0, 2, 15, 1, 2, 3, 4]);
        frame.extend([0x12, 0x34, 0, 53, 0, 10, 0, 0, b'h', b'i']);
        frame
    }

    #[test]
    fn a_datagram_is_read() {
        let frame = udp_frame();
        let Ok(Frame::Ip(packet)) = parse(&frame) else { panic!("it is dropped") };
        assert_eq!(packet.destination, IpAddr::from([1, 2, 3, 4]));
        assert_eq!(ports(packet.payload), Some((0x1234, 53)));
        assert_eq!(datagram(packet.payload), Some(&b"hi"[..]));
    }

    #[test]
    fn padding_of_the_link_is_not_part_of_a_packet() {
        let mut frame = udp_frame();
        frame.extend([0; 16]);
        let Ok(Frame::Ip(packet)) = parse(&frame) else { panic!("it is dropped") };
        assert_eq!(packet.bytes.len(), 30);
    }

    #[test]
    fn other_sources_are_dropped() {
        let mut frame = udp_frame();
        frame[11] ^= 1;
        assert_eq!(parse(&frame), Err(Dropped::Spoofed));
        let mut frame = udp_frame();
        frame[29] = 16;
        assert_eq!(parse(&frame), Err(Dropped::Spoofed));
    }

    #[test]
    fn fragments_and_options_are_dropped() {
        for (at, value) in [(20, 0x20), (21, 1), (14, 0x46), (14, 0x44)] {
            let mut frame = udp_frame();
            frame[at] = value;
            assert_eq!(parse(&frame), Err(Dropped::Unsupported), "byte {at} = {value}");
        }
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        for (at, value) in [(17, 31), (17, 19), (14, 0x65)] {
            let mut frame = udp_frame();
            frame[at] = value;
            assert_eq!(parse(&frame), Err(Dropped::Malformed), "byte {at} = {value}");
        }
        let frame = udp_frame();
        for length in 0..frame.len() {
            assert_eq!(parse(&frame[..length]).is_err(), length < frame.len());
        }
        assert_eq!(datagram(&[0, 1, 0, 2, 0, 7, 0, 0]), None);
    }

    proptest! {
        #[test]
        fn a_packet_is_within_its_frame(at in 0usize..44, byte in any::<u8>(), cut in 0usize..60, more in 0usize..9) {
            let mut frame = udp_frame();
            let length = frame.len();
            frame[at % length] = byte;
            frame.extend(vec![0; more]);
            frame.truncate(cut.max(1));
            if let Ok(Frame::Ip(packet)) = parse(&frame) {
                prop_assert!(packet.bytes.len() <= frame.len() - ETHERNET_HEADER);
                prop_assert!(packet.payload.len() < packet.bytes.len());
                prop_assert!(is_guest(packet.source) || packet.source.is_unspecified());
                let _ = (ports(packet.payload), datagram(packet.payload));
            }
        }
    }

    #[test]
    fn extension_headers_of_ipv6_are_dropped() {
        let mut frame = vec![0; ETHERNET_HEADER];
        frame[6..12].copy_from_slice(&GUEST_MAC);
        frame[12..14].copy_from_slice(&IPV6.to_be_bytes());
        frame.extend([0x60, 0, 0, 0, 0, 8, 44, 64]);
        frame.extend("fd6e:6964:6f::15".parse::<Ipv6Addr>().unwrap().octets());
        frame.extend("2001:db8::1".parse::<Ipv6Addr>().unwrap().octets());
        frame.extend([0; 8]);
        assert_eq!(parse(&frame), Err(Dropped::Unsupported));
        frame[20] = protocol::UDP;
        assert!(matches!(parse(&frame), Ok(Frame::Ip(packet)) if packet.payload.len() == 8));
        frame[22] = 0x20;
        assert_eq!(parse(&frame), Err(Dropped::Spoofed));
    }
}
