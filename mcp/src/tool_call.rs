//! One call of a tool, from request to result.
//!
//! ```text
//!  arguments are read (argument_reader.rs), the tool is offered? ── no ──> denied, written to the audit log
//!      │ yes
//!  attempt, on the disk (call_audit.rs)
//!      │
//!  arguments are parsed into an operation ── invalid ──> error, without a confirmation
//!      │
//!  where a person has to confirm (confirmation.rs): the operation is admitted, or fails; then the person is asked
//!      │
//!  the work, a task of its own ──> outcome, on the disk ──> answer
//!      │ cancelled, or the server ends: it stops and clears up
//!      │ too long for a client to wait: a job, answered at once and asked for later; where there can be none, it is cancelled
//! ```
//!
//! Invariant: if the attempt cannot be written, nothing is done; if a read cannot be recorded, nothing is returned.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::{JOB_RESULT_MAX, JobOutcome, JobProgress, JobRequest};
use nido_core::audit::AuditOutcome;
use nido_core::execute::Verdict;
use rmcp::RoleServer;
use rmcp::model::{CallToolResponse, ErrorData, InputRequiredResult};
use rmcp::service::RequestContext;
use serde_json::Value;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::DropGuard;

use crate::answer::{ErrorResult, JobReference, ToolResult, plain, result};
use crate::app::App;
use crate::argument_reader;
use crate::call_audit;
use crate::call_context::{CallContext, RefusalNotes};
use crate::call_failure::failed;
use crate::confirmation::{Decision, PendingCall, Retry, confirm};
use crate::principal::Principal;
use crate::progress::Progress;
use crate::session_leases::SessionKey;
use crate::tools::{Operation, Tool};

/// How long work that is cancelled may take to stop before its caller is answered: some clients give up soon.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// The outcome of the work.
type WorkOutcome = std::result::Result<Result<ToolResult>, JoinError>;

/// Why a call stops.
#[derive(Debug)]
enum StopReason {
    /// The user is asked first.
    Question(Box<InputRequiredResult>),
    /// It failed, or is not allowed.
    Failed(Error),
}

