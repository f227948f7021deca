//! The archive of an exported template: its frames as bytes, and what they may contain. Pure. `docs/template-format.md` is the
//! same for people.
//!
//! ```text
//!  one zstd frame with a checksum, nothing behind it:
//!    head      magic, version, length of the manifest, SHA-256 of the manifest
//!    manifest  the JSON of `templates/NAME.json`
//!    for each part the manifest names, in its order, each hash once:
//!      part    hash, length
//!      extent  offset, length, and so many bytes ──┐ any number, ascending; what lies between them is zeros
//!      part end                                  <─┘
//!    end
//! ```
//!
//! Numbers are big-endian. Extents begin and end at multiples of [`BLOCK`] (or end where the part ends), hold no block that
//! is all zero, and are split at multiples of [`MAX_EXTENT_BYTES`] and nowhere else: every content has one form.
//!
//! Invariant: no name, path or number in an archive decides where anything is written; a hash is only ever compared with
//! what the manifest states.

/// The first bytes of an archive, unpacked.
pub const MAGIC: [u8; 8] = *b"NIDOTMPL";
/// The version of the format that this program writes, and the only one it reads.
pub const VERSION: u32 = 1;
/// Length of the head in bytes.
pub const HEAD_BYTES: usize = 8 + 4 + 4 + 32;
/// Longest manifest in bytes.
pub const MAX_MANIFEST_BYTES: u32 = 1024 * 1024;
/// The grain of holes in bytes.
pub const BLOCK: u64 = 64 * 1024;
/// Longest extent in bytes.
pub const MAX_EXTENT_BYTES: u32 = 1024 * 1024;
/// Largest window a decoder has to hold, as a power of two: that of level 19.
pub const WINDOW_LOG: u32 = 23;

/// What an archive begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Length of the manifest that follows.
    pub manifest_bytes: u32,
    /// Its hash.
    pub manifest_sha256: [u8; 32],
}

/// One frame behind the manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A part begins.
    Part {
        /// Its hash.
        sha256: [u8; 32],
        /// Its length in bytes, holes included.
        bytes: u64,
    },
    /// Content of the part; the bytes follow the frame.
    Extent {
        /// Where in the part.
        offset: u64,
        /// How many bytes, 1 to [`MAX_EXTENT_BYTES`].
        length: u32,
    },
    /// The part is complete.
    PartEnd,
    /// The archive is complete.
    End,
}

const TAG_PART: u8 = 1;
const TAG_EXTENT: u8 = 2;
const TAG_PART_END: u8 = 3;
const TAG_END: u8 = 4;

impl Head {
    /// The head of an archive with this manifest.
    #[must_use]
    pub fn of(manifest: &[u8]) -> Self {
        use sha2::Digest as _;
        let manifest_bytes = u32::try_from(manifest.len()).unwrap_or(u32::MAX);
        Self { manifest_bytes, manifest_sha256: sha2::Sha256::digest(manifest).into() }
    }

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_be_bytes());
        bytes.extend(self.manifest_bytes.to_be_bytes());
        bytes.extend(self.manifest_sha256);
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn decode(bytes: &[u8; HEAD_BYTES]) -> Result<Self, String> {
        if bytes[..8] != MAGIC {
            return Err("it is not a template".to_owned());
        }
        let version = be32(&bytes[8..]);
        if version != VERSION {
            return Err(format!("its format version is {version}, this program reads {VERSION}"));
        }
        let manifest_bytes = be32(&bytes[12..]);
        if manifest_bytes > MAX_MANIFEST_BYTES {
            return Err(format!("its manifest of {manifest_bytes} bytes is longer than {MAX_MANIFEST_BYTES}"));
        }
        let mut manifest_sha256 = [0; 32];
        manifest_sha256.copy_from_slice(&bytes[16..]);
        Ok(Self { manifest_bytes, manifest_sha256 })
    }
}

