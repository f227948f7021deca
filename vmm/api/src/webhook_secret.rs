//! Secrets and signatures, as Standard Webhooks has them.
//!
//! Invariant: a secret leaves its type only by [`WebhookSecret::reveal`]; nothing that prints one shows it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use crate::error::{Code, Error, Result};

/// What every secret begins with.
const PREFIX: &str = "whsec_";
/// How many bytes a key may have.
const KEY_BYTES: std::ops::RangeInclusive<usize> = 24..=64;

/// How many letters and digits an integration key of PagerDuty has.
const ROUTING_KEY_CHARS: usize = 32;

/// What proves to an endpoint that a message is nido's.
#[derive(Clone, PartialEq, Eq)]
pub struct WebhookSecret(Kind);

#[derive(Clone, PartialEq, Eq)]
enum Kind {
    /// Messages are signed with it.
    Key(Vec<u8>),
    /// Messages contain it.
    RoutingKey(String),
}

impl std::fmt::Debug for WebhookSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl WebhookSecret {
    /// Of 32 random bytes.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Kind::Key(bytes.to_vec()))
    }

    /// Reads an integration key of PagerDuty.
    ///
    /// # Errors
    /// `webhook_invalid`; it never repeats what it was given.
    pub fn parse_routing_key(text: &str) -> Result<Self> {
        if text.len() != ROUTING_KEY_CHARS || !text.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(Error::new(Code::WebhookInvalid, "the secret is not a PagerDuty integration key")
                .hint("32 letters and digits: the service's page shows it, under Integrations, Events API v2"));
        }
        Ok(Self(Kind::RoutingKey(text.into())))
    }

    /// Reads what [`Self::reveal`] wrote.
    ///
    /// # Errors
    /// `webhook_invalid`; it never repeats what it was given.
    pub fn parse_kept(text: &str) -> Result<Self> {
        if text.starts_with(PREFIX) { Self::parse(text) } else { Self::parse_routing_key(text) }
    }

    /// The integration key of PagerDuty, if it is one.
    #[must_use]
    pub fn routing_key(&self) -> Option<&str> {
        match &self.0 {
            Kind::RoutingKey(key) => Some(key),
            Kind::Key(_) => None,
        }
    }

    /// Reads `whsec_…`.
    ///
    /// # Errors
    /// `webhook_invalid`; it never repeats what it was given.
    pub fn parse(text: &str) -> Result<Self> {
        let refused = |why: &str| {
            Error::new(Code::WebhookInvalid, format!("the secret {why}"))
                .hint("write whsec_ and 24 to 64 bytes in base64, or omit it to generate one")
        };
        let encoded = text.strip_prefix(PREFIX).ok_or_else(|| refused("does not begin with whsec_"))?;
        let key = STANDARD.decode(encoded).map_err(|_| refused("is not base64 after whsec_"))?;
        if KEY_BYTES.contains(&key.len()) { Ok(Self(Kind::Key(key))) } else { Err(refused("is not of 24 to 64 bytes")) }
    }

    /// It, as `whsec_…`, or as PagerDuty has it.
    #[must_use]
    pub fn reveal(&self) -> String {
        match &self.0 {
            Kind::Key(key) => format!("{PREFIX}{}", STANDARD.encode(key)),
            Kind::RoutingKey(key) => key.clone(),
        }
    }

    /// The header `webhook-signature` of a message sent at `timestamp`, in seconds since 1970. `None`: its endpoint knows a
    /// message by what it contains.
    #[must_use]
    pub fn sign(&self, message_id: &str, timestamp: i64, body: &str) -> Option<String> {
        let Kind::Key(key) = &self.0 else { return None };
        let signed = format!("{message_id}.{timestamp}.{body}");
        // HMAC takes keys of every length; the type does not express that.
        let mac = Hmac::<Sha256>::new_from_slice(key).ok()?.chain_update(signed).finalize().into_bytes();
        Some(format!("v1,{}", STANDARD.encode(mac)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_signature_is_that_of_the_standard() {
        // The example of the Standard Webhooks specification's own libraries.
        let secret = WebhookSecret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let signature = secret.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, r#"{"test": 2432232314}"#);
        assert_eq!(signature.unwrap(), "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn an_invalid_secret_is_refused_and_not_repeated() {
        let (short, long) = (STANDARD.encode([7; 23]), STANDARD.encode([7; 65]));
        for bad in ["", "whsec_", "geheim", "whsec_ge heim", "WHSEC_AAAA", &format!("whsec_{short}"), &long] {
            let Err(error) = WebhookSecret::parse(bad) else { panic!("{bad} was taken") };
            assert_eq!(error.code(), Code::WebhookInvalid);
            assert!(bad.len() < 8 || !error.message().contains(bad), "{error}");
        }
    }

    #[test]
    fn an_integration_key_is_kept_and_signs_nothing() {
        let key = "0123456789abcdefABCDEF0123456789";
        let secret = WebhookSecret::parse_kept(&WebhookSecret::parse_routing_key(key).unwrap().reveal()).unwrap();
        assert_eq!((secret.routing_key(), secret.sign("msg", 1, "{}")), (Some(key), None));
        assert_eq!(format!("{secret:?}"), "Secret");
        for bad in ["", &key[1..], "0123456789abcdefABCDEF012345678-", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"] {
            let Err(error) = WebhookSecret::parse_routing_key(bad) else { panic!("{bad} was taken") };
            assert!(bad.is_empty() || !error.message().contains(bad), "{error}");
        }
    }

    proptest! {
        #[test]
        fn a_secret_comes_back_as_it_was(key in proptest::collection::vec(any::<u8>(), 24..=64)) {
            let text = format!("{PREFIX}{}", STANDARD.encode(&key));
            prop_assert_eq!(WebhookSecret::parse(&text).unwrap().reveal(), text);
        }

        #[test]
        fn every_change_alters_the_signature(id in "[a-z]{1,9}", at in 0..i64::MAX, body in ".{0,40}") {
            let (ours, other) = (WebhookSecret::new([1; 32]), WebhookSecret::new([2; 32]));
            let signature = ours.sign(&id, at, &body);
            prop_assert_ne!(&signature, &other.sign(&id, at, &body));
            prop_assert_ne!(&signature, &ours.sign(&id, at ^ 1, &body));
            prop_assert_ne!(&signature, &ours.sign(&id, at, &format!("{body} ")));
        }
    }
}
