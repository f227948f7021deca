//! VMs come and go: made, started, stopped.

use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::state::VmState;
use nido_api::{Scope, SpawnRequest, StartRequest, StopRequest, VmInfo, VmSpec};
use nido_core::BegunVm;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{ADDS, Hints, Tool, arguments, field};
use crate::answer::ToolResult;
use crate::call_context::CallContext;
use crate::schema;
use crate::session_leases::SessionKey;

/// The argument with which a throw-away VM is not the session's.
const OUTLIVES: &str = "outlives_session";
/// The longest life of a throw-away VM where there are no sessions, unless the caller says how long.
const TTL_MS: u64 = 3_600_000;

pub const SPAWN: Tool = Tool {
    name: "vm_spawn",
    title: "Make and start a VM",
    about: "Makes a virtual machine from a template, starts it and waits until commands can be run in it. Use it whenever a \
        fresh, isolated machine is needed. Give ttl_seconds and ephemeral for a VM that is only needed for this task: it then \
        belongs to this session, and is removed with it, or before when its time is up. Calling again with the same name and the same request answers with the VM that is there; a name \
        that is taken by a different VM is an error. If the start fails or the call is cancelled, nothing is left. Takes \
        from a few milliseconds (a pool or a saved guest) to a minute (a cold boot under emulation). The answer has \
        expires_at, lease if it belongs to the session, and in timings how long it took. Next: vm_exec, vm_upload; at the end vm_delete.",
    hints: ADDS,
    scope: Scope::Run,
    takes: || without(&SPAWN_DOES),
    gives: schema::vm_or_job,
    run: |call, given| Box::pin(async move { spawn(&call, given).await }),
};

/// What is said of the arguments of a new VM.
const OF_A_VM: [(&str, &str); 15] = [
    ("name", "Its name: 1 to 63 of a-z, 0-9 and '-'. Unique on this host."),
    ("template", "The template it is made from; template_list tells which there are."),
    ("cpus", "Virtual CPUs, at most the host's own; 1 if absent."),
    ("memory_mib", "Memory in MiB, less than the host's own; 512 if absent."),
    ("disk_bytes", "Size of its disk in bytes; the template's if absent. Cannot be smaller than that."),
    (
        "net",
        "nat: reaches whatever this host reaches; none: no network card. Commands and files work either way. nat if absent.",
    ),
    ("machine", "Machine type. Leave it out unless a certain one is needed."),
    ("accel", "kvm or tcg (emulation, slow). Leave it out: KVM is used where it works."),
    ("nested", "Let the guest run VMs of its own."),
    ("require_isolation", "Refuse to run where there is no hardware isolation (KVM)."),
    ("forwards", "Ports of the guest published on this host, on its loopback if host is absent."),
    (
        "ttl_seconds",
        "Longest life after a start, in seconds; then it is stopped, and removed if ephemeral. No limit if absent.",
    ),
    ("idle_seconds", "Longest time without a command, a copy or a connection, in seconds; then as for ttl_seconds."),
    (
        "ephemeral",
        "A throw-away VM: it is removed, disk and all, when it stops, when its time is up, and when this session (or the \
         server) ends. Where the protocol has no sessions (2026-07-28 over HTTP), ttl_seconds is 3600 unless it is given.",
    ),
    ("labels", "Free labels, at most 64; vm_ls finds VMs by them."),
];

/// What vm_spawn does always.
pub const SPAWN_DOES: [&str; 2] = ["start", "wait"];
/// What vm_create never does.
pub const CREATE_NEVER_DOES: [&str; 4] = ["start", "wait", "path", "start_timeout_ms"];

/// The arguments of a new VM, without those that make no sense for the tool.
fn without(left_out: &[&str]) -> Value {
    let mut schema = schema::told(schema::arguments::<SpawnRequest>(), &OF_A_VM);
    if let Some(properties) = schema["properties"].as_object_mut() {
        let path =
            "How it comes to life: fork (from a saved guest, or fail) or cold (boot). Leave it out for the quickest.";
        properties["path"]["description"] = path.into();
        let outlives = "An ephemeral VM that does not go with this session (one over HTTP ends when it is not used for some \
            minutes): only its limits, its stop or vm_delete end it. false if absent.";
        properties.insert(OUTLIVES.into(), json!({ "type": "boolean", "default": false, "description": outlives }));
        properties.retain(|name, _| !left_out.contains(&name.as_str()));
    }
    schema
}

