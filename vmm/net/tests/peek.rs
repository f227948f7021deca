//! The first bytes of connections: examples byte for byte, and in pieces.
#![allow(clippy::unwrap_used, reason = "a test that cannot continue must stop")]

mod hellos;

use hellos::{browser, handshake, message, recorded, records, server_names, vector};
use nido_net::peek::{
    Body, ClientHello, HEAD_MAX, HELLO_MAX, HttpHead, Peek, RequestStream, Step, client_hello, http_head,
};
use proptest::prelude::*;

fn hello(name: Option<&str>, alpn: &[&str], ech: bool) -> Peek<ClientHello> {
    let alpn = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    Peek::Done(ClientHello { server_name: name.map(str::to_owned), alpn, ech })
}

/// Parses each prefix until the result is known, and compares it with that of all bytes.
fn in_pieces<T: PartialEq + std::fmt::Debug>(bytes: &[u8], parse: impl Fn(&[u8]) -> Peek<T>) -> Peek<T> {
    let whole = parse(bytes);
    let mut prefixes =
        (0..=bytes.len()).map(|length| parse(&bytes[..length])).skip_while(|peek| *peek == Peek::NeedMore);
    if let Some(first) = prefixes.next() {
        assert_eq!(first, whole);
        // Later prefixes do not change the result.
        assert!(prefixes.step_by(97).all(|peek| peek == whole));
    } else {
        assert_eq!(whole, Peek::NeedMore);
    }
    whole
}

#[test]
fn recorded_hellos_are_parsed() {
    let openssl = recorded(hellos::OPENSSL);
    assert_eq!(in_pieces(&openssl, client_hello), hello(Some("example.com"), &["h2", "http/1.1"], false));
    assert_eq!(client_hello(&openssl[..openssl.len() - 1]), Peek::NeedMore);
    // What follows the hello is not its concern.
    let with_more = [&openssl[..], b"\x17\x03\x03\0\x01x\0"].concat();
    assert_eq!(in_pieces(&with_more, client_hello), hello(Some("example.com"), &["h2", "http/1.1"], false));
    let nameless = recorded(hellos::OPENSSL_WITHOUT_NAME);
    assert_eq!(in_pieces(&nameless, client_hello), hello(None, &[], false));
}

#[test]
fn hellos_in_many_segments_and_records_are_parsed() {
    let expected = hello(Some("www.example.com"), &["h2", "http/1.1"], true);
    let short = message(&browser(b"www.Example.com.", 0));
    let long = message(&browser(b"www.example.com", 4000));
    assert!(long.len() > 5000);
    for (message, size) in [(&short, 16384), (&short, 1), (&short, 3), (&long, 16384), (&long, 512), (&long, 100)] {
        assert_eq!(in_pieces(&records(message, size), client_hello), expected, "records of {size} bytes");
    }
}

#[test]
fn hellos_without_extensions_have_no_name() {
    let body = [&[3, 1][..], &[7; 32], &[0], &vector(&[0, 0x2f]), &[1, 0]].concat();
    assert_eq!(in_pieces(&records(&handshake(&body), 9000), client_hello), hello(None, &[], false));
    assert_eq!(in_pieces(&records(&message(&[]), 9000), client_hello), hello(None, &[], false));
}

