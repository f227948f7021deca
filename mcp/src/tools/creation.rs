//! VMs are created: started (`vm_spawn`) or not (`vm_create`).

use futures::future::BoxFuture;
use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::state::VmState;
use nido_api::{NetChoice, SpawnRequest, StartRequest, VmInfo, VmSpec};
use nido_core::VmInProgress;
use serde_json::{Value, json};

use super::{Operation, SINGLE_USE_HINTS, Tool, arguments, brief, field};
use crate::answer::ToolResult;
use crate::call_context::CallContext;
use crate::schema;
use crate::session_leases::SessionKey;

/// The argument that makes an ephemeral VM independent of the session.
const OUTLIVES_SESSION: &str = "outlives_session";
/// The longest time to live of an ephemeral VM without a session, unless the caller specifies it.
const TTL_MS: u64 = 3_600_000;

pub const SPAWN: Tool = Tool {
    op: op::VM_SPAWN,
    title: "Create and start a VM",
    about: "Creates and starts a VM; waits until it takes commands. For this task only: set ephemeral and \
        ttl_seconds. The same name and arguments again return the existing VM. Next: vm_exec; at the end vm_delete.",
    hints: SINGLE_USE_HINTS,
    takes: || without(&SPAWN_ONLY_FIELDS),
    unlisted: &UNLISTED,
    gives: schema::vm_or_job,
    parse: |given| Ok(Box::new(Spawn(NewVm::parse(given, &SPAWN_ONLY_FIELDS)?))),
};

/// Arguments of a new VM that few callers need.
pub const UNLISTED: [&str; 13] = [
    "disk_bytes",
    "secrets",
    "secret_env",
    "disk_quota_bytes",
    "max_processes",
    "idle_seconds",
    "machine",
    "accel",
    "nested",
    "require_isolation",
    "require_confinement",
    "path",
    "start_timeout_seconds",
];

/// The same of a VM that is not started yet: its description refers to vm_spawn for the others.
const UNLISTED_IN_CREATE: [&str; 18] = [
    "secrets",
    "secret_env",
    "disk_quota_bytes",
    "max_processes",
    "start_timeout_seconds",
    "cpus",
    "memory_mib",
    "disk_bytes",
    "forwards",
    "machine",
    "accel",
    "nested",
    "require_isolation",
    "require_confinement",
    "idle_seconds",
    "labels",
    ALLOW,
    OUTLIVES_SESSION,
];

/// Descriptions of the arguments of a new VM.
const DESCRIPTIONS: [(&str, &str); 14] = [
    ("name", "a-z, 0-9, -; unique."),
    ("template", "See template_list."),
    ("cpus", "Default 1."),
    ("memory_mib", "MiB; default 512."),
    ("disk_bytes", "Bytes; at least the template's."),
    ("net", ""),
    ("labels", ""),
    ("machine", "Machine type."),
    ("accel", "tcg: emulation, slow."),
    ("nested", "Let the guest run VMs."),
    ("require_isolation", "Fail without KVM."),
    ("require_confinement", "Fail if QEMU is not fully confined."),
    ("ttl_seconds", "Stop after so many seconds."),
    ("idle_seconds", "Or after seconds unused."),
];
/// Fields of a new VM that no tool has, because the size of what a model reads is limited; and the options that set them.
pub const USER_FIELDS: [(&str, &str); 2] = [("restart", "--restart"), ("net_limits", "--net-limit")];
const EPHEMERAL: &str = "Delete when it stops, and with this session.";
const PORTS: &str = "Published, HOST:GUEST.";
/// The field that holds network rules.
const ALLOW: &str = "allow";
const RULES: &str = "All that net restricted, the default, reaches: example.com:443.";
/// The network of a VM for which the call specifies none: the caller names what its guest may reach.
pub const DEFAULT_NET: NetChoice = NetChoice::Restricted;
const OUTLIVES_SESSION_TEXT: &str = "Ephemeral, but not with this session.";

/// The fields that vm_spawn always sets.
pub const SPAWN_ONLY_FIELDS: [&str; 2] = ["start", "wait"];
/// What vm_create never does.
pub const START_FIELDS: [&str; 4] = ["start", "wait", "path", "start_timeout_ms"];

/// The arguments of a new VM that it has in common with the VM of a run.
pub fn vm_arguments() -> Value {
    let mut schema = schema::described(schema::arguments::<SpawnRequest>(), &DESCRIPTIONS);
    let rules = json!({ "type": "array", "items": { "type": "string" }, "description": RULES });
    schema["properties"][ALLOW][schema::LISTED_AS] = rules;
    schema
}

