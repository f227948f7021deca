//! The head of an HTTP/1 request (RFC 9112): its host, and how its body ends.
//!
//! Strict where servers and proxies differ: lines end with CRLF, no line is folded, no field's name is followed by white space,
//! `Host` is given exactly once and equals the authority of an absolute target, and the length of the body is given at most once.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Parsed, Peek};
use crate::names::canonical_name;

/// The longest head, in bytes, with the empty line at its end.
pub const HEAD_MAX: usize = 8 << 10;
/// The longest method, in bytes.
const METHOD_MAX: usize = 32;
/// The port of a URL without one.
const DEFAULT_PORT: u16 = 80;

/// How the body of a request ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// There is no body.
    None,
    /// After so many bytes.
    Length(u64),
    /// With an empty chunk and trailers.
    Chunked,
}

/// The head of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpHead {
    /// The method as it was sent. It is not `CONNECT`.
    pub method: String,
    /// The host that the request is for: a canonical name, or an address without brackets.
    pub host: String,
    /// The host's address, if it is given as one.
    pub address: Option<IpAddr>,
    /// The port in `Host`.
    pub port: Option<u16>,
    /// The length of the head, in bytes.
    pub length: usize,
    /// How the body ends.
    pub body: Body,
    /// Whether the client offers to change to another protocol after this request (`Upgrade`).
    pub upgrade: bool,
}

/// Parses the head of a request at the beginning of `prefix`.
pub fn http_head(prefix: &[u8]) -> Peek<HttpHead> {
    let view = &prefix[..prefix.len().min(HEAD_MAX)];
    match parse(view) {
        Ok(None) if prefix.len() >= HEAD_MAX => Peek::Invalid("the head of the request is too long"),
        result => result.into(),
    }
}

fn parse(bytes: &[u8]) -> Parsed<HttpHead> {
    let Some((line, mut rest)) = next_line(bytes)? else { return Ok(None) };
    let request = RequestLine::parse(line)?;
    let mut fields = Fields::default();
    loop {
        let Some((line, after)) = next_line(rest)? else { return Ok(None) };
        rest = after;
        if line.is_empty() {
            break;
        }
        let (name, value) = field_line(line)?;
        fields.add(name, value)?;
    }
    let host = fields.host.ok_or("the request has no Host")?;
    if request.authority.is_some_and(|authority| !authority.is_same(&host)) {
        return Err("Host is not the host of the request's URL");
    }
    let body = match (fields.is_chunked, fields.length) {
        (true, Some(_)) => return Err("the request has both Content-Length and Transfer-Encoding"),
        (true, None) if request.is_http_1_0 => return Err("an HTTP/1.0 request has a Transfer-Encoding"),
        (true, None) => Body::Chunked,
        (false, Some(length)) => Body::Length(length),
        (false, None) => Body::None,
    };
    Ok(Some(HttpHead {
        method: request.method.to_owned(),
        host: host.name,
        address: host.address,
        port: host.port,
        length: bytes.len() - rest.len(),
        body,
        upgrade: fields.is_upgrade,
    }))
}

/// The first line without its CRLF, and what follows; `None` if the line is incomplete.
pub(super) fn next_line(bytes: &[u8]) -> Parsed<(&[u8], &[u8])> {
    let is_control = |byte: &u8| byte.is_ascii_control() && *byte != b'\t';
    let Some(at) = bytes.iter().position(is_control) else { return Ok(None) };
    match &bytes[at..] {
        [b'\r'] => Ok(None),
        [b'\r', b'\n', rest @ ..] => Ok(Some((&bytes[..at], rest))),
        [b'\r' | b'\n', ..] => Err("a line of the request does not end with CRLF"),
        _ => Err("the request has a control character"),
    }
}

fn is_token(bytes: &[u8]) -> bool {
    let is_allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    !bytes.is_empty() && bytes.iter().all(is_allowed)
}

/// The name and the value of a header or trailer field.
pub(super) fn field_line(line: &[u8]) -> Result<(&[u8], &[u8]), &'static str> {
    let colon = line.iter().position(|byte| *byte == b':').ok_or("a field of the request has no colon")?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    // This includes folded lines and white space before the colon.
    if !is_token(name) {
        return Err("the name of a field of the request is malformed");
    }
    Ok((name, value.trim_ascii()))
}

