//! The server's own certificate: self-signed, made when a server that other machines can reach was given none.
//!
//! Invariant: the key is made once and never leaves its file (0600). The certificate is made again, with the same key, when the
//! server is known under another name or address; so a pin of the public key stays valid. Whenever the process is killed, the
//! next one finds a key and a certificate that belong together, or makes what is missing.

use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Zoned;
use nido_api::error::{Code, Error, Hint, Result};
use nido_files::atomic_file::{Durability, is_temporary, write_private};
use nido_files::lock::HeldLock;
use nido_files::private_dir::make_private_dir_in_place;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PublicKeyData as _};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;

/// The validity of a certificate, in years.
const VALIDITY_YEARS: i16 = 10;
/// Addresses of documentation (RFC 5737, RFC 3849): nothing is sent to them.
const DOCUMENTATION_ADDRESSES: [&str; 2] = ["192.0.2.1:9", "[2001:db8::1]:9"];

/// How long another process may take to make a key and a certificate.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// A certificate and its key.
#[derive(Debug)]
pub struct TlsFiles {
    /// PEM: the server's certificate, then those between it and the root.
    pub certificate: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
}

/// The names and the key that a certificate was issued for, in a file next to it.
#[derive(Debug, Serialize, Deserialize)]
struct CertificateRecord {
    names: Vec<String>,
    /// Of the certificate's file: SHA-256.
    certificate: String,
    /// Of the key that it was issued for.
    public_key_pin: String,
}

/// A certificate of the server's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OwnCertificate {
    /// Its file, PEM: what clients are given to trust.
    pub certificate: PathBuf,
    #[serde(skip)]
    key: PathBuf,
    /// SHA-256 of the certificate, in hexadecimal with colons.
    pub sha256: String,
    /// SHA-256 of its public key, as curl's `--pinnedpubkey` takes it.
    pub public_key_pin: String,
    /// Whether it was made just now.
    pub made: bool,
}

impl OwnCertificate {
    /// The certificate kept in a directory, for a server with these names and addresses. A new one is issued if there is no
    /// certificate yet, or if it lacks one of them.
    ///
    /// # Errors
    /// Those of the file system; `internal`.
    pub fn obtain(directory: &Path, names: &[String]) -> Result<Self> {
        let broken = |e| Error::io_at("make the server's certificate in", directory, e);
        make_private_dir_in_place(directory).map_err(broken)?;
        let held = HeldLock::take_blocking(&directory.join("lock"), Instant::now() + LOCK_TIMEOUT).map_err(broken)?;
        let _held = held.ok_or_else(|| {
            Error::new(Code::Timeout, format!("another process holds {}", directory.join("lock").display()))
                .hint(Hint::command_line("try again, or give a certificate with --cert and --key"))
        })?;
        remove_temporary_files(directory).map_err(broken)?;
        let [key_file, certificate, issued_file] =
            ["key.pem", "certificate.pem", "issued.json"].map(|name| directory.join(name));
        let key = key(&key_file)?;
        let public_key_pin = format!("sha256//{}", STANDARD.encode(Sha256::digest(key.subject_public_key_info())));
        let is_current = is_current(&certificate, &issued_file, names, &public_key_pin);
        if !is_current {
            let text = issue(&key, names)?;
            write_private(&certificate, text.as_bytes(), Durability::PowerCut).map_err(broken)?;
            let issued = CertificateRecord {
                names: names.to_vec(),
                certificate: hex(text.as_bytes(), ""),
                public_key_pin: public_key_pin.clone(),
            };
            let issued = serde_json::to_vec(&issued).map_err(|e| Error::internal(e.to_string()))?;
            write_private(&issued_file, &issued, Durability::PowerCut).map_err(broken)?;
        }
        let der = CertificateDer::from_pem_file(&certificate)
            .map_err(|e| Error::internal(format!("{} cannot be read: {e}", certificate.display())))?;
        let sha256 = hex(&der, ":");
        Ok(Self { certificate, key: key_file, sha256, public_key_pin, made: !is_current })
    }

    /// Its files.
    pub fn files(&self) -> TlsFiles {
        TlsFiles { certificate: self.certificate.clone(), key: self.key.clone() }
    }
}

/// Whether the certificate in a file is the one that was issued last, for this key and for all of these names.
fn is_current(certificate: &Path, issued: &Path, names: &[String], public_key_pin: &str) -> bool {
    let issued: Option<CertificateRecord> = fs::read(issued).ok().and_then(|text| serde_json::from_slice(&text).ok());
    issued.zip(fs::read(certificate).ok()).is_some_and(|(issued, text)| {
        names.iter().all(|name| issued.names.contains(name))
            && issued.public_key_pin == public_key_pin
            && issued.certificate == hex(&text, "")
    })
}

/// SHA-256, in hexadecimal.
fn hex(bytes: &[u8], between: &str) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(between)
}

