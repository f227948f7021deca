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

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant as StdInstant};

use nido_api::error::{Code, Error, Result};
use nido_api::name::{SnapshotName, VmName};
use nido_api::state::VmState;
use nido_engine::disk_quota::DiskUsage;
use nido_engine::guest::{Guest, GuestError, Session};
use nido_engine::home::{SNAPSHOT_SOCKET, VmDir};
use nido_engine::machine::Accel;
use nido_engine::qemu::Monitor;
use nido_engine::qemu::migration::{self, Bounds, LiveSave, Memory, MigrationError};
use nido_engine::snapshot::{self, LayerCopy, PendingSnapshot, Record};
use nido_net::Network;
use nido_net::names::PinRecord;
use nido_store::Origin;
use qapi::qmp::RunState;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::bake::save_error;
use super::clock::set_clock;
use super::control::Reply;
use super::control_server::ReplySender;
use super::jobs::{HostProbe, Jobs, Preparation, Prepared};
use super::launch::RunningQemu;
use super::name_pins;
use super::qmp::{QMP_TIMEOUT, qmp_error};
use super::readiness::AgentRoute;
use super::state::Supervisor;

/// How long the guest may take to write everything to its disk.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long saving memory and devices may take.
const SAVE_TIMEOUT: Duration = Duration::from_secs(600);
/// How long the network may take to report what the guest has resolved.
const PINS_TIMEOUT: Duration = Duration::from_secs(2);
/// What jobs of a snapshot do.
const TAKING_JOB: &str = "taking a snapshot";
const REMOVAL_JOB: &str = "removing an unfinished snapshot";
/// How long the removal of an unfinished snapshot is waited for.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(10);

/// With this environment variable set to 0, VMs are paused until their memory is saved. Under KVM it has to be set to something else
/// for precopy: that is not tested for long enough (decision 0022).
const PRECOPY: &str = "NIDO_PRECOPY";

/// Everything a snapshot is taken with.
struct SnapshotJob {
    vm: VmName,
    agent_route: AgentRoute,
    monitor: Monitor,
    jobs: Jobs,
    /// The VM is paused, and stays so.
    paused: bool,
    accel: Accel,
    network: Option<Network>,
}

impl Supervisor {
    /// Begins to take a snapshot; the reply comes when it is whole.
    pub(super) fn take_snapshot(
        &mut self,
        name: SnapshotName,
        into: Option<String>,
        running: &RunningQemu,
        reply: ReplySender,
    ) {
        let Ok(place) = self.snapshotting.clone().try_acquire_owned() else {
            let busy = Error::new(Code::VmBusy, "another snapshot of this VM is being taken");
            return drop(reply.send(Err(busy)));
        };
        // What goes to another VM is a copy of this one that is deleted soon.
        if into.is_none()
            && let Err(error) = self.check_snapshot_quota()
        {
            return drop(reply.send(Err(error)));
        }
        let (taking, preparation) = match self.taking(name, into, running) {
            Ok(begun) => begun,
            Err(error) => return drop(reply.send(Err(error))),
        };
        let agent_route = self.agent_route();
        let (name, paused) = (preparation.name.clone(), taking.paused);
        tokio::spawn(async move {
            let taken = taking.take(preparation).await;
            drop(place);
            let taken = taken.inspect_err(|error| tracing::error!("snapshot {name}: {error}"));
            let _ = reply.send(taken.map(|()| Reply::Done));
            if !paused {
                set_clock(agent_route).await;
            }
        });
    }

    fn check_snapshot_quota(&mut self) -> Result<()> {
        let Some(quota) = self.disk_quota() else { return Ok(()) };
        let usage = DiskUsage::of(&self.dir).map_err(|e| Error::io("cannot read the VM's directory", e))?;
        let needed = (u64::from(self.machine.memory_mib) << 20) + usage.layer;
        usage.check_snapshot(quota, self.row.spec.name.as_str(), needed).map_err(|refused| {
            let (error, hit) = *refused;
            self.on_limit_hit(hit);
            error
        })
    }

