//! The count of the bytes that a guest has sent and received since its start, as the VM's directory keeps it.
//!
//! ```text
//!  a user starts the VM, a copy, a restored VM -> from zero
//!  the next supervisor of the same QEMU        -> continues
//!  a start by the VM's restart policy          -> continues: a guest that powers itself off is not given more
//! ```
//!
//! Invariant: a count that cannot be read counts as if the VM's limits were reached.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nido_api::NetLimits;
use nido_api::error::{Error, Result};
use nido_engine::home::{TRAFFIC, VmDir};
use nido_net::traffic::decode;
use nido_net::{Count, TrafficFile};

/// The count from which a network starts, and where it is kept.
///
/// # Errors
/// `disk_full`, `internal`: the file cannot be opened or written.
pub(super) fn of_start(dir: &VmDir, limits: &NetLimits, continues: bool) -> Result<(Count, TrafficFile)> {
    open(&dir.file(TRAFFIC), limits, continues)
        .map_err(|error| Error::io("cannot open the count of the network's bytes", error))
}

fn open(path: &Path, limits: &NetLimits, continues: bool) -> io::Result<(Count, TrafficFile)> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)?;
    let count = if continues { stored(&mut file, limits)? } else { Count::default() };
    let file = TrafficFile::new(file);
    file.write(count)?;
    Ok((count, file))
}

fn stored(file: &mut File, limits: &NetLimits) -> io::Result<Count> {
    let mut content = Vec::new();
    // One byte more than there should be: what is longer is damaged.
    file.take(TrafficFile::LENGTH as u64 + 1).read_to_end(&mut content)?;
    // An earlier version kept no count.
    if content.is_empty() {
        return Ok(Count::default());
    }
    Ok(decode(&content).unwrap_or_else(|| {
        tracing::error!("the count of the network's bytes is damaged: limits of bytes count as reached");
        Count { sent: limits.sent_bytes.unwrap_or(0), received: limits.received_bytes.unwrap_or(0) }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_continued_or_starts_again_and_a_damaged_one_is_over_its_limits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(TRAFFIC);
        let limits = NetLimits { sent_bytes: Some(9), ..NetLimits::default() };
        let count = Count { sent: 3, received: 4 };
        let (first, file) = open(&path, &limits, true).unwrap();
        assert_eq!(first, Count::default());
        file.write(count).unwrap();
        assert_eq!(open(&path, &limits, true).unwrap().0, count);
        assert_eq!(open(&path, &limits, false).unwrap().0, Count::default());
        assert_eq!(open(&path, &limits, true).unwrap().0, Count::default());
        for damaged in ["x".to_owned(), "traffic 1 2".to_owned(), "x".repeat(100)] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(open(&path, &limits, true).unwrap().0, Count { sent: 9, received: 0 });
        }
    }
}
