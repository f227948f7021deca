//! Checks a qcow2 header before anything opens the image: an image that names another file of the host, or asks for
//! something unknown, is refused. Pure but for reading the first bytes. Invariant: no input makes it panic or read out of range.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use crate::error::ImageError;

/// How clusters of an image may be compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Deflate, the format's first.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// The content of a safe header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Qcow2Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of the disk the guest sees, in bytes.
    pub virtual_bytes: u64,
    /// Size of a cluster in bytes, a power of two from 512 to 2 MiB.
    pub cluster_bytes: u32,
    /// How compressed clusters are packed.
    pub compression: Compression,
}

/// The content of the header of a safe overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// The image itself.
    pub header: Qcow2Header,
    /// The file it stands on, as it is named there. To be judged before anything opens the image without naming another.
    pub backing: String,
}

/// As much of a file as the header may need: extensions end with the first cluster, and ours are far shorter.
const HEAD_BYTES: u64 = 64 * 1024;

const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

/// Longest name of a backing file in bytes: the format's own limit.
const MAX_BACKING_NAME: usize = 1023;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;

/// Reads the header of the regular file at `path` and refuses what is not safe.
///
/// # Errors
/// [`ImageError::ImageRefused`] with the reason, [`ImageError::Io`] if the file cannot be read.
pub fn read_qcow2_header(path: &Path) -> Result<Qcow2Header, ImageError> {
    read_head(path, parse)
}

/// As [`read_qcow2_header`] for an overlay: an image that names a qcow2 file it stands on, and nothing else.
///
/// # Errors
/// As there.
pub fn read_overlay_header(path: &Path) -> Result<Overlay, ImageError> {
    read_head(path, parse_overlay)
}

fn read_head<T>(path: &Path, parse: impl FnOnce(&[u8]) -> Result<T, String>) -> Result<T, ImageError> {
    let refused = |reason: String| ImageError::ImageRefused { path: path.to_owned(), reason };
    let unreadable = |error| ImageError::io("read", path, error);
    // Asked before opening, so that a FIFO cannot block the open.
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(refused("it is not a regular file".to_owned()));
    }
    let mut head = Vec::new();
    File::open(path).and_then(|file| file.take(HEAD_BYTES).read_to_end(&mut head)).map_err(unreadable)?;
    parse(&head).map_err(refused)
}

/// Judges the first bytes of an image (64 KiB, or the whole file if it is shorter).
///
/// # Errors
/// A sentence with the reason for the refusal.
pub fn parse(head: &[u8]) -> Result<Qcow2Header, String> {
    // A reference to another file is reported first: it is the worst.
    if head.get(..4) == Some(b"QFI\xfb") && backing_range(head)? != (0, 0) {
        return Err("it names a backing file".to_owned());
    }
    let (header, format) = parse_own(head)?;
    match format {
        None => Ok(header),
        Some(_) => Err("it names the format of a backing file".to_owned()),
    }
}

/// Judges the first bytes of an overlay (64 KiB, or the whole file if it is shorter).
///
/// # Errors
/// A sentence with the reason for the refusal.
pub fn parse_overlay(head: &[u8]) -> Result<Overlay, String> {
    let (header, format) = parse_own(head)?;
    let (offset, length) = backing_range(head)?;
    if (offset, length) == (0, 0) {
        return Err("it names no backing file".to_owned());
    }
    if format != Some(b"qcow2".as_slice()) {
        return Err("it does not name qcow2 as the format of its backing file".to_owned());
    }
    let name = usize::try_from(offset).ok().and_then(|start| head.get(start..)?.get(..length as usize));
    let name = name.filter(|name| (1..=MAX_BACKING_NAME).contains(&name.len()));
    let backing = name.and_then(|name| str::from_utf8(name).ok()).ok_or("the name of its backing file is malformed")?;
    Ok(Overlay { header, backing: backing.to_owned() })
}

/// Where the name of the backing file is and how long; zeros if there is none.
fn backing_range(head: &[u8]) -> Result<(u64, u32), String> {
    be64(head, 8).zip(be32(head, 16)).ok_or_else(|| "its header is truncated".to_owned())
}

