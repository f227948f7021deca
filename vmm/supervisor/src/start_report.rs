//! What the task that starts a VM, or takes it over, reports to the event loop, and how the supervision of a QEMU ends.

use nido_api::error::Error;
use nido_engine::qemu::QemuExit;
use qapi::qmp::RunState;
use tokio::task::JoinHandle;

use super::launch::Connection;

/// How the supervision of a QEMU ended.
pub(super) enum End {
    /// QEMU has ended.
    Exit(QemuExit),
    /// QEMU has ended before its monitor replied.
    NeverConnected(QemuExit),
    /// The guest never ran.
    Error(Error),
    /// QEMU lives, and there is no way to it.
    OutOfReach(Error),
    /// The QEMU that was taken over had not loaded its guest. It was killed; another one is as good.
    StartAgain,
}

/// What the task that starts a VM, or takes it over, reports.
pub(super) enum StartReport {
    /// QEMU was started.
    Spawned,
    /// Its monitor replies.
    Connected(Connection),
    /// The guest runs.
    Started,
    /// A QEMU that the supervisor before has left was found; its monitor, if it replies.
    Attached(Option<Connection>),
    /// What the supervisor before had begun is complete or undone; what the CPUs do, if QEMU replied.
    TakenOver(Takeover),
    /// The task has ended without a guest that runs.
    Over(End),
}

/// What was found in a QEMU that was taken over.
pub(super) enum Takeover {
    /// It was still loading, so that its guest has done nothing yet.
    StillLoading,
    /// Its guest was loaded, and has not been ready yet.
    Loaded,
    /// What its CPUs do.
    Status(RunState),
    /// It does not reply.
    Unknown,
}

/// A start that is not over.
#[derive(Debug)]
pub(super) struct PendingStart {
    pub task: JoinHandle<()>,
    /// It takes over a QEMU.
    pub attaches: bool,
}
