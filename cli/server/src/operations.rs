//! Operations: requests that change something. They run to their end even if the client disconnects. With `Prefer: respond-async`
//! the response is an operation, which the client polls or cancels.
//!
//! ```text
//!  request ──> Attempt (audit.rs) ──> detached task ──> outcome ──> response
//!                                         └── respond-async: a job in the store ──> 202; operation_view.rs shows it
//! ```
//!
//! Invariant: what is shown as an operation is a job of the core, and nothing else. So it outlives this server: what it was carrying
//! out when it was killed is shown as `lost`, what had ended keeps its result.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::extract::{FromRequestParts, MatchedPath, RawPathParams};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use nido_api::error::{Error, Result};
use nido_api::name::VmName;
use nido_api::operation::Operation;
use nido_api::{JobOutcome, JobProgress, JobRequest, OPERATION_RESULTS_MAX, StartStage};
use nido_core::VmInProgress;
use nido_core::execute::{Attempt, Verdict};
use serde::Serialize;
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use super::App;
use super::audit_entry::AuditTicket;
use super::auth::Caller;
use super::budget::Reservation;
use super::operation_view::ApiOperation;
use super::response::{self, HandlerResult};

/// How long running operations may take when the server shuts down.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(60);

/// The operations that this server is carrying out.
#[derive(Debug, Default)]
pub struct Operations {
    running: TaskTracker,
}

impl Operations {
    /// Runs something that continues even if no client waits for it any more; the server's shutdown waits for it.
    pub fn spawn_detached<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.running.spawn(work)
    }

    /// Waits for running operations.
    pub async fn finish(&self) {
        self.running.close();
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, self.running.wait()).await.is_err() {
            tracing::warn!("the server shuts down: operations were interrupted");
        }
    }
}

/// Reports the progress of an operation.
#[derive(Debug, Clone)]
pub struct StageReporter {
    app: Arc<App>,
    job: Option<String>,
    begun: ChangeStarted,
}

/// Whether a request has begun to change something. Until then an error means that nothing was changed.
#[derive(Debug, Clone, Default)]
pub struct ChangeStarted(Arc<AtomicBool>);

impl ChangeStarted {
    /// It has.
    pub fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it has.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

impl StageReporter {
    /// From here on it is not undone by an error.
    pub fn begun(&self) -> &ChangeStarted {
        &self.begun
    }

    /// A stage has begun. It is in the store before that: a job with a stage has begun to change something (idempotency.rs).
    pub fn word(&self, word: &str) {
        if let Some(job) = &self.job {
            let progress = JobProgress { stage: word.to_owned(), percent: None };
            if let Err(error) = self.app.nido.job_progress(job, &progress) {
                tracing::warn!("the stage of {job} could not be stored: {error}");
            }
        }
        self.begun.set();
    }

    /// A stage of a start has begun.
    pub fn start(&self, stage: StartStage) {
        self.word(stage.word());
    }
}

/// The output of an operation.
#[derive(Debug)]
pub struct OperationOutput {
    /// What is answered.
    pub value: Value,
    /// How a command ended, in a word for the audit log; empty where there was none.
    pub word: String,
    /// The memory that the response takes.
    pub held: Option<Reservation>,
}

impl OperationOutput {
    /// The response.
    pub fn answer(self, status: StatusCode) -> Response {
        let mut response = response::json(status, &self.value);
        if let Some(held) = self.held {
            held.leave_to(&mut response);
        }
        response
    }
}

/// The work of an operation.
pub type OperationFuture = Pin<Box<dyn Future<Output = Result<OperationOutput>> + Send>>;

/// Runs an operation. The response has `status` and the value, or is 202 with an operation if the client prefers that.
pub async fn run(
    app: &Arc<App>,
    context: OperationContext,
    operation: &'static Operation,
    status: StatusCode,
    work: impl FnOnce(StageReporter) -> OperationFuture + Send,
) -> HandlerResult {
    if !wants_async(&context.headers) {
        let work = work(StageReporter { app: Arc::clone(app), job: None, begun: context.begun() });
        let done = context.take_attempt()?.detach(&app.operations.running, work, verdict).await;
        let done = done.map_err(|e| Error::internal(format!("the operation failed: {e}")))??;
        return Ok(done.answer(status));
    }
    let begun = begin(app, &context, operation, work)?;
    let mut response = response::json(StatusCode::ACCEPTED, &begun);
    let headers = response.headers_mut();
    if let Ok(place) = HeaderValue::from_str(&format!("/v1/operations/{}", begun.id)) {
        headers.insert(header::LOCATION, place);
    }
    headers.insert("preference-applied", HeaderValue::from_static("respond-async"));
    Ok(response)
}

/// Begins a job, and carries it out in a task of its own.
fn begin(
    app: &Arc<App>,
    context: &OperationContext,
    operation: &'static Operation,
    work: impl FnOnce(StageReporter) -> OperationFuture,
) -> Result<ApiOperation> {
    let attempt = context.take_attempt()?;
    let request = JobRequest { tool: operation.id.into(), vm_name: context.vm.clone(), actor: context.actor.clone() };
    let job = match app.nido.job_begin(&request) {
        Ok(job) => job,
        Err(error) => {
            attempt.end_or_log(&Verdict::failure(&error));
            return Err(error);
        }
    };
    let id = job.id.clone();
    let work = work(StageReporter { app: Arc::clone(app), job: Some(id.clone()), begun: context.begun() });
    let task = attempt.detach(&app.operations.running, work, verdict);
    let (owner, cancel) = (Arc::clone(app), task.abort_handle());
    app.operations.running.spawn(async move {
        let outcome = async {
            match task.await {
                Ok(Ok(done)) => JobOutcome::Done(done.value),
                Ok(Err(error)) => JobOutcome::Failed(error.record()),
                Err(stopped) if stopped.is_cancelled() => JobOutcome::Cancelled,
                Err(broken) => JobOutcome::Failed(Error::internal(broken.to_string()).record()),
            }
        };
        owner.nido.carry_job(&id, OPERATION_RESULTS_MAX, outcome, || cancel.abort(), || None).await;
    });
    Ok(job.into())
}

/// Runs a short operation to its end, also if the client disconnects.
pub async fn act<T: Send + 'static>(
    app: &Arc<App>,
    context: OperationContext,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let done = context.take_attempt()?.detach(&app.operations.running, work, Verdict::of).await;
    done.map_err(|e| Error::internal(format!("the operation failed: {e}")))?
}

