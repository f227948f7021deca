//! Deleting a stopped VM: its directory, then its row.
//!
//! Invariant: nothing is removed while QEMU holds `vm.lock`. The directory leaves its name in one step, so no concurrent command
//! works in it while it is removed.

use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use nido_api::error::{Code, Error, Result};
use nido_engine::home::{CONSOLE_LOG, VM_LOCK};
use nido_engine::host::vm_processes;
use nido_engine::logs::log_tail;
use nido_files::lock::is_held;

use super::Context;

/// How long a QEMU that has been killed may take to release its lock.
const QEMU_EXIT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long processes whose directory is gone may take to die of SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

impl Context {
    /// Deletes a stopped VM. The caller holds its lock, or its directory is gone.
    ///
    /// # Errors
    /// `vm_busy` if a QEMU of it lives, and those of the file system.
    pub fn erase(&self, id: &str) -> Result<()> {
        let dir = self.vm_dir(id);
        if !await_release(&dir.file(VM_LOCK)) {
            return Err(Error::new(Code::VmBusy, "the VM's files cannot be removed: its QEMU still runs"));
        }
        match self.store().mark_deleting(id) {
            // Removing the files makes room for the rest.
            Err(error) if error.code() == Code::DiskFull => {}
            marked => marked?,
        }
        nido_files::failpoint!("erase.marked");
        let broken = |e| Error::io("cannot remove the VM's files", e);
        crate::control_group::remove(dir.path(), id);
        let last_log_entries = log_tail(&dir, &[CONSOLE_LOG]);
        let removed = self.home.removed_vm(id);
        // Of an attempt that was killed.
        remove_tree(&removed).map_err(broken)?;
        nido_files::failpoint!("erase.moving");
        match std::fs::rename(dir.path(), &removed) {
            Ok(()) => {
                nido_files::failpoint!("erase.moved");
                remove_tree(&removed).map_err(broken)?;
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let left = vm_processes::kill_processes_in_removed(dir.path(), KILL_TIMEOUT);
                if left > 0 {
                    let words = format!("{left} processes of the VM, whose directory is gone, do not end");
                    return Err(Error::new(Code::VmBusy, words));
                }
            }
            Err(e) => return Err(broken(e)),
        }
        nido_files::failpoint!("erase.files-removed");
        self.store().remove_vm(id, last_log_entries)
    }
}

/// Waits a moment for a QEMU that ends; whether it has.
fn await_release(vm_lock: &Path) -> bool {
    let deadline = Instant::now() + QEMU_EXIT_TIMEOUT;
    while is_held(vm_lock) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Removes a directory with everything in it. Another process may be doing the same.
///
/// # Errors
/// Of the file system.
pub fn remove_tree(path: &Path) -> std::io::Result<()> {
    let mut tries = 0;
    loop {
        match std::fs::remove_dir_all(path) {
            Ok(()) => return Ok(()),
            Err(_) if std::fs::symlink_metadata(path).is_err_and(|e| e.kind() == ErrorKind::NotFound) => return Ok(()),
            Err(e) if e.kind() == ErrorKind::NotFound && tries < 100 => tries += 1,
            Err(e) => return Err(e),
        }
    }
}
