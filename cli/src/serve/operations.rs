//! What changes something: it goes to its end even if whoever asked hangs up, and on request (`Prefer: respond-async`) it is
//! answered at once with an operation to poll and to cancel.
//!
//! Operations are known for as long as the server lives, the finished ones for an hour, unless they are cancelled. What they do outlives it: VMs, their
//! states and events are in the store.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use jiff::Timestamp;
use nido_vmm::api::{Scope, StartStage};
use nido_vmm::audit::{Audited, Ending};
use nido_vmm::error::{Code, Error, Problem, Result};
use nido_vmm::name::VmName;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::task::{AbortHandle, JoinHandle};
use tokio_util::task::TaskTracker;

use super::App;
use super::answer::{self, Answer};
use super::audit::{self, Ticket};

/// How long an operation that has ended is known.
const KEPT: Duration = Duration::from_secs(3600);
/// How many operations are known at most; the oldest that have ended go first.
const KNOWN: usize = 1000;
/// How long what runs may take when the server ends.
const FINISH_WITHIN: Duration = Duration::from_secs(60);

/// Something that goes on, or has ended.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Operation {
    /// Its id.
    pub id: String,
    /// What it does.
    pub kind: String,
    /// How it is.
    pub status: OperationStatus,
    /// How far it has come, in a word.
    pub stage: Option<String>,
    /// When it began.
    pub created_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
    /// What the request would have been answered. What a command has written is only for who may run some.
    pub result: Option<Value>,
    /// Why it failed.
    pub error: Option<Problem>,
}

/// The operations that run commands.
const COMMANDS: [&str; 2] = ["vm_exec", "run"];

impl Operation {
    fn shown_to(mut self, scope: Scope) -> Self {
        if scope < Scope::Run && COMMANDS.contains(&self.kind.as_str()) {
            self.result = None;
        }
        self
    }
}

/// How an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OperationStatus {
    /// It goes on.
    Running,
    /// It has ended well.
    Succeeded,
    /// It has failed.
    Failed,
    /// It was cancelled.
    Cancelled,
}

/// All operations that are known.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct OperationList {
    /// The oldest first.
    pub operations: Vec<Operation>,
}

/// What is known, by the time it began and its id; with what stops it.
type Known = BTreeMap<(Timestamp, String), (Operation, Option<AbortHandle>)>;

/// The operations of a server.
#[derive(Debug, Default)]
pub struct Operations {
    known: Mutex<Known>,
    running: TaskTracker,
}

/// How the work tells how far it has come.
#[derive(Debug, Clone)]
pub struct Stage {
    app: Arc<App>,
    key: Option<(Timestamp, String)>,
}

impl Stage {
    /// A stage has begun.
    pub fn word(&self, word: &str) {
        if let Some(key) = &self.key
            && let Some((operation, _)) = self.app.operations.lock().get_mut(key)
        {
            operation.stage = Some(word.to_owned());
        }
    }

    /// A stage of a start has begun.
    pub fn start(&self, stage: StartStage) {
        self.word(stage.word());
    }
}

/// What came of an operation.
#[derive(Debug)]
pub struct Done {
    /// What is answered.
    pub value: Value,
    /// How a command ended, in a word for the audit log; empty where there was none.
    pub word: String,
}

/// The work of an operation.
pub type Work = Pin<Box<dyn Future<Output = Result<Done>> + Send>>;

/// Does something. The answer has `status` and the value, or is 202 with an operation if the caller wants that.
pub async fn run(
    app: &Arc<App>,
    Asked { headers, ticket }: Asked,
    kind: &'static str,
    status: StatusCode,
    work: impl FnOnce(Stage) -> Work + Send,
) -> Answer {
    if !wants_async(&headers) {
        let work = work(Stage { app: Arc::clone(app), key: None });
        let audited = ticket.and_then(|ticket| ticket.take());
        let done = app.operations.running.spawn(written_down(work, audited)).await;
        let value = done.map_err(|e| Error::internal(format!("the operation broke down: {e}")))??;
        return Ok(answer::json(status, &value));
    }
    let operation = begin(app, kind, work, ticket)?;
    let mut response = answer::json(StatusCode::ACCEPTED, &operation);
    let headers = response.headers_mut();
    if let Ok(place) = HeaderValue::from_str(&format!("/v1/operations/{}", operation.id)) {
        headers.insert(header::LOCATION, place);
    }
    headers.insert("preference-applied", HeaderValue::from_static("respond-async"));
    Ok(response)
}

fn begin(
    app: &Arc<App>,
    kind: &'static str,
    work: impl FnOnce(Stage) -> Work,
    ticket: Option<Ticket>,
) -> Result<Operation> {
    let (created_at, id) = (Timestamp::now(), nido_vmm::nido::random_id()?);
    let operation = Operation {
        id: id.clone(),
        kind: kind.into(),
        status: OperationStatus::Running,
        stage: None,
        created_at,
        ended_at: None,
        result: None,
        error: None,
    };
    let key = (created_at, id);
    app.operations.make_room();
    app.operations.lock().insert(key.clone(), (operation.clone(), None));
    let work = work(Stage { app: Arc::clone(app), key: Some(key.clone()) });
    let (owner, done) = (Arc::clone(app), key.clone());
    let audited = ticket.and_then(|ticket| ticket.take());
    let task = app.operations.running.spawn(async move {
        let outcome = written_down(work, audited).await;
        owner.operations.end(&done, outcome);
    });
    match app.operations.lock().get_mut(&key) {
        Some((operation, abort)) if operation.status == OperationStatus::Running => *abort = Some(task.abort_handle()),
        // It has ended, or was cancelled before it could be stopped.
        _ => task.abort(),
    }
    Ok(operation)
}

