//! The DNS server that a guest sees: one question in, a response out. The caller frames TCP and resolves names.
//!
//! ```text
//!   message ── Query::parse ──> Query ── the policy and the resolver ──> answer | empty | refuse | failure
//!                  └──────────> Malformed ── response ──> FORMERR, NOTIMP, BADVERS, NXDOMAIN, or no response
//! ```
//!
//! Invariants:
//! - What is resolved is [`Query::name`] in canonical form: the case of its letters, the message's id and its options do not
//!   reach another server.
//! - A response repeats the question byte for byte, fits the limit of the query, and has addresses of the requested family only.
//! - Negative responses have no SOA record, so that clients do not store them and a new rule has an effect at once.

use std::net::IpAddr;

use crate::names::canonical_name;

/// The size of a message's header, in bytes.
const HEADER: usize = 12;
/// The longest name in a message, in bytes.
const WIRE_NAME_MAX: usize = 255;
/// The longest message over UDP for a client without EDNS, in bytes.
pub const UDP_SIZE_MIN: u16 = 512;
/// The longest message over UDP, in bytes: no response is fragmented.
pub const UDP_SIZE_MAX: u16 = 1232;
/// The longest text of an extended error, in bytes.
const ERROR_TEXT_MAX: usize = 160;

const FLAG_RESPONSE: u16 = 1 << 15;
const FLAGS_OPCODE: u16 = 0xf << 11;
const FLAG_TRUNCATED: u16 = 1 << 9;
const FLAG_RECURSION_DESIRED: u16 = 1 << 8;
const FLAG_RECURSION_AVAILABLE: u16 = 1 << 7;

const FORMAT_ERROR: u16 = 1;
const SERVER_FAILURE: u16 = 2;
const NAME_ERROR: u16 = 3;
const NOT_IMPLEMENTED: u16 = 4;
const BAD_VERSION: u16 = 16;

const CLASS_IN: u16 = 1;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const TYPE_OPT: u16 = 41;
/// The EDNS option "extended DNS error", and its code "filtered" (RFC 8914).
const OPTION_ERROR: u16 = 15;
const ERROR_FILTERED: u16 = 17;
/// The size of an OPT record without options, in bytes.
const OPT_SIZE: usize = 11;

/// The type of the records that a query requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// Another type, which has no records here.
    Other(u16),
}

/// A query that is well-formed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// The message's id, which its response repeats.
    pub id: u16,
    /// Whether the client requests recursion, which the response repeats.
    pub recursion_desired: bool,
    /// The name in canonical form; empty for the root.
    pub name: String,
    /// The type of the records.
    pub kind: Kind,
    /// The longest response over UDP, in bytes, within [`UDP_SIZE_MIN`] and [`UDP_SIZE_MAX`]; `None` without EDNS.
    pub edns: Option<u16>,
    /// The question as it was received.
    question: Vec<u8>,
}

/// What the response to a message repeats of it if its question is not usable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repeated {
    id: u16,
    flags: u16,
}

/// Why a message is not a query that can be resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Malformed {
    /// Shorter than a header, or itself a response: there is no response.
    NotAQuery,
    /// Not exactly one question, or it cannot be parsed.
    Format(Repeated),
    /// Another operation than a query, or another class than IN.
    NotImplemented(Repeated),
    /// An unsupported version of EDNS.
    BadVersion(Box<Query>),
    /// The name is not a host's: it has bytes outside `[A-Za-z0-9_-]`, or would be read as an address. Its `name` is in
    /// presentation form (RFC 4343), for reports; it must not be resolved.
    NameNotAllowed(Box<Query>),
}

impl Malformed {
    /// The response to the message, if it gets one.
    pub fn response(&self) -> Option<Vec<u8>> {
        match self {
            Self::NotAQuery => None,
            Self::Format(repeated) => Some(header(repeated.id, repeated.flags, FORMAT_ERROR, 0)),
            Self::NotImplemented(repeated) => Some(header(repeated.id, repeated.flags, NOT_IMPLEMENTED, 0)),
            Self::BadVersion(query) => Some(respond(query, BAD_VERSION, &[])),
            Self::NameNotAllowed(query) => Some(refuse(query, Some("the name has characters that are not allowed"))),
        }
    }
}

