//! Messages byte for byte.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;

/// `dig +noedns a eXample.com`.
const PLAIN: &[u8] = b"\x12\x34\x01\x20\0\x01\0\0\0\0\0\0\x07eXample\x03com\0\0\x01\0\x01";
/// `dig aaaa example.com`, with a cookie.
const EDNS: &[u8] = b"\xab\xcd\x01\x20\0\x01\0\0\0\0\0\x01\x07example\x03com\0\0\x1c\0\x01\
    \0\0\x29\x10\0\0\0\0\0\0\x0c\0\x0a\0\x08abcdefgh";

fn message(flags: u16, counts: [u16; 4], rest: &[u8]) -> Vec<u8> {
    let words = [7, flags, counts[0], counts[1], counts[2], counts[3]];
    words.iter().flat_map(|word: &u16| word.to_be_bytes()).chain(rest.iter().copied()).collect()
}

fn question(labels: &[&[u8]]) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    for label in labels {
        bytes.push(label.len() as u8);
        bytes.extend_from_slice(label);
    }
    bytes.extend_from_slice(b"\0\0\x01\0\x01");
    bytes
}

fn query(labels: &[&[u8]]) -> Result<Query, Malformed> {
    Query::parse(&message(0x100, [1, 0, 0, 0], &question(labels)))
}

fn code(message: &[u8]) -> u8 {
    message[3] & 0xf
}

#[test]
fn queries_are_parsed() {
    let plain = Query::parse(PLAIN).unwrap();
    assert_eq!((plain.id, plain.recursion_desired, plain.name.as_str()), (0x1234, true, "example.com"));
    assert_eq!((plain.kind, plain.edns, plain.udp_limit()), (Kind::A, None, 512));
    let edns = Query::parse(EDNS).unwrap();
    assert_eq!((edns.name.as_str(), edns.kind, edns.edns), ("example.com", Kind::Aaaa, Some(1232)));

    let with_size = |size: u16| {
        let mut bytes = EDNS[..EDNS.len() - 20].to_vec();
        bytes.extend_from_slice(&size.to_be_bytes());
        bytes.extend_from_slice(&[0; 6]);
        Query::parse(&bytes).unwrap().edns
    };
    assert_eq!([0, 600, 1400].map(with_size), [Some(512), Some(600), Some(1232)]);

    let https = b"\x01a\x07example\0\0\x41\0\x01";
    assert_eq!(Query::parse(&message(0, [1, 0, 0, 0], https)).unwrap().kind, Kind::Other(65));
    let root = Query::parse(&message(0, [1, 0, 0, 0], b"\0\0\x02\0\x01")).unwrap();
    assert_eq!((root.name.as_str(), root.kind, root.recursion_desired), ("", Kind::Other(2), false));
}

#[test]
fn messages_that_are_no_queries_get_no_response() {
    for bytes in [&[][..], &PLAIN[..11], &message(0x8100, [1, 0, 0, 0], &question(&[b"a"]))] {
        let error = Query::parse(bytes).unwrap_err();
        assert_eq!((&error, error.response()), (&Malformed::NotAQuery, None));
    }
}

