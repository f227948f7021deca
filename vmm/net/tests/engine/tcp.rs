//! Connections: data, their ends, refusals.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

use nido_api::egress::{DenialReason, DeniedProtocol};
use nido_net::{Limits, Mode};
use smoltcp::socket::tcp::State;
use smoltcp::wire::IpAddress;

use crate::guest::{Guest, TIMEOUT};

/// A server for one connection after the other, and the rule that allows it.
pub struct Server<T> {
    pub port: u16,
    pub thread: JoinHandle<T>,
}

pub fn serve<T: Send + 'static>(serve: impl FnOnce(TcpListener) -> T + Send + 'static) -> Server<T> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    Server { port, thread: std::thread::spawn(move || serve(listener)) }
}

pub fn accept(listener: &TcpListener) -> TcpStream {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream
}

fn guest_for(port: u16) -> Guest {
    Guest::new(Mode::Restricted, &[&format!("host:{port}")])
}

/// Bytes that differ from place to place.
pub fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8).collect()
}

#[test]
fn the_answer_comes_after_the_guest_has_sent_its_last_byte() {
    let server = serve(|listener| {
        let mut stream = accept(&listener);
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        stream.write_all(&received).unwrap();
    });
    let mut guest = guest_for(server.port);
    let socket = guest.connect(server.port);
    let data = pattern(3 << 20);
    guest.send_all(socket, &data);
    guest.socket(socket).close();
    assert!(guest.receive_all(socket) == data);
    server.thread.join().unwrap();
    guest.closed(socket);
    guest.quiet();
    let report = guest.report();
    assert_eq!((report.sent_bytes, report.received_bytes, report.connections), (3 << 20, 3 << 20, 1));
}

#[test]
fn the_guest_sends_after_the_server_has_sent_its_last_byte() {
    let server = serve(|listener| {
        let mut stream = accept(&listener);
        stream.write_all(b"first").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        received
    });
    let mut guest = guest_for(server.port);
    let socket = guest.connect(server.port);
    assert_eq!(guest.receive_all(socket), b"first");
    guest.send_all(socket, &pattern(500_000));
    guest.socket(socket).close();
    guest.closed(socket);
    assert!(server.thread.join().unwrap() == pattern(500_000));
    guest.quiet();
}

#[test]
fn a_reset_passes_in_both_directions() {
    let server = serve(|listener| {
        let mut stream = accept(&listener);
        let error = stream.read(&mut [0]).unwrap_err();
        let second = accept(&listener);
        rustix::net::sockopt::set_socket_linger(&second, Some(Duration::ZERO)).unwrap();
        drop(second);
        error.kind()
    });
    let mut guest = guest_for(server.port);
    let socket = guest.connect(server.port);
    guest.socket(socket).abort();
    guest.poll();
    let second = guest.dial(server.port);
    guest.until("a reset", |guest| (guest.socket(second).state() == State::Closed).then_some(()));
    assert_eq!(server.thread.join().unwrap(), std::io::ErrorKind::ConnectionReset);
    guest.quiet();
}

#[test]
fn a_closed_port_is_refused_and_is_no_denial() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let mut guest = guest_for(port);
    let socket = guest.dial(port);
    guest.closed(socket);
    guest.quiet();
    assert_eq!(guest.report().denied, 0);
}

#[test]
fn a_destination_without_a_rule_is_reset_and_reported() {
    let mut guest = guest_for(1);
    let socket = guest.dial(2);
    guest.closed(socket);
    let denial = guest.denials.try_recv().unwrap();
    assert_eq!((denial.protocol, denial.port), (DeniedProtocol::Tcp, Some(2)));
    assert_eq!(denial.reason, DenialReason::AddressPrivate);
    assert_eq!(denial.rule.unwrap().to_string(), "host:2");
    let socket = guest.dial_to(IpAddress::v4(1, 1, 1, 1), 443);
    guest.closed(socket);
    let denial = guest.denials.try_recv().unwrap();
    assert_eq!(denial.reason, DenialReason::AddressNotLearned);
    assert_eq!(denial.rule.unwrap().to_string(), "1.1.1.1:443");
    assert_eq!(guest.report().denied, 2);
}

#[test]
fn connections_one_after_the_other_leave_nothing() {
    const COUNT: usize = 10_000;
    let server = serve(|listener| {
        for _ in 0..COUNT {
            let mut stream = accept(&listener);
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            stream.write_all(&byte).unwrap();
        }
    });
    let limits = Limits { new_flows_per_second: 100_000, ..Limits::default() };
    let mut guest = Guest::with_limits(Mode::Restricted, &[&format!("host:{}", server.port)], limits);
    for number in 0..COUNT {
        let socket = guest.connect(server.port);
        guest.send_all(socket, &[number as u8]);
        guest.socket(socket).close();
        assert_eq!(guest.receive_all(socket), [number as u8]);
        guest.closed(socket);
        guest.release_socket(socket);
    }
    server.thread.join().unwrap();
    guest.quiet();
}

#[test]
fn a_guest_that_does_not_read_gets_everything_later() {
    const LENGTH: usize = 8 << 20;
    let server = serve(|listener| accept(&listener).write_all(&pattern(LENGTH)).unwrap());
    let mut guest = guest_for(server.port);
    let socket = guest.connect(server.port);
    // The window is closed, and is asked for again and again.
    for _ in 0..3 {
        let end = std::time::Instant::now() + Duration::from_secs(20);
        guest.until("that time passes", |_| (std::time::Instant::now() > end).then_some(()));
    }
    assert!(guest.receive_all(socket) == pattern(LENGTH));
    guest.socket(socket).close();
    guest.closed(socket);
    server.thread.join().unwrap();
    guest.quiet();
}

#[test]
fn connections_beyond_the_limit_are_refused_until_one_ends() {
    let limits = Limits { tcp_flows: 2, ..Limits::default() };
    let server = serve(|listener| (0..3).map(|_| accept(&listener)).collect::<Vec<_>>());
    let mut guest = Guest::with_limits(Mode::Nat, &[&format!("host:{}", server.port)], limits);
    let first = guest.connect(server.port);
    let _second = guest.connect(server.port);
    let refused = guest.dial(server.port);
    guest.closed(refused);
    assert_eq!(guest.denials.try_recv().unwrap().reason, DenialReason::ConnectionLimit);
    guest.socket(first).abort();
    guest.until("that one ends", |guest| (guest.report().open == 1).then_some(()));
    guest.connect(server.port);
    server.thread.join().unwrap();
}

#[test]
fn many_idle_connections_do_not_slow_another_down() {
    let limits = Limits { tcp_flows: 500, new_flows_per_second: 10_000, ..Limits::default() };
    let server = serve(|listener| {
        let idle: Vec<_> = (0..300).map(|_| accept(&listener)).collect();
        (idle, accept(&listener))
    });
    let mut guest = Guest::with_limits(Mode::Nat, &[&format!("host:{}", server.port)], limits);
    for _ in 0..300 {
        guest.connect(server.port);
    }
    let busy = guest.connect(server.port);
    let (idle, mut stream) = server.thread.join().unwrap();
    assert_eq!(guest.report().open, 301);
    // It ends once the guest has received most of it: the kernel does not hold all of it.
    let writer = std::thread::spawn(move || stream.write_all(&pattern(4 << 20)).unwrap());
    assert!(guest.receive_all(busy) == pattern(4 << 20));
    writer.join().unwrap();
    drop(idle);
}
