//! The task that starts a VM, or takes over its QEMU. It owns what it needs, decides nothing about the VM's state, and has a deadline
//! for each step. The event loop sees QEMU's end, and aborts this task then.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::operation as op;
use nido_api::sanitize::on_one_line;
use nido_engine::home::{DEVICE_STATE, LOAD_SOCKET, VM_LOCK, VmDir};
use nido_engine::machine::Machine;
use nido_engine::qemu::migration::{self, Memory};
use nido_engine::qemu::{GroupToJoin, Monitor, QemuExit};
use nido_files::lock::is_held;
use nido_store::{Origin, Purpose, VmRow};
use qapi::qmp::RunState;
use tokio::sync::mpsc;

use crate::context::Context;
use crate::control_group;
use crate::jobs::{self, HostProbe, Jobs};
use crate::launch::{Connection, QemuHandle, attach, connect, launch};
use crate::loaded_guest::{enlarge_disk, has_link_to_hold, switch_link};
use crate::qmp::QMP_TIMEOUT;
use crate::snapshot::SnapshotRecovery;
use crate::start_report::{End, StartReport, Takeover};
use crate::state::{RECORD_JOB, RECORD_TIMEOUT, Report};

/// How long loading may take: milliseconds for a bake, seconds for a large memory.
const LOAD_TIMEOUT: Duration = Duration::from_secs(600);
/// The job that opens what is loaded.
const OPEN_JOB: &str = "opening the saved state";
/// The job that makes QEMU's control group, and how long it may take.
const GROUP_JOB: &str = "making the VM's control group";
const GROUP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a QEMU that was left by its supervisor may take to listen to another.
const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a QEMU that cannot load may take to end itself. Its log has the cause then.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// What a start, or a take-over, needs.
pub(super) struct Startup {
    pub context: Arc<Context>,
    pub row: VmRow,
    pub machine: Machine,
    pub dir: VmDir,
    pub jobs: Jobs,
    /// It is loaded only to be saved again.
    pub twin: bool,
    pub snapshot: SnapshotRecovery,
    /// How long the guest may take to become ready.
    pub ready_within: Duration,
    /// Gets QEMU's process when it is started or found.
    pub process: QemuHandle,
    pub reports: mpsc::Sender<Report>,
}

impl Startup {
    /// Starts QEMU, and loads its guest if it is to be loaded.
    pub(super) async fn start(self) {
        let report = match self.launch().await {
            Ok(()) => StartReport::Started,
            Err(error) => StartReport::Over(End::Error(error)),
        };
        self.report(report).await;
    }

    async fn launch(&self) -> Result<()> {
        let host = HostProbe::new(&self.context);
        let facts = jobs::run(move || host.qemu()).await?;
        let group = self.group().await?;
        launch(self.context.home(), &self.row, &self.machine, &facts, &self.process, group)?;
        self.report(StartReport::Spawned).await;
        let (monitor, events) = connect(self.ready_within).await?;
        nido_files::failpoint!("startup.monitor");
        self.report(StartReport::Connected((monitor.clone(), events))).await;
        if let Some((state, memory)) = self.what_to_load() {
            if let Err(error) = self.load(state, memory, &monitor).await {
                tokio::time::sleep(END_TIMEOUT).await;
                return Err(error.hint(Hint::run_on(op::VM_START, &self.row.spec.name).cold().to("boot it")));
            }
            nido_files::failpoint!("startup.resumed");
        }
        Ok(())
    }

    /// Makes QEMU's control group, if the host has a tree for it.
    async fn group(&self) -> Result<Option<GroupToJoin>> {
        let (dir, id, machine) = (self.dir.clone(), self.row.id.clone(), self.machine.clone());
        let group = move || control_group::make(dir.path(), &id, &machine);
        let group = jobs::run_within(GROUP_JOB, GROUP_TIMEOUT, group).await?;
        nido_files::failpoint!("launch.grouped");
        Ok(group)
    }

    async fn report(&self, report: StartReport) {
        let _ = self.reports.send(Report::Start(report)).await;
    }

    /// The state that the machine is loaded from.
    fn what_to_load(&self) -> Option<(PathBuf, Memory)> {
        match &self.row.origin {
            Origin::Boot => None,
            Origin::Fork(saved) => Some((self.context.home().blob(&saved.state), Memory::Apart)),
            Origin::Restore { snapshot, .. } => {
                Some((nido_engine::snapshot::dir(&self.dir, snapshot).join(DEVICE_STATE), Memory::Within))
            }
        }
    }

