//! A VM's disk: an empty qcow2 overlay on its template's backing layer.
//!
//! Written here rather than by `qemu-img create`, which costs a process of 15 to 30 ms for what is four small clusters.
//! The layout is QEMU's `docs/interop/qcow2.txt`, version 3:
//!
//! ```text
//!  cluster 0   header, backing format, backing file name
//!  cluster 1   refcount table -> cluster 2
//!  cluster 2   refcount block: clusters 0..n are used once
//!  cluster 3.. L1 table, all zero: everything is read from the backing file
//! ```
//!
//! Invariant: the backing file is named with its format, so no program probes the format of data that a guest wrote.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// What one L1 entry covers: a cluster full of 8-byte entries, each a cluster.
const L1_REACH: u64 = CLUSTER * (CLUSTER / 8);
const HEADER_LENGTH: u32 = 104;
const BACKING_FORMAT_EXTENSION: u32 = 0xe279_2aca;

/// The bytes of an empty overlay of `virtual_bytes` on the qcow2 file `backing`. Pure.
///
/// `virtual_bytes` is rounded up to whole 512-byte sectors; `backing` is a path relative to the overlay's directory.
#[must_use]
pub fn overlay_image(virtual_bytes: u64, backing: &str) -> Vec<u8> {
    let size = virtual_bytes.next_multiple_of(512);
    let l1_entries = size.div_ceil(L1_REACH);
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER).max(1);
    let clusters = 3 + l1_clusters;
    let mut image = vec![0; usize::try_from(clusters * CLUSTER).unwrap_or(usize::MAX)];

    let mut head: Vec<u8> = Vec::with_capacity(512);
    let format = b"qcow2";
    let backing_offset = u64::from(HEADER_LENGTH) + 8 + (format.len() as u64).next_multiple_of(8) + 8;
    head.extend(b"QFI\xfb");
    head.extend(3u32.to_be_bytes());
    head.extend(backing_offset.to_be_bytes());
    head.extend(u32::try_from(backing.len()).unwrap_or(u32::MAX).to_be_bytes());
    head.extend(CLUSTER_BITS.to_be_bytes());
    head.extend(size.to_be_bytes());
    head.extend(0u32.to_be_bytes()); // no encryption
    head.extend(u32::try_from(l1_entries).unwrap_or(u32::MAX).to_be_bytes());
    head.extend((3 * CLUSTER).to_be_bytes());
    head.extend(CLUSTER.to_be_bytes()); // refcount table
    head.extend(1u32.to_be_bytes()); // of one cluster
    head.extend(0u32.to_be_bytes()); // no snapshots
    head.extend(0u64.to_be_bytes());
    head.extend([0; 24]); // no features
    head.extend(4u32.to_be_bytes()); // refcounts of 16 bits
    head.extend(HEADER_LENGTH.to_be_bytes());
    head.extend(BACKING_FORMAT_EXTENSION.to_be_bytes());
    head.extend(u32::try_from(format.len()).unwrap_or(0).to_be_bytes());
    head.extend(format);
    head.resize(head.len().next_multiple_of(8), 0);
    head.extend([0; 8]); // end of extensions
    head.extend(backing.as_bytes());
    image[..head.len()].copy_from_slice(&head);

    let at = |cluster: u64| usize::try_from(cluster * CLUSTER).unwrap_or(usize::MAX);
    image[at(1)..at(1) + 8].copy_from_slice(&(2 * CLUSTER).to_be_bytes());
    for cluster in 0..usize::try_from(clusters).unwrap_or(0) {
        let entry = at(2) + cluster * 2;
        image[entry..entry + 2].copy_from_slice(&1u16.to_be_bytes());
    }
    image
}

/// Writes an empty overlay to `path`, which must not exist; not synced yet.
///
/// # Errors
/// The file exists or cannot be written.
pub fn create_overlay(path: &Path, virtual_bytes: u64, backing: &str) -> std::io::Result<File> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(&overlay_image(virtual_bytes, backing))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// QEMU's own tool decides what a qcow2 file is.
    #[test]
    fn qemu_img_finds_nothing_wrong_and_reads_the_backing_file() {
        let dir = tempfile::tempdir().unwrap();
        let run = |args: &[&str]| {
            let output = Command::new("qemu-img").args(args).current_dir(dir.path()).output().unwrap();
            assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        std::fs::write(dir.path().join("base.raw"), [7u8; 1 << 20]).unwrap();
        run(&["convert", "-f", "raw", "-O", "qcow2", "base.raw", "base.qcow2"]);
        for size in [1 << 20, (1 << 30) + 1, 700 << 30, 16 << 40] {
            let name = format!("{size}.qcow2");
            create_overlay(&dir.path().join(&name), size, "base.qcow2").unwrap();
            run(&["check", "-f", "qcow2", &name]);
            let info: serde_json::Value = serde_json::from_str(&run(&["info", "--output=json", &name])).unwrap();
            assert_eq!(info["virtual-size"], size.next_multiple_of(512));
            assert_eq!(info["backing-filename"], "base.qcow2");
            assert_eq!(info["backing-filename-format"], "qcow2");
        }
        run(&["convert", "-f", "qcow2", "-O", "raw", "1048576.qcow2", "out.raw"]);
        assert_eq!(std::fs::read(dir.path().join("out.raw")).unwrap(), [7u8; 1 << 20]);
    }

    #[test]
    fn an_existing_disk_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, "precious").unwrap();
        assert!(create_overlay(&path, 1 << 20, "b").is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
