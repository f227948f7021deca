//! Starting the watcher of a VM's time to live (`nido watch-ttl`).

use std::process::Stdio;

use jiff::Timestamp;
use nido_api::error::{Error, Result};
use nido_engine::home::SUPERVISOR_LOG;
use nido_engine::qemu::QemuProcess;

use super::Context;

impl Context {
    /// Starts the watcher of a VM's time to live.
    ///
    /// # Errors
    /// Of the log, of QEMU's pidfd, or of starting it.
    pub fn start_ttl_watcher(&self, id: &str, expires_at: Timestamp, qemu: &QemuProcess) -> Result<()> {
        let failed = |e| Error::io("cannot start the watcher of the time to live", e);
        let dir = self.vm_dir(id);
        let log = super::open_log(&dir.file(SUPERVISOR_LOG)).map_err(failed)?;
        let pidfd = qemu.pidfd().map_err(failed)?;
        let mut command = self.daemon(dir.path())?;
        command.args(["watch-ttl", id, "--at-ms", &expires_at.as_millisecond().to_string()]);
        command.stdin(Stdio::from(pidfd)).stdout(Stdio::null()).stderr(Stdio::from(log));
        tokio::process::Command::from(command).spawn().map(drop).map_err(failed)
    }
}
