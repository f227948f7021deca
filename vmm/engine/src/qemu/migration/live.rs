//! Saving a machine, memory included, while its guest runs.
//!
//! ```text
//!  begin:  most of the memory --hold()--> almost nothing is sent (the guest's file system is frozen now) --finish():
//!  the rest, then again what the guest has changed meanwhile --little is left: QEMU pauses the CPUs--> the last of it
//!                                      \--a bound is reached: this pauses them------------------/
//! ```
//!
//! A page that changes after it was sent is sent again; loading the state uses the last copy. So the state is that of the
//! moment at which the CPUs were paused.
//!
//! Invariant: the CPUs are paused when the state is complete, and the disk has been released: `cont` resumes both. A state that
//! is not completed (an error, a dropped value) does not end the machine: QEMU resumes it, or [`abandon`] does.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use qapi::qmp::{self, MigrationStatus};
use serde::Deserialize;
use tokio::task::JoinHandle;

use super::{
    COMMAND_TIMEOUT, Memory, MigrationError, SetParameters, UNLIMITED, begin, set_capabilities, set_parameters,
};
use crate::machine::Accel;
use crate::qemu::monitor::{Monitor, MonitorError};

/// Bytes that are read at once.
const BUFFER: usize = 1 << 20;
/// How often progress is looked at. The pause of the CPUs is noticed, and ends, so much later.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// QEMU pauses the CPUs by itself when it expects to send the rest within this time, in milliseconds.
const DOWNTIME_LIMIT_MS: u64 = 20;
/// Rate at which nothing but a page now and then is sent, in bytes each second. QEMU divides it by ten; 0 is no limit.
const THROTTLED_BANDWIDTH: u64 = 10;
/// What may be left of the first pass when it is held, at most and at least, as parts of the memory.
const THROTTLE_RANGE_PARTS: (u64, u64) = (4, 64);
/// The same before the first pass is throttled: practically never.
const DOWNTIME_LIMIT_BEFORE_THROTTLE_MS: u64 = 1;
/// How long an abandoned migration may take to end.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// The first major version of QEMU whose record of changed pages is complete under emulation.
const EMULATED_SINCE: i64 = 9;

/// When the CPUs are paused although much is left to send: a guest may change its memory faster than it can be written.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Passes over the memory.
    pub passes: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Time since the first pass was held.
    pub within: Duration,
}

/// Whether QEMU of this version saves all of a running guest's memory; if not, why. Before 9.0 an emulated CPU can change a page
/// without a trace in the record of changed pages, while the migration reads that record: kernels of copies panicked.
///
/// # Errors
/// Why not.
pub fn is_precopy_reliable(accel: Accel, version: &qmp::VersionTriple) -> Result<(), String> {
    if accel == Accel::Kvm || version.major >= EMULATED_SINCE {
        return Ok(());
    }
    let qmp::VersionTriple { major, minor, .. } = version;
    Err(format!("it is emulated, and QEMU {major}.{minor} can miss changes of an emulated guest's memory"))
}

/// How far a migration is.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Progress {
    status: Option<MigrationStatus>,
    error_desc: Option<String>,
    /// How long the CPUs were paused until the state was complete, in milliseconds.
    downtime: Option<u64>,
    #[serde(default)]
    ram: Ram,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Ram {
    total: u64,
    remaining: u64,
    transferred: u64,
    dirty_sync_count: u64,
}

/// `query-migrate`, read leniently: other fields differ between versions.
#[derive(Debug, serde::Serialize)]
struct QueryMigrate {}

impl qapi::Command for QueryMigrate {
    const NAME: &'static str = "query-migrate";
    const ALLOW_OOB: bool = false;
    type Ok = Progress;
}

/// What is to be done about a migration.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Wait,
    /// Pause the CPUs: then nothing changes any more.
    Pause,
    Completed,
    Failed,
}

impl Progress {
    const fn is_over(&self) -> bool {
        matches!(
            self.status,
            None | Some(
                MigrationStatus::none
                    | MigrationStatus::completed
                    | MigrationStatus::failed
                    | MigrationStatus::cancelled
            )
        )
    }

    /// Whether it is time to throttle the first pass. At the beginning the size of the memory is unknown.
    const fn is_near_end(&self) -> bool {
        let near = self.ram.total > 0 && self.ram.remaining <= self.ram.total / THROTTLE_RANGE_PARTS.0;
        self.is_over() || self.ram.dirty_sync_count > 1 || near
    }

    /// Whether enough is left of the first pass for it not to end while it is held.
    const fn can_be_held(&self) -> bool {
        let enough = self.ram.remaining >= self.ram.total / THROTTLE_RANGE_PARTS.1;
        !self.is_over() && self.ram.dirty_sync_count <= 1 && enough
    }