impl Query {
    /// Parses a message: a header, exactly one question without compression, and at most an OPT record.
    ///
    /// # Errors
    /// With what the response is made of, if the message is another one.
    pub fn parse(message: &[u8]) -> Result<Self, Malformed> {
        let (head, rest) = message.split_first_chunk::<HEADER>().ok_or(Malformed::NotAQuery)?;
        let word = |index: usize| u16::from_be_bytes([head[2 * index], head[2 * index + 1]]);
        let (id, flags) = (word(0), word(1));
        if flags & FLAG_RESPONSE != 0 {
            return Err(Malformed::NotAQuery);
        }
        let repeated = Repeated { id, flags: flags & (FLAGS_OPCODE | FLAG_RECURSION_DESIRED) };
        if flags & FLAGS_OPCODE != 0 {
            return Err(Malformed::NotImplemented(repeated));
        }
        let counts = [word(2), word(3), word(4), word(5)];
        if !matches!(counts, [1, 0, 0, 0 | 1]) {
            return Err(Malformed::Format(repeated));
        }
        let question = Question::parse(rest).ok_or(Malformed::Format(repeated))?;
        let opt = match (counts[3], question.rest) {
            (0, []) => None,
            (1, record) => Some(Opt::parse(record).ok_or(Malformed::Format(repeated))?),
            _ => return Err(Malformed::Format(repeated)),
        };
        if question.class != CLASS_IN {
            return Err(Malformed::NotImplemented(repeated));
        }
        let query = Self {
            id,
            recursion_desired: flags & FLAG_RECURSION_DESIRED != 0,
            name: question.name,
            kind: question.kind,
            edns: opt.as_ref().map(|opt| opt.size.clamp(UDP_SIZE_MIN, UDP_SIZE_MAX)),
            question: question.bytes.to_vec(),
        };
        if opt.is_some_and(|opt| opt.version != 0) {
            Err(Malformed::BadVersion(Box::new(query)))
        } else if !query.name.is_empty() && canonical_name(&query.name).is_none() {
            Err(Malformed::NameNotAllowed(Box::new(query)))
        } else {
            Ok(query)
        }
    }

    /// The longest response over UDP, in bytes.
    pub fn udp_limit(&self) -> usize {
        usize::from(self.edns.unwrap_or(UDP_SIZE_MIN))
    }
}

/// A question, and what follows it in its message.
struct Question<'a> {
    /// Lower case, in presentation form: another byte than a printable one, a dot or a backslash within a label is escaped, so
    /// that it is a canonical name only if no byte was.
    name: String,
    kind: Kind,
    class: u16,
    bytes: &'a [u8],
    rest: &'a [u8],
}

impl<'a> Question<'a> {
    fn parse(message: &'a [u8]) -> Option<Self> {
        let (mut name, mut rest) = (String::new(), message);
        loop {
            let (length, after) = rest.split_first()?;
            // The two upper bits mark a compression pointer, or are reserved.
            if *length > 63 {
                return None;
            }
            let (label, after) = after.split_at_checked(usize::from(*length))?;
            rest = after;
            if message.len() - rest.len() > WIRE_NAME_MAX {
                return None;
            }
            if label.is_empty() {
                break;
            }
            if !name.is_empty() {
                name.push('.');
            }
            label.iter().for_each(|byte| push_escaped(&mut name, *byte));
        }
        let ([kind_high, kind_low, class_high, class_low], rest) = rest.split_first_chunk::<4>()?;
        let kind = match u16::from_be_bytes([*kind_high, *kind_low]) {
            TYPE_A => Kind::A,
            TYPE_AAAA => Kind::Aaaa,
            other => Kind::Other(other),
        };
        let class = u16::from_be_bytes([*class_high, *class_low]);
        Some(Self { name, kind, class, bytes: &message[..message.len() - rest.len()], rest })
    }
}

fn push_escaped(name: &mut String, byte: u8) {
    match byte {
        b'.' | b'\\' => name.extend(['\\', char::from(byte)]),
        0x21..=0x7e => name.push(char::from(byte.to_ascii_lowercase())),
        _ => name.push_str(&format!("\\{byte:03}")),
    }
}

/// The record with which a client uses EDNS (RFC 6891).
struct Opt {
    size: u16,
    version: u8,
}

