//! Operations: requests that change something. They run to their end even if the client disconnects. With `Prefer: respond-async`
//! the response is an operation, which the client polls or cancels.
//!
//! Operations are in the memory of the server: running ones until they end, ended ones for an hour, cancelled ones not at all. Their
//! effects (VMs, states, events) are in the store and outlive the server.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use jiff::Timestamp;
use nido_api::error::{Code, Error, Problem, Result};
use nido_api::{Scope, StartStage, moment, operation};
use nido_core::BegunVm;
use nido_core::audit::{Audited, Ending};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::task::{AbortHandle, JoinHandle};
use tokio_util::task::TaskTracker;

use super::App;
use super::audit_entry::{self, AuditTicket};
use super::auth::Caller;
use super::budget::Reservation;
use super::response::{self, HandlerResult};

/// How long an ended operation can be queried.
const ENDED_RETENTION: Duration = Duration::from_secs(3600);
/// The most operations; the oldest ended ones are removed first.
const OPERATIONS_MAX: usize = 1000;
/// The most bytes of results for one caller; the oldest operations are removed first.
const RESULTS_MAX: usize = 64 << 20;
/// How long running operations may take when the server shuts down.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(60);

/// An operation that is running, or has ended.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Operation {
    /// Its id.
    pub id: String,
    /// The request that it carries out.
    pub kind: String,
    /// Its state.
    pub status: OperationStatus,
    /// The current stage.
    pub stage: Option<String>,
    /// When it started.
    pub created_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
    /// The body that the request's response would have had. The output of commands is included only for tokens that may
    /// run commands.
    pub result: Option<Value>,
    /// Why it failed.
    pub error: Option<Problem>,
}

impl Operation {
    fn shown_to(mut self, scope: Scope) -> Self {
        if scope < Scope::Run && has_output(&self.kind) {
            self.result = None;
        }
        self
    }

    /// Without what may be long: for lists.
    fn brief(mut self) -> Self {
        self.result = None;
        self
    }
}

/// Whether operations of this kind have the output of a command as their result.
fn has_output(kind: &str) -> bool {
    operation::ALL.iter().any(|known| known.has_output && known.kind() == kind)
}

/// State of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OperationStatus {
    /// Running.
    Running,
    /// Succeeded.
    Succeeded,
    /// Failed.
    Failed,
    /// Cancelled.
    Cancelled,
}

/// The caller's operations, without their results; for an admin those of all callers.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct OperationList {
    /// The oldest first.
    pub operations: Vec<Operation>,
}

/// An operation and the server's own data about it.
#[derive(Debug)]
struct OperationEntry {
    operation: Operation,
    /// Its owner: [`Caller::owner`].
    owner: String,
    /// How long its result is, in bytes.
    bytes: usize,
    /// What stops it.
    abort: Option<AbortHandle>,
}

impl OperationEntry {
    fn is_for(&self, caller: &Caller) -> bool {
        caller.scope == Scope::Admin || self.owner == caller.owner()
    }
}

/// Operations, by the time they began and their id.
type OperationMap = BTreeMap<(Timestamp, String), OperationEntry>;

/// The operations of a server.
#[derive(Debug, Default)]
pub struct Operations {
    known: Mutex<OperationMap>,
    running: TaskTracker,
}

/// Reports the progress of an operation.
#[derive(Debug, Clone)]
pub struct StageReporter {
    app: Arc<App>,
    key: Option<(Timestamp, String)>,
    begun: BegunFlag,
}

/// Whether a request has begun to change something. Until then an error means that nothing was changed.
#[derive(Debug, Clone, Default)]
pub struct BegunFlag(Arc<AtomicBool>);

impl BegunFlag {
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
    pub fn begun(&self) -> &BegunFlag {
        &self.begun
    }

