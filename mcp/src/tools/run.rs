//! A command in a VM of its own, which is deleted afterwards.

use futures::future::BoxFuture;
use nido_api::error::{Code, Result};
use nido_api::operation as op;
use nido_api::{ExecBody, StartRequest, VmRef, VmSpec};
use nido_core::VmInProgress;
use serde_json::{Map, Value, json};

use super::command::{self, Command};
use super::creation::{self, may_be_created, owned_by_session};
use super::{Hints, Operation, Tool};
use crate::answer::ToolResult;
use crate::call_context::CallContext;
use crate::schema;

pub const RUN: Tool = Tool {
    op: op::VM_RUN,
    title: "Run one command",
    about: "Runs one command in a new VM, as vm_exec does, then deletes it. For more commands or files: vm_spawn.",
    hints: Hints { idempotent: false, open_world: true },
    takes: schema_of_arguments,
    unlisted: &UNLISTED,
    gives: command::result_schema,
    parse: |given| Ok(Box::new(Run::parse(given)?)),
};

/// Arguments of the command that few callers need, and those of the VM.
const UNLISTED: [&str; 16] = [
    "memory_mib",
    "secrets",
    "secret_env",
    "env",
    "directory",
    "user",
    "stdin_base64",
    "cpus",
    "disk_bytes",
    "machine",
    "accel",
    "nested",
    "require_isolation",
    "require_confinement",
    "path",
    "start_timeout_seconds",
];

/// Arguments of the VM.
const VM_PARAMETERS: [&str; 14] = [
    "secrets",
    "secret_env",
    "template",
    "cpus",
    "memory_mib",
    "disk_bytes",
    "net",
    "allow",
    "machine",
    "accel",
    "nested",
    "require_isolation",
    "require_confinement",
    "path",
];
/// The argument for the start timeout, with its names for callers and in the core.
const START_TIMEOUT: [&str; 2] = ["start_timeout_seconds", "start_timeout_ms"];

fn schema_of_arguments() -> Value {
    let mut schema = schema::described(schema::arguments::<ExecBody>(), &command::DESCRIPTIONS);
    let vm = creation::vm_arguments();
    for name in VM_PARAMETERS.iter().chain(&START_TIMEOUT[..1]) {
        schema["properties"][name] = vm["properties"][name].clone();
    }
    schema["properties"]["timeout_seconds"]["default"] = json!(60);
    schema["required"] = json!([]);
    schema
}

#[derive(Debug)]
struct Run {
    spec: VmSpec,
    start: StartRequest,
    command: Command,
}

impl Run {
    fn parse(mut given: Value) -> Result<Self> {
        let mut vm = Map::new();
        for name in VM_PARAMETERS.iter().chain(&START_TIMEOUT[1..]) {
            let value = given.as_object_mut().and_then(|given| given.remove(*name));
            vm.extend(value.map(|value| ((*name).to_owned(), value)));
        }
        vm.insert("name".into(), json!(nido_files::random::vm_name("run")?));
        let (spec, start) = creation::spawn_request(vm.into())?.split(creation::DEFAULT_NET);
        Ok(Self { spec, start: start.unwrap_or_default(), command: Command::parse(given)? })
    }

    fn check(&self, call: &CallContext) -> Result<()> {
        self.command.check(call, &self.spec.name, &self.spec.template)
    }
}

impl Operation for Run {
    fn creates_vm(&self) -> bool {
        true
    }

    fn admit<'a>(&'a self, call: &'a CallContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            self.check(call)?;
            may_be_created(call, &self.spec).await
        })
    }

    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move {
            self.check(&call)?;
            let Self { mut spec, start, command } = *self;
            spec.ephemeral = true;
            owned_by_session(&call, &mut spec)?;
            run(&call, spec, start, command).await
        })
    }
}

async fn run(call: &CallContext, spec: VmSpec, start: StartRequest, command: Command) -> Result<ToolResult> {
    let (name, begun, grant) = (spec.name.clone(), VmInProgress::default(), call.grant());
    let mut tell = |stage| call.progress.stage(stage);
    let work =
        |vm: nido_api::VmInfo| async move { command.run(call, VmRef { name: &vm.name, id: Some(&vm.id) }).await };
    let nido = call.nido().await?;
    let ran = call.unless_cancelled(Box::pin(nido.run((spec, start), &grant, &begun, &mut tell, work))).await;
    let output = match ran {
        Ok(output) => output,
        Err(error) => {
            if error.code() == Code::Interrupted {
                creation::remove(call, &begun).await;
            } else if begun.id().is_some() {
                call.next_step(
                    "the VM is deleted: correct the command and call again, or look closer with vm_spawn and vm_exec",
                );
            }
            return Err(error);
        }
    };
    output.result(call, &name)
}
