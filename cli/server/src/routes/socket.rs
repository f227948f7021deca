//! A command over a WebSocket: standard input as it comes, a terminal, signals.
//!
//! ```text
//!  client                                                        server
//!   text  {"start": ExecBody, "pty": {"rows","columns"}}  ->      `pty` only for a terminal
//!                                                        <-  text    {"started": {"pid"}}
//!   binary  bytes of standard input                      ->
//!   text  {"eof": true} {"signal": 15} {"resize": {…}}    ->
//!                                                        <-  binary  1 and bytes of stdout, 2 and bytes of stderr
//!                                                        <-  text    {"exit": ExecExit}  or  {"error": Problem}, then the end
//! ```
//!
//! A browser cannot give a header; it gives its token as a protocol: `nido` and `nido.token.TOKEN`. A client that sends nothing while nothing
//! is sent to it gets a ping.
//!
//! Invariant: the end of the connection, whatever ends it, kills the command; and no command begins before it is in the audit log.

use std::sync::Arc;

use axum::Extension;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use axum::routing::get;
use nido_api::error::{Code, Error, Kind, Result};
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::{Caller as AuditCaller, ExecBody, ExecEvent, ExecExit, FrontEnd};
use nido_core::audit::AuditOutcome;
use nido_core::execute::{Attempt, Request as Execution, Verdict};
use nido_core::{ExecControl, ExecEvents};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::time::{Duration, Instant, sleep_until, timeout};
use utoipa_axum::router::OpenApiRouter;

use super::vms::VmPath;
use crate::App;
use crate::access::EXEC_SOCKET;
use crate::auth::Caller;
use crate::connections::ConnectionSlot;
use crate::extract::{PathParams, parse};
use crate::response::{HandlerResult, Problem};
use crate::streams::wait_for_end;

/// The largest message of a client, in bytes.
const MESSAGE_MAX: usize = 1 << 20;
/// How long a client may take to send the command.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How many pieces of standard input may wait for a command that does not read.
const INPUT_QUEUE_MAX: usize = 16;
/// How many pings in a row may go unanswered.
const UNANSWERED_PINGS_MAX: u32 = 2;
/// How long a client may take to agree that it is over.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().route(EXEC_SOCKET, get(attach))
}

/// The upgrade of a connection; any other request gets an error with a hint.
struct Upgrade(WebSocketUpgrade);

impl<S: Send + Sync> FromRequestParts<S> for Upgrade {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> std::result::Result<Self, Problem> {
        WebSocketUpgrade::from_request_parts(parts, state).await.map(Self).map_err(|rejection| {
            Error::new(Code::RequestInvalid, rejection.body_text())
                .hint("open a WebSocket at this path, or POST a command")
                .into()
        })
    }
}