    /// A stage has begun.
    pub fn word(&self, word: &str) {
        if let Some(key) = &self.key
            && let Some(entry) = self.app.operations.lock().get_mut(key)
        {
            entry.operation.stage = Some(word.to_owned());
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
    /// The memory that the answer takes.
    pub held: Option<Reservation>,
}

impl OperationOutput {
    /// The answer.
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
    OperationContext { headers, ticket, begun, owner }: OperationContext,
    kind: &'static operation::Operation,
    status: StatusCode,
    work: impl FnOnce(StageReporter) -> OperationFuture + Send,
) -> HandlerResult {
    if !wants_async(&headers) {
        let work = work(StageReporter { app: Arc::clone(app), key: None, begun });
        let audited = ticket.and_then(|ticket| ticket.take());
        let done = app.operations.running.spawn(run_audited(work, audited)).await;
        let done = done.map_err(|e| Error::internal(format!("the operation failed: {e}")))??;
        return Ok(done.answer(status));
    }
    let operation = begin(app, kind, work, OperationContext { headers, ticket, begun, owner })?;
    let mut response = response::json(StatusCode::ACCEPTED, &operation);
    let headers = response.headers_mut();
    if let Ok(place) = HeaderValue::from_str(&format!("/v1/operations/{}", operation.id)) {
        headers.insert(header::LOCATION, place);
    }
    headers.insert("preference-applied", HeaderValue::from_static("respond-async"));
    Ok(response)
}

fn begin(
    app: &Arc<App>,
    kind: &'static operation::Operation,
    work: impl FnOnce(StageReporter) -> OperationFuture,
    OperationContext { ticket, begun, owner, .. }: OperationContext,
) -> Result<Operation> {
    let (created_at, id) = (moment::now(), nido_files::random::id()?);
    let operation = Operation {
        id: id.clone(),
        kind: kind.kind().into(),
        status: OperationStatus::Running,
        stage: None,
        created_at,
        ended_at: None,
        result: None,
        error: None,
    };
    let key = (created_at, id);
    app.operations.make_room()?;
    let entry = OperationEntry { operation: operation.clone(), owner, bytes: 0, abort: None };
    app.operations.lock().insert(key.clone(), entry);
    let work = work(StageReporter { app: Arc::clone(app), key: Some(key.clone()), begun });
    let (owner, done) = (Arc::clone(app), key.clone());
    let audited = ticket.and_then(|ticket| ticket.take());
    let task = app.operations.running.spawn(async move {
        let outcome = run_audited(work, audited).await;
        owner.operations.end(&done, outcome.map(|done| done.value));
    });
    match app.operations.lock().get_mut(&key) {
        Some(entry) if entry.operation.status == OperationStatus::Running => entry.abort = Some(task.abort_handle()),
        // It has ended, or was cancelled before it could be stopped.
        _ => task.abort(),
    }
    Ok(operation)
}

/// Runs a short operation to its end, also if the client disconnects.
pub async fn act<T: Send + 'static>(
    app: &Arc<App>,
    asked: OperationContext,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let audited = asked.take_audit_entry();
    let done = app.operations.running.spawn(async move {
        let outcome = work.await;
        audit_entry::end_with(audited, &outcome);
        outcome
    });
    done.await.map_err(|e| Error::internal(format!("the operation failed: {e}")))?
}

/// Runs an operation and completes its audit entry. If it is dropped, the entry records that by itself.
pub async fn run_audited(work: OperationFuture, audited: Option<Audited>) -> Result<OperationOutput> {
    let outcome = work.await;
    match &outcome {
        Ok(done) => audit_entry::end(audited, Ending::Success, &done.word),
        Err(error) => audit_entry::end(audited, Ending::from(error), error.code().slug()),
    }
    outcome
}

/// Extractor: what an operation needs of its request.
#[derive(Debug)]
pub struct OperationContext {
    headers: HeaderMap,
    ticket: Option<AuditTicket>,
    begun: BegunFlag,
    owner: String,
}

impl<S: Send + Sync> FromRequestParts<S> for OperationContext {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> std::result::Result<Self, Infallible> {
        Ok(Self {
            headers: parts.headers.clone(),
            ticket: parts.extensions.get::<AuditTicket>().cloned(),
            begun: parts.extensions.get::<BegunFlag>().cloned().unwrap_or_default(),
            owner: parts.extensions.get::<Caller>().map(Caller::owner).unwrap_or_default(),
        })
    }
}

impl OperationContext {
    /// The headers.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Whether the request has begun.
    pub fn begun(&self) -> BegunFlag {
        self.begun.clone()
    }

    /// The pending audit entry, for handlers that complete it themselves.
    pub fn take_audit_entry(&self) -> Option<Audited> {
        self.ticket.as_ref().and_then(AuditTicket::take)
    }
}

/// RFC 7240.
pub fn wants_async(headers: &HeaderMap) -> bool {
    let wishes = headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
    wishes.flat_map(|value| value.split(',')).any(|wish| wish.trim().eq_ignore_ascii_case("respond-async"))
}

impl Operations {
    fn lock(&self) -> MutexGuard<'_, OperationMap> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, key: &(Timestamp, String), outcome: Result<Value>) {
        let bytes =
            outcome.as_ref().ok().and_then(|value| serde_json::to_string(value).ok()).map_or(0, |text| text.len());
        let mut known = self.lock();
        let Some(OperationEntry { operation, owner, bytes: length, abort }) = known.get_mut(key) else { return };
        *abort = None;
        operation.ended_at = Some(moment::now());
        match outcome {
            Ok(value) => {
                operation.status = OperationStatus::Succeeded;
                operation.result = Some(value);
                *length = bytes;
            }
            Err(error) => {
                operation.status = OperationStatus::Failed;
                operation.error = Some(error.problem());
            }
        }
        let owner = owner.clone();
        keep_within(&mut known, &owner, RESULTS_MAX);
    }

