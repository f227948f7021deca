//! One call of a tool, from being asked to being answered.
//!
//! ```text
//!  may it be? ── no ──> denied, written down
//!      │ yes
//!  attempt, on the disk ──> the work, a task of its own ──> outcome, on the disk ──> answer
//!                                    │ cancelled, or the server ends: it stops and clears up
//! ```
//!
//! Invariant: where the attempt cannot be written, nothing is done.

use std::sync::Arc;

use nido_vmm::audit::{Audited, Caller, Ending, Face};
use nido_vmm::error::{Code, Error, Result};
use nido_vmm::name::VmName;
use nido_vmm::nido::Nido;
use rmcp::RoleServer;
use rmcp::model::{CallToolResult, ErrorData};
use rmcp::service::RequestContext;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::answer::{Done, Failed, plain, result};
use crate::app::{App, Principal};
use crate::progress::Progress;
use crate::tools::Tool;

/// What a tool knows of the call that it serves.
#[derive(Debug, Clone)]
pub struct Call {
    pub app: Arc<App>,
    pub who: Caller,
    pub progress: Progress,
    /// Nobody wants the answer any more.
    pub cancelled: CancellationToken,
}

impl Call {
    pub async fn nido(&self) -> Result<&Nido> {
        self.app.nido().await
    }

    /// Does `work` unless nobody wants it any more; then it is dropped where it is.
    pub async fn unless_cancelled<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            outcome = work => outcome,
            () = self.cancelled.cancelled() => Err(Error::new(Code::Interrupted, "the call was cancelled")),
        }
    }
}

/// Carries a call out.
pub async fn carry_out(
    app: &Arc<App>,
    tool: &'static Tool,
    principal: &Principal,
    arguments: Value,
    context: RequestContext<RoleServer>,
) -> Result<CallToolResult, ErrorData> {
    let agent = context.client_info().map(|client| client.name);
    let who = Caller { face: Face::Mcp, actor: principal.actor.clone(), agent };
    if let Some((reason, words)) = tool.refused(app.settings(), principal) {
        let denied = denied(app, &who, tool.name, arguments, reason).await;
        let error = denied.err().unwrap_or_else(|| Error::new(Code::Denied, words));
        return Ok(result(Err(Failed::new(&error, None))));
    }
    let cancelled = app.ending().child_token();
    let call = Call { app: Arc::clone(app), who, progress: Progress::new(), cancelled: cancelled.clone() };
    let progress = call.progress.clone();
    // Whoever drops this call does not want its work any more.
    let _unwanted = cancelled.clone().drop_guard();
    let mut work = app.tasks().spawn(work(call, tool, arguments));
    let mut telling = std::pin::pin!(async {
        if let Some(token) = context.meta.get_progress_token() {
            progress.pass_on(context.peer.clone(), token).await;
        }
        std::future::pending::<()>().await;
    });
    loop {
        tokio::select! {
            done = &mut work => return done.map_err(|e| ErrorData::internal_error(e.to_string(), None)),
            () = context.ct.cancelled(), if !cancelled.is_cancelled() => cancelled.cancel(),
            () = &mut telling => {}
        }
    }
}

/// The attempt, the work and the outcome.
async fn work(call: Call, tool: &'static Tool, arguments: Value) -> CallToolResult {
    let name = arguments.get("name").and_then(Value::as_str).and_then(|name| name.parse().ok());
    let audited = match begin(&call, tool.name, arguments.clone()).await {
        Ok(audited) => audited,
        Err(error) => return result(Err(Failed::new(&error, None))),
    };
    let outcome = (tool.run)(call.clone(), arguments).await;
    end(audited, &outcome).await;
    match outcome {
        Ok(done) => result(Ok(done)),
        Err(error) => {
            let state = state(&call, &error, name).await;
            result(Err(Failed::new(&error, state)))
        }
    }
}

/// Writes the attempt down. It is synced to the disk, which may take its time.
async fn begin(call: &Call, tool: &'static str, arguments: Value) -> Result<Audited> {
    let (nido, who) = (Arc::clone(call.app.unsettled()), call.who.clone());
    let begun = tokio::task::spawn_blocking(move || nido.audit_begin(&who, tool, &arguments)).await;
    begun.map_err(|e| Error::internal(format!("the audit log broke down: {e}")))?
}

/// Writes down that it was not allowed.
async fn denied(app: &App, who: &Caller, tool: &'static str, arguments: Value, reason: &'static str) -> Result<()> {
    let (nido, who) = (Arc::clone(app.unsettled()), who.clone());
    let written = tokio::task::spawn_blocking(move || nido.audit_denied(&who, tool, &arguments, reason)).await;
    written.map_err(|e| Error::internal(format!("the audit log broke down: {e}")))?
}

/// Writes down how it ended. It has been done; that only the line about it is missing goes to the server's own log.
async fn end(audited: Audited, outcome: &Result<Done>) {
    let (ending, reason) = match outcome {
        Ok(done) => (Ending::Success, done.word.clone()),
        Err(error) if matches!(error.code(), Code::Denied | Code::Unauthorized) => {
            (Ending::Denied, error.code().slug().into())
        }
        Err(error) => (Ending::Error, error.code().slug().into()),
    };
    let ended = tokio::task::spawn_blocking(move || audited.end_as(ending, &reason)).await;
    if let Ok(Err(error)) = ended {
        tracing::error!("{}", plain(error.message()));
    }
}

/// The state of the VM that a call was about, if it explains why it failed.
async fn state(call: &Call, error: &Error, name: Option<VmName>) -> Option<String> {
    let explains = matches!(
        error.code(),
        Code::VmNotRunning | Code::VmBusy | Code::VmExists | Code::AgentUnreachable | Code::GuestFailed | Code::Timeout
    );
    let info = call.app.unsettled().info(&name.filter(|_| explains)?).await.ok()?;
    Some(info.status.word().into())
}
