//! Bytes of the guest, which is hostile.
#![allow(clippy::unwrap_used, reason = "a test that cannot continue must stop")]

mod hellos;

use hellos::{browser, message, recorded, records};
use nido_api::egress::EgressRule;
use nido_net::dns::{self, Query};
use nido_net::frame::{self, Frame};
use nido_net::names::canonical_name;
use nido_net::peek::{HEAD_MAX, HELLO_MAX, Peek, RequestStream, Step, client_hello, http_head};
use nido_net::subnet;

#[test]
fn fuzz_dns_queries() {
    let seeds = [
        b"\x12\x34\x01\x20\0\x01\0\0\0\0\0\0\x07eXample\x03com\0\0\x01\0\x01".to_vec(),
        b"\xab\xcd\x01\x20\0\x01\0\0\0\0\0\x01\x01a\0\0\x1c\0\x01\0\0\x29\x10\0\0\0\0\0\0\x0c\0\x0a\0\x08abcdefgh"
            .to_vec(),
    ];
    let addresses: Vec<_> =
        (0..90).flat_map(|_| ["192.0.2.1", "2001:db8::1"].map(|text| text.parse().unwrap())).collect();
    nido_fuzz::fuzz("dns-queries", &seeds, |input| {
        let query = match Query::parse(input) {
            Ok(query) => query,
            Err(error) => {
                let response = error.response();
                assert!(
                    response.is_none_or(|bytes| bytes.len() <= 512 && bytes[..2] == input[..2] && bytes[2] & 0x80 != 0)
                );
                return;
            }
        };
        assert!(query.name.is_empty() || canonical_name(&query.name).as_ref() == Some(&query.name));
        let limit = query.udp_limit();
        let responses = [
            dns::empty(&query),
            dns::failure(&query),
            dns::refuse(&query, Some("x")),
            dns::answer(&query, &addresses, 30, limit),
        ];
        for response in &responses {
            assert!(response.len() <= limit && response[..2] == input[..2] && response[2] & 0x80 != 0);
        }
        // The question of a response is the one of the query.
        let opt = if query.edns.is_some() { 11 } else { 0 };
        let question = &responses[0][12..responses[0].len() - opt];
        assert!(
            input[12..].starts_with(question) && responses.iter().all(|response| response[12..].starts_with(question))
        );
    });
}

#[test]
fn fuzz_client_hellos() {
    let seeds = [
        recorded(hellos::OPENSSL),
        recorded(hellos::OPENSSL_WITHOUT_NAME),
        records(&message(&browser(b"a.example", 40)), 16384),
        records(&message(&browser(b"a.example", 40)), 100),
    ];
    nido_fuzz::fuzz("client-hellos", &seeds, |input| {
        let found = client_hello(input);
        match &found {
            Peek::Done(hello) => {
                let name = hello.server_name.as_ref();
                assert!(name.is_none_or(|name| canonical_name(name).as_ref() == Some(name)));
            }
            Peek::NeedMore => assert!(input.len() < HELLO_MAX),
            Peek::Invalid(_) => {}
        }
        for length in (0..input.len()).step_by(input.len() / 16 + 1) {
            let prefix = client_hello(&input[..length]);
            assert!(prefix == Peek::NeedMore || prefix == found);
        }
    });
}

/// The requests of a connection whose bytes arrive in pieces.
fn follow(input: &[u8], piece: usize) -> (usize, usize, bool) {
    let (mut stream, mut requests, mut passed) = (RequestStream::default(), 0, 0);
    for end in (0..input.len()).step_by(piece).map(|start| (start + piece).min(input.len())) {
        loop {
            match stream.advance(&input[passed..end]) {
                Step::Head(head) => {
                    assert_eq!(http_head(&input[passed..end]), Peek::Done(*head.clone()));
                    assert!(head.address.is_some() || canonical_name(&head.host).as_ref() == Some(&head.host));
                    (requests, passed) = (requests + 1, passed + head.length);
                }
                Step::Pass(count) => passed += count,
                Step::NeedMore => break,
                Step::Invalid(_) => return (requests, passed, true),
            }
        }
        assert!(end - passed <= HEAD_MAX);
    }
    (requests, passed, false)
}

#[test]
fn fuzz_http_requests() {
    let get = "GET http://a.example:80/x HTTP/1.1\r\nHost: A.example\r\nAccept: */*\r\n\r\n";
    let post = "POST / HTTP/1.1\r\nHost: [::1]:81\r\nContent-Length: 5\r\n\r\nhello";
    let chunked =
        "PUT / HTTP/1.1\r\nHost: 10.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nX: y\r\n\r\n";
    let seeds = [format!("{get}{post}{chunked}"), format!("{chunked}{get}"), format!("{post}{post}{post}")];
    let seeds = seeds.map(String::into_bytes);
    nido_fuzz::fuzz("http-requests", &seeds, |input| {
        let whole = follow(input, usize::MAX >> 1);
        assert_eq!(follow(input, 7), whole);
        assert_eq!(follow(input, 1000), whole);
    });
}

#[test]
fn fuzz_frames() {
    let frame = |ethertype: u16, packet: &[u8]| {
        [&subnet::GATEWAY_MAC[..], &subnet::GUEST_MAC, &ethertype.to_be_bytes(), packet].concat()
    };
    let v4 =
        [0x45, 0, 0, 30, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 2, 15, 1, 2, 3, 4, 0x12, 0x34, 0, 53, 0, 10, 0, 0, 1, 2];
    let mut v6 = vec![0x60, 0, 0, 0, 0, 8, 58, 255, 0xfe, 0x80];
    v6.extend([0; 14]);
    v6.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 133, 0, 0, 0, 0, 0, 0, 0]);
    let seeds = [frame(frame::IPV4, &v4), frame(frame::IPV6, &v6), frame(frame::ARP, &[0; 28])];
    nido_fuzz::fuzz("frames", &seeds, |input| match frame::parse(input) {
        Ok(Frame::Ip(packet)) => {
            assert!(packet.bytes.len() <= input.len() - 14 && packet.payload.len() < packet.bytes.len());
            assert!(subnet::is_guest(packet.source) || packet.source.is_unspecified());
            let _ = (frame::ports(packet.payload), frame::datagram(packet.payload));
        }
        Ok(Frame::Arp(packet)) => assert_eq!(packet.len(), input.len() - 14),
        Err(_) => {}
    });
}

#[test]
fn fuzz_network_rules() {
    let seeds =
        ["example.com", "*.example.com:443,8000-8010", "[2001:db8::/32]:*/udp", "10.0.0.0/8:53/udp", "host:8080"];
    let seeds = seeds.map(|rule| rule.as_bytes().to_vec());
    nido_fuzz::fuzz("network-rules", &seeds, |input| {
        let Ok(text) = std::str::from_utf8(input) else { return };
        if let Ok(rule) = text.parse::<EgressRule>() {
            let shown = rule.to_string();
            assert_eq!(shown.parse::<EgressRule>().unwrap(), rule, "{shown}");
        }
    });
}