/// Does it, and ends its line in the audit log. If it is cut off the line says so by itself.
pub async fn written_down(work: Work, audited: Option<Audited>) -> Result<Value> {
    let outcome = work.await;
    match &outcome {
        Ok(done) => audit::end(audited, Ending::Success, &done.word),
        Err(error) => audit::end(audited, Ending::Error, error.code().slug()),
    }
    outcome.map(|done| done.value)
}

/// What an operation needs of its request.
#[derive(Debug)]
pub struct Asked {
    headers: HeaderMap,
    ticket: Option<Ticket>,
}

impl<S: Send + Sync> FromRequestParts<S> for Asked {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> std::result::Result<Self, Infallible> {
        Ok(Self { headers: parts.headers.clone(), ticket: parts.extensions.get::<Ticket>().cloned() })
    }
}

impl Asked {
    /// The headers.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The line in the audit log, for who ends it by themselves.
    pub fn take_line(&self) -> Option<Audited> {
        self.ticket.as_ref().and_then(Ticket::take)
    }
}

/// RFC 7240.
pub fn wants_async(headers: &HeaderMap) -> bool {
    let wishes = headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
    wishes.flat_map(|value| value.split(',')).any(|wish| wish.trim().eq_ignore_ascii_case("respond-async"))
}

impl Operations {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, key: &(Timestamp, String), outcome: Result<Value>) {
        if let Some((operation, abort)) = self.lock().get_mut(key) {
            *abort = None;
            operation.ended_at = Some(Timestamp::now());
            match outcome {
                Ok(value) => {
                    operation.status = OperationStatus::Succeeded;
                    operation.result = Some(value);
                }
                Err(error) => {
                    operation.status = OperationStatus::Failed;
                    operation.error = Some(error.problem());
                }
            }
        }
    }

    /// Does something that goes on though nobody waits for it any more; the server's end does.
    pub fn go_on<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.running.spawn(work)
    }

    fn make_room(&self) {
        let mut known = self.lock();
        let now = Timestamp::now();
        let is_old = |operation: &Operation| {
            operation.ended_at.is_some_and(|end| now.duration_since(end).as_secs() > KEPT.as_secs().cast_signed())
        };
        known.retain(|_, (operation, _)| !is_old(operation));
        while known.len() >= KNOWN {
            let ended = known.iter().find(|(_, (operation, _))| operation.ended_at.is_some());
            let Some(key) = ended.map(|(key, _)| key.clone()) else { return };
            known.remove(&key);
        }
    }

    /// All that are known, as far as they are for somebody's eyes.
    pub fn list(&self, scope: Scope) -> OperationList {
        let shown = |operation: &Operation| operation.clone().shown_to(scope);
        OperationList { operations: self.lock().values().map(|(operation, _)| shown(operation)).collect() }
    }

    /// One of them.
    pub fn get(&self, id: &str, scope: Scope) -> Result<Operation> {
        let found = self.lock().values().find(|(operation, _)| operation.id == id).map(|(found, _)| found.clone());
        Ok(found.ok_or_else(not_known)?.shown_to(scope))
    }

    /// Forgets one, and stops it if it goes on. What it has made so far is removed as if its caller had been killed.
    pub fn cancel(&self, id: &str) -> Result<Operation> {
        let mut known = self.lock();
        let key = known.iter().find(|(_, (operation, _))| operation.id == id).map(|(key, _)| key.clone());
        let (mut operation, abort) = key.and_then(|key| known.remove(&key)).ok_or_else(not_known)?;
        if operation.status == OperationStatus::Running {
            abort.inspect(AbortHandle::abort);
            operation.status = OperationStatus::Cancelled;
            operation.ended_at = Some(Timestamp::now());
        }
        Ok(operation)
    }

    /// Waits for what goes on.
    pub async fn finish(&self) {
        self.running.close();
        if tokio::time::timeout(FINISH_WITHIN, self.running.wait()).await.is_err() {
            tracing::warn!("operations were cut off: the server ends");
        }
    }
}

fn not_known() -> Error {
    Error::new(Code::OperationNotFound, "there is no such operation").hint(
        "operations are known for as long as the server lives, those that ended for an hour, those that were cancelled not at all",
    )
}

/// Removes a VM that was begun if its operation is cut off. Nothing half-made stays.
#[derive(Debug)]
pub struct Undo {
    app: Arc<App>,
    name: Option<VmName>,
}

impl Undo {
    /// Nothing has been begun yet.
    pub fn new(app: &Arc<App>) -> Self {
        Self { app: Arc::clone(app), name: None }
    }

    /// The VM of that name is ours from here on.
    pub fn begun(&mut self, name: &VmName) {
        self.name.get_or_insert_with(|| name.clone());
    }

    /// It stays, or has been removed already.
    pub fn done(mut self) {
        self.name = None;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        let Some(name) = self.name.take() else { return };
        let app = Arc::clone(&self.app);
        self.app.operations.running.spawn(async move {
            if let Err(error) = app.nido.delete(&name, true).await
                && error.code() != Code::VmNotFound
            {
                tracing::error!("VM {name} was begun and could not be removed: {error}");
            }
        });
    }
}

/// A value as the result of an operation.
pub fn value<T: Serialize>(value: &T) -> Result<Done> {
    ended(value, String::new())
}

/// The same of an operation that was a command, with how that ended.
pub fn ended<T: Serialize>(value: &T, word: String) -> Result<Done> {
    let value = serde_json::to_value(value).map_err(|e| Error::internal(e.to_string()))?;
    Ok(Done { value, word })
}

/// An answer without a body.
pub fn empty(status: StatusCode) -> Response {
    let mut response = Response::default();
    *response.status_mut() = status;
    response
}