/// The request for a new VM, with the defaults of the tools.
pub fn spawn_request(given: Value) -> Result<SpawnRequest> {
    arguments(given)
}

/// The arguments of a new VM, without those that make no sense for the tool.
fn without(left_out: &[&str]) -> Value {
    let mut schema = vm_arguments();
    if let Some(properties) = schema["properties"].as_object_mut() {
        properties["ephemeral"]["description"] = EPHEMERAL.into();
        let outlives = json!({ "type": "boolean", "default": false, "description": OUTLIVES_SESSION_TEXT });
        properties.insert(OUTLIVES_SESSION.into(), outlives);
        let ports = json!({ "type": "array", "items": { "type": "string" }, "description": PORTS });
        properties["forwards"][schema::LISTED_AS] = ports;
        USER_FIELDS.iter().for_each(|(name, _)| drop(properties.remove(*name)));
        properties.retain(|name, _| !left_out.contains(&name.as_str()));
    }
    schema
}

/// A VM that is to be created, and how it is started.
#[derive(Debug)]
struct NewVm {
    spec: VmSpec,
    start: StartRequest,
    /// It is ephemeral and belongs to no session.
    outlives: bool,
}

impl NewVm {
    /// Parses the arguments; those in `left_out` are refused.
    fn parse(mut given: Value, left_out: &[&str]) -> Result<Self> {
        if let Some(name) = left_out.iter().find(|name| given.get(name).is_some()) {
            let words = format!(
                "{name}: there is no such argument; vm_spawn makes a VM that runs, vm_create one that does not"
            );
            return Err(Error::new(Code::SpecInvalid, words));
        }
        if let Some((name, option)) = USER_FIELDS.iter().find(|(name, _)| given.get(name).is_some()) {
            let words =
                format!("{name}: there is no such argument; a user sets it, with nido create {option} or over REST");
            return Err(Error::new(Code::SpecInvalid, words));
        }
        let outlives = given.as_object_mut().and_then(|given| given.remove(OUTLIVES_SESSION));
        let outlives = outlives.map_or(Ok(false), |outlives| field(OUTLIVES_SESSION, Some(outlives)))?;
        let (spec, start) = spawn_request(given)?.split(DEFAULT_NET);
        if outlives && !spec.ephemeral {
            let words = format!("{OUTLIVES_SESSION}: only a VM that is ephemeral would be deleted with the session");
            return Err(Error::new(Code::SpecInvalid, words));
        }
        Ok(Self { spec, start: start.unwrap_or_default(), outlives })
    }

    /// What the VM is to be; an ephemeral one gets the lease of the session.
    fn spec(self, call: &CallContext) -> Result<(VmSpec, StartRequest)> {
        let Self { mut spec, start, outlives } = self;
        if spec.ephemeral && !outlives {
            owned_by_session(call, &mut spec)?;
        }
        Ok((spec, start))
    }

    /// Whether it could be created; one that exists is the caller's own, or an error of the call itself.
    async fn admit(&self, call: &CallContext) -> Result<()> {
        let nido = call.nido().await?;
        match nido.vm_id(&self.spec.name) {
            Ok(_) => Ok(()),
            Err(_) => may_be_created(call, &self.spec).await,
        }
    }
}

/// Gives an ephemeral VM the lease of the session; where there are no sessions, also an end.
pub fn owned_by_session(call: &CallContext, spec: &mut VmSpec) -> Result<()> {
    spec.lease = Some(call.lease()?);
    if call.session == SessionKey::SERVER {
        spec.ttl_ms.get_or_insert(TTL_MS);
    }
    Ok(())
}

/// Whether a VM with this template and these resources could be created for this caller.
pub async fn may_be_created(call: &CallContext, spec: &VmSpec) -> Result<()> {
    let nido = call.nido().await?;
    let template = nido.template_info(&spec.template)?;
    let spec = nido.with_presets(spec.clone()).await?;
    call.limits.check(&spec, spec.disk_bytes.unwrap_or(template.disk_bytes))
}

/// A VM that was created, as a result; the audit log gets its lease.
fn created(call: &CallContext, vm: VmInfo) -> Result<ToolResult> {
    call.created(&vm);
    let word = vm.lease.as_ref().map_or_else(String::new, |lease| format!("lease:{}", lease.as_str()));
    Ok(ToolResult { word, ..brief::vm(vm)? })
}

#[derive(Debug)]
struct Spawn(NewVm);

impl Operation for Spawn {
    fn vm(&self) -> Option<&VmName> {
        Some(&self.0.spec.name)
    }

