//! Starting the guardian of the home (`nido watch`), and a supervisor without the store, which the guardian needs.
//!
//! Invariant: the guardian takes its lock itself, so it does not matter how many are started: one stays.

use std::path::Path;
use std::process::Stdio;

use nido_api::error::{Error, Result};
use nido_engine::home::{Home, SUPERVISOR_LOG};
use nido_files::lock::{HeldLock, is_held};

use super::background::daemon;
use super::{Context, OpenOptions, open_log};

impl Context {
    /// Starts the guardian if none runs. A failure is logged: the next look tries again.
    pub fn ensure_guardian(&self) {
        if self.is_read_only || is_held(&self.home.guardian_lock()) {
            return;
        }
        if let Err(error) = self.start_in_background("watch", "guardian.log") {
            tracing::warn!("a supervisor that is killed is not replaced for now: {error}");
        }
    }
}

/// Starts a supervisor for a QEMU that has none, without waiting for it, and hands it the lock of its VM. Needs no store.
///
/// # Errors
/// Of its log, or of starting it.
pub fn start_supervisor_unawaited(options: &OpenOptions, home: &Home, id: &str, held: HeldLock) -> Result<()> {
    let failed = |e| Error::io("cannot start a supervisor", e);
    let dir = home.vm(id);
    let log = open_log(&dir.file(SUPERVISOR_LOG)).map_err(failed)?;
    let lock = held.file().try_clone().map_err(failed)?;
    let mut command = daemon(options, home, dir.path())?;
    command.arg("supervise").arg(id);
    command.stdin(Stdio::from(lock)).stdout(Stdio::null()).stderr(Stdio::from(log));
    let started = tokio::process::Command::from(command).spawn().map(drop).map_err(failed);
    // The supervisor holds the lock now, if it was started.
    drop(held);
    started
}

/// Starts a process that restarts a VM, after so many restarts in a row that did not work, without waiting for it.
///
/// # Errors
/// Of starting it.
pub fn restart_unawaited(options: &OpenOptions, home: &Home, id: &str, in_row: u32) -> Result<()> {
    let failed = |e| Error::io("cannot start nido restart-by-policy", e);
    let log = open_log(&home.logs().join("guardian.log")).map_err(failed)?;
    let mut command = daemon(options, home, home.root())?;
    command.arg("restart-by-policy").arg(id).arg("--in-row").arg(in_row.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::from(log));
    tokio::process::Command::from(command).spawn().map(drop).map_err(failed)
}

/// The home that the options name, opened without its store. `None` if there is none: it is not created.
///
/// # Errors
/// It belongs to another user, or cannot be read.
pub fn open_home(options: &OpenOptions) -> Result<Option<Home>> {
    let root = super::home_root(options)?;
    if Path::new(&root).exists() { Home::open(&root).map(Some) } else { Ok(None) }
}
