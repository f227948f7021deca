//! Processes in the background: nido itself with a hidden verb, started by whoever needs one.
//!
//! Invariant: such a process takes its lock itself. So it does not matter how many are started: one stays.

use std::fs::OpenOptions;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::process::Stdio;

use tokio::process::Command;

use super::Nido;
use crate::error::{Error, Result};

/// Where a log is begun anew, in bytes.
const LOG_MAX: u64 = 1 << 20;

impl Nido {
    /// Starts `nido VERB` in this home. What it has to say goes to `logs/LOG`.
    pub(super) fn start_in_background(&self, verb: &str, log: &str) -> Result<()> {
        let broken = |e| Error::io(format!("cannot start nido {verb}"), e);
        let logs = self.home.root().join("logs");
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&logs).map_err(broken)?;
        let log = OpenOptions::new().append(true).create(true).mode(0o600).open(logs.join(log)).map_err(broken)?;
        if log.metadata().is_ok_and(|meta| meta.len() > LOG_MAX) {
            log.set_len(0).map_err(broken)?;
        }
        let mut command = Command::new(self.supervisor_program()?);
        command.arg("--home").arg(self.home.root());
        if let Some(qemu) = &self.options.qemu {
            command.arg("--qemu").arg(qemu);
        }
        command.arg(verb).current_dir(self.home.root());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::from(log));
        command.spawn().map(drop).map_err(broken)
    }
}
