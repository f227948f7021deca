//! Arguments that are too long for a line, kept whole (and redacted) next to the log.
//!
//! ```text
//!  params/SHA256.json      named by its content; the line has the hash in `cut`
//! ```
//!
//! Invariants: the file is on the disk before the line that names it; a killed process leaves complete files and temporary ones, which the
//! next writer removes; all of them together are at most [`ALL_MAX`] bytes, the oldest go first. Their hashes, and both ends of
//! every argument, stay in the lines.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::SystemTime;

use nido_api::error::Result;
use nido_api::hex;
use nido_files::atomic_file::{self, Durability};
use nido_files::private_dir::make_private_dir;
use sha2::{Digest as _, Sha256};

use super::failed;
use super::log::Log;
use super::redact::OversizedArguments;

/// Where they are, in the log's directory.
const DIRECTORY: &str = "params";
/// The longest that is kept, in bytes.
const ARGUMENTS_BYTES_MAX: usize = 8 << 20;
/// How much is kept of all, in bytes.
const ALL_MAX: u64 = 256 << 20;
/// What a file is called until it is whole.
const TEMPORARY: &str = ".tmp";

impl Log {
    /// Keeps these arguments, and waits until they are on the disk.
    ///
    /// # Errors
    /// `audit_failed`.
    pub(super) fn keep_whole(&self, whole: &OversizedArguments) -> Result<()> {
        if whole.text.len() > ARGUMENTS_BYTES_MAX {
            return Ok(());
        }
        self.make_directory().map_err(|e| failed(self.directory().display(), e))?;
        let directory = self.directory().join(DIRECTORY);
        let kept = self.locked(|| keep(&directory, whole, ALL_MAX));
        kept.map_err(|e| failed(directory.display(), e))
    }

    /// The arguments of this hash; `None` if they are not kept, or are others. The hash comes from a line, which anyone may have written.
    pub(crate) fn whole(&self, sha256: &str) -> Option<String> {
        if sha256.len() != 64 || !sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let path = self.directory().join(DIRECTORY).join(format!("{sha256}.json"));
        let mut text = String::new();
        let most = ARGUMENTS_BYTES_MAX as u64 + 1;
        File::open(path).ok()?.take(most).read_to_string(&mut text).ok()?;
        (hex::encode(&Sha256::digest(text.as_bytes())) == sha256).then_some(text)
    }
}

fn keep(directory: &PathBuf, whole: &OversizedArguments, all_max: u64) -> io::Result<()> {
    make_private_dir(directory)?;
    let path = directory.join(format!("{}.json", whole.sha256));
    if std::fs::metadata(&path).is_ok_and(|meta| meta.len() == whole.text.len() as u64) {
        return Ok(());
    }
    make_room(directory, all_max.saturating_sub(whole.text.len() as u64))?;
    let temporary = directory.join(TEMPORARY);
    let mut file = OpenOptions::new();
    let mut file =
        file.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(&temporary)?;
    // One fixed name: the file of a killed writer is overwritten, and counts when room is made.
    let written = file.write_all(whole.text.as_bytes());
    written.and_then(|()| atomic_file::publish(&file, &temporary, &path, Durability::PowerCut)).inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    })
}

/// Removes the oldest until there are at most so many bytes.
fn make_room(directory: &PathBuf, most: u64) -> io::Result<()> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        files.push((meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), meta.len(), entry.path()));
    }
    files.sort();
    let mut bytes: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
    for (_, length, path) in files {
        if bytes <= most {
            break;
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => bytes -= length,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_arguments_are_bounded_and_the_newest_stay() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("params");
        for n in 0..10 {
            let whole = OversizedArguments { sha256: format!("{n}"), text: "x".repeat(100) };
            keep(&directory, &whole, 350).unwrap();
            keep(&directory, &whole, 350).unwrap();
            assert!(directory.join(format!("{n}.json")).exists());
            let bytes: u64 =
                std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
            assert!(bytes <= 350, "{bytes}");
        }
    }
}
