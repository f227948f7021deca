//! Limits of the bytes that a guest sends and receives.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use nido_api::egress::{DenialReason, DeniedProtocol};
use nido_net::subnet::{DNS_V4, GATEWAY_V4};
use nido_net::{ByteLimit, Count, Limits, Mode};

use crate::guest::{Guest, TIMEOUT};
use crate::tcp::{accept, pattern, serve};
use crate::udp::datagram;

fn guest(port: u16, limits: Limits) -> Guest {
    Guest::with_limits(Mode::Nat, &[&format!("host:{port}"), &format!("host:{port}/udp")], limits)
}

/// Receives until the connection is over, however it ends.
fn drain(stream: &mut std::net::TcpStream) -> usize {
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let (mut total, mut buffer) = (0, [0; 4096]);
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        total += count;
    }
    total
}

#[test]
fn a_guest_sends_no_byte_more_than_its_limit_and_is_cut_off_then() {
    const LIMIT: u64 = 100_000;
    let server = serve(|listener| {
        let (mut idle, mut busy) = (accept(&listener), accept(&listener));
        let received = drain(&mut busy);
        let end = idle.read(&mut [0; 1]);
        (received, end.is_err() || end.is_ok_and(|count| count == 0))
    });
    let mut guest = guest(server.port, Limits { sent_bytes: Some(LIMIT), ..Limits::default() });
    let idle = guest.connect(server.port);
    let busy = guest.connect(server.port);
    let sent = guest.socket(busy).send_slice(&pattern(128 * 1024)).unwrap();
    assert!(sent as u64 > LIMIT);
    guest.closed(busy);
    // A connection that was idle is reset as well, and no other begins.
    guest.closed(idle);
    let (received, is_over) = server.thread.join().unwrap();
    assert!(received as u64 <= LIMIT && is_over, "{received}");
    let report = guest.report();
    assert_eq!((report.sent_bytes, report.open), (LIMIT, 0));
    let reached = guest.byte_limits.try_recv().unwrap();
    let count = Count { sent: LIMIT, received: 0 };
    assert_eq!(reached, ByteLimit { of_sent: true, limit: LIMIT, count });
    let refused = guest.dial(server.port);
    guest.closed(refused);
    let denials: Vec<_> = std::iter::from_fn(|| guest.denials.try_recv().ok()).collect();
    assert!(denials.iter().all(|denial| denial.reason == DenialReason::ByteLimit && denial.rule.is_none()));
    assert!(denials.iter().any(|denial| denial.port == Some(server.port)), "{denials:?}");
    // Reported once a minute at most.
    assert!(guest.byte_limits.try_recv().is_err());
}

#[test]
fn a_guest_receives_no_byte_more_than_its_limit() {
    const LIMIT: u64 = 70_000;
    let server = serve(|listener| {
        let mut stream = accept(&listener);
        stream.set_write_timeout(Some(TIMEOUT)).unwrap();
        // Ends with an error when the guest is cut off.
        stream.write_all(&pattern(16 << 20)).is_err()
    });
    let mut guest = guest(server.port, Limits { received_bytes: Some(LIMIT), ..Limits::default() });
    let socket = guest.connect(server.port);
    let received = guest.receive_all(socket);
    assert!(received.len() as u64 <= LIMIT && received == pattern(received.len()), "{}", received.len());
    assert!(server.thread.join().unwrap());
    assert_eq!(guest.report().received_bytes, LIMIT);
    let reached = guest.byte_limits.try_recv().unwrap();
    assert_eq!((reached.of_sent, reached.limit), (false, LIMIT));
}

#[test]
fn datagrams_and_questions_count_and_are_refused() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(TIMEOUT)).unwrap();
    let port = server.local_addr().unwrap().port();
    let gateway = SocketAddr::new(GATEWAY_V4.into(), port);
    let mut guest = guest(port, Limits { sent_bytes: Some(1000), ..Limits::default() });
    let mut buffer = [0; 2000];
    for length in [999, 300] {
        guest.send_frame(&datagram(4000, gateway, &vec![7; length]));
        assert_eq!(server.recv_from(&mut buffer).unwrap().0, length);
    }
    guest.until("the limit", |guest| guest.byte_limits.try_recv().ok());
    let is_unreachable = |frame: &[u8]| frame.len() > 36 && frame[23] == 1 && frame[34..36] == [3, 3];
    guest.send_frame(&datagram(4000, gateway, b"more"));
    guest.frame(is_unreachable);
    guest.send_frame(&datagram(4001, SocketAddr::new(IpAddr::from(DNS_V4), 53), &[0; 12]));
    guest.frame(is_unreachable);
    let denials: Vec<_> = std::iter::from_fn(|| guest.denials.try_recv().ok()).collect();
    let protocols: Vec<_> = denials.iter().map(|denial| (denial.protocol, denial.reason)).collect();
    let limit = DenialReason::ByteLimit;
    assert_eq!(protocols, [(DeniedProtocol::Udp, limit), (DeniedProtocol::Dns, limit)]);
    server.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    assert!(server.recv_from(&mut buffer).is_err());
    assert_eq!(guest.report().sent_bytes, 1299);
}