impl Frame {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Part { sha256, bytes } => [&[TAG_PART][..], sha256, &bytes.to_be_bytes()].concat(),
            Self::Extent { offset, length } => {
                [&[TAG_EXTENT][..], &offset.to_be_bytes(), &length.to_be_bytes()].concat()
            }
            Self::PartEnd => vec![TAG_PART_END],
            Self::End => vec![TAG_END],
        }
    }

    /// How many bytes of a frame follow its first.
    ///
    /// # Errors
    /// There is no such frame.
    pub fn body_bytes(tag: u8) -> Result<usize, String> {
        match tag {
            TAG_PART => Ok(32 + 8),
            TAG_EXTENT => Ok(8 + 4),
            TAG_PART_END | TAG_END => Ok(0),
            other => Err(format!("it holds a frame of the unknown kind {other}")),
        }
    }

    /// From the first byte and the [`Frame::body_bytes`] behind it.
    ///
    /// # Errors
    /// There is no such frame.
    pub fn decode(tag: u8, body: &[u8]) -> Result<Self, String> {
        if body.len() != Self::body_bytes(tag)? {
            return Err("it holds a frame of the wrong length".to_owned());
        }
        Ok(match tag {
            TAG_PART => {
                let mut sha256 = [0; 32];
                sha256.copy_from_slice(&body[..32]);
                Self::Part { sha256, bytes: be64(&body[32..]) }
            }
            TAG_EXTENT => Self::Extent { offset: be64(body), length: be32(&body[8..]) },
            TAG_PART_END => Self::PartEnd,
            _ => Self::End,
        })
    }

    /// What it is, for a sentence.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Part { sha256, .. } => format!("the part {}…", &nido_api::hex::encode(sha256)[..12]),
            Self::Extent { .. } => "content of a part".to_owned(),
            Self::PartEnd => "the end of a part".to_owned(),
            Self::End => "the end".to_owned(),
        }
    }
}

/// Judges the extents of one part, one after the other.
#[derive(Debug)]
pub struct Extents {
    /// Length of the part.
    part_bytes: u64,
    /// Where the last extent ended.
    end: u64,
}

impl Extents {
    /// None yet, of a part of so many bytes.
    #[must_use]
    pub const fn of(part_bytes: u64) -> Self {
        Self { part_bytes, end: 0 }
    }

    /// Whether an extent may follow those before.
    ///
    /// # Errors
    /// Why not.
    pub fn admit(&mut self, offset: u64, length: u32) -> Result<(), String> {
        let end = offset.checked_add(u64::from(length)).filter(|end| *end <= self.part_bytes);
        let Some(end) = end else { return Err("an extent reaches past the end of its part".to_owned()) };
        if length == 0 || length > MAX_EXTENT_BYTES {
            return Err(format!("an extent of {length} bytes is outside the format"));
        }
        if offset < self.end {
            return Err("its extents overlap or are out of order".to_owned());
        }
        if !offset.is_multiple_of(BLOCK) || (!end.is_multiple_of(BLOCK) && end != self.part_bytes) {
            return Err("an extent does not lie on blocks".to_owned());
        }
        let window = u64::from(MAX_EXTENT_BYTES);
        if offset / window != (end - 1) / window || (offset == self.end && !offset.is_multiple_of(window)) {
            return Err("its extents are not split where they should be".to_owned());
        }
        self.end = end;
        Ok(())
    }
}

/// Whether a block holds nothing but zeros.
#[must_use]
pub fn is_zero(block: &[u8]) -> bool {
    let mut words = block.chunks_exact(16);
    words.by_ref().all(|word| u128::from_ne_bytes(word.try_into().unwrap_or([1; 16])) == 0)
        && words.remainder().iter().all(|byte| *byte == 0)
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |field| u32::from_be_bytes(*field))
}