/// A new VM, as it is asked for, and how it is started; with an argument that was left out, it is none.
fn request(call: &CallContext, mut given: Value, left_out: &[&str]) -> Result<(VmSpec, StartRequest)> {
    if let Some(name) = left_out.iter().find(|name| given.get(name).is_some()) {
        let words =
            format!("{name}: there is no such argument; vm_spawn makes a VM that runs, vm_create one that does not");
        return Err(Error::new(Code::SpecInvalid, words));
    }
    let outlives = given.as_object_mut().and_then(|given| given.remove(OUTLIVES));
    let outlives = outlives.map_or(Ok(false), |outlives| field(OUTLIVES, Some(outlives)))?;
    let (mut spec, start) = arguments::<SpawnRequest>(given)?.split();
    if outlives && !spec.ephemeral {
        let words = format!("{OUTLIVES}: only a VM that is ephemeral would go with the session");
        return Err(Error::new(Code::SpecInvalid, words));
    }
    if spec.ephemeral && !outlives {
        spec.lease = Some(call.lease()?);
        if call.session == SessionKey::SERVER {
            spec.ttl_ms.get_or_insert(TTL_MS);
        }
    }
    Ok((spec, start.unwrap_or_default()))
}

/// A VM that was made, for the answer; the audit log is told what it belongs to.
fn made(call: &CallContext, vm: &VmInfo) -> Result<ToolResult> {
    if vm.ephemeral {
        call.app.remember(&call.who.actor, &vm.id);
    }
    let word = vm.lease.as_ref().map_or_else(String::new, |lease| format!("lease:{}", lease.as_str()));
    Ok(ToolResult { word, ..ToolResult::new(vm)? })
}

async fn spawn(call: &CallContext, given: Value) -> Result<ToolResult> {
    let (spec, start) = request(call, given, &SPAWN_DOES)?;
    let nido = call.nido().await?;
    let (name, begun, grant) = (spec.name.clone(), BegunVm::default(), call.grant());
    let mut tell = |stage| call.progress.stage(stage);
    let spawning = Box::pin(nido.spawn_tracked(spec.clone(), start, &grant, &begun, &mut tell));
    let spawned = call.unless_cancelled(spawning).await;
    match spawned {
        Ok(vm) => made(call, &vm),
        Err(error) if error.code() == Code::Interrupted => {
            remove(call, &begun).await;
            Err(error)
        }
        Err(error) if error.code() == Code::VmExists && nido.spec(&name).is_ok_and(|there| there == spec) => {
            let vm = nido.info(&name).await?;
            match vm.status {
                VmState::Running => ToolResult::new(&vm),
                // Somebody, perhaps this very caller, is at it: wait with them.
                VmState::Starting | VmState::Created => {
                    let mut tell = |stage| call.progress.stage(stage);
                    ToolResult::new(&call.unless_cancelled(nido.start(&name, start, &mut tell)).await?)
                }
                // To begin it anew is a decision: it has ended, or somebody has halted it.
                VmState::Paused | VmState::Stopped | VmState::Failed | VmState::Unknown => {
                    call.next_step(
                        "it is the VM of this very request: vm_start lets it run again, with its disk as it is",
                    );
                    Err(error)
                }
                VmState::Stopping => Err(error),
            }
        }
        // It was removed: what the error says about it must not lead back to it.
        Err(error) if begun.id().is_some() && error.code() != Code::VmExists => {
            call.next_step(
                "nothing is left of the VM: call vm_spawn again, with a longer start_timeout_seconds if the guest was slow, or \
                 with path cold if a saved guest did not come up; if it fails again, tell the user what the message says",
            );
            let hint = "its log went with it; log_tail holds the last lines, if it wrote any";
            Err(error.hint(hint))
        }
        Err(error) => Err(error),
    }
}

/// Removes what was begun. Nothing half-made stays.
async fn remove(call: &CallContext, begun: &BegunVm) {
    if let Err(error) = call.app.unsettled().undo(begun).await {
        tracing::error!("VM {} was begun and could not be removed: {error}", begun.id().unwrap_or_default());
    }
}