#[test]
fn hellos_that_servers_may_read_in_different_ways_are_invalid() {
    let name = || (0, server_names(&[b"a.example"]));
    let table = [
        ("two server name extensions", vec![name(), name()]),
        ("two host names", vec![(0, server_names(&[b"a.example", b"b.example"]))]),
        ("an unknown type of name", vec![(0, vector(&[&[1][..], &vector(b"a.example")].concat()))]),
        ("no host name", vec![(0, server_names(&[]))]),
        ("an empty server name extension", vec![(0, vec![])]),
        ("an empty host name", vec![(0, server_names(&[b""]))]),
        ("an IPv4 address", vec![(0, server_names(&[b"192.0.2.1"]))]),
        ("an IPv6 address", vec![(0, server_names(&[b"2001:db8::1"]))]),
        ("a zero byte", vec![(0, server_names(&[b"a.example\0.b.example"]))]),
        ("a byte that is not ASCII", vec![(0, server_names(&[b"b\xfccher.example"]))]),
        ("a label that is empty", vec![(0, server_names(&[b"a..example"]))]),
        ("bytes after the list of names", vec![(0, [&server_names(&[b"a.example"])[..], b"x"].concat())]),
        ("a list of names that is too long", vec![(0, b"\0\x20\0\0\x01a".to_vec())]),
        ("another extension twice", vec![name(), (0x0a0a, vec![]), (0x0a0a, vec![])]),
        ("an inner ECH", vec![name(), (0xfe0d, vec![1])]),
        ("an empty ECH", vec![name(), (0xfe0d, vec![])]),
        ("an empty protocol", vec![name(), (16, vector(&[0]))]),
        ("no protocol", vec![name(), (16, vector(&[]))]),
        ("a protocol that is too long", vec![name(), (16, vector(&[9, 1]))]),
        ("65 protocols", vec![name(), (16, vector(&[1, b'a'].repeat(65)))]),
    ];
    for (what, extensions) in table {
        let found = in_pieces(&records(&message(&extensions), 16384), client_hello);
        assert!(matches!(found, Peek::Invalid(_)), "{what}: {found:?}");
    }
}

#[test]
fn records_that_are_not_a_hello_are_invalid_at_once() {
    let valid = records(&message(&[]), 50);
    let with = |at: usize, byte: u8| {
        let mut bytes = valid.clone();
        bytes[at] = byte;
        bytes
    };
    let table = [
        ("SSH", b"SSH-2.0-x".to_vec(), 1),
        ("SSL 2", b"\x80\x2e\x01\x03\x01".to_vec(), 1),
        ("application data", b"\x17\x03\x03\0\x05".to_vec(), 1),
        ("a version before SSL 3", with(1, 2), 2),
        ("a version after TLS 1.3", with(2, 5), 3),
        ("an empty record", b"\x16\x03\x01\0\0".to_vec(), 5),
        ("a record of 16385 bytes", b"\x16\x03\x01\x40\x01".to_vec(), 5),
        ("a ServerHello", with(5, 2), 6),
        ("a message of 16 MB", with(6, 0xff), 9),
        ("an alert between two records", with(55, 21), 56),
        ("an empty record between two others", [&valid[..55], b"\x16\x03\x01\0\0", &valid[55..]].concat(), 60),
        ("a message that is shorter than its record", with(8, 1), 9),
    ];
    for (what, bytes, at) in table {
        assert!(matches!(in_pieces(&bytes, client_hello), Peek::Invalid(_)), "{what}");
        assert_eq!(client_hello(&bytes[..at - 1]), Peek::NeedMore, "{what}");
        assert!(matches!(client_hello(&bytes[..at]), Peek::Invalid(_)), "{what}");
    }
    let two = [message(&[]), message(&[])].concat();
    assert!(matches!(client_hello(&records(&two, 16384)), Peek::Invalid(_)), "two hellos in one record");
}

#[test]
fn hellos_are_at_most_16_kib_long() {
    let base = records(&message(&[(0x0015, vec![])]), 16384).len();
    let with_padding = |padding: usize| records(&message(&[(0x0015, vec![0; padding])]), 16384);
    assert_eq!(client_hello(&with_padding(HELLO_MAX - base)), hello(None, &[], false));
    let too_long = with_padding(HELLO_MAX - base + 1);
    assert_eq!(client_hello(&too_long[..HELLO_MAX - 1]), Peek::NeedMore);
    assert!(matches!(client_hello(&too_long[..HELLO_MAX]), Peek::Invalid(_)));
    assert!(matches!(client_hello(&too_long), Peek::Invalid(_)));
    // The headers of records of one byte count as well.
    let scattered = records(&message(&[(0x0015, vec![0; 4000])]), 1);
    assert!(matches!(client_hello(&scattered), Peek::Invalid(_)));
}

fn head(text: &str) -> HttpHead {
    match in_pieces(text.as_bytes(), http_head) {
        Peek::Done(head) => head,
        other => panic!("{text:?}: {other:?}"),
    }
}

fn request(fields: &str) -> String {
    format!("POST /a HTTP/1.1\r\nHost: a.example\r\n{fields}\r\n")
}

