//! Rotating the logs of a VM, and reading their ends.

use std::path::Path;

use nido_api::error::{Error, Result};
use nido_engine::home::{CONSOLE_LOG, QEMU_LOG, SUPERVISOR_LOG, VmDir};
use nido_engine::host::facts::disk_free_bytes;
use nido_engine::logs::{log_tail, panic_lines, rotate};

/// With less free space a disk counts as full.
const DISK_FULL_BYTES: u64 = 8 << 20;

/// Rotates the logs that are too long. The working directory is the VM's.
///
/// # Errors
/// That of the last log that could not be rotated.
pub(crate) fn rotate_logs() -> Result<()> {
    let mut outcome = Ok(());
    for log in [CONSOLE_LOG, QEMU_LOG, SUPERVISOR_LOG] {
        if let Err(error) = rotate(Path::new(log)) {
            outcome = Err(Error::io(format!("cannot rotate {log}"), error));
        }
    }
    outcome
}

/// What a VM's directory shows of its end.
#[derive(Debug, Default)]
pub(crate) struct Tails {
    /// The disk that holds it has no space left.
    pub disk_full: bool,
    /// The last lines of QEMU's own output.
    pub qemu: Vec<String>,
    /// The lines with which the kernel's panic began, if the console ends with one.
    pub panic: Option<Vec<String>>,
    /// The last lines of the console.
    pub console: Vec<String>,
}

impl Tails {
    pub(crate) fn read(dir: &VmDir) -> Self {
        Self {
            disk_full: disk_free_bytes(dir.path()).is_ok_and(|free| free < DISK_FULL_BYTES),
            qemu: log_tail(dir, &[QEMU_LOG]),
            panic: panic_lines(dir, CONSOLE_LOG),
            console: log_tail(dir, &[CONSOLE_LOG]),
        }
    }
}
