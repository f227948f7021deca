//! The certificate authority of one VM. Its key stays in the host's process; its certificate is trusted in that guest only.
//!
//! Invariant: the subject is a constant, so that the guest finds the certificate by the hash of its name.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use rustls::crypto::ring::sign::any_supported_type;
use rustls::pki_types::PrivateKeyDer;
use rustls::sign::CertifiedKey;

/// The subject.
const NAME: &str = "nido VM authority";
/// For how many days a server's certificate is valid: it is made for one connection.
const LEAF_DAYS: i64 = 30;

/// The certificate authority of one VM.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    key: Vec<u8>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority(redacted)")
    }
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// No key can be made.
    pub fn generate() -> Result<Self, rcgen::Error> {
        Self::new(KeyPair::generate()?)
    }

    /// The one of this key, in DER.
    ///
    /// # Errors
    /// It is no key.
    pub fn of_key(key: &[u8]) -> Result<Self, rcgen::Error> {
        Self::new(KeyPair::try_from(key)?)
    }

    fn new(key: KeyPair) -> Result<Self, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, NAME);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2049, 12, 31));
        let pem = params.self_signed(&key)?.pem();
        let der = key.serialize_der();
        Ok(Self { issuer: Issuer::new(params, key), pem, key: der })
    }

    /// Its certificate, for the guest.
    #[must_use]
    pub fn certificate(&self) -> &str {
        &self.pem
    }

    /// Its key, in DER.
    #[must_use]
    pub fn key(&self) -> &[u8] {
        &self.key
    }

    /// A certificate for a server of this name.
    ///
    /// # Errors
    /// One sentence.
    pub(crate) fn certify(&self, host: &str) -> Result<Arc<CertifiedKey>, String> {
        let key = KeyPair::generate().map_err(|e| e.to_string())?;
        let mut params = CertificateParams::new(vec![host.to_owned()]).map_err(|e| e.to_string())?;
        params.distinguished_name.push(DnType::CommonName, "nido");
        params.use_authority_key_identifier_extension = true;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let day = |days: i64| {
            let date = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(24 * days);
            let date = date.to_zoned(jiff::tz::TimeZone::UTC).date();
            date_time_ymd(date.year().into(), date.month().unsigned_abs(), date.day().unsigned_abs())
        };
        (params.not_before, params.not_after) = (day(-2), day(LEAF_DAYS));
        let certificate = params.signed_by(&key, &self.issuer).map_err(|e| e.to_string())?;
        let der = PrivateKeyDer::try_from(key.serialize_der())?;
        let signer = any_supported_type(&der).map_err(|e| e.to_string())?;
        Ok(Arc::new(CertifiedKey::new(vec![certificate.der().clone()], signer)))
    }
}
