//! What the guest gets apart from TCP's data: frames of UDP and ICMP, and resets of TCP.

use std::net::{IpAddr, SocketAddr};

use smoltcp::wire::TcpPacket;

use crate::frame::{IPV4, IPV6, Packet, protocol};
use crate::subnet::{ETHERNET_HEADER, GATEWAY_MAC, GUEST_MAC};

/// How much of a refused packet an ICMP error repeats.
const QUOTE_MAX: usize = 512;
/// Time to live of what the engine sends.
pub const HOPS: u8 = 64;

/// What an ICMP error reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreachable {
    /// There is no route.
    Network,
    /// The host does not reply.
    Host,
    /// No program listens.
    Port,
    /// A rule forbids it.
    Prohibited,
}

impl Unreachable {
    const fn code_v4(self) -> u8 {
        match self {
            Self::Network => 0,
            Self::Host => 1,
            Self::Port => 3,
            Self::Prohibited => 13,
        }
    }

    const fn code_v6(self) -> u8 {
        match self {
            Self::Network => 0,
            Self::Prohibited => 1,
            Self::Host => 3,
            Self::Port => 4,
        }
    }
}

/// The sum of RFC 1071 over bytes, to be folded.
fn sum(bytes: &[u8], start: u32) -> u32 {
    let mut sum = u64::from(start);
    let mut pairs = bytes.chunks_exact(2);
    for pair in &mut pairs {
        sum += u64::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    if let [last] = pairs.remainder() {
        sum += u64::from(u16::from_be_bytes([*last, 0]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u32
}

fn checksum(bytes: &[u8], start: u32) -> u16 {
    !(sum(bytes, start) as u16)
}

/// The sum over the pseudo header of UDP, TCP and ICMPv6.
fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> u32 {
    let addresses = match (source, destination) {
        (IpAddr::V4(a), IpAddr::V4(b)) => sum(&b.octets(), sum(&a.octets(), 0)),
        (IpAddr::V6(a), IpAddr::V6(b)) => sum(&b.octets(), sum(&a.octets(), 0)),
        _ => 0,
    };
    addresses + u32::from(protocol) + length as u32
}

/// A frame for the guest with an IP packet around this payload. The addresses are of one family.
fn ip_frame(source: IpAddr, destination: IpAddr, protocol: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(ETHERNET_HEADER + 40 + payload.len());
    frame.extend(GUEST_MAC);
    frame.extend(GATEWAY_MAC);
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            frame.extend(IPV4.to_be_bytes());
            let length = (20 + payload.len()) as u16;
            let mut header = [0x45, 0, 0, 0, 0, 0, 0x40, 0, hops, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            header[2..4].copy_from_slice(&length.to_be_bytes());
            header[12..16].copy_from_slice(&source.octets());
            header[16..20].copy_from_slice(&destination.octets());
            let check = checksum(&header, 0);
            header[10..12].copy_from_slice(&check.to_be_bytes());
            frame.extend(header);
        }
        (source, destination) => {
            frame.extend(IPV6.to_be_bytes());
            frame.extend([0x60, 0, 0, 0]);
            frame.extend((payload.len() as u16).to_be_bytes());
            frame.extend([protocol, hops]);
            for address in [source, destination] {
                let IpAddr::V6(v6) = address else { continue };
                frame.extend(v6.octets());
            }
        }
    }
    frame.extend(payload);
    frame
}

/// A frame with a UDP datagram.
#[must_use]
pub fn udp(source: SocketAddr, destination: SocketAddr, data: &[u8]) -> Vec<u8> {
    let length = 8 + data.len();
    let mut payload = Vec::with_capacity(length);
    payload.extend(source.port().to_be_bytes());
    payload.extend(destination.port().to_be_bytes());
    payload.extend((length as u16).to_be_bytes());
    payload.extend([0, 0]);
    payload.extend(data);
    let start = pseudo_header(source.ip(), destination.ip(), protocol::UDP, length);
    // 0 means that the datagram has no checksum.
    let check = match checksum(&payload, start) {
        0 => 0xffff,
        check => check,
    };
    payload[6..8].copy_from_slice(&check.to_be_bytes());
    ip_frame(source.ip(), destination.ip(), protocol::UDP, HOPS, &payload)
}

/// A frame with a message of ICMP, whose checksum is filled in.
#[must_use]
pub fn icmp(source: IpAddr, destination: IpAddr, hops: u8, mut message: Vec<u8>) -> Vec<u8> {
    let protocol = if source.is_ipv4() { protocol::ICMP } else { protocol::ICMPV6 };
    let start = if source.is_ipv4() { 0 } else { pseudo_header(source, destination, protocol, message.len()) };
    if let Some(field) = message.get_mut(2..4) {
        field.fill(0);
        let check = checksum(&message, start);
        message[2..4].copy_from_slice(&check.to_be_bytes());
    }
    ip_frame(source, destination, protocol, hops, &message)
}

/// The error that a packet could not be delivered. It comes from `router`.
#[must_use]
pub fn unreachable(packet: &Packet<'_>, router: IpAddr, why: Unreachable) -> Vec<u8> {
    let (kind, code) = if router.is_ipv4() { (3, why.code_v4()) } else { (1, why.code_v6()) };
    let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
    message.extend(&packet.bytes[..packet.bytes.len().min(QUOTE_MAX)]);
    icmp(router, packet.source, HOPS, message)
}

/// The reply to an echo request; `None` for any other message.
#[must_use]
pub fn echo_reply(packet: &Packet<'_>) -> Option<Vec<u8>> {
    let (request, reply) = if packet.source.is_ipv4() { (8, 0) } else { (128, 129) };
    if packet.payload.len() < 8 || packet.payload[..2] != [request, 0] {
        return None;
    }
    let mut message = packet.payload.to_vec();
    message[0] = reply;
    Some(icmp(packet.destination, packet.source, HOPS, message))
}

/// The reset that refuses a segment of TCP; `None` for one that is a reset itself.
#[must_use]
pub fn reset(packet: &Packet<'_>) -> Option<Vec<u8>> {
    let segment = TcpPacket::new_checked(packet.payload).ok()?;
    if segment.rst() {
        return None;
    }
    let (guest, remote) = (segment.src_port(), segment.dst_port());
    // RFC 9293, 3.5.2: a reset of a segment with an acknowledgement continues from that.
    let (sequence, acknowledgement, flags) = if segment.ack() {
        (segment.ack_number().0, 0, 0x04)
    } else {
        (0, segment.seq_number().0.wrapping_add(segment.segment_len() as i32), 0x14)
    };
    Some(tcp_without_data(
        (packet.destination, remote).into(),
        (packet.source, guest).into(),
        sequence,
        acknowledgement,
        flags,
    ))
}

/// A segment without data, options or window.
#[must_use]
pub fn tcp_without_data(
    source: SocketAddr,
    destination: SocketAddr,
    sequence: i32,
    acknowledgement: i32,
    flags: u8,
) -> Vec<u8> {
    let mut payload = Vec::with_capacity(20);
    payload.extend(source.port().to_be_bytes());
    payload.extend(destination.port().to_be_bytes());
    payload.extend(sequence.to_be_bytes());
    payload.extend(acknowledgement.to_be_bytes());
    payload.extend([0x50, flags, 0, 0, 0, 0, 0, 0]);
    let check = checksum(&payload, pseudo_header(source.ip(), destination.ip(), protocol::TCP, payload.len()));
    payload[16..18].copy_from_slice(&check.to_be_bytes());
    ip_frame(source.ip(), destination.ip(), protocol::TCP, HOPS, &payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::datagram;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// The packet of a frame for the guest, read as if the guest had sent it.
    fn packet(frame: &[u8]) -> Packet<'_> {
        let bytes = &frame[ETHERNET_HEADER..];
        let v4 = bytes[0] >> 4 == 4;
        let header = if v4 { 20 } else { 40 };
        let address = |at: usize| {
            if v4 {
                IpAddr::from(<[u8; 4]>::try_from(&bytes[at..at + 4]).unwrap())
            } else {
                IpAddr::from(<[u8; 16]>::try_from(&bytes[at..at + 16]).unwrap())
            }
        };
        let (source, destination) = if v4 { (address(12), address(16)) } else { (address(8), address(24)) };
        let protocol = if v4 { bytes[9] } else { bytes[6] };
        Packet { source, destination, protocol, hops: HOPS, payload: &bytes[header..], bytes }
    }

    fn is_valid(frame: &[u8]) -> bool {
        let packet = packet(frame);
        let start = match packet.protocol {
            protocol::ICMP => 0,
            other => pseudo_header(packet.source, packet.destination, other, packet.payload.len()),
        };
        (packet.source.is_ipv6() || sum(&packet.bytes[..20], 0) == 0xffff) && sum(packet.payload, start) == 0xffff
    }

    #[test]
    fn checksums_are_right_for_both_families() {
        for (a, b) in [("1.2.3.4:53", "10.0.2.15:999"), ("[2001:db8::1]:53", "[fd6e:6964:6f::15]:999")] {
            for data in [&b""[..], b"odd", b"even"] {
                let frame = udp(address(a), address(b), data);
                assert!(is_valid(&frame), "{a} {data:?}");
                assert_eq!(datagram(packet(&frame).payload), Some(data));
                let error = unreachable(&packet(&frame), address(b).ip(), Unreachable::Port);
                assert!(is_valid(&error));
            }
            assert!(is_valid(&tcp_without_data(address(a), address(b), 7, 8, 0x10)));
        }
    }

    #[test]
    fn a_reset_answers_a_segment_and_never_a_reset() {
        let syn = tcp_without_data(address("10.0.2.15:999"), address("1.2.3.4:80"), 41, 0, 0x02);
        let answer = reset(&packet(&syn)).unwrap();
        let answer = packet(&answer);
        let segment = TcpPacket::new_checked(answer.payload).unwrap();
        assert!(segment.rst() && segment.ack());
        assert_eq!(segment.ack_number().0, 42);
        assert_eq!((answer.source, segment.dst_port()), (address("1.2.3.4:80").ip(), 999));
        assert_eq!(reset(&answer), None);
        let data = tcp_without_data(address("10.0.2.15:999"), address("1.2.3.4:80"), 41, 1000, 0x10);
        let answer = reset(&packet(&data)).unwrap();
        let answer = packet(&answer);
        let segment = TcpPacket::new_checked(answer.payload).unwrap();
        assert!(segment.rst() && !segment.ack());
        assert_eq!(segment.seq_number().0, 1000);
    }

    #[test]
    fn an_echo_is_returned_as_it_came() {
        let request =
            icmp(address("10.0.2.15:0").ip(), address("10.0.2.2:0").ip(), HOPS, vec![8, 0, 0, 0, 1, 2, 0, 3, 9, 9]);
        let reply = echo_reply(&packet(&request)).unwrap();
        assert!(is_valid(&reply));
        assert_eq!(packet(&reply).payload[4..], [1, 2, 0, 3, 9, 9]);
        assert_eq!(echo_reply(&packet(&reply)), None);
    }
}