#[test]
fn malformed_messages_get_a_response_without_their_question() {
    let name = question(&[b"a", b"example"]);
    let with = |tail: &[u8]| [&name, tail].concat();
    let opt = b"\0\0\x29\x04\xd0\0\0\0\0\0\0";
    let table = [
        ("no question", 0_u16, [0, 0, 0, 0], vec![], 1),
        ("two questions", 0, [2, 0, 0, 0], with(&name), 1),
        ("counts of 65535", 0, [0xffff; 4], name.clone(), 1),
        ("an answer", 0, [1, 1, 0, 0], name.clone(), 1),
        ("an authority", 0, [1, 0, 1, 0], name.clone(), 1),
        ("two additional records", 0, [1, 0, 0, 2], with(&[&opt[..], opt].concat()), 1),
        ("a missing additional record", 0, [1, 0, 0, 1], name.clone(), 1),
        ("an additional record that is not counted", 0, [1, 0, 0, 0], with(opt), 1),
        ("an additional record of another type", 0, [1, 0, 0, 1], with(b"\0\0\x10\0\x01\0\0\0\0\0\0"), 1),
        ("options that are longer than the message", 0, [1, 0, 0, 1], with(b"\0\0\x29\x04\xd0\0\0\0\0\0\x01"), 1),
        ("bytes after the options", 0, [1, 0, 0, 1], with(&[&opt[..], b"x"].concat()), 1),
        ("a compression pointer", 0, [1, 0, 0, 0], b"\x01a\xc0\x0c\0\x01\0\x01".to_vec(), 1),
        ("a pointer to itself", 0, [1, 0, 0, 0], b"\xc0\x0c\0\x01\0\x01".to_vec(), 1),
        ("a label of a reserved type", 0, [1, 0, 0, 0], b"\x41a\0\0\x01\0\x01".to_vec(), 1),
        ("a label that is longer than the message", 0, [1, 0, 0, 0], b"\x3fa\0\0\x01\0\x01".to_vec(), 1),
        ("a truncated type", 0, [1, 0, 0, 0], name[..name.len() - 1].to_vec(), 1),
        ("the class CHAOS", 0, [1, 0, 0, 0], b"\x07version\x04bind\0\0\x10\0\x03".to_vec(), 4),
        ("an update", 0x2800, [1, 0, 0, 0], name.clone(), 4),
    ];
    for (what, flags, counts, rest, expected) in table {
        let response = Query::parse(&message(flags | 0x100, counts, &rest)).unwrap_err().response().unwrap();
        assert_eq!(response, message(0x8180 | flags | expected, [0; 4], &[]), "{what}");
    }
}

#[test]
fn names_are_at_most_255_bytes_on_the_wire() {
    let label = &[b'a'; 63][..];
    assert_eq!(query(&[label, label, label, &[b'b'; 61]]).unwrap().name.len(), 253);
    assert!(matches!(query(&[label, label, label, &[b'b'; 62]]), Err(Malformed::Format(_))));
    assert!(matches!(query(&[&b"a"[..]; 128]), Err(Malformed::Format(_))));
    assert_eq!(query(&[&b"a"[..]; 127]).unwrap().name.len(), 253);
}

#[test]
fn names_that_are_not_a_hosts_do_not_exist() {
    let table: [(&[&[u8]], &str); 8] = [
        (&[b"a.b", b"Example"], "a\\.b.example"),
        (&[b"a\\b"], "a\\\\b"),
        (&[b"a b", b"example"], "a\\032b.example"),
        (&[b"\0", b"example"], "\\000.example"),
        (&[b"b\xfccher", b"example"], "b\\252cher.example"),
        (&[b"*", b"example"], "*.example"),
        (&[b"10", b"0", b"0", b"1"], "10.0.0.1"),
        (&[b"0x7f000001"], "0x7f000001"),
    ];
    for (labels, name) in table {
        let error = query(labels).unwrap_err();
        assert!(matches!(&error, Malformed::NameNotAllowed(query) if query.name == name), "{error:?}");
        let expected = [&message(0x8183, [1, 0, 0, 0], &[])[..], &question(labels)].concat();
        assert_eq!(error.response().unwrap(), expected, "{name}");
    }
}

#[test]
fn another_version_of_edns_is_refused() {
    let bytes = message(0x100, [1, 0, 0, 1], b"\x01a\0\0\x01\0\x01\0\0\x29\x04\xd0\0\x01\0\0\0\0");
    let response = Query::parse(&bytes).unwrap_err().response().unwrap();
    let expected = message(0x8180, [1, 0, 0, 1], b"\x01a\0\0\x01\0\x01\0\0\x29\x04\xd0\x01\0\0\0\0\0");
    assert_eq!(response, expected);
}

#[test]
fn responses_have_addresses_of_the_requested_family() {
    let addresses = ["192.0.2.1", "2001:db8::1", "192.0.2.2"].map(|text| text.parse().unwrap());
    let response = answer(&Query::parse(PLAIN).unwrap(), &addresses, 30, 512);
    let expected = b"\x12\x34\x81\x80\0\x01\0\x02\0\0\0\0\x07eXample\x03com\0\0\x01\0\x01\
        \xc0\x0c\0\x01\0\x01\0\0\0\x1e\0\x04\xc0\0\x02\x01\
        \xc0\x0c\0\x01\0\x01\0\0\0\x1e\0\x04\xc0\0\x02\x02";
    assert_eq!(response, expected);

    let response = answer(&Query::parse(EDNS).unwrap(), &addresses, u32::MAX, 1232);
    let expected = b"\xab\xcd\x81\x80\0\x01\0\x01\0\0\0\x01\x07example\x03com\0\0\x1c\0\x01\
        \xc0\x0c\0\x1c\0\x01\x7f\xff\xff\xff\0\x10\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x01\
        \0\0\x29\x04\xd0\0\0\0\0\0\0";
    assert_eq!(response, expected);
}

