//! Stored secrets: each in a file of its own, sealed by a key of the home.
//!
//! ```text
//!  secrets.key     32 random bytes, made once
//!  secrets/NAME    format (1 byte), nonce (12), AES-256-GCM of the value, with "secret/NAME" as associated data;
//!                  format 2: of a command and the value that it printed, with "secret-with-command/NAME"
//! ```
//!
//! Invariants: a file that was changed, or has another secret's name, does not open; a reader sees the value before or after a
//! change, never a part. Who reads the whole home has the secrets: the key protects copies of single files.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
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
/// The format of a secret with the command that prints its value.
const FORMAT_WITH_COMMAND: u8 = 2;
/// How long a command is at most, in bytes.
const COMMAND_BYTES_MAX: usize = 64 << 10;

/// A program, and its arguments.
pub type SecretCommand = Vec<Vec<u8>>;

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
        self.write(name, &self.seal(&about(name), value.expose())?)
    }

    /// The same, with the command that has printed the value: both in one file, which is replaced as a whole.
    ///
    /// # Errors
    /// `spec_invalid`: the command is too long; of the file system.
    pub fn set_with_command(
        &self,
        name: &SecretName,
        value: &SecretValue,
        command: &SecretCommand,
    ) -> Result<SecretInfo> {
        if command.iter().map(|word| word.len() + size_of::<u32>()).sum::<usize>() > COMMAND_BYTES_MAX {
            return Err(Error::new(Code::SpecInvalid, "the command of the secret is longer than 64 KiB"));
        }
        let mut bytes = encode(command, value);
        let sealed = self.seal_as(FORMAT_WITH_COMMAND, &about_with_command(name), &bytes);
        overwrite(&mut bytes);
        self.write(name, &sealed?)
    }

    fn write(&self, name: &SecretName, sealed: &[u8]) -> Result<SecretInfo> {
        make_private_dir(&self.dir).map_err(|e| Error::io_at("make", &self.dir, e))?;
        let path = self.path(name);
        write_private(&path, sealed, PowerCut).map_err(|e| Error::io_at("write", &path, e))?;
        self.info(name)
    }

    /// The value of a secret.
    ///
    /// # Errors
    /// `secret_not_found`; `store_damaged` if it cannot be opened.
    pub fn get(&self, name: &SecretName) -> Result<SecretValue> {
        Ok(self.read(name)?.0)
    }

    /// The value of a secret, and the command that prints it, if there is one.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn read(&self, name: &SecretName) -> Result<(SecretValue, Option<SecretCommand>)> {
        let sealed = fs::read(self.path(name)).map_err(|e| self.missing(name, e))?;
        if sealed.first() != Some(&FORMAT_WITH_COMMAND) {
            return Ok((SecretValue::new(self.open(&about(name), &sealed)?)?, None));
        }
        let about = about_with_command(name);
        let mut bytes = self.open_as(FORMAT_WITH_COMMAND, &about, &sealed)?;
        let decoded = decode(&bytes);
        overwrite(&mut bytes);
        let (command, value) = decoded.ok_or_else(|| damaged(&about))?;
        Ok((SecretValue::new(value)?, Some(command)))
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
        let mut format = [0];
        let read = File::open(self.path(name)).and_then(|mut file| file.read_exact(&mut format));
        let refreshable = read.is_ok() && format == [FORMAT_WITH_COMMAND];
        Ok(SecretInfo { name: name.clone(), updated_at, refreshable })
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
        self.seal_as(FORMAT, about, bytes)
    }

    fn seal_as(&self, format: u8, about: &str, bytes: &[u8]) -> Result<Vec<u8>> {
        let key = self.key()?;
        let nonce = random::bytes::<NONCE_LEN>()?;
        let mut sealed = bytes.to_vec();
        key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(about), &mut sealed)
            .map_err(|_| Error::internal("a secret cannot be sealed"))?;
        Ok([&[format][..], &nonce, &sealed].concat())
    }

    /// What was sealed.
    ///
    /// # Errors
    /// `store_damaged`: it was changed, or is of another key.
    pub fn open(&self, about: &str, sealed: &[u8]) -> Result<Vec<u8>> {
        self.open_as(FORMAT, about, sealed)
    }

    fn open_as(&self, format: u8, about: &str, sealed: &[u8]) -> Result<Vec<u8>> {
        let damaged = || damaged(about);
        let (head, sealed) = sealed.split_at_checked(1 + NONCE_LEN).ok_or_else(damaged)?;
        let nonce = <[u8; NONCE_LEN]>::try_from(&head[1..]).map_err(|_| damaged())?;
        if head[0] != format {
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

/// Not the same: the format's byte alone could be changed.
fn about_with_command(name: &SecretName) -> String {
    format!("secret-with-command/{name}")
}

fn damaged(about: &str) -> Error {
    let words = format!("{about} cannot be opened: it was changed, or sealed by another key");
    Error::new(Code::StoreDamaged, words).hint("store the secret again")
}

/// Bytes that have a value, when they are not needed any more.
fn overwrite(bytes: &mut [u8]) {
    bytes.fill(0);
    std::hint::black_box(bytes);
}

/// A command and a value: the number of words, each word behind its length, and the value.
fn encode(command: &SecretCommand, value: &SecretValue) -> Vec<u8> {
    let length = |count: usize| u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes();
    let mut bytes = length(command.len()).to_vec();
    for word in command {
        bytes.extend(length(word.len()));
        bytes.extend(word);
    }
    bytes.extend(value.expose());
    bytes
}

fn decode(bytes: &[u8]) -> Option<(SecretCommand, Vec<u8>)> {
    fn number<'a>(rest: &mut &'a [u8]) -> Option<usize> {
        let (head, tail): (&'a [u8; 4], _) = rest.split_first_chunk()?;
        *rest = tail;
        usize::try_from(u32::from_le_bytes(*head)).ok()
    }
    let mut rest = bytes;
    let count = number(&mut rest)?;
    let mut command = SecretCommand::new();
    for _ in 0..count {
        let length = number(&mut rest)?;
        let (word, tail) = rest.split_at_checked(length)?;
        command.push(word.to_vec());
        rest = tail;
    }
    Some((command, rest.to_vec()))
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

    #[test]
    fn a_command_is_sealed_with_the_value_that_it_printed() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open(&dir.path().join("home")).unwrap();
        let secrets = Secrets::of(&home);
        let name: SecretName = "key".parse().unwrap();
        let command: SecretCommand = vec![b"print-it".to_vec(), b"".to_vec(), b"\xff".to_vec()];
        let info = secrets.set_with_command(&name, &value("hidden"), &command).unwrap();
        assert!(info.refreshable && secrets.list().unwrap()[0].refreshable);
        let (read, stored) = secrets.read(&name).unwrap();
        assert_eq!((read.expose(), stored), (&b"hidden"[..], Some(command)));
        assert_eq!(secrets.get(&name).unwrap().expose(), b"hidden");
        let path = home.secrets().join("key");
        let sealed = fs::read(&path).unwrap();
        for hidden in [&b"hidden"[..], b"print-it"] {
            assert!(!sealed.windows(hidden.len()).any(|bytes| bytes == hidden));
        }
        for at in 0..sealed.len() {
            for bit in [1, 3] {
                let mut changed = sealed.clone();
                changed[at] ^= bit;
                fs::write(&path, changed).unwrap();
                assert_eq!(secrets.get(&name).unwrap_err().code(), Code::StoreDamaged, "{at}");
            }
        }
        // Stored again without a command.
        assert!(!secrets.set(&name, &value("newer")).unwrap().refreshable);
        assert_eq!(secrets.read(&name).unwrap().1, None);
        let long = vec![vec![b'x'; COMMAND_BYTES_MAX]];
        assert_eq!(secrets.set_with_command(&name, &value("v"), &long).unwrap_err().code(), Code::SpecInvalid);
    }

    #[test]
    fn lengths_that_lie_are_no_command() {
        assert_eq!(decode(&[]), None);
        assert_eq!(decode(&[1, 0, 0, 0]), None);
        assert_eq!(decode(&[&[1, 0, 0, 0], &u32::MAX.to_le_bytes()[..], b"x"].concat()), None);
        assert_eq!(decode(&[&u32::MAX.to_le_bytes()[..], b"x"].concat()), None);
        assert_eq!(decode(&[0, 0, 0, 0, b'v']), Some((vec![], b"v".to_vec())));
    }
}