/// Removes temporary files of a killed process. No other process writes here: the caller holds the lock.
fn remove_temporary_files(directory: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(is_temporary) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// The key in a file. If the file is missing, a new key is generated.
fn key(path: &Path) -> Result<KeyPair> {
    if !path.exists() {
        let made = KeyPair::generate().map_err(|e| Error::internal(format!("cannot create a key: {e}")))?;
        write_private(path, made.serialize_pem().as_bytes(), Durability::PowerCut)
            .map_err(|e| Error::io_at("write", path, e))?;
    }
    let text = fs::read_to_string(path).map_err(|e| Error::io_at("read", path, e))?;
    KeyPair::from_pem(&text).map_err(|e| {
        Error::new(Code::PathUnusable, format!("the server's key {} cannot be used: {e}", path.display()))
            .hint(Hint::host("move it away; nido creates another"))
    })
}

/// A certificate for a server of these names and addresses, PEM.
fn issue(key: &KeyPair, names: &[String]) -> Result<String> {
    let failed = |e: rcgen::Error| Error::internal(format!("cannot create a certificate: {e}"));
    let mut params = CertificateParams::new(names.to_vec()).map_err(failed)?;
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, "nido");
    params.distinguished_name = subject;
    let year = i32::from(Zoned::now().year());
    params.not_before = rcgen::date_time_ymd(year - 1, 1, 1);
    params.not_after = rcgen::date_time_ymd(year + i32::from(VALIDITY_YEARS), 1, 1);
    Ok(params.self_signed(key).map_err(failed)?.pem())
}

/// The names and addresses under which clients reach this host, besides those that were given.
pub fn names_of_host(bound: IpAddr, given: &[String]) -> Vec<String> {
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".into(), "::1".into()];
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    names.push(host);
    names.extend(
        DOCUMENTATION_ADDRESSES.into_iter().filter_map(|to| address_towards(to).map(|address| address.to_string())),
    );
    if !bound.is_unspecified() {
        names.push(bound.to_string());
    }
    names.extend(given.iter().cloned());
    // What no certificate can hold is left out.
    names.retain(|name| name.parse::<IpAddr>().is_ok() || is_dns_name(name));
    names.sort_unstable();
    names.dedup();
    names
}

fn is_dns_name(name: &str) -> bool {
    let part = |part: &str| {
        (1..=63).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    name.len() <= 253 && name.split('.').all(part)
}

/// This host's address on the way to another one.
fn address_towards(to: &str) -> Option<IpAddr> {
    let from = if to.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(from).ok()?;
    socket.connect(to).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|address| !address.is_unspecified())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_certificate_is_created_once_and_reissued_with_the_same_key_for_another_name() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("tls");
        let names = |more: &[&str]| -> Vec<String> {
            ["localhost", "127.0.0.1"].iter().chain(more).map(|name| (*name).to_owned()).collect()
        };
        let first = OwnCertificate::obtain(&directory, &names(&[])).unwrap();
        assert!(first.made && first.sha256.len() == 95 && first.public_key_pin.starts_with("sha256//"));
        for file in ["key.pem", "certificate.pem"] {
            assert_eq!(fs::metadata(directory.join(file)).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let again = OwnCertificate::obtain(&directory, &names(&[])).unwrap();
        assert_eq!(again, OwnCertificate { made: false, ..first.clone() });
        let other = OwnCertificate::obtain(&directory, &names(&["ci.example"])).unwrap();
        assert!(other.made && other.sha256 != first.sha256);
        assert_eq!(other.public_key_pin, first.public_key_pin);
        // Fewer names are no reason for another one.
        assert!(!OwnCertificate::obtain(&directory, &names(&[])).unwrap().made);
        let left = fs::read_dir(&directory).unwrap().count();
        assert_eq!(left, 4, "the key, the certificate, what it was issued for, and the lock");
    }

    #[test]
    fn key_and_certificate_belong_together_whenever_the_process_was_killed() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("tls");
        let names = ["localhost".to_owned()];
        let first = OwnCertificate::obtain(&directory, &names).unwrap();
        // While a file was written.
        fs::write(directory.join(".tmp-key.pem-0123"), "-----BEGIN").unwrap();
        assert!(!OwnCertificate::obtain(&directory, &names).unwrap().made);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 4);
        // Between the certificate and the record of its names.
        fs::write(directory.join("certificate.pem"), issue(&KeyPair::generate().unwrap(), &names).unwrap()).unwrap();
        let again = OwnCertificate::obtain(&directory, &names).unwrap();
        assert!(again.made && again.public_key_pin == first.public_key_pin);
        // The key was moved away: a certificate for the new one is issued.
        fs::remove_file(directory.join("key.pem")).unwrap();
        let other = OwnCertificate::obtain(&directory, &names).unwrap();
        assert!(other.made && other.public_key_pin != first.public_key_pin);
        // A key that cannot be used is never replaced.
        fs::write(directory.join("key.pem"), "x").unwrap();
        let error = OwnCertificate::obtain(&directory, &names).unwrap_err();
        assert_eq!(error.code(), Code::PathUnusable);
        assert_eq!(fs::read_to_string(directory.join("key.pem")).unwrap(), "x");
    }

    #[test]
    fn processes_that_start_at_once_use_the_same_certificate() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("tls");
        let names = ["localhost".to_owned()];
        let obtained: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| OwnCertificate::obtain(&directory, &names).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(obtained.iter().filter(|one| one.made).count(), 1);
        assert!(obtained.iter().all(|one| one.sha256 == obtained[0].sha256));
    }

    #[test]
    fn a_name_that_no_certificate_can_hold_is_left_out() {
        let given = ["ci.example".to_owned(), "a b".into(), String::new(), "10.1.2.3".into(), "x".repeat(64)];
        let names = names_of_host("0.0.0.0".parse().unwrap(), &given);
        for there in ["localhost", "127.0.0.1", "ci.example", "10.1.2.3"] {
            assert!(names.iter().any(|name| name == there), "{there}: {names:?}");
        }
        assert!(!names.iter().any(|name| name.contains(' ') || name.is_empty() || name.starts_with("xx")), "{names:?}");
    }
}
