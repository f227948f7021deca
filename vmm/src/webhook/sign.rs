//! Secrets and signatures, as Standard Webhooks has them.
//!
//! Invariant: a secret leaves its type only by [`Secret::reveal`]; nothing that prints one shows it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use crate::error::{Code, Error, Result};

/// What every secret begins with.
const PREFIX: &str = "whsec_";
/// How many bytes a key may have.
const KEY_BYTES: std::ops::RangeInclusive<usize> = 24..=64;

/// The key that an endpoint's messages are signed with.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// Of 32 random bytes.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes.to_vec())
    }

    /// Reads `whsec_…`.
    ///
    /// # Errors
    /// `webhook_invalid`; it never repeats what it was given.
    pub fn parse(text: &str) -> Result<Self> {
        let refused = |why: &str| {
            Error::new(Code::WebhookInvalid, format!("the secret {why}"))
                .hint("whsec_ and 24 to 64 bytes in base64; leave it out, and one is made")
        };
        let encoded = text.strip_prefix(PREFIX).ok_or_else(|| refused("does not begin with whsec_"))?;
        let key = STANDARD.decode(encoded).map_err(|_| refused("is not in base64 behind whsec_"))?;
        if KEY_BYTES.contains(&key.len()) { Ok(Self(key)) } else { Err(refused("is not of 24 to 64 bytes")) }
    }

    /// It, as `whsec_…`.
    #[must_use]
    pub fn reveal(&self) -> String {
        format!("{PREFIX}{}", STANDARD.encode(&self.0))
    }

    /// The header `webhook-signature` of a message sent at `timestamp`, in seconds since 1970.
    #[must_use]
    pub fn sign(&self, message_id: &str, timestamp: i64, body: &str) -> String {
        let signed = format!("{message_id}.{timestamp}.{body}");
        // HMAC takes keys of every length; the type cannot say so.
        let mac = Hmac::<Sha256>::new_from_slice(&self.0).map(|mac| mac.chain_update(signed).finalize().into_bytes());
        mac.map(|mac| format!("v1,{}", STANDARD.encode(mac))).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_signature_is_that_of_the_standard() {
        // The example of the Standard Webhooks specification's own libraries.
        let secret = Secret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let signature = secret.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, r#"{"test": 2432232314}"#);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn a_secret_that_is_none_is_refused_and_not_repeated() {
        let (short, long) = (STANDARD.encode([7; 23]), STANDARD.encode([7; 65]));
        for bad in ["", "whsec_", "geheim", "whsec_ge heim", "WHSEC_AAAA", &format!("whsec_{short}"), &long] {
            let Err(error) = Secret::parse(bad) else { panic!("{bad} was taken") };
            assert_eq!(error.code(), Code::WebhookInvalid);
            assert!(bad.len() < 8 || !error.message().contains(bad), "{error}");
        }
    }

    proptest! {
        #[test]
        fn a_secret_comes_back_as_it_was(key in proptest::collection::vec(any::<u8>(), 24..=64)) {
            let text = format!("{PREFIX}{}", STANDARD.encode(&key));
            prop_assert_eq!(Secret::parse(&text).unwrap().reveal(), text);
        }

        #[test]
        fn whatever_is_changed_changes_the_signature(id in "[a-z]{1,9}", at in 0..i64::MAX, body in ".{0,40}") {
            let (ours, other) = (Secret::new([1; 32]), Secret::new([2; 32]));
            let signature = ours.sign(&id, at, &body);
            prop_assert_ne!(&signature, &other.sign(&id, at, &body));
            prop_assert_ne!(&signature, &ours.sign(&id, at ^ 1, &body));
            prop_assert_ne!(&signature, &ours.sign(&id, at, &format!("{body} ")));
        }
    }
}