    /// Loads a saved state into a QEMU that waits for one, and resumes it.
    async fn load(&self, state: PathBuf, memory: Memory, monitor: &Monitor) -> Result<()> {
        let opened = move || File::open(state).map_err(|e| cannot_resume(&e));
        let state = jobs::run_within(OPEN_JOB, LOAD_TIMEOUT, opened).await?;
        migration::load(monitor, Path::new(LOAD_SOCKET), state, memory, LOAD_TIMEOUT)
            .await
            .map_err(|e| cannot_resume(&e))?;
        nido_files::failpoint!("startup.loaded");
        if self.twin {
            return Ok(());
        }
        self.hold_link(monitor).await?;
        monitor.cont(QMP_TIMEOUT).await.map_err(|e| cannot_resume(&e))?;
        // Not before: QEMU 10 keeps the disk of a loaded machine inactive until it is resumed.
        enlarge_disk(&self.row, monitor).await
    }

    /// Takes the network from a loaded guest: it has the identity of another one until its identity reset.
    async fn hold_link(&self, monitor: &Monitor) -> Result<()> {
        if has_link_to_hold(&self.row, &self.machine) { switch_link(monitor, false).await } else { Ok(()) }
    }

    /// Finds the QEMU that the supervisor before has left, and completes or undoes what that had begun.
    pub(super) async fn take_over(self) {
        let connection = match self.attach().await {
            Ok(connection) => connection,
            Err(end) => return self.report(StartReport::Over(end)).await,
        };
        let monitor = connection.as_ref().map(|(monitor, _)| monitor.clone());
        self.report(StartReport::Attached(connection)).await;
        let Some(monitor) = monitor.filter(|_| self.row.purpose == Purpose::Use) else { return };
        self.complete_claim().await;
        nido_files::failpoint!("takeover.begun");
        let (reports, recovered) = (self.reports.clone(), self.recover(&monitor).await);
        let _ = reports.send(Report::Start(StartReport::TakenOver(recovered))).await;
    }

    /// Finds the QEMU that holds the VM's lock. One that cannot be reached has only just been started, or is about to end.
    async fn attach(&self) -> Result<Option<Connection>, End> {
        let deadline = Instant::now() + TAKEOVER_TIMEOUT;
        loop {
            match attach(&self.process).await {
                Ok(connection) => return Ok(connection),
                Err(_) if !is_held(&self.dir.file(VM_LOCK)) => return Err(End::Exit(QemuExit::Unknown)),
                Err(error) if Instant::now() > deadline => return Err(End::OutOfReach(error)),
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    /// The supervisor before may have been killed between a claim and its record, which would still describe a clone of the pool.
    async fn complete_claim(&self) {
        let (context, id) = (Arc::clone(&self.context), self.row.id.clone());
        let record = self.jobs.start(RECORD_JOB, move || {
            context.refresh_record(&id);
            Ok(())
        });
        if let Err(error) = record.outcome_within(RECORD_TIMEOUT).await {
            tracing::warn!("{RECORD_JOB}: {error}");
        }
    }

    async fn recover(self, monitor: &Monitor) -> Takeover {
        self.snapshot.run(monitor).await;
        match monitor.query_status(QMP_TIMEOUT).await {
            // What it has loaded may be incomplete.
            Ok(RunState::inmigrate) => Takeover::StillLoading,
            // Loaded, or claimed; only the supervisor before knew whether it was resumed and its disk enlarged.
            Ok(status) if !self.row.agent.ready && self.row.origin != Origin::Boot => {
                if status == RunState::paused {
                    if has_link_to_hold(&self.row, &self.machine)
                        && let Err(error) = switch_link(monitor, false).await
                    {
                        tracing::error!("{error}");
                    }
                    let _ = monitor.cont(QMP_TIMEOUT).await;
                }
                if let Err(error) = enlarge_disk(&self.row, monitor).await {
                    tracing::error!("{error}");
                }
                Takeover::Loaded
            }
            Ok(status) => Takeover::Status(status),
            Err(error) => {
                tracing::warn!("cannot read QEMU's status: {error}");
                Takeover::Unknown
            }
        }
    }
}

fn cannot_resume(error: &dyn std::error::Error) -> Error {
    Error::new(Code::QemuFailed, format!("the VM cannot be resumed: {}", on_one_line(&error.to_string())))
}
