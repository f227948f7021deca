//! Bytes of the other side, which is hostile or broken.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on shall stop")]

use nido_guest_agent::config::GuestConfig;
use nido_guest_agent::wire::sync::Scanner;
use nido_guest_agent::wire::{
    Connect, Entry, EntryKind, Exec, HEAD, Head, Hello, Put, Refusal, Refused, ToGuest, ToHost, WindowSize, check_path,
    decode, decode_first, encode,
};

fn entry() -> Entry {
    let path = vec![b"a".to_vec().into(), b"b".to_vec().into()];
    Entry { path, kind: EntryKind::File(5), mode: 0o644, mtime_ns: -1, owner: None, stored: None }
}

/// What was understood means the same when it is sent on.
fn check<M: for<'b> minicbor::Decode<'b, ()> + minicbor::Encode<()> + PartialEq + std::fmt::Debug>(input: &[u8]) {
    if let Ok((message, rest)) = decode_first::<M>(input) {
        assert!(rest.len() + HEAD <= input.len());
        let again = encode(&message).unwrap();
        assert_eq!(decode::<M>(&again[HEAD..]).unwrap(), message);
    }
    if let Some(head) = input.first_chunk::<HEAD>()
        && let Ok(head) = Head::parse(*head)
    {
        assert_eq!(Head::parse(head.bytes()), Ok(head));
    }
}

#[test]
fn fuzz_messages_of_the_host() {
    let exec =
        Exec { argv: vec![b"ls".to_vec().into()], pty: Some(WindowSize { rows: 24, columns: 80 }), ..Exec::default() };
    let messages = [
        ToGuest::Hello(Hello { oldest: 1, newest: 2, token: vec![0xaa; 32].into(), nonce: 256 }),
        ToGuest::Exec(exec),
        ToGuest::Put(Put {
            path: b"/t".to_vec().into(),
            name: None,
            user: Some("u".into()),
            parents: true,
            set_mode: None,
        }),
        ToGuest::Entry(entry()),
        ToGuest::Connect(Connect { host: None, port: 80 }),
        ToGuest::Hole(1 << 40),
    ];
    let seeds: Vec<Vec<u8>> = messages.iter().map(|message| encode(message).unwrap()).collect();
    nido_fuzz::fuzz("messages-of-the-host", &seeds, |input| {
        check::<ToGuest>(input);
        if let Ok((ToGuest::Entry(entry), _)) = decode_first(input)
            && check_path(&entry.path).is_ok()
        {
            assert!(
                entry.path.iter().all(|part| !part.is_empty() && !part.contains(&b'/') && part.as_slice() != b"..")
            );
        }
        // Blocks that synchronize a connection, between arbitrary bytes.
        let mut scanner = Scanner::default();
        let blocks = input.iter().filter(|byte| scanner.push(**byte).is_some()).count();
        assert!(blocks <= input.len());
    });
}

#[test]
fn fuzz_messages_of_the_guest() {
    let messages = [
        ToHost::Started(5),
        ToHost::Refused(Refused { reason: Refusal::Token, oldest: 1, newest: 1 }),
        ToHost::Entry(entry()),
        ToHost::Hole(7),
    ];
    let seeds: Vec<Vec<u8>> = messages.iter().map(|message| encode(message).unwrap()).collect();
    nido_fuzz::fuzz("messages-of-the-guest", &seeds, check::<ToHost>);
}

#[test]
fn fuzz_configuration_of_the_guest() {
    use nido_guest_agent::config::{Channel, Init, Network, StaticNetwork};
    let network = StaticNetwork {
        address: "a".into(),
        prefix: 24,
        gateway: Some("g".into()),
        dns: vec!["d".into()],
        mtu: Some(9000),
    };
    let config = GuestConfig {
        hostname: "web".into(),
        token: vec![1; 32].into(),
        init: Init::Agent,
        channel: Channel::Serial,
        network: Some(Network::Static(network)),
        identity: "0123abc".into(),
        nested: false,
    };
    let seed = minicbor::to_vec(&config).unwrap();
    nido_fuzz::fuzz("configuration-of-the-guest", &[seed], |input| {
        if let Ok(config) = minicbor::decode::<GuestConfig>(input) {
            let again = minicbor::to_vec(&config).unwrap();
            assert_eq!(minicbor::to_vec(minicbor::decode::<GuestConfig>(&again).unwrap()).unwrap(), again);
        }
    });
}
