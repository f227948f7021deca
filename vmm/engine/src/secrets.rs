//! Stored secrets: each in a file of its own, sealed by a key of the home.
//!
//! ```text
//!  secrets.key     32 random bytes, made once
//!  secrets/NAME    format (1 byte), nonce (12), AES-256-GCM of the value, with "secret/NAME" as associated data
//! ```
//!
//! Invariants: a file that was changed, or has another secret's name, does not open; a reader sees the value before or after a
//! change, never a part. Who reads the whole home has the secrets: the key protects copies of single files.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use nido_api::error::{Code, Error, Result};
use nido_api::name::SecretName;
use nido_api::{SecretInfo, SecretValue};
use nido_files::atomic_file::Durability::PowerCut;
use nido_files::atomic_file::{create_private, write_private};
use nido_files::private_dir::make_private_dir;
use nido_files::random;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use crate::home::Home;

const KEY_LEN: usize = 32;
/// The format of a sealed file: its first byte.
const FORMAT: u8 = 1;

/// The secrets of a home.
#[derive(Debug, Clone)]
pub struct Secrets {
    dir: PathBuf,
    key: PathBuf,
}

impl Secrets {
    /// Those of this home. Nothing is made before it is needed.
    #[must_use]
    pub fn of(home: &Home) -> Self {
        Self { dir: home.secrets(), key: home.secrets_key() }
    }

    /// Stores a value, in place of an older one.
    ///
    /// # Errors
    /// Of the file system.
    pub fn set(&self, name: &SecretName, value: &SecretValue) -> Result<SecretInfo> {
        make_private_dir(&self.dir).map_err(|e| Error::io_at("make", &self.dir, e))?;
        let path = self.path(name);
        let sealed = self.seal(&about(name), value.expose())?;
        write_private(&path, &sealed, PowerCut).map_err(|e| Error::io_at("write", &path, e))?;
        self.info(name)
    }

    /// The value of a secret.
    ///
    /// # Errors
    /// `secret_not_found`; `store_damaged` if it cannot be opened.
    pub fn get(&self, name: &SecretName) -> Result<SecretValue> {
        let sealed = fs::read(self.path(name)).map_err(|e| self.missing(name, e))?;
        SecretValue::new(self.open(&about(name), &sealed)?)
    }

    /// All of them, in order of name.
    ///
    /// # Errors
    /// Of the file system.
    pub fn list(&self) -> Result<Vec<SecretInfo>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|e| Error::io_at("read", &self.dir, e))?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<SecretName>().ok());
        let mut all: Vec<_> = names.filter_map(|name| self.info(&name).ok()).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// A secret, without its value.
    ///
    /// # Errors
    /// `secret_not_found`.
    pub fn info(&self, name: &SecretName) -> Result<SecretInfo> {
        let changed = fs::metadata(self.path(name)).and_then(|meta| meta.modified());
        let changed = changed.map_err(|e| self.missing(name, e))?;
        let updated_at = Timestamp::try_from(changed).map_err(|e| Error::internal(e.to_string()))?;
        Ok(SecretInfo { name: name.clone(), updated_at })
    }

    /// Deletes a secret.
    ///
    /// # Errors
    /// `secret_not_found`.
    pub fn delete(&self, name: &SecretName) -> Result<SecretInfo> {
        let info = self.info(name)?;
        fs::remove_file(self.path(name)).map_err(|e| self.missing(name, e))?;
        Ok(info)
    }

    /// Bytes, sealed. `about` is what they are, and needed to open them.
    ///
    /// # Errors
    /// The key cannot be read, or made.
    pub fn seal(&self, about: &str, bytes: &[u8]) -> Result<Vec<u8>> {
        let key = self.key()?;
        let nonce = random::bytes::<NONCE_LEN>()?;
        let mut sealed = bytes.to_vec();
        key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(about), &mut sealed)
            .map_err(|_| Error::internal("a secret cannot be sealed"))?;
        Ok([&[FORMAT][..], &nonce, &sealed].concat())
    }

    /// What was sealed.
    ///
    /// # Errors
    /// `store_damaged`: it was changed, or is of another key.
    pub fn open(&self, about: &str, sealed: &[u8]) -> Result<Vec<u8>> {
        let damaged = || {
            Error::new(
                Code::StoreDamaged,
                format!("{about} cannot be opened: it was changed, or sealed by another key"),
            )
            .hint("store the secret again")
        };
        let (head, sealed) = sealed.split_at_checked(1 + NONCE_LEN).ok_or_else(damaged)?;
        let nonce = <[u8; NONCE_LEN]>::try_from(&head[1..]).map_err(|_| damaged())?;
        if head[0] != FORMAT {
            return Err(damaged());
        }
        let mut bytes = sealed.to_vec();
        let opened = self.key()?.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(about), &mut bytes);
        let length = opened.map_err(|_| damaged())?.len();
        bytes.truncate(length);
        Ok(bytes)
    }

    fn path(&self, name: &SecretName) -> PathBuf {
        self.dir.join(name.as_str())
    }

    fn missing(&self, name: &SecretName, error: std::io::Error) -> Error {
        if error.kind() == ErrorKind::NotFound {
            return Error::new(Code::SecretNotFound, format!("there is no secret '{name}'"));
        }
        Error::io_at("use", &self.path(name), error)
    }

    /// The home's key, made if it is not there. Of several processes that make it, one does.
    fn key(&self) -> Result<LessSafeKey> {
        let bytes = match read_key(&self.key)? {
            Some(bytes) => bytes,
            None => {
                match create_private(&self.key, &random::bytes::<KEY_LEN>()?, PowerCut) {
                    Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(Error::io_at("write", &self.key, e)),
                    _ => {}
                }
                read_key(&self.key)?.ok_or_else(|| Error::internal("the key of the secrets has been removed"))?
            }
        };
        UnboundKey::new(&AES_256_GCM, &bytes)
            .map(LessSafeKey::new)
            .map_err(|_| Error::new(Code::StoreDamaged, "the key of the secrets is damaged"))
    }
}

fn read_key(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io_at("read", path, e)),
    }
}

fn about(name: &SecretName) -> String {
    format!("secret/{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> SecretValue {
        SecretValue::new(text.into()).unwrap()
    }

    #[test]
    fn a_value_is_sealed_and_bound_to_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open(&dir.path().join("home")).unwrap();
        let secrets = Secrets::of(&home);
        let (first, second): (SecretName, SecretName) = ("first".parse().unwrap(), "second".parse().unwrap());
        assert_eq!(secrets.get(&first).unwrap_err().code(), Code::SecretNotFound);
        secrets.set(&first, &value("hidden")).unwrap();
        assert_eq!(secrets.get(&first).unwrap().expose(), b"hidden");
        let path = home.secrets().join("first");
        let sealed = fs::read(&path).unwrap();
        assert!(!sealed.windows(6).any(|bytes| bytes == b"hidden"));
        fs::write(home.secrets().join("second"), &sealed).unwrap();
        assert_eq!(secrets.get(&second).unwrap_err().code(), Code::StoreDamaged);
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            fs::write(&path, changed).unwrap();
            assert_eq!(secrets.get(&first).unwrap_err().code(), Code::StoreDamaged, "{at}");
        }
        secrets.set(&first, &value("newer")).unwrap();
        assert_eq!(secrets.get(&first).unwrap().expose(), b"newer");
        assert_eq!(secrets.list().unwrap().len(), 2);
        secrets.delete(&first).unwrap();
        assert_eq!(secrets.delete(&first).unwrap_err().code(), Code::SecretNotFound);
    }
}
