//! A domain name in the one form in which names are compared.
//!
//! Invariant: 1 to 253 bytes of lower-case ASCII; labels of 1 to 63 letters, digits, `-` and `_` that neither start nor end
//! with `-`, separated by single dots; the last label is not a number.

use std::fmt;
use std::str::FromStr;

use idna::uts46::{AsciiDenyList, DnsLength, Hyphens, Uts46};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Code, Error};
use crate::sanitize::head;

/// The longest name, in bytes.
const NAME_BYTES_MAX: usize = 253;
/// The longest label, in bytes.
const LABEL_BYTES_MAX: usize = 63;
/// The longest text that is converted, in bytes: a name in Unicode takes more than its ASCII form.
const TEXT_BYTES_MAX: usize = 1024;

/// A domain name: ASCII (international names as Punycode), lower case, without a trailing dot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DomainName(String);

impl DomainName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this name is a subdomain of another one, at any depth. A name is not its own subdomain.
    #[must_use]
    pub fn is_subdomain_of(&self, other: &Self) -> bool {
        self.0.strip_suffix(&other.0).is_some_and(|rest| rest.ends_with('.'))
    }

    /// The number of labels.
    #[must_use]
    pub fn label_count(&self) -> usize {
        self.0.split('.').count()
    }
}

/// The name, or the end of a sentence about what is wrong.
fn canonical(text: &str) -> Result<String, &'static str> {
    if text.len() > TEXT_BYTES_MAX {
        return Err("it is longer than 253 bytes");
    }
    let name = Uts46::new()
        .to_ascii(text.as_bytes(), AsciiDenyList::EMPTY, Hyphens::Allow, DnsLength::Ignore)
        .map_err(|_| "it is not a valid international name")?;
    let name = name.strip_suffix('.').unwrap_or(&name);
    if name.is_empty() {
        return Err("it is empty");
    }
    if name.len() > NAME_BYTES_MAX {
        return Err("it is longer than 253 bytes");
    }
    for label in name.split('.') {
        if label.is_empty() {
            return Err("a label is empty");
        }
        if label.len() > LABEL_BYTES_MAX {
            return Err("a label is longer than 63 bytes");
        }
        let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
        if !label.bytes().all(is_plain) {
            return Err("a label has other characters than letters, digits, '-' and '_'");
        }
        if label.starts_with('-') || label.ends_with('-') {
            return Err("a label starts or ends with '-'");
        }
    }
    if name.rsplit('.').next().is_some_and(is_number) {
        return Err("it ends in a number, as only addresses do");
    }
    Ok(name.to_owned())
}

/// Whether a label is a number where an address may be written: decimal, or hexadecimal as in `0x7f`.
fn is_number(label: &str) -> bool {
    let hexadecimal = label.strip_prefix("0x").is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_hexdigit()));
    hexadecimal || label.bytes().all(|b| b.is_ascii_digit())
}

impl FromStr for DomainName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        canonical(text).map(Self).map_err(|why| {
            let shown: String = head(text, 80).chars().flat_map(char::escape_debug).collect();
            Error::new(Code::SpecInvalid, format!("'{shown}' is not a domain name: {why}"))
                .hint("for example: example.com")
        })
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for DomainName {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for DomainName {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}