    /// Runs something that continues even if no client waits for it any more; the server's shutdown waits for it.
    pub fn spawn_detached<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.running.spawn(work)
    }

    /// Deletes old operations; an error if the maximum number is running.
    fn make_room(&self) -> Result<()> {
        let mut known = self.lock();
        let now = Timestamp::now();
        let is_old = |operation: &Operation| {
            operation
                .ended_at
                .is_some_and(|end| now.duration_since(end).as_secs() > ENDED_RETENTION.as_secs().cast_signed())
        };
        known.retain(|_, entry| !is_old(&entry.operation));
        while known.len() >= OPERATIONS_MAX {
            let ended = known.iter().find(|(_, entry)| entry.operation.ended_at.is_some());
            let Some(key) = ended.map(|(key, _)| key.clone()) else {
                let words = format!("{OPERATIONS_MAX} operations are running, which is the limit");
                return Err(Error::new(Code::LimitExceeded, words).hint("wait until some have ended, or cancel some"));
            };
            known.remove(&key);
        }
        Ok(())
    }

    /// Those that are the caller's, without their results.
    pub fn list(&self, caller: &Caller) -> OperationList {
        let known = self.lock();
        let own = known.values().filter(|entry| entry.is_for(caller));
        OperationList { operations: own.map(|entry| entry.operation.clone().brief()).collect() }
    }

    /// One of them.
    pub fn get(&self, id: &str, caller: &Caller) -> Result<Operation> {
        let known = self.lock();
        let found = known.values().find(|entry| entry.operation.id == id && entry.is_for(caller));
        Ok(found.ok_or_else(not_known)?.operation.clone().shown_to(caller.scope))
    }

    /// Deletes one, and stops it if it is running. Its effects so far are undone as if its caller had been killed.
    pub fn cancel(&self, id: &str, caller: &Caller) -> Result<Operation> {
        let mut known = self.lock();
        let found = known.iter().find(|(_, entry)| entry.operation.id == id && entry.is_for(caller));
        let key = found.map(|(key, _)| key.clone());
        let OperationEntry { mut operation, abort, .. } =
            key.and_then(|key| known.remove(&key)).ok_or_else(not_known)?;
        if operation.status == OperationStatus::Running {
            abort.inspect(AbortHandle::abort);
            operation.status = OperationStatus::Cancelled;
            operation.ended_at = Some(moment::now());
        }
        Ok(operation)
    }

    /// Waits for running operations.
    pub async fn finish(&self) {
        self.running.close();
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, self.running.wait()).await.is_err() {
            tracing::warn!("the server shuts down: operations were interrupted");
        }
    }
}

fn not_known() -> Error {
    Error::new(Code::OperationNotFound, "the caller has no such operation").hint(
        "only their caller and admins see operations; they are kept while the server runs, for an hour after their end \
         (64 MiB of results for each caller), cancelled ones not at all",
    )
}

/// Forgets a caller's oldest operations until the results of the rest fit.
fn keep_within(known: &mut OperationMap, owner: &str, most: usize) {
    let mut bytes: usize = known.values().filter(|entry| entry.owner == owner).map(|entry| entry.bytes).sum();
    known.retain(|_, entry| {
        let goes = bytes > most && entry.owner == owner && entry.bytes > 0;
        bytes -= if goes { entry.bytes } else { 0 };
        !goes
    });
}

/// Removes a VM whose creation was cancelled: by its id, not by its name.
#[derive(Debug)]
pub struct UndoGuard {
    app: Arc<App>,
    /// The VM that the operation has begun to make.
    pub begun: BegunVm,
    armed: bool,
}

impl UndoGuard {
    /// Nothing has been begun yet.
    pub fn new(app: &Arc<App>) -> Self {
        Self { app: Arc::clone(app), begun: BegunVm::default(), armed: true }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: u32, owner: &str, bytes: usize) -> ((Timestamp, String), OperationEntry) {
        let at = Timestamp::from_second(id.into()).unwrap();
        let operation = Operation {
            id: id.to_string(),
            kind: "vm_exec".into(),
            status: OperationStatus::Succeeded,
            stage: None,
            created_at: at,
            ended_at: Some(at),
            result: Some(Value::Null),
            error: None,
        };
        ((at, id.to_string()), OperationEntry { operation, owner: owner.into(), bytes, abort: None })
    }

    // A thousand results of many MiB each were kept in memory for an hour.
    #[test]
    fn the_results_of_a_caller_stay_within_a_budget() {
        let mut known = OperationMap::from([entry(1, "a", 40), entry(2, "b", 90), entry(3, "a", 0), entry(4, "a", 40)]);
        keep_within(&mut known, "a", 50);
        let left: Vec<_> = known.values().map(|entry| &*entry.operation.id).collect();
        assert_eq!(left, ["2", "3", "4"]);
    }
}