    fn taking(
        &self,
        name: SnapshotName,
        into: Option<String>,
        running: &RunningQemu,
    ) -> Result<(SnapshotJob, Preparation)> {
        let vm = self.row.spec.name.clone();
        let (state, ready) = (self.lifecycle.state(), self.lifecycle.is_ready());
        let paused = state == VmState::Paused;
        if !(state == VmState::Running || paused) || !ready || self.lifecycle.is_resuming() {
            let words = format!("VM '{vm}' cannot be snapshotted: it is not ready");
            return Err(Error::new(Code::VmBusy, words));
        }
        let home = self.context.home();
        let image = match &self.row.origin {
            Origin::Fork(saved) => Some(home.blob(&saved.memory)),
            Origin::Boot | Origin::Restore { .. } => None,
        };
        let preparation = Preparation {
            host: HostProbe::new(&self.context),
            machine: self.machine.clone(),
            token: nido_api::hex::encode(self.guest.token()),
            name,
            dir: self.dir.clone(),
            into: into.map_or_else(|| self.dir.clone(), |id| home.vm(&id)),
            paused,
            pid: running.pid()?,
            memory_bytes: u64::from(self.machine.memory_mib) << 20,
            image,
        };
        let (agent_route, monitor, jobs) = (self.agent_route(), running.monitor()?.clone(), self.jobs.clone());
        let (accel, network) = (self.machine.accel, self.network.clone());
        Ok((SnapshotJob { vm, agent_route, monitor, jobs, paused, accel, network }, preparation))
    }

    /// What resumes the VM if the supervisor before was killed while it took a snapshot.
    pub(super) fn snapshot_recovery(&self) -> SnapshotRecovery {
        SnapshotRecovery {
            dir: self.dir.clone(),
            jobs: self.jobs.clone(),
            snapshotting: Arc::clone(&self.snapshotting),
            agent_route: self.agent_route(),
            paused: self.lifecycle.state() == VmState::Paused,
        }
    }
}

/// Removes what is left of an interrupted snapshot, and resumes the VM.
pub(super) struct SnapshotRecovery {
    dir: VmDir,
    jobs: Jobs,
    snapshotting: Arc<Semaphore>,
    agent_route: AgentRoute,
    /// Its user paused it: it stays paused.
    paused: bool,
}

impl SnapshotRecovery {
    pub(super) async fn run(self, monitor: &Monitor) {
        if !self.undo_interrupted().await {
            return;
        }
        // QEMU writes the state by itself, whatever has become of the supervisor before.
        if let Err(error) = migration::abandon(monitor).await {
            tracing::error!("saving the VM does not end: {error}");
        }
        if self.paused {
            return;
        }
        tracing::warn!("a snapshot was interrupted; resuming the VM");
        if let Err(error) = monitor.cont(QMP_TIMEOUT).await {
            tracing::error!("the VM cannot be resumed: {error}");
        }
        tokio::spawn(async move {
            // The agent also unfreezes it after a timeout.
            let _ = thaw(&self.agent_route, Instant::now() + FREEZE_TIMEOUT).await;
        });
    }

    /// Whether a snapshot was interrupted. If its removal takes too long, the VM counts as paused for one; no other snapshot is
    /// taken until it is removed.
    async fn undo_interrupted(&self) -> bool {
        let (dir, place) = (self.dir.clone(), self.snapshotting.clone().try_acquire_owned());
        let removal = self.jobs.start(REMOVAL_JOB, move || {
            let _place = place;
            Ok(snapshot::remove_unfinished(&dir))
        });
        removal.outcome_within(REMOVAL_TIMEOUT).await.unwrap_or_else(|error| {
            tracing::warn!("{error}");
            true
        })
    }
}

impl SnapshotJob {
    async fn take(self, preparation: Preparation) -> Result<()> {
        let dir = preparation.dir.clone();
        let precopy = self.permits_precopy().await;
        let Prepared { unfinished, running, disk, bounds } = self.job(move || preparation.run(precopy)).await?;
        // Before the guest is saved: what it resolves from here on, it can resolve again.
        let pins = self.pins().await;
        let saved = match disk {
            None => self.save_paused(&unfinished).await.map(|()| None),
            Some(disk) => self.save_running(&unfinished, &Arc::new(disk), bounds).await.map(Some),
        };
        // What has been saved of a snapshot that failed can be large, and is removed here, too.
        self.job(move || {
            let paused_for = saved?;
            if paused_for.is_none() {
                // QEMU has synced the disk and released it until the machine is resumed.
                unfinished.copy_disk(&dir)?;
            }
            if let Some(pins) = pins {
                unfinished.keep_pins(&name_pins::encode_new(pins)?)?;
            }
            let paused_ms = paused_for.map(|paused_for| u64::try_from(paused_for.as_millis()).unwrap_or(u64::MAX));
            unfinished.publish(&Record { paused_ms, ..Record::now(Some(running)) })
        })
        .await
    }

