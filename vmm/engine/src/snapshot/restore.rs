//! A restored disk: copied out of a snapshot, put in the place of the VM's own, which is kept until the restore is done.

use std::fs;
use std::path::PathBuf;

use nido_api::error::{Error, Result};
use nido_api::name::SnapshotName;
use nido_files::atomic_file::{Durability, rename_synced};

use super::dir;
use super::layer::copy_layer;
use crate::home::{DISK, VmDir};

/// Prefix of the name of a layer that is about to become the VM's disk.
const COPY: &str = "disk.qcow2.restore-";
/// The disk that a VM had before a restore.
const PREVIOUS: &str = "disk.qcow2.previous";

/// A copy of a snapshot's layer next to the VM's own disk, complete and synced. It is removed when dropped.
#[derive(Debug)]
pub struct DiskCopy {
    copy: PathBuf,
    disk: PathBuf,
}

impl DiskCopy {
    /// Copies the layer. The VM may run meanwhile.
    ///
    /// # Errors
    /// `disk_full`, `internal`; then nothing is left.
    pub fn take(vm: &VmDir, name: &SnapshotName) -> Result<Self> {
        let id = nido_files::random::id()?;
        let this = Self { copy: vm.file(&format!("{COPY}{id}")), disk: vm.file(DISK) };
        copy_layer(&dir(vm, name).join(DISK), &this.copy)?;
        Ok(this)
    }

    /// Replaces the disk of a stopped VM with the copy; keeps the old disk until the start has succeeded.
    ///
    /// # Errors
    /// `internal`; then the VM's disk is as it was.
    pub fn put_in_place(self) -> Result<PreviousDisk> {
        let broken = |e| Error::io("cannot restore the disk", e);
        let previous = PreviousDisk { previous: self.disk.with_file_name(PREVIOUS), disk: self.disk.clone() };
        let _ = fs::remove_file(&previous.previous);
        // A second name for it: at no moment is there no disk. Where there are no such links it cannot be put back.
        let _ = fs::hard_link(&self.disk, &previous.previous);
        nido_files::failpoint!("restore.linked");
        rename_synced(&self.copy, &self.disk, Durability::PowerCut).map_err(broken)?;
        Ok(previous)
    }
}

impl Drop for DiskCopy {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.copy);
    }
}

/// The disk that a VM had before a snapshot was restored.
#[derive(Debug)]
pub struct PreviousDisk {
    previous: PathBuf,
    disk: PathBuf,
}

impl PreviousDisk {
    /// Restores the old disk of the stopped VM.
    ///
    /// # Errors
    /// `internal`.
    pub fn put_back(&self) -> Result<()> {
        let put = rename_synced(&self.previous, &self.disk, Durability::PowerCut);
        put.map_err(|e| Error::io("cannot restore the VM's previous disk", e))
    }

    /// Removes it: the restore has succeeded.
    pub fn remove(&self) {
        let _ = fs::remove_file(&self.previous);
    }
}

/// Removes the files of a restore that was killed. No other process restores the VM meanwhile.
pub fn remove_restore_files(vm: &VmDir) {
    for path in restore_files(vm) {
        let _ = fs::remove_file(path);
    }
}

/// Whether a restore was interrupted, or is in progress.
#[must_use]
pub fn has_restore_files(vm: &VmDir) -> bool {
    restore_files(vm).next().is_some()
}

fn restore_files(vm: &VmDir) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(vm.path()).into_iter().flatten().flatten();
    let of_restore = |name: &str| name == PREVIOUS || name.starts_with(COPY);
    entries.filter(move |entry| of_restore(&entry.file_name().to_string_lossy())).map(|entry| entry.path())
}
