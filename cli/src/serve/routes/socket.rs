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
//! A browser cannot give a header; it gives its token as a protocol: `nido` and `nido.token.TOKEN`.
//!
//! Invariant: the end of the connection, whatever ends it, kills the command.

use std::sync::Arc;

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use axum::routing::get;
use nido_vmm::api::ExecEvent;
use nido_vmm::error::{Code, Error, Result};
use nido_vmm::name::VmName;
use nido_vmm::nido::{ExecControl, ExecEvents};
use serde::Deserialize;
use serde_json::json;
use tokio::time::{Duration, timeout};
use utoipa_axum::router::OpenApiRouter;

use super::vms::Vm;
use crate::serve::App;
use crate::serve::answer::{Answer, Problem};
use crate::serve::ask::{Names, plain};
use crate::serve::audit::end_with;
use crate::serve::guard::Uses;
use crate::serve::operations::Asked;
use nido_vmm::api::ExecBody;

/// The largest message of a client, in bytes.
const MESSAGE_MAX: usize = 1 << 20;
/// How long a client may take to say what shall be started.
const STARTED_WITHIN: Duration = Duration::from_secs(30);
/// How many pieces of standard input may wait for a command that does not read.
const INPUT_WAITING: usize = 16;

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().route("/v1/vms/{name}/exec/socket", get(attach))
}

/// The upgrade of a connection; anything else is told what to do.
struct Upgrade(WebSocketUpgrade);

impl<S: Send + Sync> FromRequestParts<S> for Upgrade {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> std::result::Result<Self, Problem> {
        WebSocketUpgrade::from_request_parts(parts, state).await.map(Self).map_err(|rejection| {
            Error::new(Code::RequestInvalid, rejection.body_text())
                .hint("open a WebSocket here, or POST a command")
                .into()
        })
    }
}

/// Opens a WebSocket for one command. OpenAPI has no words for that; docs/api.md has.
async fn attach(
    State(app): State<Arc<App>>,
    _: Uses,
    Names(vm): Names<Vm>,
    asked: Asked,
    Upgrade(upgrade): Upgrade,
) -> Answer {
    // Whether it can be used is told before the connection is another.
    app.nido().await?.info(&vm.name).await?;
    let upgrade = upgrade.protocols(["nido"]).max_message_size(MESSAGE_MAX);
    let line = asked.take_line();
    Ok(upgrade.on_upgrade(move |socket| async move {
        let mut socket = socket;
        let outcome = session(&app, &vm.name, &mut socket).await;
        end_with(line, &outcome);
        if let Err(error) = outcome {
            let _ = say(&mut socket, json!({ "error": error.problem() })).await;
        }
        let _ = socket.send(Message::Close(None)).await;
    }))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Size {
    rows: u16,
    columns: u16,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Start {
    start: ExecBody,
    #[serde(default)]
    pty: Option<Size>,
    /// The terminal's type.
    #[serde(default)]
    term: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Said {
    eof: bool,
    signal: Option<u8>,
    resize: Option<Size>,
}

async fn session(app: &Arc<App>, name: &VmName, socket: &mut WebSocket) -> Result<()> {
    let bad = |words: String| Error::new(Code::SpecInvalid, words);
    let first = timeout(STARTED_WITHIN, socket.recv()).await;
    let Ok(Some(Ok(Message::Text(text)))) = first else {
        return Err(bad("the first message does not say what to start".into()));
    };
    let start: Start = serde_json::from_str(&text).map_err(|e| bad(plain(&e.to_string())))?;
    let never = start.start.timeout_ms.is_none();
    let (mut request, _) = start.start.split()?;
    request.stdin = true;
    if never {
        request.timeout_ms = None;
    }
    request.pty = start.pty.map(|size| (size.rows, size.columns));
    request.term = start.term.filter(|_| request.pty.is_some());
    let (control, events) = app.nido().await?.exec(name, request).await?;
    app.metrics.exec();
    talk(app, socket, control, events).await
}

/// Carries what both say until one of them ends. Input goes through a task of its own: a command that does not read must not
/// keep its output or a signal from getting through.
async fn talk(app: &App, socket: &mut WebSocket, control: ExecControl, mut events: ExecEvents) -> Result<()> {
    let (input, mut waiting) = tokio::sync::mpsc::channel::<Option<Vec<u8>>>(INPUT_WAITING);
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
    loop {
        let room = input.capacity() > 0;
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(ExecEvent::Started(pid))) => say(socket, json!({ "started": { "pid": pid } })).await?,
                Some(Ok(ExecEvent::Stdout(bytes))) => output(app, socket, 1, &bytes).await?,
                Some(Ok(ExecEvent::Stderr(bytes))) => output(app, socket, 2, &bytes).await?,
                Some(Ok(ExecEvent::Exited(exit))) => return say(socket, json!({ "exit": exit })).await,
                Some(Err(error)) => return Err(error),
                None => return Err(Error::internal("the command ended without saying how")),
            },
            message = socket.recv(), if room => match message {
                Some(Ok(Message::Binary(bytes))) => drop(input.try_send(Some(bytes.to_vec()))),
                Some(Ok(Message::Text(text))) => {
                    let said: Said = serde_json::from_str(&text)
                        .map_err(|e| Error::new(Code::SpecInvalid, plain(&e.to_string())))?;
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
                // Whoever hangs up does not want the command any more.
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Ok(()),
            },
        }
    }
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn output(app: &App, socket: &mut WebSocket, stream: u8, bytes: &[u8]) -> Result<()> {
    app.metrics.bytes_out(bytes.len() as u64);
    let message = [&[stream], bytes].concat();
    socket.send(Message::Binary(message.into())).await.map_err(|_| gone())
}

async fn say(socket: &mut WebSocket, message: serde_json::Value) -> Result<()> {
    socket.send(Message::Text(message.to_string().into())).await.map_err(|_| gone())
}

fn gone() -> Error {
    Error::new(Code::Interrupted, "the client has hung up")
}