/// Opens a WebSocket for one command. OpenAPI has no words for that; docs/api.md has.
async fn attach(
    State(app): State<Arc<App>>,
    PathParams(vm): PathParams<VmPath>,
    Extension(caller): Extension<Caller>,
    Extension(slot): Extension<ConnectionSlot>,
    Upgrade(upgrade): Upgrade,
) -> HandlerResult {
    // Check whether it can be used before the protocol is switched.
    app.nido().await?.info(&vm.name).await?;
    let upgrade = upgrade.protocols(["nido"]).max_message_size(MESSAGE_MAX);
    let who = AuditCaller { face: FrontEnd::Api, actor: caller.actor, agent: None };
    let session = Session { app, name: vm.name, who };
    Ok(upgrade.on_upgrade(move |socket| async move {
        session.run(socket, caller.token).await;
        drop(slot);
    }))
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct TerminalSize {
    rows: u16,
    columns: u16,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct StartMessage {
    start: ExecBody,
    #[serde(default)]
    pty: Option<TerminalSize>,
    /// The terminal's type.
    #[serde(default)]
    term: Option<String>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
struct ClientMessage {
    eof: bool,
    signal: Option<u8>,
    resize: Option<TerminalSize>,
}

/// How it ended, if not with an error.
enum SessionEnd {
    /// The command has.
    Exit(ExecExit),
    /// The client is gone, and the command with it.
    Gone,
}

/// One connection.
struct Session {
    app: Arc<App>,
    name: VmName,
    who: AuditCaller,
}

impl Session {
    async fn run(self, mut socket: WebSocket, token: Option<String>) {
        let mut line = None;
        let outcome = tokio::select! {
            outcome = self.serve(&mut socket, &mut line) => outcome,
            error = wait_for_end(Arc::clone(&self.app), token) => Err(error),
        };
        // First: a client that is notified of the end finds it in the log.
        self.write_down(line, &outcome).await;
        let (last, code) = match outcome {
            Ok(SessionEnd::Gone) => return,
            Ok(SessionEnd::Exit(exit)) => (json!({ "exit": exit }), close_code::NORMAL),
            Err(error) => {
                let code = match error.code() {
                    Code::Interrupted => close_code::AWAY,
                    Code::Unauthorized => close_code::POLICY,
                    Code::BodyTooLarge => close_code::SIZE,
                    _ => match error.kind() {
                        Kind::Invalid => close_code::INVALID,
                        Kind::NotFound | Kind::Conflict | Kind::Denied => close_code::POLICY,
                        Kind::Unavailable | Kind::Internal => close_code::ERROR,
                    },
                };
                (json!({ "error": error.problem_for(FrontEnd::Api) }), code)
            }
        };
        let _ = socket.send(text(&last)).await;
        let _ = socket.send(Message::Close(Some(CloseFrame { code, reason: "".into() }))).await;
        // Messages that the client still sends must not reset what it has not read yet.
        let _ = timeout(CLOSE_TIMEOUT, async { while let Some(Ok(_)) = socket.recv().await {} }).await;
    }

    /// Records the outcome; if no command was started, the connection.
    async fn write_down(&self, line: Option<Attempt>, outcome: &Result<SessionEnd>) {
        let verdict = match outcome {
            Ok(SessionEnd::Exit(exit)) => Verdict::success(exit.word()),
            Ok(SessionEnd::Gone) => Verdict { ending: AuditOutcome::Unknown, reason: Code::Interrupted.slug().into() },
            Err(error) => Verdict { ending: AuditOutcome::Error, reason: error.code().slug().into() },
        };
        let line = line.unwrap_or_else(|| self.app.nido.owe(self.request(json!({ "name": self.name }))));
        if let Err(error) = line.end(verdict).await {
            tracing::error!("{error}");
        }
    }

    /// Runs a command; from when it is recorded, `line` is what is open of that.
    async fn serve(&self, socket: &mut WebSocket, line: &mut Option<Attempt>) -> Result<SessionEnd> {
        let Some(start) = self.first(socket).await? else { return Ok(SessionEnd::Gone) };
        *line = Some(self.app.nido.attempt(self.request(self.arguments(&start)?)).await?);
        let never = start.start.timeout_ms.is_none() && start.start.timeout_seconds.is_none();
        let (mut request, stdin) = start.start.split()?;
        request.stdin = true;
        if never {
            request.timeout_ms = None;
        }
        request.pty = start.pty.map(|size| (size.rows, size.columns));
        request.term = start.term.filter(|_| request.pty.is_some());
        let (control, events) = self.app.nido().await?.exec(&self.name, request).await?;
        self.app.metrics.exec();
        exchange_frames(&self.app, socket, (control, stdin), events).await
    }

    fn request(&self, arguments: Value) -> Execution {
        Execution { operation: op::VM_EXEC, caller: self.who.clone(), arguments }
    }

    /// What shall be started. `None`: the client has gone.
    async fn first(&self, socket: &mut WebSocket) -> Result<Option<StartMessage>> {
        let wanted = "the first message does not contain a command to start";
        let first = tokio::select! {
            first = timeout(START_TIMEOUT, socket.recv()) => first,
            () = self.app.shutting_down.cancelled() => return Err(Error::new(Code::Interrupted, "the server shuts down")),
        };
        match first {
            Ok(Some(Ok(Message::Text(text)))) => parse(text.as_bytes()).map(Some).map_err(|Problem(error)| error),
            Ok(Some(Err(error))) if is_too_large(&error) => Err(too_large()),
            Ok(None | Some(Err(_) | Ok(Message::Close(_)))) => Ok(None),
            Ok(Some(Ok(_))) | Err(_) => Err(Error::new(Code::SpecInvalid, wanted)),
        }
    }

    /// The same as of a command that is posted; and its terminal.
    fn arguments(&self, start: &StartMessage) -> Result<Value> {
        let broken = |error: serde_json::Error| Error::internal(error.to_string());
        let mut arguments = Map::new();
        arguments.insert("name".into(), json!(self.name));
        let Value::Object(mut said) = serde_json::to_value(start).map_err(broken)? else { return Ok(Value::Null) };
        if let Some(Value::Object(command)) = said.remove("start") {
            arguments.extend(command);
        }
        arguments.extend(said);
        // Absent values are not recorded.
        arguments.retain(|_, value| !value.is_null() && value.as_object().is_none_or(|fields| !fields.is_empty()));
        Ok(Value::Object(arguments))
    }
}

/// Whether the client is connected while no message is sent.
struct PingTimer {
    every: Duration,
    ask_at: Instant,
    unanswered: u32,
}

impl PingTimer {
    fn since_now(every: Duration) -> Self {
        Self { every, ask_at: Instant::now() + every, unanswered: 0 }
    }

    /// It has been quiet for long enough to ask; whether it has been asked too often. Where a client is not listened to, for the
    /// command has not read its earlier messages, its silence has no meaning.
    fn is_gone(&mut self, listening: bool) -> bool {
        self.unanswered = if listening { self.unanswered + 1 } else { 0 };
        self.ask_at = Instant::now() + self.every;
        self.unanswered > UNANSWERED_PINGS_MAX
    }
}

/// Forwards the messages of both until one of them ends. Input goes through a task of its own: a command that does not read must not
/// keep its output or a signal from getting through.
async fn exchange_frames(
    app: &App,
    socket: &mut WebSocket,
    (control, stdin): (ExecControl, Vec<u8>),
    mut events: ExecEvents,
) -> Result<SessionEnd> {
    let (input, mut waiting) = tokio::sync::mpsc::channel::<Option<Vec<u8>>>(INPUT_QUEUE_MAX);
    // What the first message gave goes before what comes.
    if !stdin.is_empty() {
        drop(input.try_send(Some(stdin)));
    }
    let feeder = control.clone();
    let feed = tokio::spawn(async move {
        while let Some(piece) = waiting.recv().await {
            let sent = match piece {
                Some(bytes) => feeder.stdin(&bytes).await,
                None => feeder.stdin_eof().await,
            };
            if sent.is_err() {
                return;
            }
        }
    });
    let _ends = AbortOnDrop(feed);
    let mut quiet = PingTimer::since_now(app.timeouts.body_idle);
    loop {
        let room = input.capacity() > 0;
        tokio::select! {
            event = events.next() => {
                let message = match event {
                    Some(Ok(ExecEvent::Started(pid))) => text(&json!({ "started": { "pid": pid } })),
                    Some(Ok(ExecEvent::Stdout(bytes))) => output(app, 1, &bytes),
                    Some(Ok(ExecEvent::Stderr(bytes))) => output(app, 2, &bytes),
                    Some(Ok(ExecEvent::Exited(exit))) => return Ok(SessionEnd::Exit(exit)),
                    Some(Err(error)) => return Err(error),
                    None => return Err(Error::internal("the command ended without an exit status")),
                };
                if socket.send(message).await.is_err() {
                    return Ok(SessionEnd::Gone);
                }
            }
            message = socket.recv(), if room => match message {
                Some(Ok(Message::Binary(bytes))) => drop(input.try_send(Some(bytes.to_vec()))),
                Some(Ok(Message::Text(text))) => {
                    let said: ClientMessage = parse(text.as_bytes()).map_err(|Problem(error)| error)?;
                    if said.eof {
                        let _ = input.try_send(None);
                    }
                    if let Some(size) = said.resize {
                        control.resize(size.rows, size.columns).await?;
                    }
                    if let Some(signal) = said.signal {
                        control.signal(signal).await?;
                    }
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                // A client that disconnects ends the command.
                Some(Err(error)) if is_too_large(&error) => return Err(too_large()),
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Ok(SessionEnd::Gone),
            },
            () = sleep_until(quiet.ask_at) => {
                if quiet.is_gone(room) || socket.send(Message::Ping(Vec::new().into())).await.is_err() {
                    return Ok(SessionEnd::Gone);
                }
                continue;
            }
        }
        // Also data that was only passed on: the connection itself detects a client that does not read (timeouts.rs).
        quiet = PingTimer::since_now(app.timeouts.body_idle);
    }
}

/// Whether a message was longer than it may be. The type of that error is not public.
fn is_too_large(error: &axum::Error) -> bool {
    error.to_string().contains("too long")
}

fn too_large() -> Error {
    Error::new(Code::BodyTooLarge, format!("a message is longer than {MESSAGE_MAX} bytes"))
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn output(app: &App, stream: u8, bytes: &[u8]) -> Message {
    app.metrics.bytes_out(bytes.len() as u64);
    Message::Binary([&[stream], bytes].concat().into())
}

fn text(message: &Value) -> Message {
    Message::Text(message.to_string().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_unanswered_pings_disconnect_a_client_that_was_read_from() {
        let asked = |listening: &[bool]| {
            let mut quiet = PingTimer::since_now(Duration::from_secs(30));
            listening.iter().map(|listening| quiet.is_gone(*listening)).collect::<Vec<_>>()
        };
        assert_eq!(asked(&[true, true, true]), [false, false, true]);
        assert_eq!(asked(&[true, true, false, true, true, true]), [false, false, false, false, false, true]);
        assert_eq!(asked(&[false; 9]), [false; 9]);
    }
}