/// Everything but the name of the backing file: the header, and the format of the backing file if it is named.
fn parse_own(head: &[u8]) -> Result<(Qcow2Header, Option<&[u8]>), String> {
    let cut = || "its header is truncated".to_owned();
    let word = |at: usize| be32(head, at).ok_or_else(cut);
    let long = |at: usize| be64(head, at).ok_or_else(cut);

    if head.get(..4) != Some(b"QFI\xfb") {
        return Err("it is not a qcow2 image".to_owned());
    }
    let version = word(4)?;
    let cluster_bits = word(20)?;
    if !(9..=21).contains(&cluster_bits) {
        return Err(format!("its clusters of 2^{cluster_bits} bytes are outside the format"));
    }
    let virtual_bytes = long(24)?;
    if word(32)? != 0 {
        return Err("it is encrypted".to_owned());
    }
    if word(60)? != 0 {
        return Err("it holds internal snapshots".to_owned());
    }
    let (compression, extensions) = match version {
        2 => (Compression::Zlib, 72),
        3 => version_3(head)?,
        other => return Err(format!("its format version {other} is unknown")),
    };
    let format = check_extensions(head, extensions)?;
    Ok((Qcow2Header { version, virtual_bytes, cluster_bytes: 1 << cluster_bits, compression }, format))
}

/// The fields that version 3 added: how clusters are compressed, and where the extensions start.
fn version_3(head: &[u8]) -> Result<(Compression, usize), String> {
    let cut = || "its header is truncated".to_owned();
    let incompatible = be64(head, 72).ok_or_else(cut)?;
    if incompatible & 1 << 2 != 0 {
        return Err("it keeps its data in another file".to_owned());
    }
    if incompatible & 0b11 != 0 {
        return Err("it was not closed cleanly".to_owned());
    }
    if incompatible & !(INCOMPATIBLE_COMPRESSION | INCOMPATIBLE_EXTENDED_L2) != 0 {
        return Err(format!("it needs unsupported features ({incompatible:#x})"));
    }
    let length = be32(head, 100).ok_or_else(cut)? as usize;
    if length < 104 || !length.is_multiple_of(8) || length > head.len() {
        return Err(format!("its header length {length} is outside the format"));
    }
    let kind = if length > 104 { *head.get(104).ok_or_else(cut)? } else { 0 };
    match (kind, incompatible & INCOMPATIBLE_COMPRESSION != 0) {
        (0, false) => Ok((Compression::Zlib, length)),
        (1, true) => Ok((Compression::Zstd, length)),
        _ => Err(format!("its compression type {kind} is unknown")),
    }
}

