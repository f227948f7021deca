//! Taking a snapshot of a running VM.
//!
//! ```text
//!  copy the disk - save most of the memory - freeze the guest's file system - copy what has changed, of both
//!        - pause - the rest - resume - unfreeze - publish
//! ```
//!
//! Everything before the pause happens while the guest runs. Under emulation, and without enough space for that on the host's
//! disk (pages that change are written again), memory is saved while the VM is paused. A paused VM is saved as it is, and stays paused.
//!
//! This is a task next to the event loop. Invariant: the VM continues whatever fails; if this supervisor is killed meanwhile,
//! the next one finds what was unfinished, removes it and resumes the VM.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant as StdInstant};

use nido_api::error::{Code, Error, Result};
use nido_api::name::{SnapshotName, VmName};
use nido_api::state::VmState;
use nido_engine::bake::{qemu_id, shape};
use nido_engine::guest::{Guest, GuestError, Session};
use nido_engine::home::{SNAPSHOT_SOCKET, VmDir};
use nido_engine::host::{facts, qemu};
use nido_engine::machine::Accel;
use nido_engine::qemu::Monitor;
use nido_engine::qemu::migration::{self, Bounds, LiveSave, Memory, MigrationError};
use nido_engine::snapshot::{self, LayerCopy, PendingSnapshot, Record};
use nido_store::Origin;
use qapi::qmp::RunState;
use tokio::time::Instant;

use super::bake::save_error;
use super::clock::set_clock;
use super::control::Reply;
use super::control_server::ReplySender;
use super::launch::RunningQemu;
use super::qmp::{QMP_TIMEOUT, qmp_error};
use super::readiness::AgentRoute;
use super::state::Supervisor;

/// How long the guest may take to write everything to its disk.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long saving memory and devices may take.
const SAVE_TIMEOUT: Duration = Duration::from_secs(600);
/// How long, and in how many passes over the memory, the changes of a running guest are followed before it is paused.
const PRECOPY_TIMEOUT: Duration = Duration::from_secs(2);
const PRECOPY_PASSES_MAX: u64 = 8;
/// What a file system in memory calls itself.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// The environment variable that permits saving a VM under KVM while it runs. Not the default yet: see decision 0022.
const PRECOPY: &str = "NIDO_PRECOPY";

/// Everything a snapshot is taken with.
struct SnapshotJob {
    vm: VmName,
    dir: VmDir,
    /// The directory of the VM that gets it.
    into: VmDir,
    agent_route: AgentRoute,
    monitor: Monitor,
    running: snapshot::RunningState,
    /// The VM is paused, and stays so.
    paused: bool,
    /// What it may take on the disk.
    needed: SpaceEstimate,
}

/// What a snapshot may take on the disk.
struct SpaceEstimate {
    pid: i32,
    memory_bytes: u64,
    /// The memory image that the guest maps, if it was forked.
    image: Option<PathBuf>,
    /// It can be saved while it runs. Not under emulation: a guest that QEMU 7.2 had saved so panicked, probably because a write was
    /// missed.
    live: bool,
}

impl Supervisor {
    /// Begins to take a snapshot; the reply comes when it is whole.
    pub(super) fn take_snapshot(
        &self,
        name: SnapshotName,
        into: Option<String>,
        running: &RunningQemu,
        reply: ReplySender,
    ) {
        let Ok(place) = self.snapshotting.clone().try_acquire_owned() else {
            let busy = Error::new(Code::VmBusy, "another snapshot of this VM is being taken");
            return drop(reply.send(Err(busy)));
        };
        let taking = match self.taking(into, running) {
            Ok(taking) => taking,
            Err(error) => return drop(reply.send(Err(error))),
        };
        let agent_route = self.agent_route();
        let paused = taking.paused;
        tokio::spawn(async move {
            let taken = taking.take(&name).await;
            drop(place);
            let taken = taken.inspect_err(|error| tracing::error!("snapshot {name}: {error}"));
            let _ = reply.send(taken.map(|()| Reply::Done));
            if !paused {
                set_clock(agent_route).await;
            }
        });
    }

    fn taking(&self, into: Option<String>, running: &RunningQemu) -> Result<SnapshotJob> {
        let vm = self.row.spec.name.clone();
        let (state, ready) = (self.lifecycle.state(), self.lifecycle.is_ready());
        let paused = state == VmState::Paused;
        if !(state == VmState::Running || paused) || !ready || self.lifecycle.is_resuming() {
            let words = format!("VM '{vm}' cannot be snapshotted: it is not ready");
            return Err(Error::new(Code::VmBusy, words));
        }
        let home = self.context.home();
        let qemu = qemu::probe(&qemu::find(self.context.qemu())?, &home.cache())?;
        let image = match &self.row.origin {
            Origin::Fork(saved) => Some(home.blob(&saved.memory)),
            Origin::Boot | Origin::Restore { .. } => None,
        };
        Ok(SnapshotJob {
            vm,
            dir: self.dir.clone(),
            into: into.map_or_else(|| self.dir.clone(), |id| home.vm(&id)),
            agent_route: self.agent_route(),
            monitor: running.monitor()?.clone(),
            running: snapshot::RunningState {
                machine: shape(&self.machine, &facts::gather(&home.cache())),
                qemu: qemu_id(&qemu),
                token: nido_api::hex::encode(self.guest.token()),
            },
            paused,
            needed: SpaceEstimate {
                pid: running.process.pid(),
                memory_bytes: u64::from(self.machine.memory_mib) << 20,
                image,
                live: self.machine.accel == Accel::Kvm && std::env::var_os(PRECOPY).is_some(),
            },
        })
    }