#[test]
fn responses_without_addresses() {
    let plain = Query::parse(PLAIN).unwrap();
    let edns = Query::parse(EDNS).unwrap();
    let plain_question = &PLAIN[12..];
    let edns_question = &EDNS[12..EDNS.len() - 23];
    let opt = b"\0\0\x29\x04\xd0\0\0\0\0\0\0";
    let join = |id: u16, code: u8, additional: u8, question: &[u8], rest: &[u8]| {
        let head = [&id.to_be_bytes()[..], &[0x81, 0x80 | code, 0, 1, 0, 0, 0, 0, 0, additional]].concat();
        [&head, question, rest].concat()
    };
    assert_eq!(empty(&plain), join(0x1234, 0, 0, plain_question, &[]));
    assert_eq!(empty(&edns), join(0xabcd, 0, 1, edns_question, opt));
    assert_eq!(failure(&plain), join(0x1234, 2, 0, plain_question, &[]));
    assert_eq!(failure(&edns), join(0xabcd, 2, 1, edns_question, opt));
    assert_eq!(refuse(&plain, Some("no rule")), join(0x1234, 3, 0, plain_question, &[]));
    let error = b"\0\0\x29\x04\xd0\0\0\0\0\0\x0d\0\x0f\0\x09\0\x11no rule";
    assert_eq!(refuse(&edns, Some("no rule")), join(0xabcd, 3, 1, edns_question, error));
    let error = b"\0\0\x29\x04\xd0\0\0\0\0\0\x06\0\x0f\0\x02\0\x11";
    assert_eq!(refuse(&edns, None), join(0xabcd, 3, 1, edns_question, error));
    let long = refuse(&edns, Some(&"\u{fc}".repeat(1000)));
    assert_eq!(long.len(), EDNS.len() - 23 + 11 + 6 + 160);
}

#[test]
fn a_response_that_is_too_long_is_truncated() {
    let addresses: Vec<IpAddr> = (0..3000).map(|number| IpAddr::V4(Ipv4Addr::from_bits(number))).collect();
    for (bytes, limit) in [(PLAIN, 512), (PLAIN, 65535), (PLAIN, usize::MAX)] {
        let query = Query::parse(bytes).unwrap();
        let response = answer(&query, &addresses, 30, limit);
        let count = usize::from(u16::from_be_bytes([response[6], response[7]]));
        let fits = limit > 512;
        assert_eq!((count, response[2] & 2 != 0), if fits { (3000, false) } else { ((512 - 29) / 16, true) });
        assert_eq!(response.len(), 29 + count * 16);
    }
    let addresses: Vec<IpAddr> = (0..100).map(|number| IpAddr::V6(Ipv6Addr::from_bits(number))).collect();
    let query = Query::parse(EDNS).unwrap();
    let response = answer(&query, &addresses, 30, query.udp_limit());
    assert!(response.len() <= 1232 && response.len() > 1232 - 28 && response[2] & 2 != 0, "{}", response.len());
    assert!(response.ends_with(b"\0\0\x29\x04\xd0\0\0\0\0\0\0"));
}

proptest! {
    #[test]
    fn every_message_is_parsed_or_gets_a_bounded_response(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        match Query::parse(&bytes) {
            Ok(query) => prop_assert!(empty(&query).len() <= 512),
            Err(error) => prop_assert!(error.response().is_none_or(|response| response.len() <= 512)),
        }
    }

    #[test]
    fn the_case_of_a_question_is_repeated_and_its_name_is_lower_case(name in "[a-zA-Z0-9_-]{1,63}(\\.[a-zA-Z0-9_-]{1,20}){0,5}\\.[a-zA-Z]{1,9}") {
        let labels: Vec<_> = name.split('.').map(str::as_bytes).collect();
        let query = query(&labels).unwrap();
        prop_assert_eq!(&query.name, &name.to_ascii_lowercase());
        let response = refuse(&query, None);
        prop_assert_eq!(&response[12..], &question(&labels)[..]);
        prop_assert_eq!(code(&response), 3);
    }
}
