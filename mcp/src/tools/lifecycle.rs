//! VMs are started and stopped.

use futures::future::BoxFuture;
use nido_api::error::Result;
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::state::VmState;
use nido_api::{StartRequest, StopRequest};
use serde::Deserialize;

use super::{Hints, Operation, Tool, brief, parse};
use crate::answer::ToolResult;
use crate::call_context::CallContext;
use crate::schema;

pub const START: Tool = Tool {
    op: op::VM_START,
    title: "Start a VM",
    about: "Starts a VM, or resumes a paused one, and waits until it takes commands. Its disk is unchanged.",
    hints: Hints { idempotent: true, open_world: false },
    takes: schema::arguments::<Start>,
    unlisted: &["timeout_seconds"],
    gives: schema::vm_or_job,
    parse: parse::<Start>,
};

/// Which VM is started.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Start {
    name: VmName,
    /// How long the guest may take to become ready, in milliseconds.
    #[serde(default)]
    timeout_ms: Option<u64>,
}

impl Operation for Start {
    fn vm(&self) -> Option<&VmName> {
        Some(&self.name)
    }

    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move {
            let how = StartRequest { timeout_ms: self.timeout_ms, ..StartRequest::default() };
            let mut tell = |stage| call.progress.stage(stage);
            let nido = call.nido().await?;
            if nido.info(&self.name).await?.status == VmState::Paused {
                // There is no other tool for it: to an agent a VM runs or does not.
                call.unless_cancelled(nido.resume(&self.name)).await?;
            }
            // A start without a waiting caller continues by itself.
            brief::vm(call.unless_cancelled(nido.start(&self.name, how, &mut tell)).await?)
        })
    }
}

pub const STOP: Tool = Tool {
    op: op::VM_STOP,
    title: "Stop a VM",
    about: "Powers a VM off. Its disk stays, but an ephemeral VM is deleted: the user may be asked.",
    hints: Hints { idempotent: true, open_world: false },
    takes: schema::arguments::<Stop>,
    unlisted: &["timeout_seconds"],
    gives: schema::vm_or_job,
    parse: parse::<Stop>,
};

/// Which VM is stopped.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Stop {
    name: VmName,
    /// At once; unsaved data is lost.
    #[serde(default)]
    force: bool,
    /// How long an orderly power-off may take, in milliseconds.
    #[serde(default)]
    timeout_ms: Option<u64>,
}

impl Operation for Stop {
    fn vm(&self) -> Option<&VmName> {
        Some(&self.name)
    }

    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move {
            let usual = StopRequest::default();
            let how = StopRequest { force: self.force, timeout_ms: self.timeout_ms.unwrap_or(usual.timeout_ms) };
            brief::vm(call.nido().await?.stop(call.which(&self.name), how).await?)
        })
    }
}
