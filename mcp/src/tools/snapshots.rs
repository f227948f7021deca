//! Snapshots: a VM as it was at one moment, and back.

use nido_api::error::Result;
use nido_api::name::{SnapshotName, VmName};
use nido_api::{RestoreRequest, Scope, SnapshotInfo};
use serde::Deserialize;

use super::{ADDS, DESTROYS, Tool, arguments};
use crate::answer::ToolResult;
use crate::call_context::CallContext;
use crate::schema;

pub const SNAPSHOT: Tool = Tool {
    name: "vm_snapshot",
    title: "Take a snapshot of a VM",
    about: "Keeps a virtual machine as it is under a name: memory, devices and disk of one that runs, the disk of one that does \
        not. Use it before something that may go wrong. A VM that runs stands still for a moment. Uses about as much of the \
        host's disk as the VM has memory. To start other VMs from its disk use template_create. Next: vm_restore goes back \
        to it.",
    hints: ADDS,
    scope: Scope::Run,
    takes: schema::arguments::<Take>,
    gives: schema::answer_or_job::<SnapshotInfo>,
    run: |call, given| Box::pin(async move { take(&call, arguments(given)?).await }),
};

/// What is to be kept.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Take {
    /// Name of the VM.
    name: VmName,
    /// Name of the snapshot: 1 to 63 of a-z, 0-9 and '-'. Unique for the VM.
    snapshot: SnapshotName,
}

async fn take(call: &CallContext, asked: Take) -> Result<ToolResult> {
    ToolResult::new(&call.nido().await?.snapshot_create(call.which(&asked.name), &asked.snapshot).await?)
}

pub const RESTORE: Tool = Tool {
    name: "vm_restore",
    title: "Go back to a snapshot",
    about: "Makes a virtual machine what it was when the snapshot was taken. What it has done since is lost and cannot be \
        fetched any more: fetch what is still needed with vm_download first. A snapshot of a VM that ran goes on where it \
        was; with disk_only the disk is taken back and the VM does not run. The snapshot stays. The user may be asked first. Next: vm_exec.",
    hints: DESTROYS,
    scope: Scope::Run,
    takes: schema::arguments::<Restore>,
    gives: schema::vm_or_job,
    run: |call, given| Box::pin(async move { restore(&call, arguments(given)?).await }),
};

/// What a VM is to be again.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Restore {
    /// Name of the VM.
    name: VmName,
    /// Name of the snapshot.
    snapshot: SnapshotName,
    /// Take back the disk only, and leave the VM stopped.
    #[serde(default)]
    disk_only: bool,
    /// How long the guest may take to become ready, in milliseconds.
    #[serde(default)]
    timeout_ms: Option<u64>,
    /// The approval_id of an earlier answer approval_required, once the user has approved it. Else leave it out.
    #[serde(default, rename = "approval_id")]
    _approval_id: Option<String>,
}

async fn restore(call: &CallContext, asked: Restore) -> Result<ToolResult> {
    let how = RestoreRequest { disk_only: asked.disk_only, timeout_ms: asked.timeout_ms };
    let mut tell = |stage| call.progress.stage(stage);
    let vm = call.which(&asked.name);
    ToolResult::new(&call.nido().await?.snapshot_restore(vm, &asked.snapshot, how, &mut tell).await?)
}
