//! Commands in a VM: run to their end, or followed as server-sent events; and runs, a VM for one command.

use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::response::sse::{self, KeepAlive, Sse};
use base64::Engine as _;
use futures::stream;
use nido_vmm::api::{Collected, ExecBody, ExecEvent, ExecRequest, ExecResult, SpawnRequest, VmInfo};
use nido_vmm::audit::Ending;
use nido_vmm::error::{Code, Error, Result};
use nido_vmm::name::VmName;
use nido_vmm::nido::{ExecControl, ExecEvents, Nido};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::vms::Vm;
use crate::serve::answer::Answer;
use crate::serve::ask::{Body, Names, accepts, plain};
use crate::serve::guard::Uses;
use crate::serve::operations::{self, Asked, Undo, ended};
use crate::serve::{App, audit};

/// How much of each stream a JSON answer holds, in bytes.
const COLLECT_MAX: usize = 4 << 20;

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(exec)).routes(routes!(run))
}

/// Runs a command in a VM. Answered when it has ended, with what it wrote (at most 4 MiB of each stream); with
/// `Accept: text/event-stream` as it goes on: the events `started`, `stdout`, `stderr`, `exit`, and `error` if the VM is
/// lost. Hanging up kills it. For standard input as it comes, and a terminal, see the WebSocket at `exec/socket` (docs/api.md).
#[utoipa::path(post, path = "/v1/vms/{name}/exec", operation_id = "vm_exec", tag = "exec", params(Vm),
    request_body = ExecBody,
    responses((status = 200, description = "How it ended.", content(
        (ExecResult = "application/json"),
        (String = "text/event-stream")))))]
async fn exec(
    State(app): State<Arc<App>>,
    _: Uses,
    Names(vm): Names<Vm>,
    asked: Asked,
    Body(body): Body<ExecBody>,
) -> Answer {
    let (request, stdin) = body.split()?;
    if accepts(asked.headers(), "text/event-stream") {
        let (control, events) = app.nido().await?.exec(&vm.name, request).await?;
        app.metrics.exec();
        feed(control, stdin);
        let line = asked.take_line();
        let events = stream::unfold(Some((events, line)), |running| async move {
            let (mut events, line) = running?;
            let event = events.next().await?;
            let next = match &event {
                Ok(ExecEvent::Exited(exit)) => {
                    audit::end(line, Ending::Success, &exit.word());
                    None
                }
                Ok(_) => Some((events, line)),
                Err(error) => {
                    audit::end(line, Ending::Error, error.code().slug());
                    None
                }
            };
            Some((Ok::<_, Infallible>(frame(event)), next))
        });
        return Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response());
    }
    let owner = Arc::clone(&app);
    let is_async = operations::wants_async(asked.headers());
    let work = async move {
        let nido = owner.nido().await?;
        owner.metrics.exec();
        let done = collect(nido, &vm.name, request, stdin).await?;
        ended(&done, done.exit.word())
    };
    if is_async {
        return operations::run(&app, asked, "vm_exec", StatusCode::OK, |_| Box::pin(work)).await;
    }
    // Not detached: who hangs up does not want the command any more.
    let done = operations::written_down(Box::pin(work), asked.take_line()).await?;
    Ok(crate::serve::answer::json(StatusCode::OK, &done))
}

/// Sends the standard input, on a task of its own; it ends with the command.
fn feed(control: ExecControl, stdin: Vec<u8>) {
    if stdin.is_empty() {
        tokio::spawn(async move { control.stdin_eof().await });
        return;
    }
    tokio::spawn(async move {
        control.stdin(&stdin).await?;
        control.stdin_eof().await
    });
}

