//! SHA-256 in lower-case hexadecimal, of bytes and of streams. Invariant: always 64 characters of `0-9a-f`.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;

use nido_api::hex;
use rustix::fs::SeekFrom;
use sha2::{Digest, Sha256};

/// SHA-256 of `bytes`.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(&Sha256::digest(bytes))
}

/// SHA-256 of everything `reader` yields, and how many bytes that were.
///
/// # Errors
/// Whatever reading fails with.
pub fn sha256_of(mut reader: impl Read) -> io::Result<(String, u64)> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut bytes = 0;
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok((hex::encode(&hash.finalize()), bytes)),
            count => {
                hash.update(&buffer[..count]);
                bytes += count as u64;
            }
        }
    }
}

/// The blocks in which sparse files are looked at, in bytes.
pub const SPARSE_BLOCK: usize = 4096;

/// Hash of a file that is mostly zeros, and how many bytes of it are not: over its length, then the offset and the content
/// of each block of [`SPARSE_BLOCK`] bytes that is not all zero. Holes are not read; where they lie does not matter.
///
/// # Errors
/// Whatever reading fails with.
pub fn sparse_sha256(file: &File) -> io::Result<(String, u64)> {
    let length = file.metadata()?.len();
    let mut hash = Sha256::new();
    hash.update(length.to_be_bytes());
    let mut buffer = vec![0; 256 * SPARSE_BLOCK];
    let (mut at, mut data_bytes) = (0, 0);
    while let Some(start) = next_data(file, at)? {
        at = start - start % SPARSE_BLOCK as u64;
        let hole = next_hole(file, start)?.next_multiple_of(SPARSE_BLOCK as u64).min(length);
        while at < hole {
            let wanted = usize::try_from(hole - at).unwrap_or(usize::MAX).min(buffer.len());
            let piece = &mut buffer[..wanted];
            file.read_exact_at(piece, at)?;
            for block in piece.chunks(SPARSE_BLOCK) {
                if block.iter().any(|byte| *byte != 0) {
                    hash.update(at.to_be_bytes());
                    hash.update(block);
                    data_bytes += block.len() as u64;
                }
                at += block.len() as u64;
            }
        }
    }
    Ok((hex::encode(&hash.finalize()), data_bytes))
}

/// Where data begins at or after `from`; `None` if only a hole is left.
pub(crate) fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(at) => Ok(Some(at)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn next_hole(file: &File, from: u64) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::Hole(from))?)
}

/// Whether `text` is a SHA-256 as this project writes it. Checked before a hash becomes part of a path.
#[must_use]
pub fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The bytes of a SHA-256 written in hexadecimal; `None` if it is not one.
pub(crate) fn unhex(text: &str) -> Option<[u8; 32]> {
    if !is_sha256(text) {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_empty_input_has_its_known_hash() {
        let known = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(sha256(b""), known);
        assert_eq!(sha256_of(&b""[..]).unwrap(), (known.to_owned(), 0));
        assert!(is_sha256(known));
        assert_eq!(hex::encode(&unhex(known).unwrap()), known);
    }

    #[test]
    fn holes_and_zeros_are_the_same() {
        let (block, full) = (SPARSE_BLOCK as u64, vec![7; 3 * SPARSE_BLOCK]);
        let with = |writes: &[(&[u8], u64)], length: u64| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(length).unwrap();
            writes.iter().for_each(|(bytes, at)| file.write_all_at(bytes, *at).unwrap());
            sparse_sha256(&file).unwrap()
        };
        let sparse = with(&[(&full, 40 * block)], 1 << 30);
        assert_eq!(sparse.1, 3 * block);
        assert_eq!(with(&[(&vec![0; 20 * SPARSE_BLOCK], 30 * block), (&full, 40 * block)], 1 << 30), sparse);
        assert_ne!(with(&[(&full, 41 * block)], 1 << 30), sparse);
        assert_ne!(with(&[(&full, 40 * block)], (1 << 30) + 1), sparse);
        assert_eq!(with(&[(b"x", 5000)], 5001).1, 5001 - block);
    }

    #[test]
    fn only_hashes_pass_for_hashes() {
        assert!(!is_sha256("../../etc/passwd"));
        assert!(!is_sha256(&"A".repeat(64)));
        assert!(!is_sha256(&"a".repeat(63)));
        assert_eq!(unhex(&"A".repeat(64)), None);
    }
}
