//! The environment in which commands of a guest find its secrets: certificates, and placeholders. Pure.
//!
//! Invariant: no value of a secret is in it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Code, Error};
use crate::name::SecretName;
use crate::{SecretUse, VmSpec};

/// How long the name of a variable is at most.
const VARIABLE_BYTES_MAX: usize = 128;
/// The bundle of certificates of authorities in a guest with secrets: its system's, and the VM's own.
const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
/// The certificate of the VM's own authority in the guest.
const CERTIFICATE: &str = "/usr/local/share/ca-certificates/nido.crt";
/// Variables for programs that have certificates of their own.
const CERTIFICATE_VARIABLES: [(&str, &str); 4] = [
    ("CURL_CA_BUNDLE", BUNDLE),
    // In addition to those that it has.
    ("NODE_EXTRA_CA_CERTS", CERTIFICATE),
    ("REQUESTS_CA_BUNDLE", BUNDLE),
    ("SSL_CERT_FILE", BUNDLE),
];

/// A variable that has the placeholder of a secret: `VARIABLE=NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SecretVariable {
    /// The variable.
    pub variable: String,
    /// The secret.
    pub name: SecretName,
}

impl FromStr for SecretVariable {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid = |why: String| {
            Error::new(Code::SpecInvalid, format!("secret_env: {why}"))
                .hint("VARIABLE=NAME, for example GITHUB_TOKEN=github")
        };
        let (variable, name) =
            text.split_once('=').ok_or_else(|| invalid("'=' and the name of the secret are missing".into()))?;
        let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let is_name = !variable.is_empty()
            && variable.len() <= VARIABLE_BYTES_MAX
            && variable.bytes().all(is_word)
            && !variable.as_bytes()[0].is_ascii_digit();
        if !is_name {
            return Err(invalid(format!("'{}' is no name of a variable", variable.escape_debug())));
        }
        Ok(Self { variable: variable.to_owned(), name: name.parse()? })
    }
}

impl fmt::Display for SecretVariable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.variable, self.name)
    }
}

impl Serialize for SecretVariable {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SecretVariable {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl utoipa::PartialSchema for SecretVariable {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        let text = utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .description(Some("A variable of commands that has the placeholder of a secret: `VARIABLE=NAME`."));
        text.into()
    }
}

impl utoipa::ToSchema for SecretVariable {}

/// What commands of a VM's guest find in their environment, beside that of their user: `KEY=VALUE`. Empty for a VM without secrets.
#[must_use]
pub fn secret_environment(spec: &VmSpec) -> Vec<String> {
    if spec.secrets.is_empty() {
        return Vec::new();
    }
    let certificates = CERTIFICATE_VARIABLES.iter().map(|(variable, path)| format!("{variable}={path}"));
    let placeholders =
        spec.secret_env.iter().map(|one| format!("{}={}", one.variable, SecretUse::placeholder_of(&one.name)));
    certificates.chain(placeholders).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_names_a_secret() {
        let variable: SecretVariable = "GITHUB_TOKEN=github".parse().unwrap();
        assert_eq!((variable.variable.as_str(), variable.name.as_str()), ("GITHUB_TOKEN", "github"));
        assert_eq!(variable.to_string(), "GITHUB_TOKEN=github");
        let long = format!("{}=key", "A".repeat(VARIABLE_BYTES_MAX + 1));
        for bad in ["", "A", "=key", "A=", "1A=key", "A B=key", "A\0=key", "A=../key", &long] {
            assert!(bad.parse::<SecretVariable>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_a_vm_with_secrets_has_variables_for_them() {
        let plain = VmSpec::named("web".parse().unwrap());
        assert_eq!(secret_environment(&plain), Vec::<String>::new());
        let with = VmSpec {
            secrets: vec!["key@example.com".parse().unwrap()],
            secret_env: vec!["TOKEN=key".parse().unwrap()],
            ..plain
        };
        let environment = secret_environment(&with);
        for expected in ["TOKEN=nido-secret-key", "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"] {
            assert!(environment.iter().any(|pair| pair == expected), "{environment:?}");
        }
    }
}
