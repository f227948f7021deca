//! Commands in a VM: run to their end, or followed as server-sent events; and runs, a VM for one command.

use nido_api::FrontEnd;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::response::sse::{self, KeepAlive, Sse};
use base64::Engine as _;
use futures::stream;
use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::{Collected, ExecBody, ExecEvent, ExecRequest, ExecResult, SpawnRequest, VmInfo};
use nido_core::execute::{Attempt, Verdict};
use nido_core::{ExecControl, ExecEvents};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::vms::VmPath;
use crate::auth::CallerGrant;
use crate::budget::{Reservation, json_length};
use crate::extract::{JsonBody, PathParams, parser_message};
use crate::media_type::prefers;
use crate::operations::{self, ChangeStarted, OperationContext, UndoGuard, ended};
use crate::response::HandlerResult;
use crate::{App, audit_entry};

/// How much of each stream a JSON answer holds, in bytes.
const COLLECT_MAX: usize = 4 << 20;

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(exec)).routes(routes!(run))
}

/// Runs a command in a VM. The response follows when the command has ended, with its output (at most 4 MiB of each
/// stream). With `Accept: text/event-stream` the output is streamed: the events `started`, `stdout`, `stderr`, `exit`,
/// and `error` if the VM is lost. Disconnecting kills the command. For streamed standard input or a terminal, use the
/// WebSocket at `exec/socket` (docs/api.md).
#[utoipa::path(post, path = "/v1/vms/{name}/exec", operation_id = "vm_exec", tag = "exec", params(VmPath),
    request_body = ExecBody,
    responses((status = 200, description = "Exit status of the command.", content(
        (ExecResult = "application/json"),
        (String = "text/event-stream")))))]
async fn exec(
    State(app): State<Arc<App>>,
    PathParams(vm): PathParams<VmPath>,
    context: OperationContext,
    JsonBody(body): JsonBody<ExecBody>,
) -> HandlerResult {
    let (request, stdin) = body.split()?;
    if prefers(context.headers(), "text/event-stream", "application/json") {
        let (control, events) = app.nido().await?.exec(&vm.name, request).await?;
        app.metrics.exec();
        feed(control, stdin);
        let line = context.take_attempt()?;
        let events = stream::unfold(Some(ExecEventStream::new(events, Some(line))), ExecEventStream::next);
        return Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response());
    }
    let owner = Arc::clone(&app);
    let is_async = operations::wants_async(context.headers());
    let begun = context.begun();
    let work = async move {
        let mut held = owner.output.hold();
        owner.nido().await?;
        owner.metrics.exec();
        let done = collect(&owner, &vm.name, (request, stdin), (&begun, &mut held)).await?;
        Ok(operations::OperationOutput { held: Some(held), ..ended(&done, done.exit.word())? })
    };
    if is_async {
        return operations::run(&app, context, op::VM_EXEC, StatusCode::OK, |_| Box::pin(work)).await;
    }
    // Not detached: who hangs up does not want the command any more.
    let done = context.take_attempt()?.carry_out(work, operations::verdict).await.or_log()?;
    Ok(done.answer(StatusCode::OK))
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

/// Runs a command to its end. Output beyond the memory that is left for responses is truncated.
async fn collect(
    app: &App,
    name: &VmName,
    (request, stdin): (ExecRequest, Vec<u8>),
    (begun, held): (&ChangeStarted, &mut Reservation),
) -> Result<ExecResult> {
    let wants_stdin = request.stdin;
    let began_at = jiff::Timestamp::now();
    let (control, mut events): (ExecControl, ExecEvents) = app.nido.exec(name, request).await?;
    begun.set();
    if wants_stdin {
        feed(control, stdin);
    }
    let mut collected = Collected::new(COLLECT_MAX);
    while let Some(event) = events.next().await {
        match event.map_err(|error| app.nido.lost_while_in_use(name, began_at, error))? {
            ExecEvent::Exited(exit) => return Ok(collected.result(exit)),
            event => {
                let (ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes)) = &event else { continue };
                if held.grow(json_length(&bytes[..collected.room(&event)])) {
                    collected.add(&event);
                } else {
                    collected.cut(&event);
                }
            }
        }
    }
    Err(Error::internal("the command ended without an exit status"))
}

