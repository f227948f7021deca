//! Taking a snapshot of a running VM.
//!
//! ```text
//!  freeze the guest's disk - halt - save memory and devices - copy the disk - go on - thaw - publish
//! ```
//!
//! It is a task beside the loop. Invariant: whatever fails, the VM goes on; if this supervisor is killed meanwhile, the
//! next one finds what was unfinished, removes it and lets the VM go on.

use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use super::begin::Way;
use super::launch::Running;
use super::react::{QMP_WITHIN, qmp_error};
use super::run::Supervisor;
use crate::bake::{qemu_id, shape};
use crate::error::{Code, Error, Result};
use crate::guest::{Guest, GuestError, Session};
use crate::home::VmDir;
use crate::host::{facts, qemu};
use crate::name::{SnapshotName, VmName};
use crate::qemu::Monitor;
use crate::qemu::migration::{self, Memory};
use crate::snapshot::{self, Record, Unfinished};
use crate::state::VmState;

/// How long the guest may take to write everything to its disk.
const FROZEN_WITHIN: Duration = Duration::from_secs(30);
/// How long saving memory and devices may take.
const SAVED_WITHIN: Duration = Duration::from_secs(600);
/// The socket over which they are saved.
const SAVE_SOCKET: &str = "snapshot.sock";

/// Everything a snapshot is taken with.
struct Taking {
    vm: VmName,
    dir: VmDir,
    /// The directory of the VM that gets it.
    into: VmDir,
    way: Way,
    monitor: Monitor,
    running: snapshot::Running,
}

impl Supervisor {
    /// Begins to take a snapshot; the answer comes when it is whole.
    pub(super) fn take_snapshot(
        &self,
        name: SnapshotName,
        into: Option<String>,
        running: &Running,
        reply: tokio::sync::oneshot::Sender<Result<()>>,
    ) {
        let Ok(place) = self.snapshotting.clone().try_acquire_owned() else {
            let busy = Error::new(Code::VmBusy, "another snapshot of this VM is being taken");
            return drop(reply.send(Err(busy)));
        };
        let taking = match self.taking(into, running) {
            Ok(taking) => taking,
            Err(error) => return drop(reply.send(Err(error))),
        };
        tokio::spawn(async move {
            let taken = taking.take(&name).await;
            drop(place);
            let _ = reply.send(taken.inspect_err(|error| tracing::error!("snapshot {name}: {error}")));
        });
    }

    /// Whether it stands still only for a snapshot.
    pub(super) fn is_being_saved(&self) -> bool {
        self.snapshotting.available_permits() == 0
    }

    fn taking(&self, into: Option<String>, running: &Running) -> Result<Taking> {
        let vm = self.row.spec.name.clone();
        if self.state != VmState::Running || !self.row.agent.ready {
            let what = if self.state == VmState::Paused { "it is paused; resume it" } else { "it is not ready" };
            return Err(Error::new(Code::VmBusy, format!("VM '{vm}' cannot be snapshotted: {what}")));
        }
        let home = self.nido.home();
        let qemu = qemu::probe(&qemu::find(self.nido.options().qemu.as_deref())?, &home.cache())?;
        Ok(Taking {
            vm,
            dir: self.dir.clone(),
            into: into.map_or_else(|| self.dir.clone(), |id| home.vm(&id)),
            way: Way { guest: self.guest.clone(), channel: self.channel.clone() },
            monitor: running.monitor.clone(),
            running: snapshot::Running {
                machine: shape(&self.machine, &facts::gather(&home.cache())),
                qemu: qemu_id(&qemu),
                token: crate::hex::encode(self.guest.token()),
            },
        })
    }

    /// Lets a VM go on whose snapshot nobody takes any more.
    pub(super) async fn mend_snapshot(&self, running: &Running) {
        if !snapshot::remove_unfinished(&self.dir) {
            return;
        }
        tracing::warn!("a snapshot was cut off; the VM goes on");
        if let Err(error) = running.monitor.cont(QMP_WITHIN).await {
            tracing::error!("the VM cannot go on: {error}");
        }
        let way = Way { guest: self.guest.clone(), channel: self.channel.clone() };
        tokio::spawn(async move {
            // It thaws by itself, too, only later.
            let _ = thaw(&way, Instant::now() + FROZEN_WITHIN).await;
        });
    }
}

impl Taking {
    async fn take(self, name: &SnapshotName) -> Result<()> {
        let unfinished = Unfinished::begin(&self.dir, &self.into, name)?;
        let guest_error = |e: GuestError| Error::from_guest(self.vm.as_str(), e);
        let deadline = Instant::now() + FROZEN_WITHIN;
        let stream = self.way.stream(deadline).await.map_err(guest_error)?;
        let mut session = Session::open(stream, self.way.guest.token(), deadline).await.map_err(guest_error)?;
        session.freeze(deadline).await.map_err(guest_error)?;
        let began = std::time::Instant::now();
        let saved = self.save(&unfinished).await;
        let gone_on = self.monitor.cont(QMP_WITHIN).await.map_err(|e| qmp_error(&e));
        tracing::info!("the VM stood still for {} ms", began.elapsed().as_millis());
        let thawed = session.thaw(Instant::now() + FROZEN_WITHIN).await.map_err(guest_error);
        saved.and(gone_on).and(thawed)?;
        unfinished.publish(&Record::now(Some(self.running)))
    }

    async fn save(&self, unfinished: &Unfinished) -> Result<()> {
        self.monitor.stop(QMP_WITHIN).await.map_err(|e| qmp_error(&e))?;
        let state = unfinished.state()?;
        migration::save(&self.monitor, Path::new(SAVE_SOCKET), state, Memory::Within, SAVED_WITHIN)
            .await
            .map_err(|e| Error::new(Code::QemuFailed, e.to_string().escape_debug().to_string()))?;
        // QEMU has written everything of the disk and let go of it until it goes on.
        unfinished.copy_disk(&self.dir)
    }
}

async fn thaw(way: &Way, deadline: Instant) -> Result<(), GuestError> {
    let guest: &Guest = &way.guest;
    Session::open(way.stream(deadline).await?, guest.token(), deadline).await?.thaw(deadline).await
}