#[test]
fn heads_are_parsed() {
    let text = "GET /x?y HTTP/1.1\r\nHost: Example.COM:8080\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n\r\n";
    let expected = HttpHead {
        method: "GET".into(),
        host: "example.com".into(),
        address: None,
        port: Some(8080),
        length: text.len(),
        body: Body::None,
        upgrade: false,
    };
    assert_eq!(head(text), expected);
    assert_eq!(head(&format!("{text}GET")), expected);
    let with_host = |host: &str| {
        let head = head(&format!("GET / HTTP/1.1\r\nhOST:\t {host} \r\n\r\n"));
        (head.host, head.address, head.port)
    };
    assert_eq!(with_host("a.example."), ("a.example".into(), None, None));
    assert_eq!(with_host("192.0.2.1:81"), ("192.0.2.1".into(), Some("192.0.2.1".parse().unwrap()), Some(81)));
    let address = "2001:db8::1".parse().unwrap();
    assert_eq!(with_host("[2001:DB8:0::1]"), ("2001:db8::1".into(), Some(address), None));
    assert_eq!(with_host("[2001:db8::1]:80"), ("2001:db8::1".into(), Some(address), Some(80)));
}

#[test]
fn absolute_targets_name_the_same_host() {
    for (target, host) in [
        ("http://a.example/x", "A.example"),
        ("HTTP://A.example", "a.example:80"),
        ("http://a.example:80?q", "a.example."),
        ("http://[::1]:8080/", "[0::1]:8080"),
    ] {
        head(&format!("GET {target} HTTP/1.0\r\nHost: {host}\r\n\r\n"));
    }
    assert_eq!(head("OPTIONS * HTTP/1.1\r\nHost: a.example\r\n\r\n").method, "OPTIONS");
}

#[test]
fn the_end_of_a_body_is_known() {
    for (fields, body, upgrade) in [
        ("", Body::None, false),
        ("Content-Length: 0\r\n", Body::Length(0), false),
        ("content-length:\t18446744073709551\r\n", Body::Length(18_446_744_073_709_551), false),
        ("Transfer-Encoding: Chunked\r\n", Body::Chunked, false),
        ("Connection: Upgrade\r\nUpgrade: websocket\r\n", Body::None, true),
    ] {
        let head = head(&request(fields));
        assert_eq!((head.body, head.upgrade), (body, upgrade), "{fields:?}");
    }
}

#[test]
fn requests_that_servers_may_read_in_different_ways_are_invalid() {
    let host = "Host: a.example\r\n";
    let first = |line: &str| format!("{line}\r\n{host}\r\n");
    let with_host = |value: &str| format!("GET / HTTP/1.1\r\nHost: {value}\r\n\r\n");
    let lines = [
        "",
        " GET / HTTP/1.1",
        "GET  / HTTP/1.1",
        "GET / HTTP/1.1 ",
        "GET /",
        "GET / HTTP/2.0",
        "GET / http/1.1",
        "GET / HTTP/1.1\t",
        "GET /\ta HTTP/1.1",
        "G(T / HTTP/1.1",
        "GET / a HTTP/1.1",
        "GET * HTTP/1.1",
        "CONNECT a.example:443 HTTP/1.1",
        "Connect / HTTP/1.1",
        "PRI * HTTP/2.0",
        "GET a.example/ HTTP/1.1",
        "GET http://b.example/ HTTP/1.1",
        "GET http://a.example:81/ HTTP/1.1",
        "GET https://a.example/ HTTP/1.1",
        "GET http://b.example@a.example/ HTTP/1.1",
        "GET http://a.example\\@b.example/ HTTP/1.1",
        "GET http:/a.example/ HTTP/1.1",
        "GET http:///a.example HTTP/1.1",
        "GET /\0 HTTP/1.1",
        "GET / HTTP/1.1\rX: y",
    ];
    let hosts = [
        "",
        "a.example:",
        "a.example:0",
        "a.example:65536",
        "a.example:+80",
        "a.example:80:80",
        "a.example b.example",
        "a.example,b.example",
        "x@a.example",
        "a.example/",
        "http://a.example",
        "::1",
        "[::1",
        "[::1]x",
        "[::1]:",
        "[::1%1]",
        "[192.0.2.1]",
        "127.1",
        "0x7f000001",
        "a_b.example:8o",
        "*.example",
        "b\u{fc}cher.example",
        "[a.example]",
        "a]:80",
    ];
    let fields = [
        host,
        "host: b.example\r\n",
        " folded: x\r\n",
        "\tfolded: x\r\n",
        "X : y\r\n",
        "X\r\n",
        ": y\r\n",
        "X: a\nY: b\r\n",
        "X: a\rY: b\r\n",
        "X: a\0b\r\n",
        "X: a\x7fb\r\n",
        "X\u{fc}: y\r\n",
        "Content-Length: 1\r\nContent-Length: 1\r\n",
        "Content-Length: 1, 1\r\n",
        "Content-Length: +1\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 0x1\r\n",
        "Content-Length:\r\n",
        "Content-Length: 1 1\r\n",
        "Content-Length: 99999999999999999999\r\n",
        "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 1\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: identity\r\n",
        "Transfer-Encoding: chunked;x\r\n",
        "Transfer-Encoding:\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Transfer-Encoding: \x0bchunked\r\n",
    ];
    let others = [
        "GET / HTTP/1.1\r\n\r\n",
        "GET http://a.example/ HTTP/1.1\r\n\r\n",
        "POST / HTTP/1.0\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n",
        "GET / HTTP/1.1\nHost: a.example\n\n",
    ];
    let all = lines.iter().map(|line| first(line)).chain(hosts.iter().map(|host| with_host(host)));
    let all =
        all.chain(fields.iter().map(|fields| request(fields))).chain(others.iter().map(|text| (*text).to_owned()));
    for text in all {
        let found = in_pieces(text.as_bytes(), http_head);
        assert!(matches!(found, Peek::Invalid(_)), "{text:?}: {found:?}");
    }
}

