//! VMs: found, told about, thrown away.

use std::collections::BTreeMap;

use nido_api::error::Result;
use nido_api::name::VmName;
use nido_api::state::VmState;
use nido_api::{Scope, VmInfo, VmList};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::page::{PageRequest, page};
use super::{DESTROYS, LOOKS, Tool, arguments};
use crate::answer::ToolResult;
use crate::call_context::CallContext;
use crate::pagination::{cursor_of_vms, place};
use crate::schema;

pub const LS: Tool = Tool {
    name: "vm_ls",
    title: "List VMs",
    about: "Lists virtual machines in order of creation, with their state, template, limits and labels. Use it to find a VM \
        by label or state, or to see what is left over. For one VM whose name is known, vm_info is shorter. Changes \
        nothing. If next_cursor is in the answer, there are more: call again with cursor set to it.",
    hints: LOOKS,
    scope: Scope::Read,
    takes: schema::arguments::<Ls>,
    gives: schema::answer::<Page>,
    run: |call, given| Box::pin(async move { ls(&call, arguments(given)?).await }),
};

/// Which VMs are wanted.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
struct Ls {
    /// Only VMs that carry all of these labels.
    labels: BTreeMap<String, String>,
    /// Only VMs in this state.
    status: Option<VmState>,
    /// The most VMs that are answered; 50 if absent.
    #[schema(minimum = 1, maximum = 500)]
    limit: Option<usize>,
    /// The next_cursor of an earlier answer: what comes after it.
    cursor: Option<String>,
}

/// Some VMs.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Page {
    #[serde(flatten)]
    list: VmList,
    /// There are more: give this as cursor.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    next_cursor: Option<String>,
}

async fn ls(call: &CallContext, asked: Ls) -> Result<ToolResult> {
    let mut vms = call.nido().await?.list_with_idle().await?.vms;
    vms.retain(|vm| asked.status.is_none_or(|status| vm.status == status));
    vms.retain(|vm| asked.labels.iter().all(|(key, value)| vm.labels.get(key) == Some(value)));
    let wanted = PageRequest { limit: asked.limit, cursor: cursor_of_vms(asked.cursor.as_deref())? };
    let (vms, next_cursor) = page(vms, wanted, place)?;
    let mut done = ToolResult::new(&Page { list: VmList { vms }, next_cursor })?;
    without_repetition(&mut done.value);
    Ok(done)
}

/// What is the same for most VMs of a host, and long: vm_info tells it. Warnings are told once for all.
fn without_repetition(page: &mut Value) {
    let mut warnings: Vec<Value> = Vec::new();
    for vm in page["vms"].as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
        vm.remove("machine_reason");
        if let Some(Value::Array(some)) = vm.remove("warnings") {
            let new: Vec<_> = some.into_iter().filter(|one| !warnings.contains(one)).collect();
            warnings.extend(new);
        }
    }
    if !warnings.is_empty() {
        page["warnings"] = warnings.into();
    }
}

pub const INFO: Tool = Tool {
    name: "vm_info",
    title: "Tell about a VM",
    about: "Tells everything about one virtual machine: state, machine, isolation, network, published ports, limits, and why \
        it failed if it did. Use it before anything that depends on the state, and after an error. To find VMs whose name \
        is not known, use vm_ls. Changes nothing.",
    hints: LOOKS,
    scope: Scope::Read,
    takes: schema::arguments::<OneVm>,
    gives: schema::answer::<VmInfo>,
    run: |call, given| {
        Box::pin(async move {
            let OneVm { name } = arguments(given)?;
            ToolResult::new(&call.nido().await?.info(&name).await?)
        })
    },
};

/// One VM.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct OneVm {
    /// Name of the VM.
    name: VmName,
}

pub const DELETE: Tool = Tool {
    name: "vm_delete",
    title: "Delete a VM",
    about: "Deletes a virtual machine with its disk and its snapshots. This cannot be undone: fetch what is still needed with \
        vm_download first. Without force a VM that runs is refused; vm_stop it first, or set force to end it at once. Use \
        it for every VM that is not needed any more, unless it was made ephemeral with ttl_seconds. The user may be asked first; throw-away \
        VMs of your own are not asked about. The answer is the VM as it \
        was; a VM that does not exist is the error vm_not_found.",
    hints: DESTROYS,
    scope: Scope::Run,
    takes: schema::arguments::<Delete>,
    gives: schema::vm_or_job,
    run: |call, given| Box::pin(async move { delete(&call, arguments(given)?).await }),
};

/// Which VM is to go.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Delete {
    /// Name of the VM.
    name: VmName,
    /// Also if it runs: it is ended at once, without a power-off.
    #[serde(default)]
    force: bool,
    /// The approval_id of an earlier answer approval_required, once the user has approved it. Else leave it out.
    #[serde(default, rename = "approval_id")]
    _approval_id: Option<String>,
}

async fn delete(call: &CallContext, asked: Delete) -> Result<ToolResult> {
    ToolResult::new(&call.nido().await?.delete(call.which(&asked.name), asked.force).await?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_list_tells_what_is_the_same_for_all_vms_once() {
        // The same two sentences in every VM were a third of what a model pays for a list.
        let vm = |name: &str| json!({ "name": name, "machine_reason": "q35", "warnings": ["no isolation"] });
        let mut page = json!({ "vms": [vm("a"), vm("b"), { "name": "c", "warnings": ["another"] }] });
        without_repetition(&mut page);
        let names = json!([{ "name": "a" }, { "name": "b" }, { "name": "c" }]);
        assert_eq!(page, json!({ "vms": names, "warnings": ["no isolation", "another"] }));
    }
}
