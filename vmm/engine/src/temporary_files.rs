//! Temporary files in a VM's directory, which are left if the process that wrote one is killed before it renamed the file.
//!
//! Invariant: only the process that holds the VM's `supervisor.lock` removes them, while no QEMU of the VM runs.

use std::fs;
use std::path::PathBuf;

use nido_files::atomic_file::is_temporary;

use crate::home::{DISK_TEMPORARY, VmDir};

/// Whether there are any.
#[must_use]
pub fn has_temporary_files(vm: &VmDir) -> bool {
    files(vm).next().is_some()
}

/// Removes them. What cannot be removed is logged.
pub fn remove_temporary_files(vm: &VmDir) {
    for path in files(vm) {
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!("a temporary file cannot be removed: {}: {error}", path.display());
        }
    }
}

fn files(vm: &VmDir) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(vm.path()).into_iter().flatten().flatten();
    let of_nido = |name: &str| is_temporary(name) || name == DISK_TEMPORARY;
    entries.filter(move |entry| of_nido(&entry.file_name().to_string_lossy())).map(|entry| entry.path())
}
