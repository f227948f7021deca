//! The question that a user is asked: what is done to what, and what is lost.

use std::time::SystemTime;

use nido_api::name::VmName;
use nido_api::sanitize::head;
use nido_api::state::VmState;
use nido_api::{ApprovalRequest, VmInfo};
use serde_json::Value;

use crate::answer::plain;
use crate::call_context::CallContext;
use crate::tools::Tool;

/// How much of the arguments a question shows, in bytes.
const SHOWN: usize = 400;

/// How many snapshots a question names.
const SNAPSHOTS_NAMED: usize = 5;

/// What a person is asked: what is done to what, and what is lost. Nothing of a guest is in it, and what the agent has written is shown
/// without what hides or reorders text.
pub async fn question(call: &CallContext, tool: &Tool, ask: &ApprovalRequest, seen: Option<&VmInfo>) -> String {
    let agent = ask.agent.as_deref().map_or_else(|| "An agent".into(), plain);
    let name = &ask.vm_name;
    let vm = seen.map_or_else(|| format!("VM '{name}'"), described);
    let text = |key: &str| shown(ask, key);
    let flag = |key: &str| ask.arguments.get(key).is_some_and(|value| *value == true);
    match tool.name() {
        "vm_delete" | "vm_restore" | "vm_stop" => end_of_state(call, tool, ask, seen, (&agent, &vm)).await,
        "vm_exec" => {
            let argv = ask.arguments.get("argv").map(|argv| plain(head(&argv.to_string(), SHOWN)));
            let command = argv.unwrap_or_else(|| text("command"));
            format!("{agent} wants to run a command in {vm}: {command}")
        }
        "vm_run" => {
            let argv = ask.arguments.get("argv").map(|argv| plain(head(&argv.to_string(), SHOWN)));
            let command = argv.unwrap_or_else(|| text("command"));
            format!("{agent} wants to run a command in a new VM, which is deleted afterwards: {command}")
        }
        "vm_ports" => {
            let change = |word: &str, key: &str| match text(key) {
                port if port.is_empty() => None,
                port => Some(format!("{word} the port {port}")),
            };
            let changes: Vec<_> = [change("no longer publish", "unpublish"), change("publish", "publish")]
                .into_iter()
                .flatten()
                .collect();
            format!("{agent} wants to {} of {vm} on this host.", changes.join(" and "))
        }
        "vm_network" => {
            let rules = |key: &str| ask.arguments.get(key).map(|rules| plain(head(&rules.to_string(), SHOWN)));
            match (rules("allow"), rules("deny")) {
                (_, Some(deny)) => format!("{agent} wants to remove rules of the network of {vm}: {deny}."),
                (allow, None) => format!("{agent} wants {vm} to reach {}.", allow.unwrap_or_default()),
            }
        }
        "vm_fork" => {
            let copies = ask.arguments.get("copies").map(|copies| plain(head(&copies.to_string(), SHOWN)));
            format!(
                "{agent} wants to copy {vm}, with its disk and everything in its memory, as {}; the copies are its own.",
                copies.unwrap_or_default()
            )
        }
        "vm_upload" => format!("{agent} wants to write the file '{}' in {vm}.", text("path")),
        "vm_download" if flag("overwrite") => {
            format!(
                "{agent} wants to replace the file '{}' of this host with '{}' of {vm}.",
                text("destination"),
                text("path")
            )
        }
        other => format!("{agent} wants to call {other} for {vm}: {}", plain(head(&ask.arguments.to_string(), SHOWN))),
    }
}

