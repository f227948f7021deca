//! Processes in the background: nido itself with a hidden verb, started by whichever process needs one.
//!
//! Invariant: such a process takes its lock itself. So it does not matter how many are started: one stays. It keeps nothing of the
//! process that started it (`host/daemon.rs`).

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nido_api::error::{Error, Result};
use nido_engine::home::Home;
use nido_engine::host::daemon as host_daemon;
use nido_files::private_dir::make_private_dir;

use super::{Context, OpenOptions};

/// Size at which a log is restarted, in bytes.
const LOG_MAX: u64 = 1 << 20;

impl Context {
    /// Starts `nido VERB` in this home. What it has to say goes to `logs/LOG`.
    ///
    /// # Errors
    /// Of the log, or of starting it.
    pub fn start_in_background(&self, verb: &str, log: &str) -> Result<()> {
        let broken = |e| Error::io(format!("cannot start nido {verb}"), e);
        let logs = self.home.logs();
        make_private_dir(&logs).map_err(broken)?;
        let log = open_log(&logs.join(log)).map_err(broken)?;
        if log.metadata().is_ok_and(|meta| meta.len() > LOG_MAX) {
            log.set_len(0).map_err(broken)?;
        }
        let mut command = self.daemon(self.home.root())?;
        command.arg(verb).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::from(log));
        tokio::process::Command::from(command).spawn().map(drop).map_err(broken)
    }

    /// A command for nido itself in this home, to stay; the verb is still missing.
    ///
    /// # Errors
    /// nido's own program cannot be found.
    pub fn daemon(&self, directory: &Path) -> Result<Command> {
        daemon(&self.options, &self.home, directory)
    }
}

/// The same for a process that has no store open.
pub(super) fn daemon(options: &OpenOptions, home: &Home, directory: &Path) -> Result<Command> {
    let program = options.supervisor.clone().map_or_else(own_program, Ok)?;
    let mut command = host_daemon::command(&program, directory);
    command.arg("--home").arg(home.root());
    if let Some(qemu) = &options.qemu {
        command.arg("--qemu").arg(qemu);
    }
    Ok(command)
}

/// The program that runs. One that was replaced since it was started is run as it is now.
fn own_program() -> Result<PathBuf> {
    let program = std::env::current_exe().map_err(|e| Error::io("cannot find nido's own program", e))?;
    Ok(match program.to_str().and_then(|path| path.strip_suffix(" (deleted)")) {
        Some(path) if !program.exists() => PathBuf::from(path),
        _ => program,
    })
}

/// A log file, opened to be appended to.
///
/// # Errors
/// Of the file system.
pub fn open_log(path: &Path) -> std::io::Result<File> {
    fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}
