//! A machine's state out of QEMU and into another: QMP's migration, over a unix socket between QEMU and us.
//!
//! `unix:` works with every QEMU; `file:` only from 8.2. A machine that is paused is saved by `fd:`, into a file that was handed to
//! QEMU: its pause takes two thirds of the time then. QEMU and this process share their working directory, so the
//! socket is named relatively. With [`Memory::Apart`] the stream holds everything but the memory, which lies in a file of
//! its own; with [`Memory::Within`] it holds the memory too.
//!
//! Invariant: every wait has a deadline, and nothing of the stream is looked at here: it comes from QEMU.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use nido_files::private_dir::{make_socket_private, remove_socket};
use qapi::qmp::{self, MigrationCapability, MigrationCapabilityStatus, MigrationStatus};

use super::monitor::{Monitor, MonitorError};

mod live;

pub use self::live::{Bounds, LiveSave, abandon, is_precopy_reliable};

/// How long one command about a migration may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// A rate that no disk reaches, in bytes each second.
const UNLIMITED: u64 = 1 << 40;
/// The name by which QEMU knows the file that it writes.
const STATE_FILE: &str = "state";
/// How much is written after a failure, to find the reason.
const PROBE_BYTES: usize = 64 << 10;
/// Pause between checks of the progress, at first and at most.
const POLL_INTERVAL: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// Where the guest's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// In a file that both machines map.
    Apart,
    /// In the stream.
    Within,
}

/// Why a machine's state could not be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// A command failed.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// QEMU gave up.
    #[error("QEMU could not {what} the machine's state{}", .desc.as_ref().map(|d| format!(": {d}")).unwrap_or_default())]
    Failed {
        /// `save` or `load`.
        what: &'static str,
        /// QEMU's sentence; escape it before showing it.
        desc: Option<String>,
    },
    /// It took too long.
    #[error("the machine's state could not be moved in time")]
    Late,
    /// The stream broke, or the file.
    #[error("the machine's state could not be moved: {0}")]
    Io(#[from] io::Error),
}

/// Writes the state of a paused machine to `file`; returns once QEMU and the file agree that it is complete. QEMU writes the file
/// itself where it can: a copy less than over a socket, for as long as the machine is paused.
///
/// # Errors
/// See [`MigrationError`]. The machine stands as before.
pub async fn save(
    monitor: &Monitor,
    socket: &Path,
    file: File,
    memory: Memory,
    within: Duration,
) -> Result<(), MigrationError> {
    let deadline = Instant::now() + within;
    set_capabilities(monitor, memory).await?;
    if memory == Memory::Within {
        unlimit(monitor).await?;
    }
    match begin_to_file(monitor, &file).await {
        Ok(()) => {
            let Err(error) = completed(monitor, "save", deadline).await else { return Ok(()) };
            // No stream breaks when this process gives up: QEMU would write on, and pause the machine when it is done.
            if let Err(error) = abandon(monitor).await {
                tracing::warn!("saving the machine does not end: {error}");
            }
            Err(why_unwritten(&file).map_or(error, MigrationError::Io))
        }
        Err(MonitorError::Refused { desc, .. }) => {
            tracing::info!("QEMU does not write a file itself: {}", desc.escape_debug());
            save_over(monitor, socket, file, deadline).await
        }
        Err(error) => Err(error.into()),
    }
}

/// Begins a migration to a file, which QEMU writes.
async fn begin_to_file(monitor: &Monitor, file: &File) -> Result<(), MonitorError> {
    monitor.send_file(STATE_FILE, file, COMMAND_TIMEOUT).await?;
    let uri = Some(format!("fd:{STATE_FILE}"));
    monitor.execute(qmp::migrate { uri, channels: None, detach: None, resume: None }, COMMAND_TIMEOUT).await?;
    nido_files::failpoint!("save.begun");
    Ok(())
}

/// Why QEMU could not write a file: it does not report that. The next bytes fail as well.
fn why_unwritten(file: &File) -> Option<io::Error> {
    let end = file.metadata().ok()?.len();
    file.write_all_at(&[0; PROBE_BYTES], end).err()
}

/// Saves over a socket.
async fn save_over(monitor: &Monitor, socket: &Path, mut file: File, deadline: Instant) -> Result<(), MigrationError> {
    let sent = async {
        let stream = begin(monitor, socket, deadline).await?;
        let copy = copying(stream, deadline, move |mut stream| io::copy(&mut stream, &mut file).map(drop));
        let (copied, done) = tokio::join!(copy, completed(monitor, "save", deadline));
        match (done, copied) {
            // QEMU only sees its stream break: that the file could not be written is the reason.
            (Err(MigrationError::Failed { .. }), Err(MigrationError::Io(error)))
                if !matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) =>
            {
                Err(error.into())
            }
            (done, copied) => done.and(copied),
        }
    };
    let sent = sent.await;
    let _ = std::fs::remove_file(socket);
    sent
}

