//! Checkpoints: the last line's number and chain, signed with Ed25519, to be kept elsewhere.
//!
//! The key is created on first use and stored next to the log, so the owner of the log can sign anything. What a checkpoint
//! proves it proves because it was handed out before, and because its key was known before.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use jiff::Timestamp;
use nido_api::error::{Code, Error, Hint, Result};
use nido_api::{AuditCheckpoint, AuditVerdict, hex};
use nido_files::atomic_file::{self, Durability};
use ring::rand::SystemRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};

use super::log::Log;

/// The key, beside the log: PKCS #8.
const KEY: &str = "audit.key";
/// The version of the document.
pub const FORMAT: u32 = 1;
/// The longest document that is read, in bytes.
const MAX_BYTES: u64 = 64 << 10;

/// What checkpoints are signed with.
#[derive(Debug)]
pub struct Key(Ed25519KeyPair);

impl Key {
    /// The log's own; made if it is not there.
    pub(crate) fn open(log: &Log) -> Result<Self> {
        let path = log.directory().join(KEY);
        log.make_directory().map_err(|e| Error::io(format!("cannot use {}", path.display()), e))?;
        let read = log.locked(|| match std::fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => make(log.directory(), &path),
            other => other,
        });
        Self::read(&read.map_err(|e| Error::io(format!("cannot use {}", path.display()), e))?)
    }

    /// The log's own, if it is there and a key.
    pub(crate) fn existing(log: &Log) -> Option<Self> {
        std::fs::read(log.directory().join(KEY)).ok().and_then(|document| Self::read(&document).ok())
    }

    fn read(document: &[u8]) -> Result<Self> {
        Ed25519KeyPair::from_pkcs8(document).map(Self).map_err(|e| {
            Error::internal(format!("{KEY} holds no key: {e}"))
                .hint(Hint::host("move it away; nido creates another, whose public key you must distribute"))
        })
    }

    /// The public half, in hexadecimal.
    #[must_use]
    pub fn public(&self) -> String {
        hex::encode(self.0.public_key().as_ref())
    }

    /// The signature of a text, in hexadecimal.
    pub(super) fn signature(&self, text: &str) -> String {
        hex::encode(self.0.sign(text.as_bytes()).as_ref())
    }

    /// Puts key and signature into a checkpoint.
    #[must_use]
    pub fn sign(&self, mut checkpoint: AuditCheckpoint) -> AuditCheckpoint {
        checkpoint.public_key = self.public();
        checkpoint.signature = self.signature(&checkpoint.statement());
        checkpoint
    }
}

impl Log {
    /// Signs the last line's number and chain.
    ///
    /// # Errors
    /// As [`crate::nido::Nido::audit_checkpoint`].
    pub fn checkpoint(&self) -> Result<AuditCheckpoint> {
        match self.check(None)? {
            (AuditVerdict { ok: true, last_seq: Some(seq), chain: Some(chain), .. }, Some(head)) => {
                let now = Timestamp::now();
                let time = Timestamp::from_second(now.as_second()).unwrap_or(now);
                let (public_key, signature) = (String::new(), String::new());
                Ok(Key::open(self)?.sign(AuditCheckpoint {
                    format: FORMAT,
                    seq,
                    chain,
                    time,
                    head,
                    public_key,
                    signature,
                }))
            }
            (verdict, _) => Err(verdict.error().unwrap_or_else(|| {
                Error::new(Code::PathNotFound, "there is no line in the audit log yet")
                    .hint("the first exec or delete writes one")
            })),
        }
    }
}

/// Makes a key, and brings it under its name when it is whole.
fn make(directory: &Path, path: &Path) -> io::Result<Vec<u8>> {
    let document =
        Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| io::Error::other("no random numbers"))?;
    let fresh = directory.join(format!(".new-{KEY}"));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.write_all(document.as_ref())?;
    atomic_file::publish(&file, &fresh, path, Durability::PowerCut)?;
    Ok(document.as_ref().to_vec())
}

/// Whether a checkpoint was signed with the key that is in it. Pure.
///
/// # Errors
/// `audit_broken`.
pub fn check_signature(checkpoint: &AuditCheckpoint) -> Result<()> {
    let refuse = |why| Err(Error::new(Code::AuditBroken, why).hint("use the checkpoint exactly as it was printed"));
    if checkpoint.format != FORMAT {
        return refuse("this nido does not support the checkpoint's format");
    }
    let (key, signature) = (hex::decode(&checkpoint.public_key), hex::decode(&checkpoint.signature));
    match UnparsedPublicKey::new(&ED25519, key).verify(checkpoint.statement().as_bytes(), &signature) {
        Ok(()) => Ok(()),
        Err(_) => refuse("the checkpoint's signature is wrong: it was altered"),
    }
}

/// Reads a checkpoint from a file.
///
/// # Errors
/// `path_not_found`, `spec_invalid`, `internal`.
pub fn read(path: &Path) -> Result<AuditCheckpoint> {
    let shown = path.display();
    let broken = |e: io::Error| match e.kind() {
        ErrorKind::NotFound => Error::new(Code::PathNotFound, format!("there is no file {shown}")),
        _ => Error::io(format!("cannot read {shown}"), e),
    };
    let mut text = Vec::new();
    std::fs::File::open(path).map_err(broken)?.take(MAX_BYTES).read_to_end(&mut text).map_err(broken)?;
    serde_json::from_slice(&text).map_err(|e| {
        Error::new(Code::SpecInvalid, format!("{shown} is not a checkpoint: {e}"))
            .hint(Hint::host("create one with nido audit checkpoint"))
    })
}

/// Writes a checkpoint to a new file.
///
/// # Errors
/// `path_exists`, `disk_full`, `internal`.
pub fn write(checkpoint: &AuditCheckpoint, path: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(checkpoint).map_err(|e| Error::internal(e.to_string()))? + "\n";
    write_text(&text, path)
}

/// Writes a signed document to a new file.
///
/// # Errors
/// As [`write()`].
pub fn write_text(text: &str, path: &Path) -> Result<()> {
    let shown = path.display();
    let broken = |e: io::Error| match e.kind() {
        ErrorKind::AlreadyExists => Error::new(Code::PathExists, format!("{shown} exists")).hint("choose another file"),
        _ => Error::io(format!("cannot write {shown}"), e),
    };
    let mut file = OpenOptions::new().write(true).create_new(true).open(path).map_err(broken)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(broken)
}
