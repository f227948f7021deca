//! Copies of a running VM.

use futures::future::BoxFuture;
use nido_api::StartStage;
use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_core::Intent;
use nido_core::policy::decide_fork;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::brief::{VmBrief, vm_list};
use super::{Operation, SINGLE_USE_HINTS, Tool, arguments};
use crate::answer::ToolResult;
use crate::call_context::CallContext;
use crate::schema;

/// How many copies one call can make.
const COPIES_MAX: usize = 16;

pub const FORK: Tool = Tool {
    op: op::VM_FORK,
    title: "Copy a VM",
    about: "Copies a running VM with memory and disk, to try several ways from one state. It keeps running.",
    hints: SINGLE_USE_HINTS,
    takes: schema::arguments::<Fork>,
    unlisted: &[],
    gives: schema::result_or_job::<Copies>,
    parse: |given| Ok(Box::new(Fork::parse(given)?)),
};

/// Which VM is copied.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Fork {
    name: VmName,
    /// Names.
    copies: Vec<VmName>,
}

impl Fork {
    fn parse(given: Value) -> Result<Self> {
        let fork: Self = arguments(given)?;
        match fork.copies.len() {
            1..=COPIES_MAX => Ok(fork),
            _ => Err(Error::new(Code::SpecInvalid, format!("copies: must be 1 to {COPIES_MAX} names"))),
        }
    }

    /// Whether the policy allows the copies.
    async fn check(&self, call: &CallContext) -> Result<()> {
        let (_, template) = call.nido().await?.identity(call.which(&self.name))?;
        let policy = &call.app.settings().policy;
        self.copies.iter().try_for_each(|copy| {
            decide_fork(policy, &self.name, &template, copy).into_result().map_err(|denial| {
                call.refused_because(denial.reason);
                Error::from(denial)
            })
        })
    }
}

/// The copies of a VM.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Copies {
    vms: Vec<VmBrief>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
    /// For how long the CPUs of the VM that was copied were paused, if they ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    paused_ms: Option<u64>,
}

impl Operation for Fork {
    fn vm(&self) -> Option<&VmName> {
        Some(&self.name)
    }

    fn admit<'a>(&'a self, call: &'a CallContext) -> BoxFuture<'a, Result<()>> {
        let intent = Intent::Fork { copies: &self.copies, limits: &call.limits };
        Box::pin(async move {
            self.check(call).await?;
            call.nido().await?.admits(call.which(&self.name), &intent)
        })
    }

    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move {
            self.check(&call).await?;
            let grant = call.grant();
            let mut tell = |_: &VmName, stage: StartStage| call.progress.stage(stage);
            let vm = call.which(&self.name);
            let forking = Box::pin(call.nido().await?.fork(vm, &self.copies, &grant, &mut tell));
            let forked = call.unless_cancelled(forking).await?;
            forked.copies.iter().for_each(|vm| call.created(vm));
            let list = vm_list(forked.copies, None);
            ToolResult::new(&Copies { vms: list.vms, warnings: list.warnings, paused_ms: forked.paused_ms })
        })
    }
}
