//! What a connection that is allowed by a name has to show before its bytes are passed on: the name. Addresses are shared by many
//! names, so the address alone says little.
//!
//! ```text
//!  first byte 0x16 -> TLS:  the server name is allowed     -> everything passes
//!  else, port 80   -> HTTP: the host of each request is    -> that request passes
//!  else, port 443  -> refused
//!  else            -> everything passes: the protocol has no name, or the server speaks first
//! ```
//!
//! Invariant: no byte of the guest's reaches the server before the name it is for was checked.

use nido_api::egress::DenialReason;

use crate::peek::{ClientHello, Peek, RequestStream, Step, client_hello};

const HTTP_PORT: u16 = 80;
const HTTPS_PORT: u16 = 443;
/// The first byte of a record of TLS that holds a handshake.
const HANDSHAKE: u8 = 0x16;

/// The check of one connection.
#[derive(Debug)]
pub enum Gate {
    /// Nothing has been sent to this port.
    Unknown(u16),
    /// A handshake of TLS has begun.
    Tls,
    /// Requests of HTTP.
    Http(RequestStream),
    /// Everything passes; a handshake of TLS is looked at first, for the name that it has.
    Watch,
    /// Everything passes.
    Open,
}

/// What is done with the bytes that wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// So many of them pass.
    Pass(usize),
    /// All of them pass: they begin a connection of TLS to this name.
    Named(String),
    /// The check needs more of them.
    NeedMore,
    /// The connection is refused; the name that it was for.
    Refused(DenialReason, Option<String>),
}

impl Gate {
    /// Whether nothing is checked any more.
    pub const fn is_open(&self) -> bool {
        matches!(self, Self::Open)
    }

    /// Decides about the bytes that have not passed yet.
    pub fn admit(&mut self, pending: &[u8], is_allowed: impl Fn(&str) -> bool) -> Admission {
        let Some(first) = pending.first() else { return Admission::NeedMore };
        if let Self::Unknown(port) = self {
            *self = match *port {
                _ if *first == HANDSHAKE => Self::Tls,
                HTTP_PORT => Self::Http(RequestStream::default()),
                HTTPS_PORT => return Admission::Refused(DenialReason::SniMissing, None),
                _ => Self::Open,
            };
        }
        match self {
            Self::Unknown(_) | Self::Open => Admission::Pass(pending.len()),
            Self::Watch if *first == HANDSHAKE && matches!(client_hello(pending), Peek::NeedMore) => {
                Admission::NeedMore
            }
            Self::Watch => {
                *self = Self::Open;
                match (*first == HANDSHAKE).then(|| client_hello(pending)) {
                    Some(Peek::Done(ClientHello { server_name: Some(name), .. })) => Admission::Named(name),
                    _ => Admission::Pass(pending.len()),
                }
            }
            Self::Tls => match client_hello(pending) {
                Peek::NeedMore => Admission::NeedMore,
                Peek::Invalid(_) => Admission::Refused(DenialReason::SniMismatch, None),
                Peek::Done(hello) => match hello.server_name {
                    None => Admission::Refused(DenialReason::SniMissing, None),
                    Some(name) if is_allowed(&name) => {
                        *self = Self::Open;
                        Admission::Named(name)
                    }
                    Some(name) => Admission::Refused(DenialReason::SniMismatch, Some(name)),
                },
            },
            Self::Http(requests) => match requests.advance(pending) {
                Step::NeedMore => Admission::NeedMore,
                Step::Invalid(_) => Admission::Refused(DenialReason::HostMismatch, None),
                Step::Pass(count) => Admission::Pass(count),
                Step::Head(head) if head.address.is_none() && is_allowed(&head.host) => Admission::Pass(head.length),
                Step::Head(head) => Admission::Refused(DenialReason::HostMismatch, Some(head.host)),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_allowed(name: &str) -> bool {
        name == "example.com"
    }

    #[test]
    fn every_request_of_a_connection_is_checked() {
        let mut gate = Gate::Unknown(80);
        let first = b"POST / HTTP/1.1\r\nHost: example.com\r\nContent-Length: 3\r\n\r\n";
        assert_eq!(gate.admit(&first[..20], is_allowed), Admission::NeedMore);
        assert_eq!(gate.admit(first, is_allowed), Admission::Pass(first.len()));
        assert_eq!(gate.admit(b"abcGET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", is_allowed), Admission::Pass(3));
        let refused = gate.admit(b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", is_allowed);
        assert_eq!(refused, Admission::Refused(DenialReason::HostMismatch, Some("evil.example".into())));
    }

    #[test]
    fn an_address_as_host_and_other_protocols_are_refused() {
        let request = b"GET / HTTP/1.1\r\nHost: 1.2.3.4\r\n\r\n";
        let refused = Gate::Unknown(80).admit(request, |_| true);
        assert_eq!(refused, Admission::Refused(DenialReason::HostMismatch, Some("1.2.3.4".into())));
        assert!(matches!(Gate::Unknown(80).admit(b"SSH-2.0-x\r\n\r\n", |_| true), Admission::Refused(..)));
        let refused = Gate::Unknown(443).admit(b"SSH-2.0-x\r\n", |_| true);
        assert_eq!(refused, Admission::Refused(DenialReason::SniMissing, None));
    }

    #[test]
    fn what_is_watched_passes_also_without_a_name() {
        for bytes in [&b"SSH-2.0-x\r\n"[..], &[0x16, 3, 1, 0, 1, 9], &[0x16, 9]] {
            let mut gate = Gate::Watch;
            assert_eq!(gate.admit(bytes, |_| false), Admission::Pass(bytes.len()));
            assert!(gate.is_open());
        }
        assert_eq!(Gate::Watch.admit(&[0x16, 3, 1], |_| false), Admission::NeedMore);
    }

    #[test]
    fn other_ports_pass_unless_they_begin_with_a_handshake() {
        let mut gate = Gate::Unknown(22);
        assert_eq!(gate.admit(b"", is_allowed), Admission::NeedMore);
        assert_eq!(gate.admit(b"SSH-2.0-x\r\n", is_allowed), Admission::Pass(11));
        assert!(gate.is_open());
        let mut gate = Gate::Unknown(8443);
        assert_eq!(gate.admit(&[0x16, 3, 1], is_allowed), Admission::NeedMore);
        assert!(matches!(gate.admit(&[0x16, 3, 1, 0, 1, 9], is_allowed), Admission::Refused(..)));
    }
}
