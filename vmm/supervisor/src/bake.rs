//! Saving a guest as a warm image: the end of a VM whose purpose is to be saved.
//!
//! ```text
//!  ready - freeze - close the channel - idle - pause - save state - quit    memory.img, state.bin, disk.qcow2
//!                                                                                 hashed, into the store of parts
//! ```
//!
//! Every fork first repeats what the guest had not finished when it was saved, so the guest is saved when it is idle.
//!
//! Invariant: the agent in the saved memory has no session and waits for its host's first word, its disk is clean, and
//! nothing of the three files changes after QEMU has ended.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use nido_api::error::{Code, Error, Result};
use nido_engine::guest::{GuestError, Session};
use nido_engine::home::{DEVICE_STATE, SAVE_SOCKET};
use nido_engine::qemu::Monitor;
use nido_engine::qemu::migration::{self, Memory, MigrationError};
use nido_images::Bake;
use nido_store::Origin;
use tokio::time::Instant;

use super::jobs::{self, HostProbe, WarmImage};
use super::launch::RunningQemu;
use super::qmp::QMP_TIMEOUT;
use super::readiness::AgentRoute;
use super::state::{Report, Supervisor};

/// How long the agent may take to close its channel.
const CHANNEL_CLOSE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long QEMU may take to save a machine's state.
const SAVE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the guest may take to come to rest.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// Over how long its CPU time is counted, what share of it counts as rest, and how many such spans in a row it takes: what
/// a kernel puts off, it puts off for a second or two (the addresses of a network card, for one).
const CPU_SAMPLE_INTERVAL: Duration = Duration::from_millis(400);
const IDLE_CPU_PERCENT: u32 = 3;
const IDLE_SAMPLES: u32 = 10;
/// How long the end of a QEMU may take to be seen.
const EXIT_TIMEOUT: Duration = Duration::from_millis(500);

/// What the guest is saved with.
struct Saving {
    name: String,
    agent_route: AgentRoute,
    monitor: Monitor,
    pid: i32,
    /// It booted to be saved: it is left alone until it rests.
    rests: bool,
    /// It was loaded, and has never run: it is saved as it is.
    twin: bool,
}

impl Supervisor {
    /// Starts to save the guest. Its machine ends then; the result is reported when QEMU has ended.
    pub(super) fn begin_bake(&self, running: &RunningQemu) {
        let (Ok(monitor), Ok(pid)) = (running.monitor().cloned(), running.pid()) else { return };
        let saving = Saving {
            name: self.row.spec.name.to_string(),
            agent_route: self.agent_route(),
            monitor,
            pid,
            rests: self.row.origin == Origin::Boot,
            twin: self.lifecycle.role().is_twin(),
        };
        let report = self.reports.0.clone();
        tokio::spawn(async move {
            let saved = saving.save().await;
            if saved.is_err() {
                // If QEMU has ended, the event loop detects that and derives the cause.
                tokio::time::sleep(EXIT_TIMEOUT).await;
            }
            let _ = report.send(Report::Saved(saved)).await;
        });
    }

    /// Takes what was saved into the store of parts.
    pub(super) async fn keep_bake(&self) -> Result<Bake> {
        let saved = WarmImage {
            host: HostProbe::new(&self.context),
            machine: self.machine.clone(),
            token: nido_api::hex::encode(self.guest.token()),
            disk_bytes: self.row.disk_bytes,
            dir: self.dir.clone(),
            home: self.context.home().root().to_owned(),
        };
        jobs::run(move || saved.keep()).await
    }
}

impl Saving {
    async fn save(self) -> Result<()> {
        let broken = |why: String| Error::new(Code::QemuFailed, format!("the guest cannot be saved: {why}"));
        if !self.twin {
            let deadline = Instant::now() + CHANNEL_CLOSE_TIMEOUT;
            self.silence(deadline).await.map_err(|e| nido_engine::error_sources::guest_error(&self.name, e))?;
            // A copy of a running VM is wanted at once, and its programs may never rest.
            if self.rests {
                rest(self.pid).await;
            }
            self.monitor
                .stop(QMP_TIMEOUT)
                .await
                .map_err(|e| broken(nido_api::sanitize::on_one_line(&e.to_string())))?;
        }
        nido_files::failpoint!("save.paused");
        let state = File::create(DEVICE_STATE).map_err(|e| Error::io("cannot save the guest", e))?;
        migration::save(&self.monitor, Path::new(SAVE_SOCKET), state, Memory::Apart, SAVE_TIMEOUT)
            .await
            .map_err(|e| save_error("cannot save the guest", e))
    }

    /// Freezes the guest's disk, and leaves its agent waiting for the first word of another host.
    async fn silence(&self, deadline: Instant) -> Result<(), GuestError> {
        let agent_route = &self.agent_route;
        let mut session =
            Session::open(agent_route.stream(deadline).await?, agent_route.guest.token(), deadline).await?;
        // This syncs everything to the disk. Unfreeze at once: doing so after each fork would cost more than all other steps.
        session.freeze(deadline).await?;
        session.thaw(deadline).await?;
        drop(session);
        match &agent_route.channel {
            Some(channel) => channel.close_for_save(deadline).await,
            None => Ok(()),
        }
    }
}

/// A machine's state that could not be saved; a full disk has a code of its own.
pub(super) fn save_error(what: &str, error: MigrationError) -> Error {
    match error {
        MigrationError::Io(error) => Error::io(what.to_owned(), error),
        error => {
            Error::new(Code::QemuFailed, format!("{what}: {}", nido_api::sanitize::on_one_line(&error.to_string())))
        }
    }
}

/// Waits until the guest has nothing left to do, but not for ever: some always have.
async fn rest(qemu: i32) {
    let deadline = Instant::now() + IDLE_TIMEOUT;
    let (mut before, mut rested) = (cpu_time(qemu), 0);
    while Instant::now() < deadline {
        tokio::time::sleep(CPU_SAMPLE_INTERVAL).await;
        let now = cpu_time(qemu);
        let rests = now.saturating_sub(before) < CPU_SAMPLE_INTERVAL * IDLE_CPU_PERCENT / 100;
        rested = if rests { rested + 1 } else { 0 };
        if rested == IDLE_SAMPLES {
            return;
        }
        before = now;
    }
    tracing::warn!("the guest does not become idle; it is saved as it is");
}

/// How much CPU time all threads of a process have used. Zero if it cannot be seen.
fn cpu_time(pid: i32) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let nanos = tasks.filter_map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_ascii_whitespace().next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanos.sum())
}