    fn creates_vm(&self) -> bool {
        true
    }

    fn admit<'a>(&'a self, call: &'a CallContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.0.admit(call))
    }

    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move { Box::pin(spawn(&call, self.0)).await })
    }
}

async fn spawn(call: &CallContext, vm: NewVm) -> Result<ToolResult> {
    let (spec, start) = vm.spec(call)?;
    let nido = call.nido().await?;
    let spec = nido.with_presets(spec).await?;
    let (name, begun, grant) = (spec.name.clone(), VmInProgress::default(), call.grant());
    let mut tell = |stage| call.progress.stage(stage);
    let spawning = Box::pin(nido.spawn_tracked(spec.clone(), start, &grant, &begun, &mut tell));
    let spawned = call.unless_cancelled(spawning).await;
    match spawned {
        Ok(vm) => created(call, vm),
        Err(error) if error.code() == Code::Interrupted => {
            remove(call, &begun).await;
            Err(error)
        }
        Err(error) if error.code() == Code::VmExists && nido.spec(&name).is_ok_and(|there| there == spec) => {
            Box::pin(existing(call, &name, start, error)).await
        }
        // It was removed: the error's hint must not refer to it.
        Err(error) if begun.id().is_some() && error.code() != Code::VmExists => {
            call.next_step(
                "nothing is left of the VM: call vm_spawn again, with a longer start_timeout_seconds if the guest was slow, or \
                 with path cold if a saved guest did not come up; if it fails again, report the message to the user",
            );
            let hint = "its log went with it; log_tail holds the last lines, if it wrote any";
            Err(error.hint(hint))
        }
        Err(error) => Err(error),
    }
}

/// The VM of this very request, if it runs or starts.
async fn existing(call: &CallContext, name: &VmName, start: StartRequest, error: Error) -> Result<ToolResult> {
    let nido = call.nido().await?;
    let vm = nido.info(name).await?;
    match vm.status {
        VmState::Running => brief::vm(vm),
        // Another call, perhaps of this very caller, starts it: wait for that.
        VmState::Starting | VmState::Created => {
            let mut tell = |stage| call.progress.stage(stage);
            brief::vm(call.unless_cancelled(nido.start(name, start, &mut tell)).await?)
        }
        // To start it again is a decision: it has ended, or a caller has paused it.
        VmState::Paused | VmState::Stopped | VmState::Failed | VmState::Unknown => {
            call.next_step("it is the VM of this very request: vm_start lets it run again, with its disk as it is");
            Err(error)
        }
        VmState::Stopping => Err(error),
    }
}

/// Removes what was begun. Nothing half-made stays.
pub async fn remove(call: &CallContext, begun: &VmInProgress) {
    if let Err(error) = call.app.unreconciled().undo(begun).await {
        tracing::error!("VM {} was begun and could not be removed: {error}", begun.id().unwrap_or_default());
    }
}

pub const CREATE: Tool = Tool {
    op: op::VM_CREATE,
    title: "Create a VM",
    about: "Creates a VM without starting it; arguments as in vm_spawn. Next: vm_start.",
    hints: SINGLE_USE_HINTS,
    takes: || schema::undescribed(without(&START_FIELDS)),
    unlisted: &UNLISTED_IN_CREATE,
    gives: schema::vm_or_job,
    parse: |given| Ok(Box::new(Create(NewVm::parse(given, &START_FIELDS)?))),
};

#[derive(Debug)]
struct Create(NewVm);

impl Operation for Create {
    fn vm(&self) -> Option<&VmName> {
        Some(&self.0.spec.name)
    }

    fn creates_vm(&self) -> bool {
        true
    }

    fn admit<'a>(&'a self, call: &'a CallContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.0.admit(call))
    }

    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move { create(&call, self.0).await })
    }
}

async fn create(call: &CallContext, vm: NewVm) -> Result<ToolResult> {
    let (spec, _) = vm.spec(call)?;
    let nido = call.nido().await?;
    let spec = nido.with_presets(spec).await?;
    let name = spec.name.clone();
    call.progress.report(1.0, Some(2.0), "preparing disk and configuration");
    match nido.create(spec.clone(), &call.grant()).await {
        Ok(vm) => {
            call.progress.report(2.0, Some(2.0), "created");
            created(call, vm)
        }
        Err(error) if error.code() == Code::VmExists => match nido.spec(&name) {
            Ok(there) if there == spec => brief::vm(nido.info(&name).await?),
            _ => Err(error),
        },
        Err(error) => Err(error),
    }
}
