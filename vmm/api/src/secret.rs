//! Credentials that the engine puts into requests of a guest, which never has them itself.
//!
//! ```text
//!  USE = NAME "@" HOST [":" HEADER]        HEADER: authorization if absent
//! ```
//!
//! Invariant: the value of a secret is in no `Debug` output, and in no type that is serialized.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::egress::DomainName;
use crate::error::{Code, Error};
use crate::name::SecretName;

/// What the placeholder of every secret begins with.
const PLACEHOLDER_PREFIX: &str = "nido-secret-";
/// The header if none is named.
const DEFAULT_HEADER: &str = "authorization";
/// How many bytes a secret has at most.
pub const SECRET_BYTES_MAX: usize = 64 << 10;
/// How many secrets a VM uses at most.
pub const SECRETS_MAX: usize = 64;
/// How long the name of a header is at most.
const HEADER_BYTES_MAX: usize = 64;
/// Headers that decide where a request begins, ends or goes.
const FORBIDDEN_HEADERS: [&str; 10] = [
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The value of a secret. It is overwritten when it is dropped.
pub struct SecretValue(Vec<u8>);

impl SecretValue {
    /// The value in these bytes, without one line end at their end.
    ///
    /// # Errors
    /// `spec_invalid`: it is empty, too long, or no value of a header.
    pub fn new(mut bytes: Vec<u8>) -> Result<Self, Error> {
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
            if bytes.last() == Some(&b'\r') {
                bytes.pop();
            }
        }
        let value = Self(bytes);
        let invalid = |why: &str| Error::new(Code::SpecInvalid, format!("the secret's value {why}"));
        if value.0.is_empty() {
            return Err(invalid("is empty"));
        }
        if value.0.len() > SECRET_BYTES_MAX {
            return Err(invalid("is longer than 64 KiB"));
        }
        if value.0.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t') {
            return Err(invalid("has a line end or control character").hint("headers have one line"));
        }
        Ok(value)
    }

    /// Its bytes.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for SecretValue {
    fn drop(&mut self) {
        self.0.fill(0);
        std::hint::black_box(&self.0);
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretValue(redacted)")
    }
}

/// Where a VM's requests get a secret.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SecretUse {
    /// The secret.
    pub name: SecretName,
    /// The only host that gets it.
    pub host: DomainName,
    /// The only header in which it is put, in lower case.
    pub header: String,
}

impl SecretUse {
    /// What the guest sends in place of the value.
    #[must_use]
    pub fn placeholder(&self) -> String {
        Self::placeholder_of(&self.name)
    }

    /// The placeholder of the secret of this name.
    #[must_use]
    pub fn placeholder_of(name: &SecretName) -> String {
        format!("{PLACEHOLDER_PREFIX}{name}")
    }

    /// A header's value with the secret in place of each placeholder; `None` if it has no placeholder.
    #[must_use]
    pub fn fill(&self, header: &[u8], secret: &SecretValue) -> Option<Vec<u8>> {
        let placeholder = self.placeholder();
        let mut filled = Vec::new();
        let (mut rest, mut found) = (header, false);
        while let Some(at) = find(rest, placeholder.as_bytes()) {
            let end = at + placeholder.len();
            // A longer name is another secret's.
            let is_whole = !rest.get(end).is_some_and(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(byte));
            filled.extend(&rest[..at]);
            filled.extend(if is_whole { secret.expose() } else { placeholder.as_bytes() });
            found |= is_whole;
            rest = &rest[end..];
        }
        filled.extend(rest);
        found.then_some(filled)
    }

    /// Whether a header's value has its placeholder.
    #[must_use]
    pub fn is_in(&self, header: &[u8]) -> bool {
        self.fill(header, &SecretValue(Vec::new())).is_some()
    }
}

fn find(text: &[u8], word: &[u8]) -> Option<usize> {
    text.windows(word.len()).position(|window| window == word)
}

impl FromStr for SecretUse {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid = |why: String| {
            Error::new(Code::SpecInvalid, format!("secrets: {why}"))
                .hint("NAME@HOST[:HEADER], for example github@api.github.com or key@api.example.com:x-api-key")
        };
        let (name, rest) = text.split_once('@').ok_or_else(|| invalid("'@' and the host are missing".into()))?;
        let (host, header) = rest.split_once(':').unwrap_or((rest, DEFAULT_HEADER));
        let name: SecretName = name.parse()?;
        let host: DomainName = host.parse().map_err(|_| invalid("the host is not a domain name".into()))?;
        let header = header.to_ascii_lowercase();
        let is_token = !header.is_empty()
            && header.len() <= HEADER_BYTES_MAX
            && header.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
        if !is_token || FORBIDDEN_HEADERS.contains(&header.as_str()) {
            return Err(invalid(format!("'{}' is no header for a secret", header.escape_debug())));
        }
        Ok(Self { name, host, header })
    }
}

impl fmt::Display for SecretUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}:{}", self.name, self.host, self.header)
    }
}

impl Serialize for SecretUse {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SecretUse {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl utoipa::PartialSchema for SecretUse {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        let text =
            utoipa::openapi::ObjectBuilder::new().schema_type(utoipa::openapi::schema::Type::String).description(Some(
                "Where requests get a secret: `NAME@HOST[:HEADER]`; the header is `authorization` if absent.",
            ));
        text.into()
    }
}

impl utoipa::ToSchema for SecretUse {}

/// A stored secret, without its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SecretInfo {
    /// Its name.
    pub name: SecretName,
    /// When its value was stored.
    pub updated_at: Timestamp,
    /// Whether a command that prints the value is stored with it.
    pub refreshable: bool,
}

/// All secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SecretList {
    /// In order of name.
    pub secrets: Vec<SecretInfo>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> SecretValue {
        SecretValue::new(text.into()).unwrap()
    }

    #[test]
    fn a_use_names_secret_host_and_header() {
        let used: SecretUse = "github@API.github.com".parse().unwrap();
        assert_eq!(used.to_string(), "github@api.github.com:authorization");
        let used: SecretUse = "key@example.com:X-Api-Key".parse().unwrap();
        assert_eq!((used.header.as_str(), used.placeholder().as_str()), ("x-api-key", "nido-secret-key"));
        for bad in
            ["key", "key@", "@example.com", "key@1.2.3.4", "key@example.com:", "key@example.com:host", "k@e.com:a b"]
        {
            assert!(bad.parse::<SecretUse>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_whole_placeholders_are_filled() {
        let used: SecretUse = "key@example.com".parse().unwrap();
        let fill =
            |text: &str| used.fill(text.as_bytes(), &value("v")).map(|filled| String::from_utf8(filled).unwrap());
        assert_eq!(fill("Bearer nido-secret-key").as_deref(), Some("Bearer v"));
        assert_eq!(fill("nido-secret-key-2 nido-secret-key").as_deref(), Some("nido-secret-key-2 v"));
        assert_eq!(fill("Bearer nido-secret-key-2"), None);
        assert_eq!(fill(""), None);
    }

    #[test]
    fn values_are_one_line_and_not_shown() {
        assert_eq!(value("v\r\n").expose(), b"v");
        for bad in ["", "\n", "a\nb", "a\r\nX: y", "a\0", &"x".repeat(SECRET_BYTES_MAX + 1)] {
            assert!(SecretValue::new(bad.into()).is_err());
        }
        assert!(!format!("{:?}", value("hidden")).contains("hidden"));
    }
}