    /// What the guest has resolved. Without it, a copy resolves names again.
    async fn pins(&self) -> Option<Vec<PinRecord>> {
        let pins = timeout(PINS_TIMEOUT, self.network.as_ref()?.pins()).await.ok().flatten();
        if pins.is_none() {
            tracing::warn!("the VM's network does not report what the guest has resolved");
        }
        pins
    }

    /// Whether the VM can be saved while it runs; if not, why.
    async fn permits_precopy(&self) -> Result<(), String> {
        match std::env::var(PRECOPY).as_deref() {
            Ok("0") => return Err(format!("{PRECOPY} is 0")),
            Err(_) if self.accel == Accel::Kvm => return Err(format!("it runs under KVM, and {PRECOPY} is not set")),
            _ => {}
        }
        // The program that runs, which an upgrade of the package does not change.
        let version = self.monitor.query_version(QMP_TIMEOUT).await.map_err(|error| error.to_string())?;
        migration::is_precopy_reliable(self.accel, &version.qemu)
    }

    /// Copies, syncs or removes files, on a thread of its own.
    async fn job<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        self.jobs.start(TAKING_JOB, work).end().await
    }

    /// Saves a VM that runs, and runs on. Returns for how long its CPUs were paused.
    async fn save_running(
        &self,
        unfinished: &PendingSnapshot,
        disk: &Arc<LayerCopy>,
        bounds: Option<Bounds>,
    ) -> Result<Duration> {
        let deadline = Instant::now() + FREEZE_TIMEOUT;
        let stream = self.agent_route.stream(deadline).await.map_err(|e| self.guest_error(e))?;
        let mut session =
            Session::open(stream, self.agent_route.guest.token(), deadline).await.map_err(|e| self.guest_error(e))?;
        let saved = match bounds {
            Some(bounds) => self.save_live(unfinished, disk, &mut session, bounds).await,
            None => self.save_still(unfinished, disk, &mut session).await,
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
        let disk = Arc::clone(disk);
        self.job(move || disk.sync()).await?;
        Ok(paused_for)
    }

    /// Saves a VM while it runs, and pauses it at the end. Returns since when it is paused; so too below.
    async fn save_live(
        &self,
        unfinished: &PendingSnapshot,
        disk: &Arc<LayerCopy>,
        session: &mut Session,
        bounds: Bounds,
    ) -> Result<StdInstant> {
        self.refresh(disk, false).await?;
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
        self.refresh(disk, false).await?;
        let paused_at = live.finish(bounds).await.map_err(not_saved)?;
        // QEMU has synced the disk and released it until the machine is resumed.
        self.refresh(disk, true).await?;
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
        self.refresh(disk, false).await?;
        self.freeze(session).await?;
        let paused_at = StdInstant::now();
        self.monitor.stop(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e))?;
        self.save_memory(unfinished).await?;
        self.refresh(disk, true).await?;
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

    /// Memory and disk of a paused guest match; the disk is copied later.
    async fn save_paused(&self, unfinished: &PendingSnapshot) -> Result<()> {
        // QEMU saves a machine once; to save it again it has to have run, if only for a moment.
        if self.monitor.query_status(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e))? == RunState::postmigrate {
            self.monitor.cont(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e))?;
            self.monitor.stop(QMP_TIMEOUT).await.map_err(|e| qmp_error(&e))?;
        }
        self.save_memory(unfinished).await
    }

    async fn save_memory(&self, unfinished: &PendingSnapshot) -> Result<()> {
        let state = unfinished.state()?;
        migration::save(&self.monitor, Path::new(SNAPSHOT_SOCKET), state, Memory::Within, SAVE_TIMEOUT)
            .await
            .map_err(not_saved)
    }

    async fn refresh(&self, disk: &Arc<LayerCopy>, last: bool) -> Result<()> {
        let disk = Arc::clone(disk);
        self.job(move || disk.refresh(last)).await
    }
}

fn not_saved(error: MigrationError) -> Error {
    save_error("cannot take the snapshot", error)
}

async fn thaw(agent_route: &AgentRoute, deadline: Instant) -> Result<(), GuestError> {
    let guest: &Guest = &agent_route.guest;
    Session::open(agent_route.stream(deadline).await?, guest.token(), deadline).await?.thaw(deadline).await
}