/// Walks the extensions; the format of the backing file, if one names it.
fn check_extensions(head: &[u8], mut at: usize) -> Result<Option<&[u8]>, String> {
    let mut format = None;
    loop {
        // A version 2 image made by old tools may end right after its header.
        let Some(kind) = be32(head, at) else { return Err("its header extensions do not end".to_owned()) };
        let length = be32(head, at + 4).unwrap_or(0) as usize;
        match kind {
            EXTENSION_END => return Ok(format),
            EXTENSION_BACKING_FORMAT => {
                format = Some(head.get(at + 8..).and_then(|rest| rest.get(..length)).unwrap_or(&[]));
            }
            EXTENSION_FEATURE_NAMES | EXTENSION_BITMAPS => {}
            other => return Err(format!("its header extension {other:#010x} is not allowed")),
        }
        at = length.checked_next_multiple_of(8).and_then(|padded| at.checked_add(8 + padded)).unwrap_or(usize::MAX - 8);
    }
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|field| u32::from_be_bytes(*field))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|field| u64::from_be_bytes(*field))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image() -> Vec<u8> {
        let mut head = vec![0; 512];
        head[..4].copy_from_slice(b"QFI\xfb");
        head[4..8].copy_from_slice(&3_u32.to_be_bytes());
        head[20..24].copy_from_slice(&16_u32.to_be_bytes());
        head[24..32].copy_from_slice(&(2_u64 << 30).to_be_bytes());
        head[72..80].copy_from_slice(&INCOMPATIBLE_COMPRESSION.to_be_bytes());
        head[100..104].copy_from_slice(&112_u32.to_be_bytes());
        head[104] = 1;
        head
    }

    fn with(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut head = image();
        head[at..at + bytes.len()].copy_from_slice(bytes);
        head
    }

    #[test]
    fn a_plain_zstd_image_is_read() {
        let expected =
            Qcow2Header { version: 3, virtual_bytes: 2 << 30, cluster_bytes: 65536, compression: Compression::Zstd };
        assert_eq!(parse(&image()), Ok(expected));
    }

    #[test]
    fn images_that_reach_outside_are_refused() {
        let cases: [(usize, &[u8], &str); 8] = [
            (8, &512_u64.to_be_bytes(), "backing file"),
            (16, &9_u32.to_be_bytes(), "backing file"),
            (72, &(1_u64 << 2 | 8).to_be_bytes(), "another file"),
            (72, &(1_u64 << 40 | 8).to_be_bytes(), "unsupported features"),
            (112, &EXTENSION_BACKING_FORMAT.to_be_bytes(), "backing file"),
            (112, &0x4441_5441_u32.to_be_bytes(), "not allowed"),
            (32, &2_u32.to_be_bytes(), "encrypted"),
            (60, &1_u32.to_be_bytes(), "snapshots"),
        ];
        for (at, bytes, reason) in cases {
            let error = parse(&with(at, bytes)).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }

    /// The same image as an overlay on `backing`.
    fn overlay(format: &[u8], backing: &[u8]) -> Vec<u8> {
        let mut head = with(112, &EXTENSION_BACKING_FORMAT.to_be_bytes());
        head[8..16].copy_from_slice(&256_u64.to_be_bytes());
        head[16..20].copy_from_slice(&u32::try_from(backing.len()).unwrap().to_be_bytes());
        head[116..120].copy_from_slice(&u32::try_from(format.len()).unwrap().to_be_bytes());
        head[120..120 + format.len()].copy_from_slice(format);
        head[256..256 + backing.len()].copy_from_slice(backing);
        head
    }

    #[test]
    fn an_overlay_names_a_qcow2_file_and_is_no_plain_image() {
        let read = parse_overlay(&overlay(b"qcow2", b"../base")).unwrap();
        assert_eq!((read.backing.as_str(), read.header), ("../base", parse(&image()).unwrap()));
        assert!(parse(&overlay(b"qcow2", b"../base")).unwrap_err().contains("backing file"));
        assert!(parse_overlay(&image()).unwrap_err().contains("no backing file"));
        for (format, backing) in [(&b"raw"[..], &b"base"[..]), (b"", b"base"), (b"qcow2", b""), (b"qcow2", b"\xff")] {
            assert!(parse_overlay(&overlay(format, backing)).is_err(), "{format:?} {backing:?}");
        }
        let mut far = overlay(b"qcow2", b"base");
        far[8..16].copy_from_slice(&u64::MAX.to_be_bytes());
        assert!(parse_overlay(&far).unwrap_err().contains("malformed"));
    }

    proptest! {
        #[test]
        fn no_header_makes_the_parser_panic(mut head: Vec<u8>, version in 2_u32..4) {
            let _ = (parse(&head), parse_overlay(&head));
            head.resize(head.len().max(120), 0);
            head[..4].copy_from_slice(b"QFI\xfb");
            head[4..8].copy_from_slice(&version.to_be_bytes());
            let _ = (parse(&head), parse_overlay(&head));
        }

        #[test]
        fn a_changed_byte_never_lets_another_file_in(at in 0_usize..512, value: u8) {
            let head = with(at, &[value]);
            if parse(&head).is_ok() {
                prop_assert_eq!(&head[8..20], &[0; 12][..]);
                prop_assert_eq!(head[79] & 0b111, 0);
            }
        }
    }

    #[test]
    fn fuzz_qcow2_header() {
        let mut overlay = image();
        let backing = b"../base";
        overlay[8..16].copy_from_slice(&400_u64.to_be_bytes());
        overlay[16..20].copy_from_slice(&7_u32.to_be_bytes());
        overlay[112..116].copy_from_slice(&0xe279_2aca_u32.to_be_bytes());
        overlay[116..120].copy_from_slice(&5_u32.to_be_bytes());
        overlay[120..125].copy_from_slice(b"qcow2");
        overlay[400..407].copy_from_slice(backing);
        nido_fuzz::fuzz("qcow2", &[image(), overlay], |input| {
            // What is taken for a disk of its own names no other file.
            if parse(input).is_ok() {
                assert_eq!(input[8..16], [0; 8]);
            }
            let _ = parse_overlay(input);
        });
    }
}
