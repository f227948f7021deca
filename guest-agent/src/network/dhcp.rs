//! A DHCP client, as small as a guest of a user network needs: discover, request, and the same again when half the
//! lease is over.
//!
//! Invariant: a reply counts only if it is to this card and this exchange; whatever else it holds is read within its
//! bounds.

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use super::Settings;
use super::link::NetworkCard;

const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Length of a message before its options: the fixed part and the cookie.
const FIXED: usize = 240;
/// How long one reply is waited for before asking again.
const REPLY_TIMEOUT: Duration = Duration::from_secs(1);
/// How many requests are sent.
const ATTEMPTS: u32 = 10;
/// Shortest time between two exchanges, whatever the server requests.
const MIN_RENEWAL: Duration = Duration::from_secs(60);

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;

mod option {
    pub const MASK: u8 = 1;
    pub const ROUTER: u8 = 3;
    pub const DNS: u8 = 6;
    pub const MTU: u8 = 26;
    pub const ADDRESS: u8 = 50;
    pub const LEASE: u8 = 51;
    pub const KIND: u8 = 53;
    pub const SERVER: u8 = 54;
    pub const REQUESTED_PARAMETERS: u8 = 55;
}

/// A server's reply.
#[derive(Debug, PartialEq, Eq)]
struct DhcpReply {
    kind: u8,
    server: Ipv4Addr,
    lease: Duration,
    settings: Settings,
}

/// Gets a lease, applies it, and keeps it up.
///
/// # Errors
/// No server replies, or the settings cannot be applied. Later exchanges that fail are tried again.
pub fn keep_lease(card: &NetworkCard, apply: impl Fn(&Settings) -> io::Result<()>) -> io::Result<()> {
    let mut lease = exchange(card)?;
    loop {
        apply(&lease.settings)?;
        std::thread::sleep((lease.lease / 2).max(MIN_RENEWAL));
        match exchange(card) {
            Ok(renewed) => lease = renewed,
            Err(error) => eprintln!("nido-guest-agent: the network lease was not renewed: {error}"),
        }
    }
}

fn exchange(card: &NetworkCard) -> io::Result<DhcpReply> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 68))?;
    socket.set_broadcast(true)?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::BindToDevice, &card.name.clone().into())?;
    let mut random = [0; 4];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let offer = request(&socket, &message(card, random, DISCOVER, None), card, random, OFFER)?;
    let wanted = Some((offer.settings.address, offer.server));
    request(&socket, &message(card, random, REQUEST, wanted), card, random, ACK)
}

/// Sends a message until a reply of the wanted kind comes.
fn request(
    socket: &UdpSocket,
    message: &[u8],
    card: &NetworkCard,
    exchange: [u8; 4],
    wanted: u8,
) -> io::Result<DhcpReply> {
    let mut answer = [0; 1500];
    for _ in 0..ATTEMPTS {
        socket.send_to(message, (Ipv4Addr::BROADCAST, 67))?;
        let deadline = Instant::now() + REPLY_TIMEOUT;
        while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            socket.set_read_timeout(Some(left))?;
            let length = match socket.recv(&mut answer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if let Some(answer) = parse(&answer[..length], card.mac, exchange).filter(|answer| answer.kind == wanted) {
                return Ok(answer);
            }
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "no DHCP server replied"))
}

fn message(card: &NetworkCard, exchange: [u8; 4], kind: u8, wanted: Option<(Ipv4Addr, Ipv4Addr)>) -> Vec<u8> {
    let mut message = vec![0; FIXED];
    // A request, Ethernet, addresses of 6 bytes; the reply shall be broadcast, as the card has no address yet.
    message[..4].copy_from_slice(&[1, 1, 6, 0]);
    message[4..8].copy_from_slice(&exchange);
    message[10] = 0x80;
    message[28..34].copy_from_slice(&card.mac);
    message[FIXED - 4..].copy_from_slice(&COOKIE);
    message.extend([option::KIND, 1, kind]);
    if let Some((address, server)) = wanted {
        message.extend([option::ADDRESS, 4]);
        message.extend(address.octets());
        message.extend([option::SERVER, 4]);
        message.extend(server.octets());
    }
    message.extend([option::REQUESTED_PARAMETERS, 4, option::MASK, option::ROUTER, option::DNS, option::MTU, 255]);
    message
}