/// Begins a migration to this process; returns the connection that the state comes from.
async fn begin(monitor: &Monitor, socket: &Path, deadline: Instant) -> Result<UnixStream, MigrationError> {
    remove_socket(socket)?;
    let listener = UnixListener::bind(socket)?;
    make_socket_private(socket)?;
    listener.set_nonblocking(true)?;
    let uri = Some(format!("unix:{}", socket.display()));
    monitor.execute(qmp::migrate { uri, channels: None, detach: None, resume: None }, COMMAND_TIMEOUT).await?;
    // QEMU has connected, or is about to.
    loop {
        match listener.accept() {
            Ok((stream, _)) => return Ok(stream),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error.into()),
            Err(_) if Instant::now() > deadline => return Err(MigrationError::Late),
            Err(_) => tokio::time::sleep(POLL_INTERVAL.0).await,
        }
    }
}

/// Loads a state from `file` into a machine that was started to wait for one; it is paused afterwards.
///
/// # Errors
/// See [`MigrationError`]. QEMU may have ended itself.
pub async fn load(
    monitor: &Monitor,
    socket: &Path,
    mut file: File,
    memory: Memory,
    within: Duration,
) -> Result<(), MigrationError> {
    let deadline = Instant::now() + within;
    set_capabilities(monitor, memory).await?;
    remove_socket(socket)?;
    let uri = Some(format!("unix:{}", socket.display()));
    monitor.execute(qmp::migrate_incoming { uri, channels: None, exit_on_error: None }, COMMAND_TIMEOUT).await?;
    let stream = UnixStream::connect(socket)?;
    let copy = copying(stream, deadline, move |mut stream| io::copy(&mut file, &mut stream).map(drop));
    let (copied, done) = tokio::join!(copy, completed(monitor, "load", deadline));
    let _ = std::fs::remove_file(socket);
    // QEMU's error is the better reason.
    done.and(copied)
}

async fn set_capabilities(monitor: &Monitor, memory: Memory) -> Result<(), MigrationError> {
    let state = memory == Memory::Apart;
    let capabilities = vec![MigrationCapabilityStatus { capability: MigrationCapability::x_ignore_shared, state }];
    monitor.execute(qmp::migrate_set_capabilities { capabilities }, COMMAND_TIMEOUT).await?;
    Ok(())
}

/// QEMU limits the rate of a migration to that of a slow network by default.
async fn unlimit(monitor: &Monitor) -> Result<(), MigrationError> {
    set_parameters(monitor, SetParameters { max_bandwidth: Some(UNLIMITED), downtime_limit: None }).await
}

/// `migrate-set-parameters` with parameters that every QEMU knows.
#[derive(Debug, serde::Serialize)]
struct SetParameters {
    /// In bytes each second.
    #[serde(rename = "max-bandwidth", skip_serializing_if = "Option::is_none")]
    max_bandwidth: Option<u64>,
    /// In milliseconds.
    #[serde(rename = "downtime-limit", skip_serializing_if = "Option::is_none")]
    downtime_limit: Option<u64>,
}

impl qapi::Command for SetParameters {
    const NAME: &'static str = "migrate-set-parameters";
    const ALLOW_OOB: bool = false;
    type Ok = qapi::Empty;
}

async fn set_parameters(monitor: &Monitor, parameters: SetParameters) -> Result<(), MigrationError> {
    monitor.execute(parameters, COMMAND_TIMEOUT).await?;
    Ok(())
}

/// Copies on a thread of its own, which ends when QEMU's end does, or at the deadline.
async fn copying(
    stream: UnixStream,
    deadline: Instant,
    copy: impl FnOnce(UnixStream) -> io::Result<()> + Send + 'static,
) -> Result<(), MigrationError> {
    stream.set_nonblocking(false)?;
    let left = Some(deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
    stream.set_read_timeout(left)?;
    stream.set_write_timeout(left)?;
    let copied = tokio::task::spawn_blocking(move || copy(stream)).await;
    Ok(copied.map_err(io::Error::other)??)
}

/// Waits until QEMU reports completion.
async fn completed(monitor: &Monitor, what: &'static str, deadline: Instant) -> Result<(), MigrationError> {
    let mut pause = POLL_INTERVAL.0;
    while Instant::now() < deadline {
        let now = monitor.execute(qmp::query_migrate {}, COMMAND_TIMEOUT).await?;
        match now.status {
            Some(MigrationStatus::completed) => return Ok(()),
            Some(MigrationStatus::failed | MigrationStatus::cancelled) => {
                return Err(MigrationError::Failed { what, desc: now.error_desc });
            }
            _ => tokio::time::sleep(pause).await,
        }
        pause = (pause * 3 / 2).min(POLL_INTERVAL.1);
    }
    Err(MigrationError::Late)
}

#[cfg(test)]
mod tests {
    use super::*;

    // QEMU reports only that it failed.
    #[test]
    fn a_full_disk_is_the_reason_that_a_file_could_not_be_written() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(why_unwritten(&full).unwrap().kind(), io::ErrorKind::StorageFull);
        assert!(why_unwritten(&tempfile::tempfile().unwrap()).is_none());
    }
}
