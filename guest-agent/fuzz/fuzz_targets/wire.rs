//! Any bytes, read as everything that either side reads from the other: no panic, no allocation beyond the limits,
//! and what decodes encodes to what decodes to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nido_guest_agent::config::GuestConfig;
use nido_guest_agent::wire::{HEAD, Head, ToGuest, ToHost, decode, encode, sync};

fuzz_target!(|bytes: &[u8]| {
    if let Some((head, payload)) = bytes.split_first_chunk::<HEAD>()
        && let Ok(head) = Head::parse(*head)
    {
        assert_eq!(Head::parse(head.bytes()), Ok(head));
        let _ = decode::<ToGuest>(&payload[..payload.len().min(head.length)]);
    }
    if let Ok(message) = decode::<ToGuest>(bytes) {
        let frame = encode(&message).expect("what was decoded can be encoded");
        assert_eq!(decode::<ToGuest>(&frame[HEAD..]), Ok(message));
    }
    if let Ok(message) = decode::<ToHost>(bytes) {
        let frame = encode(&message).expect("what was decoded can be encoded");
        assert_eq!(decode::<ToHost>(&frame[HEAD..]), Ok(message));
    }
    let _ = minicbor::decode::<GuestConfig>(bytes);
    let mut scanner = sync::Scanner::default();
    for &byte in bytes {
        if let Some(block) = scanner.push(byte) {
            assert!(bytes.windows(sync::BLOCK).any(|window| window == block.bytes()));
        }
    }
});