fn be64(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |field| u64::from_be_bytes(*field))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_frame_survives_its_bytes(sha256: [u8; 32], bytes: u64, offset: u64, length: u32) {
            for frame in [Frame::Part { sha256, bytes }, Frame::Extent { offset, length }, Frame::PartEnd, Frame::End] {
                let encoded = frame.encode();
                prop_assert_eq!(encoded.len() - 1, Frame::body_bytes(encoded[0]).unwrap());
                prop_assert_eq!(Frame::decode(encoded[0], &encoded[1..]).unwrap(), frame);
            }
        }

        #[test]
        fn no_bytes_make_a_frame_panic(tag: u8, body: Vec<u8>) {
            let _ = Frame::decode(tag, &body);
        }

        #[test]
        fn admitted_extents_ascend_inside_the_part(
            part in 0_u64..2_000_000,
            extents in proptest::collection::vec((0_u64..40, 0_u32..1_200_000), 0..12),
        ) {
            let (mut judge, mut end) = (Extents::of(part), 0);
            for (block, length) in extents {
                let offset = block * BLOCK;
                if judge.admit(offset, length).is_ok() {
                    prop_assert!(offset >= end && length > 0);
                    end = offset + u64::from(length);
                    prop_assert!(end <= part);
                }
            }
        }

        #[test]
        fn zero_blocks_are_recognized(length in 0_usize..100, at in 0_usize..100) {
            let mut block = vec![0; length];
            prop_assert!(is_zero(&block));
            if let Some(byte) = block.get_mut(at) {
                *byte = 1;
                prop_assert!(!is_zero(&block));
            }
        }
    }

    #[test]
    fn extents_outside_the_format_are_refused() {
        let refused = |offset, length| Extents::of(3 * BLOCK + 5).admit(offset, length).unwrap_err();
        assert!(refused(u64::MAX, 2).contains("past the end"));
        assert!(refused(3 * BLOCK, 6).contains("past the end"));
        assert!(refused(0, 0).contains("outside"));
        assert!(refused(5, 65536).contains("blocks"));
        assert!(refused(0, 100).contains("blocks"));
        assert!(Extents::of(3 * BLOCK + 5).admit(3 * BLOCK, 5).is_ok());
        assert!(Extents::of(1 << 30).admit(15 * BLOCK, 131_072).unwrap_err().contains("split"));
        let mut parted = Extents::of(1 << 30);
        assert!(parted.admit(14 * BLOCK, 65536).is_ok());
        assert!(parted.admit(15 * BLOCK, 65536).unwrap_err().contains("split"));
        let mut joined = Extents::of(1 << 30);
        assert!(joined.admit(15 * BLOCK, 65536).is_ok() && joined.admit(16 * BLOCK, 65536).is_ok());
        assert!(Extents::of(u64::MAX).admit(0, MAX_EXTENT_BYTES + 65536).unwrap_err().contains("outside"));
    }

    #[test]
    fn heads_of_something_else_are_refused() {
        let head: [u8; HEAD_BYTES] = Head::of(b"{}").encode().try_into().unwrap();
        assert_eq!(Head::decode(&head).unwrap(), Head::of(b"{}"));
        let with = |at: usize, byte: u8| {
            let mut other = head;
            other[at] = byte;
            Head::decode(&other)
        };
        assert!(with(0, b'X').unwrap_err().contains("not a template"));
        assert!(with(11, 2).unwrap_err().contains("version is 2, this program reads 1"));
        assert!(with(12, 1).unwrap_err().contains("longer"));
    }

    #[test]
    fn fuzz_template_archive_frames() {
        let frames = [
            Frame::Part { sha256: [1; 32], bytes: 70_000 },
            Frame::Extent { offset: 0, length: 65_536 },
            Frame::PartEnd,
            Frame::End,
        ];
        let seed = [Head::of(b"{}").encode(), frames.iter().flat_map(Frame::encode).collect()].concat();
        nido_fuzz::fuzz("template-archive-frames", &[seed], |input| {
            let Some((head, mut rest)) = input.split_first_chunk::<HEAD_BYTES>() else { return };
            if let Ok(head) = Head::decode(head) {
                assert!(head.manifest_bytes <= MAX_MANIFEST_BYTES);
            }
            while let Some((tag, body)) = rest.split_first() {
                let Ok(length) = Frame::body_bytes(*tag) else { return };
                let Some((body, after)) = body.split_at_checked(length) else { return };
                let frame = Frame::decode(*tag, body).unwrap();
                assert_eq!(frame.encode(), rest[..=length]);
                rest = after;
            }
        });
    }
}
