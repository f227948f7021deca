//! The ClientHello of TLS 1.0 to 1.3 (RFC 8446): fragments of one handshake message in records.
//!
//! ```text
//!   record: 22, version, length   ┌ handshake: 1, length (3 bytes), version, random, session id, cipher suites, compression,
//!   record: 22, version, length   │            extensions: (type, length, data)*
//!   …                             └ the last record ends with the message
//! ```

use std::collections::HashSet;

use super::{Parsed, Peek};
use crate::names::canonical_name;

/// The longest ClientHello, in bytes of the connection: with the headers of its records.
pub const HELLO_MAX: usize = 16 << 10;
/// The longest record, in bytes.
const RECORD_MAX: usize = 1 << 14;
/// The size of a record's header, in bytes.
const RECORD_HEADER: usize = 5;
/// The size of a handshake message's header, in bytes.
const HANDSHAKE_HEADER: usize = 4;
/// The most protocols in the ALPN extension.
const PROTOCOLS_MAX: usize = 64;

const RECORD_HANDSHAKE: u8 = 22;
const HANDSHAKE_CLIENT_HELLO: u8 = 1;
const EXTENSION_SERVER_NAME: u16 = 0;
const EXTENSION_ALPN: u16 = 16;
const EXTENSION_ECH: u16 = 0xfe0d;

const TOO_LONG: &str = "the ClientHello is too long";
const TRUNCATED: &str = "a length in the ClientHello is wrong";

/// What a TLS client sends first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientHello {
    /// The name of the server (SNI) in canonical form, if there is one.
    pub server_name: Option<String>,
    /// The protocols that the client offers (ALPN), in its order.
    pub alpn: Vec<Vec<u8>>,
    /// Whether there is an outer ECH extension. Browsers send a meaningless one to servers without ECH (GREASE), so it is no
    /// sign that `server_name` is not the real one.
    pub ech: bool,
}

/// Parses the ClientHello at the beginning of a connection.
pub fn client_hello(prefix: &[u8]) -> Peek<ClientHello> {
    let view = &prefix[..prefix.len().min(HELLO_MAX)];
    let parsed = handshake(view).and_then(|message| match message {
        Some(message) => parse(&message).map(Some),
        None if prefix.len() >= HELLO_MAX => Err(TOO_LONG),
        None => Ok(None),
    });
    parsed.into()
}

/// The body of the first handshake message. Its records are visited in every call, and copied when all of them are there.
fn handshake(prefix: &[u8]) -> Parsed<Vec<u8>> {
    let (mut rest, mut start) = (prefix, Vec::with_capacity(HANDSHAKE_HEADER));
    let (mut received, mut declared) = (0, 0);
    loop {
        let Some((fragment, length, after)) = record(rest)? else { return Ok(None) };
        declared += length;
        received += fragment.len();
        start.extend_from_slice(&fragment[..fragment.len().min(HANDSHAKE_HEADER - start.len())]);
        if start.first().is_some_and(|kind| *kind != HANDSHAKE_CLIENT_HELLO) {
            return Err("the first TLS handshake message is not a ClientHello");
        }
        if let [_, high, middle, low] = start[..] {
            let end = HANDSHAKE_HEADER + u32::from_be_bytes([0, high, middle, low]) as usize;
            if end > HELLO_MAX {
                return Err(TOO_LONG);
            }
            if declared > end {
                return Err("the record of the ClientHello has more than the ClientHello");
            }
            if received == end {
                return Ok(Some(joined(prefix, end)));
            }
        }
        rest = after;
    }
}

/// The body of a message of `end` bytes, whose records are complete.
fn joined(prefix: &[u8], end: usize) -> Vec<u8> {
    let (mut message, mut rest) = (Vec::with_capacity(end), prefix);
    while let (true, Ok(Some((fragment, _, after)))) = (message.len() < end, record(rest)) {
        message.extend_from_slice(fragment);
        rest = after;
    }
    message.split_off(HANDSHAKE_HEADER.min(message.len()))
}