/// Reads a reply; `None` if it is not one, or not for us.
fn parse(bytes: &[u8], mac: [u8; 6], exchange: [u8; 4]) -> Option<DhcpReply> {
    let is_ours = bytes.len() > FIXED
        && bytes[0] == 2
        && bytes[4..8] == exchange
        && bytes[28..34] == mac
        && bytes[FIXED - 4..FIXED] == COOKIE;
    if !is_ours {
        return None;
    }
    let four = |value: &[u8]| value.first_chunk::<4>().copied();
    let address = Ipv4Addr::from(four(&bytes[16..20])?);
    let mut answer = DhcpReply {
        kind: 0,
        server: Ipv4Addr::UNSPECIFIED,
        lease: Duration::from_secs(3600),
        settings: Settings { address, prefix: 24, gateway: None, dns: Vec::new(), mtu: None },
    };
    let mut rest = &bytes[FIXED..];
    while let [code, tail @ ..] = rest {
        match code {
            0 => rest = tail,
            255 => break,
            code => {
                let (&length, tail) = tail.split_first()?;
                let (value, tail) = tail.split_at_checked(length.into())?;
                rest = tail;
                match *code {
                    option::KIND => answer.kind = *value.first()?,
                    option::SERVER => answer.server = four(value)?.into(),
                    option::LEASE => answer.lease = Duration::from_secs(u32::from_be_bytes(four(value)?).into()),
                    option::MASK => answer.settings.prefix = u32::from_be_bytes(four(value)?).leading_ones() as u8,
                    option::ROUTER => answer.settings.gateway = Some(four(value)?.into()),
                    option::DNS => {
                        answer.settings.dns = value.chunks_exact(4).filter_map(four).map(Ipv4Addr::from).collect();
                    }
                    option::MTU => {
                        answer.settings.mtu = value.first_chunk().map(|value| u16::from_be_bytes(*value).into());
                    }
                    _ => {}
                }
            }
        }
    }
    Some(answer)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn card() -> NetworkCard {
        NetworkCard { name: "eth0".into(), index: 2, mac: MAC }
    }

    fn offer() -> Vec<u8> {
        let mut bytes = message(&card(), [1, 2, 3, 4], OFFER, Some((Ipv4Addr::LOCALHOST, Ipv4Addr::new(10, 0, 2, 2))));
        bytes[0] = 2;
        bytes[16..20].copy_from_slice(&[10, 0, 2, 15]);
        bytes.pop();
        bytes
            .extend([1, 4, 255, 255, 255, 0, 3, 4, 10, 0, 2, 2, 6, 8, 10, 0, 2, 3, 9, 9, 9, 9, 51, 4, 0, 0, 1, 0, 255]);
        bytes
    }

    #[test]
    fn an_offer_is_understood() {
        let answer = parse(&offer(), MAC, [1, 2, 3, 4]).unwrap();
        assert_eq!((answer.kind, answer.server), (OFFER, Ipv4Addr::new(10, 0, 2, 2)));
        assert_eq!(answer.lease, Duration::from_secs(256));
        let dns = vec![Ipv4Addr::new(10, 0, 2, 3), Ipv4Addr::new(9, 9, 9, 9)];
        let gateway = Some(Ipv4Addr::new(10, 0, 2, 2));
        assert_eq!(
            answer.settings,
            Settings { address: Ipv4Addr::new(10, 0, 2, 15), prefix: 24, gateway, dns, mtu: None }
        );
    }

    #[test]
    fn answers_to_others_do_not_count() {
        assert_eq!(parse(&offer(), MAC, [1, 2, 3, 5]), None);
        assert_eq!(parse(&offer(), [0; 6], [1, 2, 3, 4]), None);
    }

    proptest! {
        #[test]
        fn damaged_answers_never_panic(at in 0usize..300, byte in any::<u8>(), cut in 0usize..300) {
            let mut bytes = offer();
            let length = bytes.len();
            bytes[at % length] = byte;
            bytes.truncate(cut.max(1));
            let _ = parse(&bytes, MAC, [1, 2, 3, 4]);
        }
    }
}
