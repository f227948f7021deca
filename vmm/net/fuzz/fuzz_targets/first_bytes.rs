//! Any bytes, read as everything that the engine reads of a guest's names: no panic, and canonical names only.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nido_net::dns::{self, Query};
use nido_net::names::canonical_name;
use nido_net::peek::{Peek, RequestStream, Step, client_hello};

fn check(name: &str) {
    assert_eq!(canonical_name(name).as_deref(), Some(name));
}

fuzz_target!(|bytes: &[u8]| {
    match Query::parse(bytes) {
        Ok(query) => {
            assert!(query.name.is_empty() || canonical_name(&query.name).as_ref() == Some(&query.name));
            assert!(dns::refuse(&query, Some("x")).len() <= query.udp_limit());
        }
        Err(error) => assert!(error.response().is_none_or(|response| response.len() <= 512)),
    }
    if let Peek::Done(hello) = client_hello(bytes) {
        hello.server_name.iter().for_each(|name| check(name));
    }
    let (mut stream, mut rest) = (RequestStream::default(), bytes);
    loop {
        match stream.advance(rest) {
            Step::Head(head) => {
                if head.address.is_none() {
                    check(&head.host);
                }
                rest = &rest[head.length..];
            }
            Step::Pass(count) => rest = &rest[count..],
            Step::NeedMore | Step::Invalid(_) => break,
        }
    }
});