/// The question about a call that takes something of a VM away; `agent` asks about `vm`.
async fn end_of_state(
    call: &CallContext,
    tool: &Tool,
    ask: &ApprovalRequest,
    seen: Option<&VmInfo>,
    (agent, vm): (&str, &str),
) -> String {
    let text = |key: &str| shown(ask, key);
    let flag = |key: &str| ask.arguments.get(key).is_some_and(|value| *value == true);
    match tool.name() {
        "vm_delete" => {
            let lost = lost(call, ask, seen, &[Loss::Disk, Loss::Memory, Loss::Snapshots]).await;
            let now = if flag("force") { " It is ended at once if it runs." } else { "" };
            format!("{agent} wants to delete {vm}.{now} Lost permanently: {lost}.")
        }
        "vm_restore" => {
            let snapshot = text("snapshot");
            let of = taken(call, &ask.vm_name, &snapshot).await;
            let what = if flag("disk_only") { "the disk of " } else { "" };
            let lost = lost(call, ask, seen, &[Loss::Memory]).await;
            let lost = if lost.is_empty() { lost } else { format!(", {lost}") };
            format!(
                "{agent} wants to restore {what}{vm} to the snapshot '{snapshot}'{of}. Lost permanently: everything written to its \
                 disk since then{lost}."
            )
        }
        _ => match seen.is_some_and(|vm| vm.ephemeral) {
            true => {
                let lost = lost(call, ask, seen, &[Loss::Disk, Loss::Memory, Loss::Snapshots]).await;
                format!(
                    "{agent} wants to stop {vm}, which deletes it, because it is ephemeral. Lost permanently: {lost}."
                )
            }
            false => {
                let lost = lost(call, ask, seen, &[Loss::Memory]).await;
                let lost = if lost.is_empty() { String::new() } else { format!(" Lost: {lost}.") };
                format!("{agent} wants to stop {vm}. Its disk stays.{lost}")
            }
        },
    }
}

/// An argument that is text, as far as a question shows it.
fn shown(ask: &ApprovalRequest, key: &str) -> String {
    plain(head(ask.arguments.get(key).and_then(Value::as_str).unwrap_or_default(), SHOWN))
}

/// A VM, for who has to decide about it. Names are parsed names.
fn described(vm: &VmInfo) -> String {
    let age = age(vm.created_at.into());
    format!("VM '{}' (id {}, of template {}, {}, created {age} ago)", vm.name, vm.id, vm.template, vm.status.word())
}

fn age(since: SystemTime) -> String {
    let minutes = since.elapsed().unwrap_or_default().as_secs() / 60;
    match minutes {
        ..120 => format!("{minutes} min"),
        120..2880 => format!("{} h", minutes / 60),
        _ => format!("{} days", minutes / 1440),
    }
}

/// When a snapshot was taken.
async fn taken(call: &CallContext, vm: &VmName, snapshot: &str) -> String {
    let Ok(nido) = call.nido().await else { return String::new() };
    let list = nido.snapshot_list(vm).map(|list| list.snapshots).unwrap_or_default();
    let found = list.into_iter().find(|one| one.name.as_str() == snapshot);
    found.map_or_else(String::new, |one| format!(" of {:.0} ({} ago)", one.created_at, age(one.created_at.into())))
}

/// What an operation takes away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    Disk,
    Memory,
    Snapshots,
}

/// The parts of a VM that are lost, as far as it has them.
async fn lost(call: &CallContext, ask: &ApprovalRequest, vm: Option<&VmInfo>, losses: &[Loss]) -> String {
    let snapshots = match call.nido().await {
        Ok(nido) => nido.snapshot_list(&ask.vm_name).map(|list| list.snapshots).unwrap_or_default(),
        Err(_) => Vec::new(),
    };
    let names: Vec<_> = snapshots.iter().take(SNAPSHOTS_NAMED).map(|one| one.name.as_str()).collect();
    let parts = losses.iter().filter_map(|loss| match loss {
        Loss::Disk => Some("its disk".to_owned()),
        Loss::Memory => vm.and_then(running_for),
        Loss::Snapshots => snapshots_lost(&names, snapshots.len()),
    });
    parts.collect::<Vec<_>>().join(", ")
}

/// What runs, and since when.
fn running_for(vm: &VmInfo) -> Option<String> {
    let runs = matches!(vm.status, VmState::Running | VmState::Paused);
    let since = vm.started_at.filter(|_| runs)?;
    Some(format!("what runs in it (up for {})", age(since.into())))
}

fn snapshots_lost(names: &[&str], all: usize) -> Option<String> {
    let more = match all - names.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    match all {
        0 => None,
        1 => Some(format!("its snapshot {}", names.join(""))),
        _ => Some(format!("its {all} snapshots {}{more}", names.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_that_are_lost_are_named_and_counted() {
        assert_eq!(snapshots_lost(&[], 0), None);
        assert_eq!(snapshots_lost(&["a"], 1).unwrap(), "its snapshot a");
        assert_eq!(snapshots_lost(&["a", "b"], 2).unwrap(), "its 2 snapshots a, b");
        assert_eq!(snapshots_lost(&["a", "b"], 9).unwrap(), "its 9 snapshots a, b and 7 more");
    }
}
