//! What export and import share: progress reports, cancellation, and hashing of files.
//! Invariant: work that was a stop was requested fails with [`ImageError::Interrupted`], whatever it was doing.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::digest::{sha256_of, sparse_sha256};
use crate::error::ImageError;
use crate::manifest::{Digest, Manifest, Part};

/// One report of an export or an import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferProgress {
    /// What is being worked on: the name of a part, or `publish`.
    pub stage: &'static str,
    /// Its number, from 1.
    pub index: usize,
    /// How many there are.
    pub total: usize,
    /// Bytes of the parts that are done, holes included.
    pub bytes: u64,
    /// Bytes of all parts.
    pub total_bytes: u64,
}

/// The progress callback and the cancellation of an export or import.
pub struct TransferWatch<'a> {
    /// Receives progress reports.
    pub progress: &'a mut dyn FnMut(TransferProgress),
    /// Set to stop it.
    pub cancel: &'a AtomicBool,
}

impl TransferWatch<'_> {
    /// Fails if it is to stop.
    pub(crate) fn check(&self) -> Result<(), ImageError> {
        if self.cancel.load(Ordering::Relaxed) { Err(ImageError::Interrupted) } else { Ok(()) }
    }

    /// What an I/O error means: if it is to stop, only that.
    pub(crate) fn failed(&self, action: &'static str, path: &Path, error: io::Error) -> ImageError {
        self.check().err().unwrap_or_else(|| ImageError::io(action, path, error))
    }

    /// The hash of a file's content, of the kind that its part has. The file is read from where it stands.
    pub(crate) fn hash(&self, file: &File, digest: Digest) -> io::Result<String> {
        let (hash, _) = match digest {
            Digest::Plain => sha256_of(CancellableReader { file, cancel: self.cancel })?,
            Digest::Sparse => sparse_sha256(file)?,
        };
        Ok(hash)
    }
}

struct CancellableReader<'a> {
    file: &'a File,
    cancel: &'a AtomicBool,
}

impl Read for CancellableReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(io::Error::other("a stop was requested"));
        }
        self.file.read(buffer)
    }
}

/// A part as it travels: content that several places of a manifest name travels once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TransferPart {
    /// The first place that names it.
    pub name: &'static str,
    /// Hash and length.
    pub part: Part,
    /// The kind of its hash.
    pub digest: Digest,
}

/// The parts of a template in the order in which they travel.
pub(crate) fn pieces(manifest: &Manifest) -> Vec<TransferPart> {
    let mut pieces: Vec<TransferPart> = Vec::new();
    for (name, part, digest) in manifest.all_parts() {
        if pieces.iter().all(|piece| piece.part.sha256 != part.sha256) {
            pieces.push(TransferPart { name, part: part.clone(), digest });
        }
    }
    pieces
}
