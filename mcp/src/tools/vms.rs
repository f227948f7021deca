//! VMs: list, facts, delete.

use std::collections::BTreeMap;

use futures::future::BoxFuture;
use nido_api::error::Result;
use nido_api::name::{SnapshotName, VmName};
use nido_api::operation as op;
use nido_api::state::VmState;
use nido_api::{LabelFilter, SnapshotInfo, VmInfo, VmQuery};
use nido_core::Intent;
use serde::{Deserialize, Serialize};

use super::brief::{self, VmBriefs, vm_list};
use super::{Operation, REPEATABLE, Tool, page_request, parse};
use crate::answer::ToolResult;
use crate::call_context::CallContext;
use crate::schema;

pub const LS: Tool = Tool {
    op: op::VM_LS,
    title: "List VMs",
    about: "Lists VMs: name, state, template, end of life, ports, labels.",
    hints: REPEATABLE,
    takes: schema::arguments::<Ls>,
    unlisted: &["limit"],
    gives: schema::result::<VmBriefs>,
    parse: parse::<Ls>,
};

/// Which VMs are listed.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
struct Ls {
    /// All of these.
    labels: BTreeMap<String, String>,
    status: Option<VmState>,
    /// Default 50.
    #[schema(minimum = 1, maximum = 500)]
    limit: Option<usize>,
    /// A next_cursor.
    cursor: Option<String>,
}

impl Operation for Ls {
    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move {
            let Self { labels, status, limit, cursor } = *self;
            let query = VmQuery {
                status: status.into_iter().collect(),
                labels: labels.into_iter().map(|(key, value)| LabelFilter::with_value(key, value)).collect(),
                page: page_request(limit, cursor)?,
            };
            let page = call.nido().await?.list_page(&query).await?;
            let list = vm_list(page.vms, page.next_cursor);
            Ok(ToolResult::new(&list)?.with_text(list.text()))
        })
    }
}

pub const INFO: Tool = Tool {
    op: op::VM_INFO,
    title: "Get a VM",
    about: "Returns all facts of a VM: state, limits, ports, snapshots, cause of failure. Use it after an error.",
    hints: REPEATABLE,
    takes: schema::arguments::<Info>,
    unlisted: &[],
    gives: schema::result::<VmFacts>,
    parse: parse::<Info>,
};

/// One VM.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Info {
    name: VmName,
}

/// All facts of a VM.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct VmFacts {
    #[serde(flatten)]
    vm: VmInfo,
    /// The oldest first.
    snapshots: Vec<Snapshot>,
}

/// A snapshot of a VM.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Snapshot {
    name: SnapshotName,
    created_at: String,
    /// It holds memory: the VM resumes where it was.
    running: bool,
    size_bytes: u64,
    /// Why it cannot be restored.
    #[serde(skip_serializing_if = "Option::is_none")]
    damaged: Option<String>,
}

impl From<SnapshotInfo> for Snapshot {
    fn from(one: SnapshotInfo) -> Self {
        let created_at = format!("{:.0}", one.created_at);
        Self { name: one.name, created_at, running: one.running, size_bytes: one.size_bytes, damaged: one.damaged }
    }
}

impl Operation for Info {
    fn vm(&self) -> Option<&VmName> {
        Some(&self.name)
    }

    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move {
            let nido = call.nido().await?;
            let vm = nido.info(&self.name).await?;
            let snapshots = nido.snapshot_list(&self.name)?.snapshots.into_iter().map(Snapshot::from).collect();
            ToolResult::new(&VmFacts { vm, snapshots })
        })
    }
}

pub const DELETE: Tool = Tool {
    op: op::VM_DELETE,
    title: "Delete a VM",
    about: "Deletes a VM, its disk and snapshots permanently. May ask the user, except about your own ephemeral \
        VMs.",
    hints: REPEATABLE,
    takes: schema::arguments::<Delete>,
    unlisted: &[],
    gives: schema::vm_or_job,
    parse: parse::<Delete>,
};

/// Which VM is deleted.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Delete {
    name: VmName,
    /// Also if it runs.
    #[serde(default)]
    force: bool,
}

impl Operation for Delete {
    fn vm(&self) -> Option<&VmName> {
        Some(&self.name)
    }

    fn admit<'a>(&'a self, call: &'a CallContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(async { call.nido().await?.admits(call.which(&self.name), &Intent::Delete { force: self.force }) })
    }

    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move { brief::vm(call.nido().await?.delete(call.which(&self.name), self.force).await?) })
    }
}