/// A command that is followed as server-sent events.
struct ExecEventStream {
    events: ExecEvents,
    line: Option<Attempt>,
    out: Utf8Buffer,
    err: Utf8Buffer,
    /// Frames that came of one event, and are sent one after the other.
    frames: VecDeque<sse::Event>,
    is_over: bool,
}

impl ExecEventStream {
    fn new(events: ExecEvents, line: Option<Attempt>) -> Self {
        let (out, err) = (Utf8Buffer::default(), Utf8Buffer::default());
        Self { events, line, out, err, frames: VecDeque::new(), is_over: false }
    }

    async fn next(running: Option<Self>) -> Option<(Result<sse::Event, Infallible>, Option<Self>)> {
        let mut running = running?;
        loop {
            if let Some(frame) = running.frames.pop_front() {
                return Some((Ok(frame), Some(running)));
            }
            if running.is_over {
                return None;
            }
            let event = running.events.next().await?;
            running.take(event);
        }
    }

    /// Makes frames of what has happened.
    fn take(&mut self, event: Result<ExecEvent>) {
        match event {
            Ok(ExecEvent::Started(pid)) => self.send_event("started", &json!({ "pid": pid })),
            Ok(ExecEvent::Stdout(bytes)) => {
                let piece = self.out.push(bytes);
                self.frames.extend(piece.map(|piece| frame("stdout", &piece)));
            }
            Ok(ExecEvent::Stderr(bytes)) => {
                let piece = self.err.push(bytes);
                self.frames.extend(piece.map(|piece| frame("stderr", &piece)));
            }
            Ok(ExecEvent::Exited(exit)) => {
                self.finish();
                audit_entry::end(self.line.take(), &Verdict::success(exit.word()));
                self.send_event("exit", &json!(exit));
            }
            Err(error) => {
                self.finish();
                audit_entry::end(self.line.take(), &Verdict::failure(&error));
                self.send_event("error", &json!(error.problem_for(FrontEnd::Api)));
            }
        }
    }

    /// What was held back of either stream goes out before the last word.
    fn finish(&mut self) {
        self.is_over = true;
        for (kind, rest) in [("stdout", self.out.finish()), ("stderr", self.err.finish())] {
            self.frames.extend(rest.map(|piece| frame(kind, &piece)));
        }
    }

    fn send_event(&mut self, kind: &str, data: &serde_json::Value) {
        self.frames.push_back(frame(kind, data));
    }
}

fn frame(kind: &str, data: &serde_json::Value) -> sse::Event {
    sse::Event::default().event(kind).data(data.to_string())
}

/// A stream that is cut into pieces wherever the guest's pipe was: of a character that is cut, the first bytes wait for the
/// rest.
#[derive(Debug, Default)]
struct Utf8Buffer {
    held: Vec<u8>,
}

impl Utf8Buffer {
    /// The next piece; none if there is no whole character in it.
    fn push(&mut self, bytes: Vec<u8>) -> Option<serde_json::Value> {
        let mut whole = std::mem::take(&mut self.held);
        whole.extend(bytes);
        if let Err(error) = std::str::from_utf8(&whole)
            && error.error_len().is_none()
        {
            self.held = whole.split_off(error.valid_up_to());
        }
        (!whole.is_empty()).then(|| piece(whole))
    }

    /// What never became a character.
    fn finish(&mut self) -> Option<serde_json::Value> {
        let rest = std::mem::take(&mut self.held);
        (!rest.is_empty()).then(|| piece(rest))
    }
}

