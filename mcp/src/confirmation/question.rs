//! The question that a user is asked: what is done to what, and what is lost.

use std::time::SystemTime;

use nido_api::name::VmName;
use nido_api::sanitize::head;
use nido_api::{Ask, VmInfo};
use serde_json::Value;

use crate::answer::plain;
use crate::call_context::CallContext;
use crate::tools::Tool;

/// How much of the arguments a question shows, in bytes.
const SHOWN: usize = 400;

/// What a person is asked: what is done to what, and what is lost. Nothing of a guest is in it, and what the agent has written is shown
/// without what hides or reorders text.
pub async fn question(call: &CallContext, tool: &Tool, ask: &Ask, vm: Option<&VmInfo>) -> String {
    let agent = ask.agent.as_deref().map_or_else(|| "An agent".into(), plain);
    let name = &ask.vm_name;
    let vm = vm.map_or_else(|| format!("VM '{name}'"), described);
    let text = |key: &str| plain(head(ask.arguments.get(key).and_then(Value::as_str).unwrap_or_default(), SHOWN));
    let flag = |key: &str| ask.arguments.get(key).is_some_and(|value| *value == true);
    match tool.name {
        "vm_delete" => {
            let now = if flag("force") { " It is ended at once if it runs." } else { "" };
            format!("{agent} wants to delete {vm}, with its disk and its snapshots.{now} This cannot be undone.")
        }
        "vm_restore" => {
            let snapshot = text("snapshot");
            let of = taken(call, name, &snapshot).await;
            let what = if flag("disk_only") { "the disk of " } else { "" };
            format!(
                "{agent} wants to restore {what}{vm} to the snapshot '{snapshot}'{of}. Everything since then is lost. This cannot be \
                 undone."
            )
        }
        "vm_stop" => {
            let lost = if vm_is_ephemeral(call, name).await {
                ", which destroys it with its disk, because it is ephemeral"
            } else {
                ""
            };
            format!("{agent} wants to stop {vm}{lost}. This cannot be undone.")
        }
        "vm_exec" => {
            let argv = ask.arguments.get("argv").map(|argv| plain(head(&argv.to_string(), SHOWN)));
            let command = argv.unwrap_or_else(|| text("command"));
            format!("{agent} wants to run a command in {vm}: {command}")
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

/// A VM, for who has to decide about it. Names are parsed names.
fn described(vm: &VmInfo) -> String {
    let age = age(vm.created_at.into());
    format!("VM '{}' (id {}, of template {}, {}, made {age} ago)", vm.name, vm.id, vm.template, vm.status.word())
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

async fn vm_is_ephemeral(call: &CallContext, vm: &VmName) -> bool {
    match call.nido().await {
        Ok(nido) => nido.spec(vm).is_ok_and(|spec| spec.ephemeral),
        Err(_) => false,
    }
}