/// Runs a command to its end.
async fn collect(nido: &Nido, name: &VmName, request: ExecRequest, stdin: Vec<u8>) -> Result<ExecResult> {
    let wants_stdin = request.stdin;
    let (control, mut events): (ExecControl, ExecEvents) = nido.exec(name, request).await?;
    if wants_stdin {
        feed(control, stdin);
    }
    let mut collected = Collected::new(COLLECT_MAX);
    while let Some(event) = events.next().await {
        match event? {
            ExecEvent::Exited(exit) => return Ok(collected.result(exit)),
            event => collected.add(&event),
        }
    }
    Err(Error::internal("the command ended without saying how"))
}

fn frame(event: Result<ExecEvent>) -> sse::Event {
    let (kind, data) = match event {
        Ok(ExecEvent::Started(pid)) => ("started", json!({ "pid": pid })),
        Ok(ExecEvent::Stdout(bytes)) => ("stdout", piece(bytes)),
        Ok(ExecEvent::Stderr(bytes)) => ("stderr", piece(bytes)),
        Ok(ExecEvent::Exited(exit)) => ("exit", json!(exit)),
        Err(error) => ("error", json!(error.problem())),
    };
    sse::Event::default().event(kind).data(data.to_string())
}

/// A piece of a stream: text where it is UTF-8 by itself, else base64.
fn piece(bytes: Vec<u8>) -> serde_json::Value {
    match String::from_utf8(bytes) {
        Ok(text) => json!({ "text": text }),
        Err(error) => json!({ "base64": base64::engine::general_purpose::STANDARD.encode(error.as_bytes()) }),
    }
}

/// A VM for one command: both in one.
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// The command.
    exec: ExecBody,
    /// The VM, as it is spawned; a name is made up if there is none. It is gone when the command has ended.
    #[serde(default)]
    #[schema(value_type = Option<SpawnRequest>)]
    vm: serde_json::Map<String, serde_json::Value>,
}

/// How a run ended.
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
pub struct RunResult {
    /// The VM as it was when it was ready.
    vm: VmInfo,
    /// How the command ended.
    exec: ExecResult,
}

/// Runs a command in a fresh VM, which is gone afterwards.
#[utoipa::path(post, path = "/v1/runs", operation_id = "run", tag = "exec", request_body = RunRequest,
    responses((status = 200, body = RunResult)))]
async fn run(State(app): State<Arc<App>>, _: Uses, asked: Asked, Body(mut body): Body<RunRequest>) -> Answer {
    let name = format!("run-{}", &nido_vmm::nido::random_id()?[..8]);
    body.vm.entry("name").or_insert(name.into());
    let spawn: SpawnRequest = serde_json::from_value(body.vm.into())
        .map_err(|e| Error::new(Code::SpecInvalid, format!("vm: {}", plain(&e.to_string()))))?;
    let (mut spec, start) = spawn.split();
    let start = start.filter(|start| start.wait);
    let start = start.ok_or_else(|| Error::new(Code::SpecInvalid, "vm.start: a run starts its VM and waits for it"))?;
    spec.ephemeral = true;
    spec.idle_ms = spec.idle_ms.or(Some(60_000));
    let (request, stdin) = body.exec.split()?;
    let owner = Arc::clone(&app);
    operations::run(&app, asked, "run", StatusCode::OK, |stage| {
        Box::pin(async move {
            let nido = owner.nido().await?;
            let (mut undo, name) = (Undo::new(&owner), spec.name.clone());
            let mut tell = |now| {
                undo.begun(&name);
                stage.start(now);
            };
            let vm = match nido.spawn(spec, start, &mut tell).await {
                Ok(vm) => vm,
                Err(error) => {
                    undo.done();
                    return Err(error);
                }
            };
            owner.metrics.spawn(&vm);
            owner.metrics.exec();
            stage.word("running");
            let exec = collect(nido, &vm.name, request, stdin).await;
            let gone = nido.delete(&vm.name, true).await;
            undo.done();
            let exec = exec?;
            match gone {
                Err(error) if error.code() != Code::VmNotFound => return Err(error),
                _ => {}
            }
            let word = exec.exit.word();
            ended(&RunResult { vm, exec }, word)
        })
    })
    .await
}