pub const CREATE: Tool = Tool {
    name: "vm_create",
    title: "Make a VM",
    about: "Makes a virtual machine without starting it. Use it to prepare a VM for later, or to publish ports before it \
        runs; for a VM that is to be used now, vm_spawn does both in one. Calling again with the same name and the same \
        request answers with the VM that is there. Uses disk space only when it is started. Next: vm_start.",
    hints: ADDS,
    scope: Scope::Run,
    takes: || without(&CREATE_NEVER_DOES),
    gives: schema::vm_or_job,
    run: |call, given| Box::pin(async move { create(&call, given).await }),
};

async fn create(call: &CallContext, given: Value) -> Result<ToolResult> {
    let (spec, _) = request(call, given, &CREATE_NEVER_DOES)?;
    let nido = call.nido().await?;
    let name = spec.name.clone();
    call.progress.tell(1.0, Some(2.0), "preparing disk and configuration");
    match nido.create(spec.clone(), &call.grant()).await {
        Ok(vm) => {
            call.progress.tell(2.0, Some(2.0), "made");
            made(call, &vm)
        }
        Err(error) if error.code() == Code::VmExists => match nido.spec(&name) {
            Ok(there) if there == spec => ToolResult::new(&nido.info(&name).await?),
            _ => Err(error),
        },
        Err(error) => Err(error),
    }
}

pub const START: Tool = Tool {
    name: "vm_start",
    title: "Start a VM",
    about: "Starts a virtual machine that is created, stopped or failed, and waits until commands can be run in it. Its disk \
        is as it was left. One that is paused runs on where it was. One that runs already is answered as it is. To make a \
        new VM use vm_spawn. Takes from a few milliseconds to a minute. Next: vm_exec.",
    hints: Hints { read_only: false, destructive: false, idempotent: true, open_world: false },
    scope: Scope::Run,
    takes: schema::arguments::<Start>,
    gives: schema::vm_or_job,
    run: |call, given| Box::pin(async move { start(&call, arguments(given)?).await }),
};

/// Which VM is to be started.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Start {
    /// Name of the VM.
    name: VmName,
    /// How long the guest may take to become ready, in milliseconds; a default by accelerator if absent.
    #[serde(default)]
    timeout_ms: Option<u64>,
}

async fn start(call: &CallContext, asked: Start) -> Result<ToolResult> {
    let how = StartRequest { timeout_ms: asked.timeout_ms, ..StartRequest::default() };
    let mut tell = |stage| call.progress.stage(stage);
    let nido = call.nido().await?;
    if nido.info(&asked.name).await?.status == VmState::Paused {
        // There is no other tool for it: to an agent a VM runs or does not.
        call.unless_cancelled(nido.resume(&asked.name)).await?;
    }
    // A start that nobody waits for goes on by itself.
    ToolResult::new(&call.unless_cancelled(nido.start(&asked.name, how, &mut tell)).await?)
}

pub const STOP: Tool = Tool {
    name: "vm_stop",
    title: "Stop a VM",
    about: "Powers a virtual machine off, and pulls the plug if that takes too long. What runs in it ends; its disk stays, and \
        vm_start starts it again. One made ephemeral is gone afterwards, disk and all: the user may be asked first if it is not \
        yours. One that does not run is answered as it is. To get rid of a VM use vm_delete. Next: vm_start or vm_delete.",
    hints: Hints { read_only: false, destructive: true, idempotent: true, open_world: false },
    scope: Scope::Run,
    takes: schema::arguments::<Stop>,
    gives: schema::vm_or_job,
    run: |call, given| Box::pin(async move { stop(&call, arguments(given)?).await }),
};

/// Which VM is to be stopped.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Stop {
    /// Name of the VM.
    name: VmName,
    /// Pull the plug at once. What the guest has not written to its disk is lost.
    #[serde(default)]
    force: bool,
    /// How long an orderly power-off may take before the plug is pulled, in milliseconds; half a minute if absent.
    #[serde(default)]
    timeout_ms: Option<u64>,
    /// The approval_id of an earlier answer approval_required, once the user has approved it. Else leave it out.
    #[serde(default, rename = "approval_id")]
    _approval_id: Option<String>,
}

async fn stop(call: &CallContext, asked: Stop) -> Result<ToolResult> {
    let usual = StopRequest::default();
    let how = StopRequest { force: asked.force, timeout_ms: asked.timeout_ms.unwrap_or(usual.timeout_ms) };
    ToolResult::new(&call.nido().await?.stop(call.which(&asked.name), how).await?)
}
