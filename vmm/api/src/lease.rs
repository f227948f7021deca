//! Leases: what VMs belong to that are made for a session.

use serde::{Deserialize, Serialize};

use crate::error::{Code, Error};

/// The id of a lease: 16 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[0-9a-f]{16}$")]
pub struct LeaseId(String);

impl LeaseId {
    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// It becomes the name of a file, so it is looked at wherever it comes from.
impl TryFrom<String> for LeaseId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        if text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Ok(Self(text));
        }
        Err(Error::new(Code::SpecInvalid, format!("'{}' is not the id of a lease", text.escape_debug())))
    }
}

impl From<LeaseId> for String {
    fn from(id: LeaseId) -> Self {
        id.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_never_a_path() {
        let parse = |text: &str| serde_json::from_value::<LeaseId>(text.into());
        assert_eq!(parse("0123456789abcdef").unwrap().as_str(), "0123456789abcdef");
        for bad in ["", "../../nido.db...", "0123456789ABCDEF", "0123456789abcdef0", "0123456789abcde/"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
