//! The bytes on the wire, written out: a change of the protocol has to change this file and `docs/guest-protocol.md`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on shall stop")]

use nido_guest_agent::config::{Channel, GuestConfig, Init, Network, StaticNetwork};
use nido_guest_agent::wire::{
    Connect, Entry, EntryKind, Exec, Exited, Failed, Fault, HEAD, Hello, IdentityReset, Pong, Power, Put, Refusal,
    Refused, Summary, ToGuest, ToHost, WindowSize, decode, encode,
};

fn payload<M: minicbor::Encode<()>>(message: &M) -> String {
    encode(message).unwrap()[HEAD..].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(text: &str) -> minicbor::bytes::ByteVec {
    text.as_bytes().to_vec().into()
}

#[test]
fn messages_of_the_host_keep_their_encoding() {
    let hello = Hello { oldest: 1, newest: 2, token: vec![0xaa; 2].into(), nonce: 256 };
    let pty = Some(WindowSize { rows: 24, columns: 80 });
    let exec = Exec { argv: vec![bytes("ls")], pty, ..Exec::default() };
    let entry = Entry {
        path: vec![bytes("a")],
        kind: EntryKind::File(5),
        mode: 0o644,
        mtime_ns: -1,
        owner: None,
        stored: None,
    };
    let network =
        StaticNetwork { address: "a".into(), prefix: 24, gateway: Some("g".into()), dns: Vec::new(), mtu: None };
    let renew = IdentityReset {
        token: vec![0xaa].into(),
        entropy: vec![0xbb].into(),
        time_ns: 5,
        hostname: "w".into(),
        identity: "m".into(),
        network: Some(Network::Static(network)),
        disk_grown: false,
    };
    let put = Put { path: bytes("/t"), name: None, user: Some("u".into()), parents: true, set_mode: None };
    for (message, wanted) in [
        (ToGuest::Hello(hello), "820081840102".to_owned() + "42aaaa" + "190100"),
        (ToGuest::Ping, "820180".into()),
        (ToGuest::Exec(exec), "82028188".to_owned() + "81426c73" + "80" + "f6f6" + "f4" + "8218181850" + "f6f4"),
        (ToGuest::StdinEof, "820380".into()),
        (ToGuest::Signal(15), "8204810f".into()),
        (ToGuest::Put(put), "82068184422f74f66175f5".into()),
        (ToGuest::Entry(entry), "8207818481416182008105".to_owned() + "1901a4" + "20"),
        (ToGuest::TreeEnd, "820980".into()),
        (ToGuest::Connect(Connect { host: None, port: 80 }), "820b8182f61850".into()),
        (ToGuest::Power(Power::Restart), "820c8101".into()),
        (ToGuest::Freeze, "820d80".into()),
        (ToGuest::Thaw, "820e80".into()),
        (
            ToGuest::ResetIdentity(renew),
            "820f8187".to_owned() + "41aa" + "41bb" + "05" + "6177" + "616d" + "82018184616118186167" + "80" + "f4",
        ),
    ] {
        assert_eq!(payload(&message), wanted, "{message:?}");
    }
}

#[test]
fn messages_of_the_agent_keep_their_encoding() {
    let refused = Refused { reason: Refusal::Token, oldest: 1, newest: 1 };
    let exited = Exited { code: None, signal: Some(9), timed_out: true, duration_ms: 100 };
    let pong = Pong { agent: "a".into(), uptime_ms: 1, sessions: 2, is_init: false, address: None, warnings: None };
    let failed = Failed { fault: Fault::DiskFull, message: "no".into() };
    for (message, wanted) in [
        (ToHost::Refused(refused), "82018183010101"),
        (ToHost::Started(7), "82038107"),
        (ToHost::Exited(exited), "82058184f609f51864"),
        (ToHost::PutDone(Summary { entries: 1, bytes: 2, ..Summary::default() }), "82068183010200"),
        (ToHost::PoweringOff, "820b80"),
        (ToHost::Failed(failed), "820c818206626e6f"),
        (ToHost::Frozen, "820d80"),
        (ToHost::Thawed, "820e80"),
        (ToHost::IdentityReset(pong), "820f818461610102f4"),
    ] {
        assert_eq!(payload(&message), wanted, "{message:?}");
    }
}

#[test]
fn optional_fields_at_the_end_may_be_absent() {
    let message: ToHost = decode(&[0x82, 0x06, 0x81, 0x83, 1, 2, 0]).unwrap();
    assert_eq!(message, ToHost::PutDone(Summary { entries: 1, bytes: 2, ..Summary::default() }));
}

#[test]
fn the_guest_configuration_keeps_its_encoding() {
    let network = StaticNetwork { address: "a".into(), prefix: 24, gateway: None, dns: vec!["d".into()], mtu: None };
    let config = GuestConfig {
        hostname: "h".into(),
        token: vec![1].into(),
        init: Init::System,
        channel: Channel::Serial,
        identity: "0123456789abcdef".into(),
        network: Some(Network::Static(network)),
        nested: true,
    };
    assert_eq!(
        payload(&config),
        "87616841010101820181846161".to_owned()
            + "1818"
            + "f6"
            + "816164"
            + "70"
            + &"0123456789abcdef".bytes().map(|b| format!("{b:02x}")).collect::<String>()
            + "f5"
    );
}