/// The first record's fragment as far as it has been received, its whole length, and what follows.
fn record(bytes: &[u8]) -> Parsed<(&[u8], usize, &[u8])> {
    if bytes.first().is_some_and(|kind| *kind != RECORD_HANDSHAKE) {
        return Err("not a TLS handshake record");
    }
    if bytes.get(1).is_some_and(|major| *major != 3) || bytes.get(2).is_some_and(|minor| *minor > 4) {
        return Err("not a version of TLS");
    }
    let Some(([_, _, _, high, low], rest)) = bytes.split_first_chunk::<RECORD_HEADER>() else { return Ok(None) };
    let length = usize::from(u16::from_be_bytes([*high, *low]));
    if length == 0 || length > RECORD_MAX {
        return Err("the length of a TLS record is wrong");
    }
    let (fragment, rest) = rest.split_at(length.min(rest.len()));
    Ok(Some((fragment, length, rest)))
}

/// Bytes that are taken from the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], &'static str> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(TRUNCATED)?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, &'static str> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn word(&mut self) -> Result<u16, &'static str> {
        self.take(2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// A vector with a length of one byte.
    fn short_vector(&mut self) -> Result<&'a [u8], &'static str> {
        let length = self.byte()?;
        self.take(usize::from(length))
    }

    /// A vector with a length of two bytes.
    fn vector(&mut self) -> Result<Reader<'a>, &'static str> {
        let length = self.word()?;
        self.take(usize::from(length)).map(Reader)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn parse(body: &[u8]) -> Result<ClientHello, &'static str> {
    let mut body = Reader(body);
    let version = body.word()?;
    body.take(32)?;
    let session = body.short_vector()?;
    let ciphers = body.vector()?.0;
    let compression = body.short_vector()?;
    if version >> 8 != 3 || session.len() > 32 || ciphers.is_empty() || ciphers.len() % 2 != 0 || compression.is_empty()
    {
        return Err("the ClientHello is malformed");
    }
    let mut hello = ClientHello::default();
    if body.is_empty() {
        return Ok(hello);
    }
    let mut extensions = body.vector()?;
    if !body.is_empty() {
        return Err(TRUNCATED);
    }
    let mut kinds = HashSet::new();
    while !extensions.is_empty() {
        let (kind, data) = (extensions.word()?, extensions.vector()?);
        if !kinds.insert(kind) {
            return Err("the ClientHello has an extension twice");
        }
        match kind {
            EXTENSION_SERVER_NAME => hello.server_name = Some(server_name(data)?),
            EXTENSION_ALPN => hello.alpn = protocols(data)?,
            EXTENSION_ECH if data.0.first() == Some(&0) => hello.ech = true,
            EXTENSION_ECH => return Err("the ClientHello has an inner ECH extension"),
            _ => {}
        }
    }
    Ok(hello)
}

fn server_name(mut data: Reader<'_>) -> Result<String, &'static str> {
    let mut list = data.vector()?;
    if list.byte()? != 0 {
        return Err("the server name is of an unsupported type");
    }
    let name = list.vector()?.0;
    if !list.is_empty() {
        return Err("the ClientHello has more than one server name");
    }
    if !data.is_empty() {
        return Err(TRUNCATED);
    }
    std::str::from_utf8(name).ok().and_then(canonical_name).ok_or("the server name is not a DNS name")
}

fn protocols(mut data: Reader<'_>) -> Result<Vec<Vec<u8>>, &'static str> {
    let (mut list, mut protocols) = (data.vector()?, Vec::new());
    while !list.is_empty() {
        let protocol = list.short_vector()?;
        if protocol.is_empty() || protocols.len() >= PROTOCOLS_MAX {
            return Err("the ALPN extension is malformed");
        }
        protocols.push(protocol.to_vec());
    }
    if protocols.is_empty() || !data.is_empty() {
        return Err("the ALPN extension is malformed");
    }
    Ok(protocols)
}