    /// Resumes a VM whose snapshot was interrupted.
    pub(super) async fn recover_snapshot(&self, running: &RunningQemu) {
        // One that its user paused was not taking a snapshot.
        if !snapshot::remove_unfinished(&self.dir) || self.lifecycle.state() == VmState::Paused {
            return;
        }
        tracing::warn!("a snapshot was interrupted; resuming the VM");
        let Ok(monitor) = running.monitor() else { return };
        if let Err(error) = migration::abandon(monitor).await {
            tracing::error!("saving the VM does not end: {error}");
        }
        if let Err(error) = monitor.cont(QMP_TIMEOUT).await {
            tracing::error!("the VM cannot be resumed: {error}");
        }
        let agent_route = self.agent_route();
        tokio::spawn(async move {
            // The agent also unfreezes it after a timeout.
            let _ = thaw(&agent_route, Instant::now() + FREEZE_TIMEOUT).await;
        });
    }
}

impl SpaceEstimate {
    /// Refuses where the disk is too full, before anything is done to the VM. Returns the bounds within which it can be saved
    /// while it runs, if it may be and there is enough space for that.
    fn check(&self, dir: &VmDir) -> Result<Option<Bounds>> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let used = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        let memory = used.map_or(self.memory_bytes, |kib| self.memory_bytes.min(kib << 10));
        let needed = memory + snapshot::copy_bytes(dir) + self.holes(dir);
        let free = facts::disk_free_bytes(dir.path()).unwrap_or(u64::MAX);
        // What is sent before the guest is paused, and all of it once more.
        let sent = memory + memory / 4;
        if self.live && free >= needed + sent {
            return Ok(Some(Bounds { passes: PRECOPY_PASSES_MAX, bytes: sent, within: PRECOPY_TIMEOUT }));
        }
        if free >= needed {
            let why = if self.live {
                "the disk is too full to save it while it runs"
            } else {
                "it is emulated, or NIDO_PRECOPY is not set"
            };
            tracing::info!("the VM is paused until its memory is saved: {why}");
            return Ok(None);
        }
        let words = format!(
            "the disk that holds nido's home is too full for a snapshot: {} MiB may be needed, {} MiB are free",
            needed.div_ceil(1 << 20),
            free >> 20
        );
        Err(Error::new(Code::DiskFull, words).hint("free some space there, or use another disk with --home"))
    }

    /// Saving reads all of the guest's memory. In a memory file system a hole of the image that is read takes space,
    /// and QEMU is killed if there is none.
    fn holes(&self, dir: &VmDir) -> u64 {
        let in_memory = rustix::fs::statfs(dir.path().as_os_str()).is_ok_and(|facts| facts.f_type == TMPFS_MAGIC);
        match self.image.as_ref().filter(|_| in_memory).and_then(|image| fs::metadata(image).ok()) {
            Some(facts) => facts.len().saturating_sub(facts.blocks() * 512),
            None => 0,
        }
    }
}

impl SnapshotJob {
    async fn take(self, name: &SnapshotName) -> Result<()> {
        let bounds = self.needed.check(&self.dir)?;
        let unfinished = PendingSnapshot::begin(&self.dir, &self.into, name)?;
        nido_files::failpoint!("take.begun");
        let (unfinished, paused_for) = if self.paused {
            (self.save_paused(unfinished).await?, None)
        } else {
            let (unfinished, paused_for) = self.save_running(unfinished, bounds).await?;
            (unfinished, Some(paused_for))
        };
        let paused_ms = paused_for.map(|paused_for| u64::try_from(paused_for.as_millis()).unwrap_or(u64::MAX));
        let record = Record { paused_ms, ..Record::now(Some(self.running)) };
        blocking(move || unfinished.publish(&record)).await
    }

