//! What changes something: it goes to its end even if whoever asked hangs up, and on request (`Prefer: respond-async`) it is
//! answered at once with an operation to poll and to cancel.
//!
//! Operations are known for as long as the server lives, the finished ones for an hour. What they do outlives it: VMs, their
//! states and events are in the store.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use jiff::Timestamp;
use nido_vmm::api::StartStage;
use nido_vmm::error::{Code, Error, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::task::AbortHandle;
use tokio_util::task::TaskTracker;

use super::App;
use super::answer::{self, Answer};

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
    /// What the request would have been answered.
    pub result: Option<Value>,
    /// Why it failed.
    pub error: Option<Problem>,
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

/// The operations of a server.
#[derive(Debug, Default)]
pub struct Operations {
    known: Mutex<BTreeMap<(Timestamp, String), (Operation, Option<AbortHandle>)>>,
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

/// The work of an operation.
pub type Work = Pin<Box<dyn Future<Output = Result<Value>> + Send>>;

/// Does something. The answer has `status` and the value, or is 202 with an operation if the caller wants that.
pub async fn run(
    app: &Arc<App>,
    headers: &HeaderMap,
    kind: &'static str,
    status: StatusCode,
    work: impl FnOnce(Stage) -> Work + Send,
) -> Answer {
    if !wants_async(headers) {
        let work = work(Stage { app: Arc::clone(app), key: None });
        let done = app.operations.running.spawn(work).await;
        let value = done.map_err(|e| Error::internal(format!("the operation broke down: {e}")))??;
        return Ok(answer::json(status, &value));
    }
    let operation = begin(app, kind, work)?;
    let mut response = answer::json(StatusCode::ACCEPTED, &operation);
    let headers = response.headers_mut();
    if let Ok(place) = HeaderValue::from_str(&format!("/v1/operations/{}", operation.id)) {
        headers.insert(header::LOCATION, place);
    }
    headers.insert("preference-applied", HeaderValue::from_static("respond-async"));
    Ok(response)
}

fn begin(app: &Arc<App>, kind: &'static str, work: impl FnOnce(Stage) -> Work) -> Result<Operation> {
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
    let task = app.operations.running.spawn(async move {
        let outcome = work.await;
        owner.operations.end(&done, outcome);
    });
    if let Some((operation, abort)) = app.operations.lock().get_mut(&key)
        && operation.status == OperationStatus::Running
    {
        *abort = Some(task.abort_handle());
    }
    Ok(operation)
}

/// RFC 7240.
pub fn wants_async(headers: &HeaderMap) -> bool {
    let wishes = headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
    wishes.flat_map(|value| value.split(',')).any(|wish| wish.trim().eq_ignore_ascii_case("respond-async"))
}

impl Operations {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(Timestamp, String), (Operation, Option<AbortHandle>)>> {
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

    /// All that are known.
    pub fn list(&self) -> OperationList {
        OperationList { operations: self.lock().values().map(|(operation, _)| operation.clone()).collect() }
    }

    /// One of them.
    pub fn get(&self, id: &str) -> Result<Operation> {
        let found = self.lock().values().find(|(operation, _)| operation.id == id).map(|(found, _)| found.clone());
        found.ok_or_else(|| {
            Error::new(Code::OperationNotFound, "there is no such operation")
                .hint("operations are known for as long as the server lives, those that ended for an hour")
        })
    }

    /// Stops one that goes on. What it has made so far is removed as if its caller had been killed.
    pub fn cancel(&self, id: &str) -> Result<Operation> {
        let mut known = self.lock();
        if let Some((operation, abort)) = known.values_mut().find(|(operation, _)| operation.id == id)
            && operation.status == OperationStatus::Running
        {
            if let Some(abort) = abort.take() {
                abort.abort();
            }
            operation.status = OperationStatus::Cancelled;
            operation.ended_at = Some(Timestamp::now());
        }
        drop(known);
        self.get(id)
    }

    /// Waits for what goes on.
    pub async fn finish(&self) {
        self.running.close();
        if tokio::time::timeout(FINISH_WITHIN, self.running.wait()).await.is_err() {
            tracing::warn!("operations were cut off: the server ends");
        }
    }
}

/// A value as the result of an operation.
pub fn value<T: Serialize>(value: &T) -> Result<Value> {
    serde_json::to_value(value).map_err(|e| Error::internal(e.to_string()))
}

/// An answer without a body.
pub fn empty(status: StatusCode) -> Response {
    let mut response = Response::default();
    *response.status_mut() = status;
    response
}
