//! Datagrams, address resolution, DHCP and echo requests.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use nido_api::egress::{DenialReason, DeniedProtocol};
use nido_net::Mode;
use nido_net::subnet::{GATEWAY_MAC, GATEWAY_V4, GUEST_MAC, GUEST_V4};

use crate::guest::{Guest, TIMEOUT, frame_of};

/// An IPv4 packet of the guest's.
pub fn ipv4(protocol: u8, to: IpAddr, payload: &[u8]) -> Vec<u8> {
    let IpAddr::V4(to) = to else { panic!("only IPv4") };
    let length = (20 + payload.len()) as u16;
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0];
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    packet.extend(GUEST_V4.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    frame_of(0x0800, &packet)
}

/// A datagram of the guest's.
pub fn datagram(from: u16, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.extend(from.to_be_bytes());
    payload.extend(to.port().to_be_bytes());
    payload.extend(((8 + data.len()) as u16).to_be_bytes());
    payload.extend([0, 0]);
    payload.extend(data);
    ipv4(17, to.ip(), &payload)
}

fn gateway(port: u16) -> SocketAddr {
    SocketAddr::new(GATEWAY_V4.into(), port)
}

#[test]
fn datagrams_pass_both_ways_where_a_rule_for_udp_allows_it() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(TIMEOUT)).unwrap();
    let port = server.local_addr().unwrap().port();
    let mut guest = Guest::new(Mode::Nat, &[&format!("host:{port}/udp")]);
    let data = vec![7; 9000];
    guest.send_frame(&datagram(4000, gateway(port), &data));
    let mut buffer = [0; 10_000];
    let (length, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(buffer[..length], data);
    server.send_to(b"answer", from).unwrap();
    let answer = guest.frame(|frame| frame.len() > 34 && frame[23] == 17);
    assert_eq!(&answer[42..], b"answer");
    assert_eq!(answer[26..30], GATEWAY_V4.octets());
    assert_eq!(answer[34..38], [(port >> 8) as u8, port as u8, (4000u16 >> 8) as u8, 4000u16 as u8]);
}

#[test]
fn a_rule_for_tcp_allows_no_datagram() {
    let mut guest = Guest::new(Mode::Restricted, &["host:9", "1.1.1.1:443"]);
    guest.send_frame(&datagram(4000, gateway(9), b"x"));
    let answer = guest.frame(|frame| frame.len() > 34 && frame[23] == 1);
    assert_eq!(answer[34..36], [3, 3], "port unreachable");
    guest.send_frame(&datagram(4000, "1.1.1.1:443".parse().unwrap(), b"quic"));
    guest.frame(|frame| frame.len() > 34 && frame[23] == 1);
    let reasons: Vec<_> = (0..2).map(|_| guest.denials.try_recv().unwrap()).collect();
    assert!(reasons.iter().all(|denial| denial.protocol == DeniedProtocol::Udp));
    assert_eq!(reasons[1].reason, DenialReason::PortNotAllowed);
}

#[test]
fn a_closed_port_of_udp_is_reported() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    drop(server);
    let mut guest = Guest::new(Mode::Nat, &[&format!("host:{port}/udp")]);
    guest.send_frame(&datagram(4000, gateway(port), b"x"));
    let answer = guest.frame(|frame| frame.len() > 34 && frame[23] == 1);
    assert_eq!(answer[34..36], [3, 3]);
    assert_eq!(guest.report().denied, 0);
}

#[test]
fn the_gateway_is_resolved_and_answers_echo_requests() {
    let mut guest = Guest::new(Mode::Restricted, &[]);
    let mut request = vec![0, 1, 8, 0, 6, 4, 0, 1];
    request.extend(GUEST_MAC);
    request.extend(GUEST_V4.octets());
    request.extend([0; 6]);
    request.extend(GATEWAY_V4.octets());
    guest.send_frame(&frame_of(0x0806, &request));
    let answer = guest.frame(|frame| frame[12..14] == [8, 6]);
    assert_eq!(answer[22..28], GATEWAY_MAC);
    guest.send_frame(&ipv4(1, GATEWAY_V4.into(), &[8, 0, 0, 0, 1, 2, 0, 1, 42]));
    let answer = guest.frame(|frame| frame[12..14] == [8, 0] && frame[23] == 1);
    assert_eq!((answer[34], answer[42]), (0, 42));
    guest.send_frame(&ipv4(1, [1, 1, 1, 1].into(), &[8, 0, 0, 0, 1, 2, 0, 1]));
    let answer = guest.frame(|frame| frame[12..14] == [8, 0] && frame[23] == 1);
    assert_eq!(answer[34..36], [3, 13], "administratively prohibited");
    guest.send_frame(&ipv4(132, [1, 1, 1, 1].into(), &[0; 12]));
    guest.frame(|frame| frame[12..14] == [8, 0] && frame[34..36] == [3, 13]);
    let protocols: Vec<_> = (0..2).map(|_| guest.denials.try_recv().unwrap().protocol).collect();
    assert_eq!(protocols, [DeniedProtocol::Icmp, DeniedProtocol::Other]);
}

#[test]
fn dhcp_offers_the_fixed_address() {
    let mut guest = Guest::new(Mode::Nat, &[]);
    let mut message = vec![0; 240];
    message[..3].copy_from_slice(&[1, 1, 6]);
    message[28..34].copy_from_slice(&GUEST_MAC);
    message[236..].copy_from_slice(&[99, 130, 83, 99]);
    message.extend([53, 1, 1, 255]);
    let mut frame = datagram(68, "255.255.255.255:67".parse().unwrap(), &message);
    frame[26..30].fill(0);
    guest.send_frame(&frame);
    let answer = guest.frame(|frame| frame[12..14] == [8, 0] && frame[23] == 17);
    assert_eq!(answer[42 + 16..42 + 20], GUEST_V4.octets());
}
