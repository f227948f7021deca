//! Whatever is changed in an archive: the import yields the same template, or nothing.

use std::sync::LazyLock;

use proptest::prelude::*;

use super::rig::{Rig, compress};
use crate::error::ImageError;
use crate::import::ImportOptions;
use crate::store::Store;

/// One change of a range of bytes. Places and lengths are fractions, for archives differ in length.
#[derive(Debug, Clone)]
enum Change {
    Flip { bit: u8 },
    Set { byte: u8 },
    Cut { length: usize },
    Insert { bytes: Vec<u8> },
    Duplicate { length: usize },
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (0_u8..8).prop_map(|bit| Change::Flip { bit }),
        any::<u8>().prop_map(|byte| Change::Set { byte }),
        (1_usize..200).prop_map(|length| Change::Cut { length }),
        proptest::collection::vec(any::<u8>(), 1..60).prop_map(|bytes| Change::Insert { bytes }),
        (1_usize..200).prop_map(|length| Change::Duplicate { length }),
    ]
}

fn apply(bytes: &mut Vec<u8>, at: usize, change: &Change) {
    let at = at.min(bytes.len().saturating_sub(1));
    let end = |length: usize| (at + length).min(bytes.len());
    match change {
        Change::Flip { bit } => bytes[at] ^= 1 << bit,
        Change::Set { byte } => bytes[at] = *byte,
        Change::Cut { length } => drop(bytes.drain(at..end(*length))),
        Change::Insert { bytes: new } => drop(bytes.splice(at..at, new.iter().copied())),
        Change::Duplicate { length } => {
            let range = bytes[at..end(*length)].to_vec();
            drop(bytes.splice(at..at, range));
        }
    }
}

static FROM: LazyLock<Rig> = LazyLock::new(Rig::small);
static ARCHIVE: LazyLock<Vec<u8>> = LazyLock::new(|| FROM.archive());
static INSIDE: LazyLock<Vec<u8>> = LazyLock::new(|| zstd::decode_all(&ARCHIVE[..]).unwrap());

/// Where to change something: anywhere, or where the frames are dense.
fn place(length: usize) -> impl Strategy<Value = usize> {
    let edge = 5000.min(length);
    prop_oneof![0..length, 0..edge, length - edge..length]
}

fn the_template_or_nothing(archive: &[u8]) {
    let to = Rig::empty();
    match to.import(archive, &ImportOptions::default()) {
        Ok(arrived) => {
            assert_eq!(arrived.manifest, FROM.manifest);
            assert_eq!(Store::new(to.home()).verify("sandbox").unwrap(), FROM.manifest);
        }
        Err(ImageError::ArchiveRefused { .. }) => {
            assert_eq!(to.home().join("blobs/sha256").read_dir().unwrap().count(), 0);
        }
        Err(other) => panic!("{other}"),
    }
    assert_eq!(to.leftovers(), [""; 0]);
}

proptest! {
    #[test]
    fn a_changed_archive_is_the_template_or_nothing(
        changes in proptest::collection::vec((place(ARCHIVE.len()), change()), 1..4),
    ) {
        let mut archive = ARCHIVE.clone();
        changes.iter().for_each(|(at, change)| apply(&mut archive, *at, change));
        the_template_or_nothing(&archive);
    }

    /// Past the checksum of the compression, which an attacker gets right.
    #[test]
    fn changed_frames_are_the_template_or_nothing(
        changes in proptest::collection::vec((place(INSIDE.len()), change()), 1..4),
    ) {
        let mut inside = INSIDE.clone();
        changes.iter().for_each(|(at, change)| apply(&mut inside, *at, change));
        the_template_or_nothing(&compress(&inside));
    }
}
