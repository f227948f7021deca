//! The addresses that a guest has resolved names to, which rules for names need: a guest that is taken over, restored or copied uses
//! them without asking again.
//!
//! ```text
//!  network -- after a change --> names.json of the VM -- the next supervisor of the same QEMU
//!     └────── at a snapshot ───> names.json of the snapshot -- a restored VM; a copy gets it into its own directory
//! ```
//!
//! A pin permits nothing by itself: the rules decide at each connection, and one that is older than an hour is resolved again.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use nido_api::error::{Error, Result};
use nido_api::moment;
use nido_engine::home::{NAME_PINS, VmDir};
use nido_engine::snapshot;
use nido_files::atomic_file::{Durability, write_private};
use nido_net::names::PinRecord;
use nido_store::{Origin, VmRow};
use serde::{Deserialize, Serialize};

/// Version of [`StoredPins`].
const FORMAT: u32 = 1;
/// The longest file that is read, in bytes.
const MAX_BYTES: u64 = 2 << 20;

#[derive(Debug, Serialize, Deserialize)]
struct StoredPins {
    format: u32,
    /// When they were exported, in milliseconds since 1970.
    exported_ms: i64,
    pins: Vec<PinRecord>,
}

/// What a guest that starts, or is taken over, has resolved, and how long ago that was exported. One that boots has resolved nothing.
pub(super) fn of_start(row: &VmRow, dir: &VmDir, attach: bool) -> (Vec<PinRecord>, Duration) {
    let own = dir.file(NAME_PINS);
    let stored = match source(row, dir, attach) {
        Some(path) => read(&path).unwrap_or_else(|error| {
            tracing::warn!("what the guest has resolved cannot be read: {error}");
            None
        }),
        None => None,
    };
    let kept = match &stored {
        Some(stored) => encode(stored).and_then(|bytes| write(&own, &bytes)),
        None => match fs::remove_file(&own) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        },
    };
    if let Err(error) = kept {
        tracing::warn!("{error}");
    }
    stored.map(|stored| (stored.pins, age(stored.exported_ms, moment::now().as_millisecond()))).unwrap_or_default()
}

fn source(row: &VmRow, dir: &VmDir, attach: bool) -> Option<PathBuf> {
    match &row.origin {
        _ if attach => Some(dir.file(NAME_PINS)),
        Origin::Boot => None,
        Origin::Fork(saved) => saved.live.then(|| dir.file(NAME_PINS)),
        Origin::Restore { snapshot, .. } => Some(snapshot::dir(dir, snapshot).join(NAME_PINS)),
    }
}

/// A clock that was put back makes nothing younger than it is.
fn age(exported_ms: i64, now_ms: i64) -> Duration {
    u64::try_from(now_ms.saturating_sub(exported_ms)).map_or(Duration::MAX, Duration::from_millis)
}

/// `None` if there is no file.
fn read(path: &Path) -> Result<Option<StoredPins>> {
    let mut text = Vec::new();
    match fs::File::open(path) {
        Ok(file) => file.take(MAX_BYTES).read_to_end(&mut text).map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let stored: StoredPins = serde_json::from_slice(&text).map_err(|e| Error::internal(e.to_string()))?;
    Ok((stored.format == FORMAT).then_some(stored))
}

/// What is stored of pins that were exported now.
///
/// # Errors
/// `internal`.
pub(super) fn encode_new(pins: Vec<PinRecord>) -> Result<Vec<u8>> {
    encode(&StoredPins { format: FORMAT, exported_ms: moment::now().as_millisecond(), pins })
}

fn encode(stored: &StoredPins) -> Result<Vec<u8>> {
    serde_json::to_vec(stored).map_err(|e| Error::internal(e.to_string()))
}

/// Replaces a VM's file.
///
/// # Errors
/// `disk_full`, `internal`.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_private(path, bytes, Durability::Kill).map_err(failed)
}

fn failed(error: io::Error) -> Error {
    Error::io("what the guest has resolved cannot be stored", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_put_back_makes_pins_old() {
        assert_eq!(age(1_000, 3_500), Duration::from_millis(2_500));
        assert_eq!(age(3_500, 1_000), Duration::MAX);
    }

    #[test]
    fn files_of_another_format_are_ignored_and_damaged_ones_reported() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME_PINS);
        assert!(read(&path).unwrap().is_none());
        let pin = PinRecord { address: [192, 0, 2, 1].into(), name: "example.com".into(), age_seconds: 5 };
        write(&path, &encode_new(vec![pin.clone()]).unwrap()).unwrap();
        assert_eq!(read(&path).unwrap().unwrap().pins, [pin]);
        fs::write(&path, r#"{"format":2,"exported_ms":0,"pins":[]}"#).unwrap();
        assert!(read(&path).unwrap().is_none());
        fs::write(&path, "{").unwrap();
        read(&path).unwrap_err();
    }
}
