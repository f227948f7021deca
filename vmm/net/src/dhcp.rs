//! A DHCP server for one client, whose address is fixed. Guests with nido's agent do not need it; others do.

use std::net::{IpAddr, Ipv4Addr};

use crate::packet;
use crate::subnet::{DNS_V4, GATEWAY_V4, GUEST_MAC, GUEST_V4, MTU, PREFIX_V4};

const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Length of a message before its options: the fixed part and the cookie.
const FIXED: usize = 240;
/// For how long the address may be used, in seconds: a day.
const LEASE: u32 = 86_400;
const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

mod option {
    pub const MASK: u8 = 1;
    pub const ROUTER: u8 = 3;
    pub const DNS: u8 = 6;
    pub const MTU: u8 = 26;
    pub const ADDRESS: u8 = 50;
    pub const LEASE: u8 = 51;
    pub const KIND: u8 = 53;
    pub const SERVER: u8 = 54;
}

/// Whether a datagram to this port is for the server.
#[must_use]
pub const fn is_server_port(port: u16) -> bool {
    port == SERVER_PORT
}

/// The frame that answers a client's message; `None` for any other datagram, and for a message that needs no answer.
#[must_use]
pub fn reply(message: &[u8]) -> Option<Vec<u8>> {
    let (fixed, options) = message.split_at_checked(FIXED)?;
    // A request, Ethernet, addresses of 6 bytes.
    if fixed[..3] != [1, 1, 6] || fixed[28..34] != GUEST_MAC || fixed[FIXED - 4..] != COOKIE {
        return None;
    }
    let kind = *value(options, option::KIND)?.first()?;
    let requested = value(options, option::ADDRESS).and_then(|value| value.first_chunk::<4>()).copied();
    let current = [fixed[12], fixed[13], fixed[14], fixed[15]];
    let kind = match kind {
        DISCOVER => OFFER,
        INFORM => ACK,
        REQUEST if requested.is_some_and(|wanted| wanted != GUEST_V4.octets()) => NAK,
        REQUEST if requested.is_none() && current != GUEST_V4.octets() => NAK,
        REQUEST => ACK,
        _ => return None,
    };
    let body = body(fixed, kind);
    let to = IpAddr::from(Ipv4Addr::BROADCAST);
    Some(packet::udp((GATEWAY_V4, SERVER_PORT).into(), (to, CLIENT_PORT).into(), &body))
}

fn body(request: &[u8], kind: u8) -> Vec<u8> {
    let mut body = vec![0; FIXED];
    body[..4].copy_from_slice(&[2, 1, 6, 0]);
    // The exchange's number, and the flag that asks for a broadcast.
    body[4..8].copy_from_slice(&request[4..8]);
    body[10..12].copy_from_slice(&request[10..12]);
    body[28..44].copy_from_slice(&request[28..44]);
    body[FIXED - 4..].copy_from_slice(&COOKIE);
    body.extend([option::KIND, 1, kind]);
    body.extend([option::SERVER, 4]);
    body.extend(GATEWAY_V4.octets());
    if kind != NAK {
        body[16..20].copy_from_slice(&GUEST_V4.octets());
        body[20..24].copy_from_slice(&GATEWAY_V4.octets());
        let mask = u32::MAX << (32 - PREFIX_V4);
        let four = [(option::MASK, mask.to_be_bytes()), (option::LEASE, LEASE.to_be_bytes())];
        let addresses = [(option::ROUTER, GATEWAY_V4.octets()), (option::DNS, DNS_V4.octets())];
        for (code, value) in four.into_iter().chain(addresses) {
            body.extend([code, 4]);
            body.extend(value);
        }
        body.extend([option::MTU, 2]);
        body.extend((MTU as u16).to_be_bytes());
    }
    body.push(255);
    // RFC 1542: a message of BOOTP has 300 bytes at least.
    body.resize(body.len().max(300), 0);
    body
}

fn value(mut options: &[u8], wanted: u8) -> Option<&[u8]> {
    while let [code, rest @ ..] = options {
        match code {
            0 => options = rest,
            255 => return None,
            code => {
                let (&length, rest) = rest.split_first()?;
                let (value, rest) = rest.split_at_checked(length.into())?;
                if *code == wanted {
                    return Some(value);
                }
                options = rest;
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::subnet::ETHERNET_HEADER;

    fn request(options: &[u8]) -> Vec<u8> {
        let mut message = vec![0; FIXED];
        message[..4].copy_from_slice(&[1, 1, 6, 0]);
        message[4..8].copy_from_slice(&[1, 2, 3, 4]);
        message[28..34].copy_from_slice(&GUEST_MAC);
        message[FIXED - 4..].copy_from_slice(&COOKIE);
        message.extend(options);
        message
    }

    fn kind_of_reply(options: &[u8]) -> Option<u8> {
        let frame = reply(&request(options))?;
        let body = &frame[ETHERNET_HEADER + 28..];
        assert_eq!(body[4..8], [1, 2, 3, 4]);
        value(&body[FIXED..], option::KIND).map(|value| value[0])
    }

    proptest! {
        #[test]
        fn any_options_are_read(options in proptest::collection::vec(any::<u8>(), 0..80), cut in 0usize..330) {
            let mut message = request(&options);
            message.truncate(cut);
            let _ = reply(&message);
        }
    }

    #[test]
    fn the_address_is_fixed() {
        assert_eq!(kind_of_reply(&[53, 1, DISCOVER, 255]), Some(OFFER));
        assert_eq!(kind_of_reply(&[53, 1, REQUEST, 50, 4, 10, 0, 2, 15, 255]), Some(ACK));
        assert_eq!(kind_of_reply(&[53, 1, REQUEST, 50, 4, 10, 0, 2, 16, 255]), Some(NAK));
        assert_eq!(kind_of_reply(&[53, 1, 7, 255]), None);
        assert_eq!(kind_of_reply(&[53, 200, DISCOVER]), None);
    }
}