/// A piece of a stream: text where it is UTF-8 by itself, else base64.
fn piece(bytes: Vec<u8>) -> serde_json::Value {
    match String::from_utf8(bytes) {
        Ok(text) => json!({ "text": text }),
        Err(error) => json!({ "base64": base64::engine::general_purpose::STANDARD.encode(error.as_bytes()) }),
    }
}

/// A command and the VM to create for it.
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// The command.
    exec: ExecBody,
    /// The VM; nido generates a name if none is given. It is deleted when the command has ended.
    #[serde(default)]
    #[schema(value_type = Option<SpawnRequest>)]
    vm: serde_json::Map<String, serde_json::Value>,
}

/// Result of a run.
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
pub struct RunResult {
    /// The VM at the time when it was ready.
    vm: VmInfo,
    /// Exit status of the command.
    exec: ExecResult,
}

/// Creates a VM, runs a command in it and deletes the VM.
#[utoipa::path(post, path = "/v1/runs", operation_id = "run", tag = "exec", request_body = RunRequest,
    responses((status = 200, body = RunResult)))]
async fn run(
    State(app): State<Arc<App>>,
    CallerGrant(grant): CallerGrant,
    context: OperationContext,
    JsonBody(mut body): JsonBody<RunRequest>,
) -> HandlerResult {
    let name = format!("run-{}", &nido_files::random::id()?[..8]);
    body.vm.entry("name").or_insert(name.into());
    let spawn: SpawnRequest = serde_json::from_value(body.vm.into())
        .map_err(|e| Error::new(Code::SpecInvalid, format!("vm: {}", parser_message(&e.to_string()))))?;
    let context = context.about(&spawn.name);
    let net = app.nido().await?.default_net(&spawn.template, &grant.limits);
    let (spec, start) = spawn.split(net);
    let start = start.filter(|start| start.wait);
    let start = start.ok_or_else(|| Error::new(Code::SpecInvalid, "vm.start: a run starts its VM and waits for it"))?;
    let (request, stdin) = body.exec.split()?;
    let owner = Arc::clone(&app);
    operations::run(&app, context, op::VM_RUN, StatusCode::OK, |stage| {
        Box::pin(async move {
            let nido = owner.nido().await?;
            let undo = UndoGuard::new(&owner);
            let mut held = owner.output.hold();
            let mut tell = |now| stage.start(now);
            let collected = async |vm: VmInfo| {
                owner.metrics.spawn(&vm);
                owner.metrics.exec();
                stage.word("running");
                let exec = collect(&owner, &vm.name, (request, stdin), (stage.begun(), &mut held)).await?;
                Ok(RunResult { vm, exec })
            };
            let outcome = nido.run((spec, start), &grant, &undo.begun, &mut tell, collected).await;
            undo.done();
            let done = outcome?;
            let word = done.exec.exit.word();
            Ok(operations::OperationOutput { held: Some(held), ..ended(&done, word)? })
        })
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_that_is_cut_between_two_pieces_stays_text() {
        // Each half of such a character made its whole piece base64.
        let mut text = Utf8Buffer::default();
        let mut push = |bytes: &[u8]| text.push(bytes.to_vec());
        assert_eq!(push(b"a\xc3"), Some(json!({ "text": "a" })));
        assert_eq!(push(b"\xa9b"), Some(json!({ "text": "éb" })));
        assert_eq!(push(b"\xf0"), None);
        assert_eq!(push(b"\x9f\x98"), None);
        assert_eq!(push(b"\x80"), Some(json!({ "text": "😀" })));
        assert_eq!(push(b"\xff\xc3"), Some(json!({ "base64": "/8M=" })));
        assert_eq!(push(b"x\xe2\x82"), Some(json!({ "text": "x" })));
        assert_eq!(text.finish(), Some(json!({ "base64": "4oI=" })));
        assert_eq!(text.finish(), None);
    }
}