#[test]
fn heads_are_at_most_8_kib_long() {
    let base = request("X: \r\n").len();
    let with = |length: usize| request(&format!("X: {}\r\n", "a".repeat(length)));
    assert!(matches!(http_head(with(HEAD_MAX - base).as_bytes()), Peek::Done(_)));
    let too_long = with(HEAD_MAX - base + 1);
    assert_eq!(http_head(&too_long.as_bytes()[..HEAD_MAX - 1]), Peek::NeedMore);
    assert!(matches!(http_head(&too_long.as_bytes()[..HEAD_MAX]), Peek::Invalid(_)));
    assert!(matches!(http_head(too_long.as_bytes()), Peek::Invalid(_)));
}

/// The hosts of a connection's requests, how many bytes pass, and why it ends; sent in pieces of so many bytes.
fn follow(bytes: &[u8], piece: usize) -> (Vec<String>, usize, Option<&'static str>) {
    let (mut stream, mut hosts, mut passed) = (RequestStream::default(), Vec::new(), 0);
    for end in (0..bytes.len()).step_by(piece).map(|start| (start + piece).min(bytes.len())) {
        loop {
            assert!(passed <= end && end - passed <= HEAD_MAX + piece);
            match stream.advance(&bytes[passed..end]) {
                Step::Head(head) => {
                    passed += head.length;
                    hosts.push(head.host);
                }
                Step::Pass(count) => {
                    assert!(count > 0);
                    passed += count;
                }
                Step::NeedMore => break,
                Step::Invalid(reason) => {
                    assert_eq!(stream.advance(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"), Step::Invalid(reason));
                    return (hosts, passed, Some(reason));
                }
            }
        }
    }
    (hosts, passed, None)
}

fn follow_in_pieces(text: &str) -> (Vec<String>, usize, Option<&'static str>) {
    let whole = follow(text.as_bytes(), usize::MAX >> 1);
    for piece in [1, 2, 7, 100] {
        assert_eq!(follow(text.as_bytes(), piece), whole, "{text:?} in pieces of {piece}");
    }
    whole
}

#[test]
fn every_request_of_a_connection_is_found() {
    let get = |host: &str| format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let (chunked, hidden) = ("Transfer-Encoding: chunked\r\n", get("x"));
    let texts = [
        get("a.example"),
        request(&format!("Content-Length: {}\r\n", hidden.len())) + &hidden,
        request("Content-Length: 0\r\n"),
        request(chunked) + &format!("5\r\nhello\r\n{:x};name=\"value\"\r\n{hidden}\r\n0\r\n\r\n", hidden.len()),
        request(chunked) + "00000A\r\n0123456789\r\n0;x\r\nExpires: now\r\nX: y\r\n\r\n",
        request("Connection: Upgrade\r\nUpgrade: h2c\r\n"),
        get("b.example"),
    ];
    let all = texts.concat();
    let (hosts, passed, reason) = follow_in_pieces(&all);
    assert_eq!((hosts.join(" "), passed, reason), (["a.example"; 6].join(" ") + " b.example", all.len(), None));
}

#[test]
fn bodies_that_servers_may_read_in_different_ways_are_invalid() {
    let chunked = request("Transfer-Encoding: chunked\r\n");
    let long = "a".repeat(300);
    let trailers = format!("X: {}\r\n", "a".repeat(1000)).repeat(9);
    let table = [
        ("\r\n", 0),
        ("x\r\n", 0),
        ("-1\r\n", 0),
        ("+1\r\na\r\n", 0),
        ("0x1\r\na\r\n", 0),
        (" 1\r\na\r\n", 0),
        ("1 \r\na\r\n", 0),
        ("1\na\n0\n\n", 0),
        ("1;a\nb\r\na\r\n", 0),
        ("1;a\rb\r\na\r\n", 0),
        ("1000000000000000\r\n", 0),
        (&format!("1;{long}\r\na\r\n"), 0),
        (&format!("1;{long}"), 0),
        ("1\r\nab\r\n", 4),
        ("1\r\na\n", 4),
        ("1\r\na\rx", 4),
        ("0\r\nX\r\n\r\n", 3),
        ("0\r\n X: y\r\n\r\n", 3),
        ("0\r\nX: y\r\nHost: b.example\r\n\r\n", 9),
        ("0\r\ncontent-length: 1\r\n\r\n", 3),
        ("0\r\nTransfer-Encoding: chunked\r\n\r\n", 3),
        (&format!("0\r\n{trailers}\r\n"), 3 + 8 * 1005),
    ];
    for (body, passed) in table {
        let (hosts, found, reason) = follow_in_pieces(&format!("{chunked}{body}"));
        assert_eq!((hosts.len(), found - chunked.len(), reason.is_some()), (1, passed, true), "{body:?}");
    }
    let upgrade = request("Connection: Upgrade\r\nUpgrade: websocket\r\n") + "\x01\x05hello";
    assert!(follow_in_pieces(&upgrade).2.is_some(), "another protocol does not pass");
}

fn bytes_like_http() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        Just("GET / HTTP/1.1\r\n".to_owned()),
        Just("POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned()),
        Just("Host: a.example\r\n".to_owned()),
        Just("\r\n".to_owned()),
        Just("0\r\n\r\n".to_owned()),
        (0_usize..20).prop_map(|length| format!("Content-Length: {length}\r\n\r\n{}", "x".repeat(length))),
        (1_usize..20).prop_map(|length| format!("{length:x}\r\n{}\r\n", "x".repeat(length))),
        "\\PC{0,9}",
        "[\r\n\t :;a0]{0,5}",
    ];
    proptest::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn requests_in_pieces_are_the_same_as_at_once(text in bytes_like_http()) {
        in_pieces(text.as_bytes(), http_head);
        follow_in_pieces(&text);
    }

    #[test]
    fn any_bytes_in_pieces_are_the_same_as_at_once(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        in_pieces(&bytes, client_hello);
        in_pieces(&[b"\x16\x03\x01\0\x40\x01\0\0\x3c\x03\x03", &bytes[..]].concat(), client_hello);
        in_pieces(&bytes, http_head);
    }

    #[test]
    fn names_are_the_same_in_every_case_and_record_size(
        name in "[a-zA-Z0-9-]{1,20}(\\.[a-zA-Z0-9-]{1,20}){0,4}\\.[a-zA-Z]{2,9}\\.?",
        size in 1_usize..600,
    ) {
        let canonical = name.trim_end_matches('.').to_ascii_lowercase();
        let bytes = records(&message(&[(0, server_names(&[name.as_bytes()]))]), size);
        prop_assert_eq!(client_hello(&bytes), hello(Some(&canonical), &[], false));
        prop_assert_eq!(head(&format!("GET / HTTP/1.1\r\nHost: {name}\r\n\r\n")).host, canonical);
    }
}