    fn step(&self, bounds: Bounds, since: Duration, paused: bool) -> Step {
        match self.status {
            Some(MigrationStatus::completed) => Step::Completed,
            Some(MigrationStatus::failed | MigrationStatus::cancelled) => Step::Failed,
            _ if paused => Step::Wait,
            _ if self.ram.dirty_sync_count > bounds.passes
                || self.ram.transferred > bounds.bytes
                || since > bounds.within =>
            {
                Step::Pause
            }
            _ => Step::Wait,
        }
    }
}

/// A machine that is being saved.
#[derive(Debug)]
pub struct LiveSave {
    monitor: Monitor,
    /// Shut down when this is dropped: QEMU gives up then.
    stream: UnixStream,
    copy: JoinHandle<io::Result<()>>,
    deadline: Instant,
}

impl LiveSave {
    /// Begins to save a running machine to `file`.
    ///
    /// # Errors
    /// See [`MigrationError`]; the machine may be left with a migration: [`abandon`] it. So too below.
    pub async fn begin(
        monitor: &Monitor,
        socket: &Path,
        mut file: File,
        within: Duration,
    ) -> Result<Self, MigrationError> {
        let deadline = Instant::now() + within;
        set_capabilities(monitor, Memory::Within).await?;
        let unlimited =
            SetParameters { max_bandwidth: Some(UNLIMITED), downtime_limit: Some(DOWNTIME_LIMIT_BEFORE_THROTTLE_MS) };
        set_parameters(monitor, unlimited).await?;
        let stream = begin(monitor, socket, deadline).await;
        let _ = std::fs::remove_file(socket);
        let stream = stream?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(within))?;
        let mut reader = stream.try_clone()?;
        let copy = tokio::task::spawn_blocking(move || {
            let mut buffer = vec![0; BUFFER];
            loop {
                match reader.read(&mut buffer) {
                    Ok(0) => return Ok(()),
                    Ok(read) => {
                        // QEMU notices that its stream is shut down.
                        file.write_all(&buffer[..read]).inspect_err(|_| drop(reader.shutdown(Shutdown::Both)))?;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        });
        Ok(Self { monitor: monitor.clone(), stream, copy, deadline })
    }

    /// Waits until most of the memory has been sent, then lets QEMU send almost nothing until [`Self::finish`]. Returns whether
    /// that succeeded: with little memory QEMU may be done before, and pauses the CPUs.
    ///
    /// # Errors
    /// See [`Self::begin`].
    pub async fn hold(&mut self) -> Result<bool, MigrationError> {
        loop {
            let progress = self.query().await?;
            if progress.is_near_end() {
                break;
            }
            self.check_deadline()?;
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        set_parameters(&self.monitor, SetParameters { max_bandwidth: Some(THROTTLED_BANDWIDTH), downtime_limit: None })
            .await?;
        let progress = self.query().await?;
        tracing::debug!(?progress, "the first pass is held");
        Ok(progress.can_be_held())
    }

    /// Sends the rest. Returns since when the CPUs are paused, at the earliest.
    ///
    /// # Errors
    /// See [`Self::begin`].
    pub async fn finish(mut self, bounds: Bounds) -> Result<Instant, MigrationError> {
        let unlimited = SetParameters { max_bandwidth: Some(UNLIMITED), downtime_limit: Some(DOWNTIME_LIMIT_MS) };
        set_parameters(&self.monitor, unlimited).await?;
        let (held_at, mut paused_at) = (Instant::now(), None);
        let mut ran_at = held_at;
        loop {
            let asked_at = Instant::now();
            let progress = self.query().await?;
            match progress.step(bounds, held_at.elapsed(), paused_at.is_some()) {
                Step::Completed => {
                    tracing::info!(?progress, bounded = paused_at.is_some(), "the machine is saved");
                    self.copied().await?;
                    // QEMU counts from before it pauses them.
                    let counted = progress.downtime.map(Duration::from_millis).and_then(|ms| asked_at.checked_sub(ms));
                    return Ok(paused_at.unwrap_or_else(|| counted.map_or(ran_at, |counted| counted.min(ran_at))));
                }
                Step::Failed => {
                    self.copied().await?;
                    return Err(MigrationError::Failed { what: "save", desc: progress.error_desc });
                }
                Step::Pause => {
                    paused_at = Some(Instant::now());
                    self.monitor.stop(COMMAND_TIMEOUT).await?;
                }
                Step::Wait => tokio::time::sleep(POLL_INTERVAL).await,
            }
            ran_at = asked_at;
            self.check_deadline()?;
        }
    }

    /// Ends it before it is completed; nothing is written to the file afterwards. The CPUs are as after [`abandon`].
    ///
    /// # Errors
    /// See [`MigrationError`].
    pub async fn give_up(mut self) -> Result<(), MigrationError> {
        let _ = self.stream.shutdown(Shutdown::Both);
        let _ = self.copied().await;
        abandon(&self.monitor).await
    }

    async fn query(&self) -> Result<Progress, MonitorError> {
        self.monitor.execute(QueryMigrate {}, COMMAND_TIMEOUT).await
    }

    fn check_deadline(&self) -> Result<(), MigrationError> {
        if Instant::now() > self.deadline { Err(MigrationError::Late) } else { Ok(()) }
    }

    /// Waits for what was sent to be in the file. QEMU has closed its end.
    async fn copied(&mut self) -> Result<(), MigrationError> {
        Ok((&mut self.copy).await.map_err(io::Error::other)??)
    }
}

impl Drop for LiveSave {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Ends a migration that is in progress, of this process or of one that was killed. The CPUs are as they were before it, or
/// paused; if none is in progress, nothing changes.
///
/// # Errors
/// See [`MigrationError`].
pub async fn abandon(monitor: &Monitor) -> Result<(), MigrationError> {
    let deadline = Instant::now() + CANCEL_TIMEOUT;
    let mut asked = false;
    while !monitor.execute(QueryMigrate {}, COMMAND_TIMEOUT).await?.is_over() {
        if !asked {
            asked = true;
            monitor.execute(qmp::migrate_cancel {}, COMMAND_TIMEOUT).await?;
        } else if Instant::now() > deadline {
            return Err(MigrationError::Late);
        } else {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { passes: 6, bytes: 1000, within: Duration::from_secs(2) };

    fn progress(status: MigrationStatus, ram: Ram) -> Progress {
        Progress { status: Some(status), ram, ..Progress::default() }
    }

    #[test]
    fn the_cpus_are_paused_when_a_bound_is_reached_and_only_then() {
        let ram = Ram { total: 1000, remaining: 10, transferred: 900, dirty_sync_count: 2 };
        let (soon, late) = (Duration::from_millis(100), Duration::from_secs(3));
        for (ram, since, paused, wanted) in [
            (ram, soon, false, Step::Wait),
            (Ram { dirty_sync_count: 7, ..ram }, soon, false, Step::Pause),
            (Ram { transferred: 1001, ..ram }, soon, false, Step::Pause),
            (ram, late, false, Step::Pause),
            // Once is enough.
            (Ram { dirty_sync_count: 7, transferred: 1001, ..ram }, late, true, Step::Wait),
        ] {
            assert_eq!(progress(MigrationStatus::active, ram).step(BOUNDS, since, paused), wanted, "{ram:?}");
        }
        for paused in [false, true] {
            let at = |status| progress(status, ram).step(BOUNDS, late, paused);
            assert_eq!(at(MigrationStatus::completed), Step::Completed);
            assert_eq!(at(MigrationStatus::failed), Step::Failed);
            assert_eq!(at(MigrationStatus::cancelled), Step::Failed);
        }
    }

    #[test]
    fn the_first_pass_is_held_near_its_end() {
        let ram = Ram { total: 800, remaining: 201, transferred: 0, dirty_sync_count: 1 };
        let near = |remaining| progress(MigrationStatus::active, Ram { remaining, ..ram });
        assert!(!progress(MigrationStatus::setup, Ram::default()).is_near_end());
        assert!(!near(201).is_near_end() && near(200).is_near_end() && near(0).is_near_end());
        assert!(near(200).can_be_held() && near(13).can_be_held() && !near(11).can_be_held());
        let second = progress(MigrationStatus::active, Ram { dirty_sync_count: 2, ..ram });
        assert!(second.is_near_end() && !second.can_be_held());
        let failed = progress(MigrationStatus::failed, ram);
        assert!(failed.is_near_end() && !failed.can_be_held());
    }

    // What QEMU 7.2 and 10.0 return; fields that only one of them has are left out.
    #[test]
    fn progress_is_read_from_any_version() {
        let read = |text: &str| serde_json::from_str::<Progress>(text).unwrap();
        assert!(read("{}").is_over());
        let active = read(
            r#"{"status": "active", "expected-downtime": 300, "setup-time": 1, "total-time": 12, "ram": {"total": 553984000,
            "remaining": 1000, "transferred": 5, "dirty-sync-count": 1, "page-size": 4096, "new-in-12": {}}}"#,
        );
        assert_eq!((active.ram.remaining, active.ram.dirty_sync_count, active.is_over()), (1000, 1, false));
        assert_eq!(read(r#"{"status": "completed", "downtime": 12}"#).downtime, Some(12));
        // Before it begins, nothing is known of the memory.
        assert!(!read(r#"{"status": "setup"}"#).is_over());
    }
}