impl From<Error> for StopReason {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl StopReason {
    fn verdict(&self, call: &CallContext) -> Verdict {
        match self {
            Self::Question(_) => Verdict { ending: AuditOutcome::Denied, reason: Code::ApprovalRequired.slug().into() },
            Self::Failed(error) => call_audit::verdict(call, &Err(error), ""),
        }
    }
}

/// A request to call a tool.
#[derive(Debug)]
pub struct CallRequest {
    pub tool: &'static Tool,
    pub arguments: Value,
    pub retry: Retry,
    pub session: SessionKey,
}

/// Carries a call out.
pub async fn carry_out(
    app: &Arc<App>,
    principal: &Principal,
    CallRequest { tool, arguments, retry, session }: CallRequest,
    context: RequestContext<RoleServer>,
) -> Result<CallToolResponse, ErrorData> {
    let who = principal.caller(&context);
    let given = argument_reader::read(&(tool.takes)(), &tool.also_accepts(), arguments);
    let arguments = given.value;
    if let Some((reason, words)) = tool.refused(app.settings(), principal) {
        let denied = app.unreconciled().refuse(who, tool.name().into(), arguments, reason).await;
        let error = denied.err().unwrap_or_else(|| Error::new(Code::Denied, words));
        return Ok(result(Err(ErrorResult::new(&error, None))).into());
    }
    let notes = Arc::new(Mutex::new(RefusalNotes { arguments: given.notes, ..RefusalNotes::default() }));
    let (progress, vm) = (Progress::new(), None);
    let limits = app.limits(principal);
    let (cancelled, scope) = (app.ending().child_token(), principal.scope);
    let mut call = CallContext {
        app: Arc::clone(app),
        who,
        scope,
        progress,
        cancelled: cancelled.clone(),
        session,
        limits,
        vm,
        notes,
    };
    let attempt = match app.unreconciled().attempt(call_audit::request(&call, tool, arguments.clone())).await {
        Ok(attempt) => attempt,
        Err(error) => return Ok(result(Err(ErrorResult::new(&error, None))).into()),
    };
    let parsed = given.wrong.map_or_else(|| tool.operation(arguments.clone()), Err);
    let name = parsed.as_ref().ok().and_then(|operation| operation.vm().cloned());
    let known = call.clone();
    let permitted = async {
        let operation = parsed?;
        let asked = PendingCall { tool, operation: &*operation, arguments: &arguments };
        match decide(&mut call, asked, retry, &context).await? {
            Decision::Proceed(permission) => Ok((operation, permission)),
            Decision::Ask(question) => Err(StopReason::Question(question)),
        }
    };
    let (attempt, (operation, permission)) =
        match Box::pin(attempt.confirmed(permitted, |stop| stop.verdict(&known))).await {
            Ok(permitted) => permitted,
            Err(StopReason::Question(question)) => return Ok((*question).into()),
            Err(StopReason::Failed(error)) => return Ok(result(Err(failed(&call, &error, name).await)).into()),
        };
    call.vm = permission.vm;
    // Dropping this call cancels its work.
    let unwanted = cancelled.clone().drop_guard();
    let done = call.clone();
    let verdict = move |outcome: &Result<ToolResult>| call_audit::verdict(&done, &outcome.as_ref(), permission.word);
    let work = attempt.detach(app.tasks(), work(call.clone(), operation), verdict);
    awaited(call, tool, name, (work, unwanted), &context).await
}

/// Whether the call may be made, and asks a person where that is needed. Here and not in the task of the work: what a client is asked
/// belongs to its request.
async fn decide(
    call: &mut CallContext,
    asked: PendingCall<'_>,
    retry: Retry,
    context: &RequestContext<RoleServer>,
) -> Result<Decision> {
    let (steps, token, peer) = (call.progress.clone(), context.meta.get_progress_token(), context.peer.clone());
    let telling = async {
        if let Some(token) = token {
            steps.pass_on(peer, token).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        decision = confirm(call, asked, retry, context) => decision,
        () = telling => Err(Error::internal("progress ended")),
        () = context.ct.cancelled() => Err(Error::new(Code::Interrupted, "the call was cancelled")),
    }
}

/// Waits for the work, for as long as a client does. Then it is a job, or given up.
async fn awaited(
    call: CallContext,
    tool: &Tool,
    name: Option<VmName>,
    (mut work, unwanted): (JoinHandle<Result<ToolResult>>, DropGuard),
    context: &RequestContext<RoleServer>,
) -> Result<CallToolResponse, ErrorData> {
    let (app, cancelled) = (Arc::clone(&call.app), call.cancelled.clone());
    let progress = call.progress.clone();
    let mut patience = std::pin::pin!(tokio::time::sleep(app.settings().answer_within));
    let token = context.meta.get_progress_token();
    // Dropped at the end of the block: then the last step can be sent.
    let done = {
        let mut telling = std::pin::pin!(async {
            if let Some(token) = token.clone() {
                progress.pass_on(context.peer.clone(), token).await;
            }
            std::future::pending::<()>().await;
        });
        loop {
            tokio::select! {
                biased;
                () = &mut telling => {}
                done = &mut work => break Some(done),
                () = context.ct.cancelled(), if !cancelled.is_cancelled() => cancelled.cancel(),
                () = &mut patience, if !tool.op.is_read() && !cancelled.is_cancelled() => break None,
            }
        }
    };
    if let Some(done) = done {
        if let Some(token) = token {
            progress.send_last(&context.peer, token).await;
        }
        return answered(&call, name, done).await;
    }
    let request = JobRequest { tool: tool.name().into(), vm_name: name.clone(), actor: call.who.actor.clone() };
    match app.unreconciled().job_begin(&request) {
        Ok(job) => {
            unwanted.disarm();
            app.tasks().spawn(job_of(call, job.id.clone(), work));
            Ok(result(ToolResult::new(&JobReference::new(&job)).map_err(|e| ErrorResult::new(&e, None))).into())
        }
        Err(error) => given_up(&call, name, work, &error).await,
    }
}

/// The answer of work that has ended.
async fn answered(
    call: &CallContext,
    name: Option<VmName>,
    outcome: WorkOutcome,
) -> Result<CallToolResponse, ErrorData> {
    match outcome {
        Ok(Ok(done)) => Ok(result(Ok(done)).into()),
        Ok(Err(error)) => Ok(result(Err(failed(call, &error, name).await)).into()),
        Err(broken) => Err(ErrorData::internal_error(broken.to_string(), None)),
    }
}

/// Work that takes too long and cannot become a job: its end could not be reported, so it is stopped before the response.
async fn given_up(
    call: &CallContext,
    name: Option<VmName>,
    mut work: JoinHandle<Result<ToolResult>>,
    why: &Error,
) -> Result<CallToolResponse, ErrorData> {
    tracing::warn!("a long-running call cannot become a job: {}", plain(why.message()));
    call.cancelled.cancel();
    let stopped = match tokio::time::timeout(STOP_TIMEOUT, &mut work).await {
        Ok(Ok(Err(error))) if error.code() == Code::Interrupted => "so it was cancelled",
        // It has ended in this very moment, one way or the other.
        Ok(done) => return answered(call, name, done).await,
        Err(_) => "and it cannot be cancelled: it continues, and its result is lost",
    };
    let words = format!("the call takes long and cannot continue as a job, {stopped}: {}", why.message());
    if why.code() == Code::LimitExceeded {
        call.next_step(
            "end other jobs: job_get with wait_seconds waits for one, job_cancel stops one; vm_info shows the state of the VM; \
             then call again",
        );
    }
    Ok(result(Err(failed(call, &Error::new(why.code(), words), name).await)).into())
}

/// The work, and the notes for its result.
async fn work(call: CallContext, operation: Box<dyn Operation>) -> Result<ToolResult> {
    let done = operation.run(call.clone()).await?;
    let notes = call.notes().arguments.clone();
    Ok(done.noted(&notes))
}

/// Carries a job to its end, and records how that was.
async fn job_of(call: CallContext, id: String, work: JoinHandle<Result<ToolResult>>) {
    let outcome = async {
        match work.await {
            Ok(Ok(done)) => JobOutcome::Done(done.value),
            Ok(Err(error)) if error.code() == Code::Interrupted => JobOutcome::Cancelled,
            Ok(Err(error)) => JobOutcome::Failed(error.record()),
            Err(broken) => JobOutcome::Failed(Error::internal(broken.to_string()).record()),
        }
    };
    let progress = || {
        let (stage, percent) = call.progress.now();
        (!stage.is_empty()).then_some(JobProgress { stage, percent })
    };
    let nido = call.app.unreconciled();
    nido.carry_job(&id, JOB_RESULT_MAX, outcome, || call.cancelled.cancel(), progress).await;
}
