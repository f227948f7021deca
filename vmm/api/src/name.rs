//! Names of VMs and templates: parsed once at the border, safe in paths and arguments from then on.
//!
//! Invariant: a name is 1–63 characters of `a-z 0-9 -` and starts and ends with a letter or digit.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};

use crate::error::{Code, Error};

/// The rule, as a regular expression.
const PATTERN: &str = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$";
/// The rule, for error messages.
pub const RULE: &str = "1 to 63 characters of a-z, 0-9 and '-', starting and ending with a letter or digit";

fn valid(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| plain(b) || b == b'-')
        && text.bytes().next().is_some_and(plain)
        && text.bytes().next_back().is_some_and(plain)
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str { &self.0 }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self, Error> {
                if valid(text) {
                    return Ok(Self(text.to_owned()));
                }
                let shown: String = text.chars().take(80).flat_map(char::escape_debug).collect();
                Err(Error::new(Code::NameInvalid, format!(concat!("'{}' is not a ", $what, " name: {}"), shown, RULE))
                    .hint("for example: web-1"))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(&self.0) }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> { s.serialize_str(&self.0) }
        }

        impl utoipa::PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                let rule = ObjectBuilder::new()
                    .schema_type(Type::String)
                    .pattern(Some(PATTERN))
                    .description(Some(concat!("The name of a ", $what, ".")));
                rule.into()
            }
        }

        impl utoipa::ToSchema for $name {}

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

name_type!(
    /// The name of a VM.
    VmName,
    "VM"
);
name_type!(
    /// The name of a template.
    TemplateName,
    "template"
);
name_type!(
    /// The name of a snapshot, unique for its VM.
    SnapshotName,
    "snapshot"
);

name_type!(
    /// The name of a secret.
    SecretName,
    "secret"
);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_rule_holds_at_its_edges() {
        for good in ["a", "0", "web-1", "a--b", &"x".repeat(63)] {
            assert!(good.parse::<VmName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "a b", "a/b", "..", "a\n", "ä", &"x".repeat(64)] {
            let error = bad.parse::<VmName>().unwrap_err();
            assert_eq!(error.code(), Code::NameInvalid, "{bad}");
            assert!(!error.message().contains('\n'));
        }
    }

    proptest! {
        #[test]
        fn valid_names_are_safe_in_a_path(text in ".{0,80}") {
            if let Ok(name) = text.parse::<VmName>() {
                prop_assert!(name.as_str().bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'));
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}