/// The outcome of an operation for the audit log.
pub fn verdict(outcome: &Result<OperationOutput>) -> Verdict {
    outcome.as_ref().map_or_else(Verdict::failure, |done| Verdict::success(done.word.clone()))
}

/// Extractor: what an operation needs of its request.
#[derive(Debug)]
pub struct OperationContext {
    headers: HeaderMap,
    ticket: Option<AuditTicket>,
    begun: ChangeStarted,
    actor: String,
    vm: Option<VmName>,
}

impl<S: Send + Sync> FromRequestParts<S> for OperationContext {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> std::result::Result<Self, Infallible> {
        Ok(Self {
            headers: parts.headers.clone(),
            ticket: parts.extensions.get::<AuditTicket>().cloned(),
            begun: parts.extensions.get::<ChangeStarted>().cloned().unwrap_or_default(),
            actor: parts.extensions.get::<Caller>().map(|caller| caller.actor.clone()).unwrap_or_default(),
            vm: vm_of(parts, state).await,
        })
    }
}

/// The VM that the path of a request names.
async fn vm_of<S: Send + Sync>(parts: &mut Parts, state: &S) -> Option<VmName> {
    let route = parts.extensions.get::<MatchedPath>()?;
    if !route.as_str().starts_with("/v1/vms/{name}") {
        return None;
    }
    let names = RawPathParams::from_request_parts(parts, state).await.ok()?;
    names.iter().find(|(name, _)| *name == "name")?.1.parse().ok()
}

impl OperationContext {
    /// The same for a VM that the path does not name.
    pub fn about(self, vm: &VmName) -> Self {
        Self { vm: Some(vm.clone()), ..self }
    }

    /// The headers.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Whether the request has begun.
    pub fn begun(&self) -> ChangeStarted {
        self.begun.clone()
    }

    /// The attempt in the audit log, which the operation completes.
    ///
    /// # Errors
    /// `internal` if there is none: nothing may be done then.
    pub fn take_attempt(&self) -> Result<Attempt> {
        let attempt = self.ticket.as_ref().and_then(AuditTicket::take);
        attempt.ok_or_else(|| Error::internal("the request has no attempt in the audit log"))
    }
}

/// RFC 7240.
pub fn wants_async(headers: &HeaderMap) -> bool {
    let wishes = headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
    wishes.flat_map(|value| value.split(',')).any(|wish| wish.trim().eq_ignore_ascii_case("respond-async"))
}

/// Removes a VM whose creation was cancelled: by its id, not by its name.
#[derive(Debug)]
pub struct UndoGuard {
    app: Arc<App>,
    /// The VM that the operation has begun to make.
    pub begun: VmInProgress,
    armed: bool,
}

impl UndoGuard {
    /// Nothing has been begun yet.
    pub fn new(app: &Arc<App>) -> Self {
        Self { app: Arc::clone(app), begun: VmInProgress::default(), armed: true }
    }

    /// It stays, or has been removed already.
    pub fn done(mut self) {
        self.armed = false;
    }
}

impl Drop for UndoGuard {
    fn drop(&mut self) {
        if !self.armed || self.begun.id().is_none() {
            return;
        }
        let (app, begun) = (Arc::clone(&self.app), self.begun.clone());
        self.app.operations.running.spawn(async move {
            if let Err(error) = app.nido.undo(&begun).await {
                tracing::error!("VM {} was created and could not be deleted: {error}", begun.id().unwrap_or_default());
            }
        });
    }
}

/// A value as the result of an operation.
pub fn value<T: Serialize>(value: &T) -> Result<OperationOutput> {
    ended(value, String::new())
}

/// The same of an operation that was a command, with how that ended.
pub fn ended<T: Serialize>(value: &T, word: String) -> Result<OperationOutput> {
    let value = serde_json::to_value(value).map_err(|e| Error::internal(e.to_string()))?;
    Ok(OperationOutput { value, word, held: None })
}