struct RequestLine<'a> {
    method: &'a str,
    /// The host of an absolute target.
    authority: Option<Authority>,
    is_http_1_0: bool,
}

impl<'a> RequestLine<'a> {
    fn parse(line: &'a [u8]) -> Result<Self, &'static str> {
        const MALFORMED: &str = "not an HTTP/1 request";
        let mut parts = line.split(|byte| *byte == b' ');
        let (Some(method), Some(target), Some(version), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(MALFORMED);
        };
        let is_http_1_0 = match version {
            b"HTTP/1.1" => false,
            b"HTTP/1.0" => true,
            _ => return Err(MALFORMED),
        };
        if !is_token(method) || method.len() > METHOD_MAX || target.contains(&b'\t') {
            return Err(MALFORMED);
        }
        let method = std::str::from_utf8(method).map_err(|_| MALFORMED)?;
        if method.eq_ignore_ascii_case("CONNECT") {
            return Err("CONNECT is not supported");
        }
        let authority = match target {
            [b'/', ..] => None,
            b"*" if method == "OPTIONS" => None,
            _ => Some(url_authority(target).ok_or("the target of the request is neither a path nor an http URL")?),
        };
        Ok(Self { method, authority, is_http_1_0 })
    }
}

fn url_authority(target: &[u8]) -> Option<Authority> {
    let (scheme, rest) = target.split_at_checked("http://".len())?;
    let end = rest.iter().position(|byte| b"/?#".contains(byte)).unwrap_or(rest.len());
    Authority::parse(&rest[..end]).filter(|_| scheme.eq_ignore_ascii_case(b"http://"))
}

/// A host and perhaps a port, as in `Host`.
struct Authority {
    name: String,
    address: Option<IpAddr>,
    port: Option<u16>,
}

impl Authority {
    fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        // The colons of an IPv6 address are within brackets.
        let end = text.find(']').map_or(0, |bracket| bracket + 1);
        let (host, port) = match text[end..].find(':') {
            Some(colon) => (&text[..end + colon], Some(parse_port(&text[end + colon + 1..])?)),
            None => (text, None),
        };
        if let Some(literal) = host.strip_prefix('[') {
            let address: Ipv6Addr = literal.strip_suffix(']')?.parse().ok()?;
            return Some(Self { name: address.to_string(), address: Some(address.into()), port });
        }
        if let Ok(address) = host.parse::<Ipv4Addr>() {
            return Some(Self { name: address.to_string(), address: Some(address.into()), port });
        }
        canonical_name(host).map(|name| Self { name, address: None, port })
    }

    fn is_same(&self, other: &Self) -> bool {
        let port = |authority: &Self| authority.port.unwrap_or(DEFAULT_PORT);
        self.name == other.name && port(self) == port(other)
    }
}

fn parse_port(text: &str) -> Option<u16> {
    let is_number = (1..=5).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| is_number && *port != 0)
}

/// The fields that matter, as far as they have been parsed.
#[derive(Default)]
struct Fields {
    host: Option<Authority>,
    length: Option<u64>,
    is_chunked: bool,
    is_upgrade: bool,
}

impl Fields {
    fn add(&mut self, name: &[u8], value: &[u8]) -> Result<(), &'static str> {
        if name.eq_ignore_ascii_case(b"host") {
            let host = Authority::parse(value).ok_or("Host is malformed")?;
            if self.host.replace(host).is_some() {
                return Err("the request has more than one Host");
            }
        } else if name.eq_ignore_ascii_case(b"content-length") {
            let length = parse_length(value).ok_or("Content-Length is malformed")?;
            if self.length.replace(length).is_some() {
                return Err("the request has more than one Content-Length");
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if self.is_chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err("the request has another Transfer-Encoding than chunked");
            }
            self.is_chunked = true;
        } else if name.eq_ignore_ascii_case(b"upgrade") {
            self.is_upgrade = true;
        }
        Ok(())
    }
}

/// A number of decimal digits only: no sign, no list.
fn parse_length(value: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(value).ok()?;
    let is_number = (1..=19).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| is_number)
}