impl Opt {
    /// Parses a record that ends with its message. Its options are ignored.
    fn parse(record: &[u8]) -> Option<Self> {
        let (head, options) = record.split_first_chunk::<OPT_SIZE>()?;
        let word = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        let is_opt = head[0] == 0 && word(1) == TYPE_OPT && usize::from(word(9)) == options.len();
        is_opt.then(|| Self { size: word(3), version: head[6] })
    }
}

/// A header with one question or none, and no other records.
fn header(id: u16, flags: u16, code: u16, questions: u16) -> Vec<u8> {
    let flags = flags | FLAG_RESPONSE | FLAG_RECURSION_AVAILABLE | (code & 0xf);
    [id, flags, questions, 0, 0, 0].iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// The header and the question of a response.
fn begin(query: &Query, code: u16) -> Vec<u8> {
    let flags = if query.recursion_desired { FLAG_RECURSION_DESIRED } else { 0 };
    let mut message = header(query.id, flags, code, 1);
    message.extend_from_slice(&query.question);
    message
}

/// Adds the OPT record, if the query has one.
fn end(query: &Query, mut message: Vec<u8>, code: u16, options: &[u8]) -> Vec<u8> {
    let length = u16::try_from(options.len()).unwrap_or(u16::MAX);
    if query.edns.is_some() {
        message[HEADER - 1] = 1;
        message.push(0);
        for word in [TYPE_OPT, UDP_SIZE_MAX, (code >> 4) << 8, 0, length] {
            message.extend_from_slice(&word.to_be_bytes());
        }
        message.extend_from_slice(&options[..usize::from(length)]);
    }
    message
}

/// A response without records.
fn respond(query: &Query, code: u16, options: &[u8]) -> Vec<u8> {
    end(query, begin(query, code), code, options)
}

/// The response with those of the addresses that are of the requested family. If not all of them fit into `limit_bytes` (at least
/// 512; for TCP 65535), it has as many as do and is marked as truncated.
pub fn answer(query: &Query, addresses: &[IpAddr], ttl: u32, limit_bytes: usize) -> Vec<u8> {
    let mut message = begin(query, 0);
    let end_size = if query.edns.is_some() { OPT_SIZE } else { 0 };
    let limit = limit_bytes.min(usize::from(u16::MAX)).saturating_sub(end_size);
    let mut count = 0_u16;
    for address in addresses {
        let (kind, octets) = match (query.kind, address) {
            (Kind::A, IpAddr::V4(address)) => (TYPE_A, address.octets().to_vec()),
            (Kind::Aaaa, IpAddr::V6(address)) => (TYPE_AAAA, address.octets().to_vec()),
            _ => continue,
        };
        if message.len() + 12 + octets.len() > limit {
            message[2] |= FLAG_TRUNCATED.to_be_bytes()[0];
            break;
        }
        // A pointer to the question's name.
        for word in [0xc000 | HEADER as u16, kind, CLASS_IN] {
            message.extend_from_slice(&word.to_be_bytes());
        }
        message.extend_from_slice(&ttl.min(i32::MAX as u32).to_be_bytes());
        message.extend_from_slice(&(octets.len() as u16).to_be_bytes());
        message.extend_from_slice(&octets);
        count += 1;
    }
    message[6..8].copy_from_slice(&count.to_be_bytes());
    end(query, message, 0, &[])
}

/// The response that the name exists and has no records of this type.
pub fn empty(query: &Query) -> Vec<u8> {
    respond(query, 0, &[])
}

/// The response that the name does not exist (NXDOMAIN). With EDNS, it carries the extended error "filtered" and the text, which
/// is truncated if it is longer than 160 bytes.
pub fn refuse(query: &Query, text: Option<&str>) -> Vec<u8> {
    let text = text.unwrap_or_default();
    let text = &text[..text.floor_char_boundary(ERROR_TEXT_MAX)];
    let mut option = Vec::new();
    for word in [OPTION_ERROR, (2 + text.len()) as u16, ERROR_FILTERED] {
        option.extend_from_slice(&word.to_be_bytes());
    }
    option.extend_from_slice(text.as_bytes());
    respond(query, NAME_ERROR, &option)
}

/// The response that the name could not be resolved now (SERVFAIL).
pub fn failure(query: &Query) -> Vec<u8> {
    respond(query, SERVER_FAILURE, &[])
}

#[cfg(test)]
mod tests;
