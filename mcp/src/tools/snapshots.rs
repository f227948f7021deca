//! Snapshots: a VM as it was at one moment, and back.

use futures::future::BoxFuture;
use nido_api::error::Result;
use nido_api::name::{SnapshotName, VmName};
use nido_api::operation as op;
use nido_api::{RestoreRequest, SnapshotInfo};
use nido_core::Intent;
use serde::Deserialize;

use super::{Operation, REPEATABLE, SINGLE_USE_HINTS, Tool, brief, parse};
use crate::answer::ToolResult;
use crate::call_context::CallContext;
use crate::schema;

pub const SNAPSHOT: Tool = Tool {
    op: op::VM_SNAPSHOT,
    title: "Take a snapshot",
    about: "Saves a VM's disk, and memory if it runs, before something risky. vm_restore goes back; vm_info lists \
        snapshots.",
    hints: SINGLE_USE_HINTS,
    takes: schema::arguments::<Take>,
    unlisted: &[],
    gives: schema::result_or_job::<SnapshotInfo>,
    parse: parse::<Take>,
};

/// What is saved.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Take {
    name: VmName,
    snapshot: SnapshotName,
}

impl Operation for Take {
    fn vm(&self) -> Option<&VmName> {
        Some(&self.name)
    }

    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move {
            let vm = call.which(&self.name);
            ToolResult::new(&call.nido().await?.snapshot_create(vm, &self.snapshot).await?)
        })
    }
}

pub const RESTORE: Tool = Tool {
    op: op::VM_RESTORE,
    title: "Restore a snapshot",
    about: "Takes a VM back to a snapshot; everything since is lost. May ask the user.",
    hints: REPEATABLE,
    takes: schema::arguments::<Restore>,
    unlisted: &["timeout_seconds"],
    gives: schema::vm_or_job,
    parse: parse::<Restore>,
};

/// What a VM is taken back to.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Restore {
    name: VmName,
    snapshot: SnapshotName,
    /// Only the disk; the VM stays stopped.
    #[serde(default)]
    disk_only: bool,
    /// How long the guest may take to become ready, in milliseconds.
    #[serde(default)]
    timeout_ms: Option<u64>,
}

impl Operation for Restore {
    fn vm(&self) -> Option<&VmName> {
        Some(&self.name)
    }

    fn admit<'a>(&'a self, call: &'a CallContext) -> BoxFuture<'a, Result<()>> {
        let intent = Intent::Restore { snapshot: &self.snapshot };
        Box::pin(async move { call.nido().await?.admits(call.which(&self.name), &intent) })
    }

    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move {
            let how = RestoreRequest { disk_only: self.disk_only, timeout_ms: self.timeout_ms };
            let mut tell = |stage| call.progress.stage(stage);
            let vm = call.which(&self.name);
            brief::vm(call.nido().await?.snapshot_restore(vm, &self.snapshot, how, &mut tell).await?)
        })
    }
}