    /// Saves a running VM, which keeps running. Returns for how long its CPUs were paused.
    async fn save_running(
        &self,
        unfinished: PendingSnapshot,
        bounds: Option<Bounds>,
    ) -> Result<(PendingSnapshot, Duration)> {
        let deadline = Instant::now() + FREEZE_TIMEOUT;
        let stream = self.agent_route.stream(deadline).await.map_err(|e| self.guest_error(e))?;
        let mut session =
            Session::open(stream, self.agent_route.guest.token(), deadline).await.map_err(|e| self.guest_error(e))?;
        let disk = Arc::new(unfinished.begin_disk(&self.dir)?);
        let saved = match bounds {
            Some(bounds) => self.save_live(&unfinished, &disk, &mut session, bounds).await,
            None => self.save_still(&unfinished, &disk, &mut session).await,
        };
        if saved.is_err()
            && let Err(error) = migration::abandon(&self.monitor).await
        {
            tracing::error!("saving the VM does not end: {error}");
        }
        nido_files::failpoint!("take.saved");
        let gone_on = self.monitor.cont(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e));
        let paused_for = saved.as_ref().map_or(Duration::ZERO, StdInstant::elapsed);
        nido_files::failpoint!("take.resumed");
        let thawed = session.thaw(Instant::now() + FREEZE_TIMEOUT).await.map_err(|e| self.guest_error(e));
        saved?;
        gone_on.and(thawed)?;
        tracing::info!("the VM was paused for {} ms", paused_for.as_millis());
        blocking(move || disk.sync()).await?;
        Ok((unfinished, paused_for))
    }

    /// Saves a VM while it runs, and pauses it at the end. Returns since when it is paused; so too below.
    async fn save_live(
        &self,
        unfinished: &PendingSnapshot,
        disk: &Arc<LayerCopy>,
        session: &mut Session,
        bounds: Bounds,
    ) -> Result<StdInstant> {
        refresh(disk, false).await?;
        let mut live = self.begin_live(unfinished).await?;
        if live.hold().await.map_err(not_saved)? {
            self.freeze(session).await?;
        } else {
            // It has so little memory that QEMU may have paused it already: again, with its file system frozen from the start.
            tracing::info!("saving the VM again, with its file system frozen");
            live.give_up().await.map_err(not_saved)?;
            self.monitor.cont(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e))?;
            self.freeze(session).await?;
            live = self.begin_live(unfinished).await?;
        }
        refresh(disk, false).await?;
        let paused_at = live.finish(bounds).await.map_err(not_saved)?;
        // QEMU has synced the disk and released it until the machine is resumed.
        refresh(disk, true).await?;
        Ok(paused_at)
    }

    /// Pauses a VM, and saves it.
    async fn save_still(
        &self,
        unfinished: &PendingSnapshot,
        disk: &Arc<LayerCopy>,
        session: &mut Session,
    ) -> Result<StdInstant> {
        // Only what changes from here on is copied while it is paused.
        refresh(disk, false).await?;
        self.freeze(session).await?;
        let paused_at = StdInstant::now();
        self.monitor.stop(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e))?;
        self.save_memory(unfinished).await?;
        refresh(disk, true).await?;
        Ok(paused_at)
    }

    async fn begin_live(&self, unfinished: &PendingSnapshot) -> Result<LiveSave> {
        let (socket, state) = (Path::new(SNAPSHOT_SOCKET), unfinished.state()?);
        LiveSave::begin(&self.monitor, socket, state, SAVE_TIMEOUT).await.map_err(not_saved)
    }

    /// The guest writes everything to its disk, and nothing more until it is unfrozen.
    async fn freeze(&self, session: &mut Session) -> Result<()> {
        let frozen = session.freeze(Instant::now() + FREEZE_TIMEOUT).await.map_err(|e| self.guest_error(e));
        nido_files::failpoint!("take.frozen");
        frozen
    }

    fn guest_error(&self, error: GuestError) -> Error {
        nido_engine::error_sources::guest_error(self.vm.as_str(), error)
    }

    /// Memory and disk of a paused guest match.
    async fn save_paused(&self, unfinished: PendingSnapshot) -> Result<PendingSnapshot> {
        // QEMU saves a machine once; to save it again it has to have run, if only for a moment.
        if self.monitor.query_status(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e))? == RunState::postmigrate {
            self.monitor.cont(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e))?;
            self.monitor.stop(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e))?;
        }
        self.save_memory(&unfinished).await?;
        // QEMU has synced the disk and released it until the machine is resumed.
        let dir = self.dir.clone();
        blocking(move || unfinished.copy_disk(&dir).map(|()| unfinished)).await
    }

    async fn save_memory(&self, unfinished: &PendingSnapshot) -> Result<()> {
        let state = unfinished.state()?;
        migration::save(&self.monitor, Path::new(SNAPSHOT_SOCKET), state, Memory::Within, SAVE_TIMEOUT)
            .await
            .map_err(not_saved)
    }
}

fn not_saved(error: MigrationError) -> Error {
    save_error("cannot take the snapshot", error)
}

async fn refresh(disk: &Arc<LayerCopy>, last: bool) -> Result<()> {
    let disk = Arc::clone(disk);
    blocking(move || disk.refresh(last)).await
}

/// Copies and syncs on a thread of its own, so that the event loop, sessions and forwards are not blocked.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::internal(format!("the work failed: {e}")))?
}

async fn thaw(agent_route: &AgentRoute, deadline: Instant) -> Result<(), GuestError> {
    let guest: &Guest = &agent_route.guest;
    Session::open(agent_route.stream(deadline).await?, guest.token(), deadline).await?.thaw(deadline).await
}
