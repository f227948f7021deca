//! `Idempotency-Key`: a POST that a client retries gets the response of the first attempt and does not run again. The responses
//! are in the store, so they survive a restart of the server.
//!
//! ```text
//!  success                                        stored, and replayed
//!  202 with an operation                          stored; replayed with the operation's current state
//!  refused before anything was changed            not stored: a retry runs
//!  anything else                                  stored as `outcome_unknown`, with the original error
//! ```
//!
//! Invariant: a request that has begun to change something never runs again. If its response was not stored, a retry gets what
//! is known about it.

use nido_api::FrontEnd;
use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use nido_api::error::{Code, Error, Kind};
use nido_core::KeyState;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::auth::Caller;
use super::extract::JSON_BODY_MAX;
use super::media_type::prefers;
use super::operation_view::{self, OperationStatus};
use super::operations::ChangeStarted;
use super::response::{self, Problem};
use super::{App, streams, timeouts};

/// The longest key, in bytes.
const KEY_MAX: usize = 255;
/// The largest response that is stored, in bytes. The output of a command may be longer: JSON takes up to six times its bytes.
const RESPONSE_MAX: usize = 16 << 20;

/// A response as it is stored.
#[derive(Debug, Serialize, Deserialize)]
struct StoredResponse {
    status: u16,
    location: Option<String>,
    body: serde_json::Value,
}

/// The route whose response may be a stream of events.
const STREAMING_ROUTE: &str = "/v1/vms/{name}/exec";
/// How often a key whose operation was refused is started again before the caller gets `request_in_progress`.
const ATTEMPTS_MAX: usize = 3;

/// Runs a request, or replays its response if a request with the same key has run.
pub async fn replay_or_run(State(app): State<Arc<App>>, request: Request, next: Next) -> Result<Response, Problem> {
    let key = request.headers().get("idempotency-key").cloned();
    let caller = request.extensions().get::<Caller>().cloned();
    let (Some(key), Some(caller), &Method::POST) = (key, caller, request.method()) else {
        return Ok(next.run(request).await);
    };
    let key = checked(&request, key.as_bytes())?;
    let (mut parts, body) = request.into_parts();
    let bytes = timeouts::read_body(body, JSON_BODY_MAX).await?;
    let mut digest = Sha256::new();
    digest.update(parts.uri.to_string());
    digest.update([0]);
    digest.update(&bytes);
    let sum = nido_api::hex::encode(&digest.finalize());
    let owner = caller.owner();
    let mut tries = 0;
    loop {
        tries += 1;
        let kept = match app.nido.answer_begin(&owner, &key, &sum)? {
            KeyState::Nothing => break,
            KeyState::Answered(kept) => kept,
            known => return Err(refusal(&known).into()),
        };
        match replay(&app, &caller, &kept)? {
            Some(response) => return Ok(response),
            // The operation was refused before it began.
            None if tries < ATTEMPTS_MAX => app.nido.answer_end(&owner, &key, None)?,
            None => return Err(refusal(&KeyState::Running).into()),
        }
    }
    let begun = ChangeStarted::default();
    parts.extensions.insert(begun.clone());
    // A client that disconnects gets the response when it retries.
    let (server, token) = (Arc::clone(&app), caller.token);
    let work = app.operations.spawn_detached(async move {
        let request = Request::from_parts(parts, Body::from(bytes));
        let response = tokio::select! {
            response = next.run(request) => response,
            // As without a key: the request ends with its token.
            error = streams::wait_for_end(Arc::clone(&server), token) => {
                begun.set();
                Problem(error).into_response()
            }
        };
        store_response(&server, &owner, &key, response, &begun).await
    });
    work.await.map_err(|e| Error::internal(format!("the request failed: {e}")))?
}

/// The key, if it is valid and the request may have one.
fn checked(request: &Request, key: &[u8]) -> Result<String, Error> {
    let is_key = (1..=KEY_MAX).contains(&key.len()) && key.iter().all(|byte| (0x20..0x7f).contains(byte));
    if !is_key {
        let words = format!("Idempotency-Key: it must be 1 to {KEY_MAX} printable characters");
        return Err(Error::new(Code::SpecInvalid, words));
    }
    let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    if route == Some(STREAMING_ROUTE) && prefers(request.headers(), "text/event-stream", "application/json") {
        let words = "Idempotency-Key: a response that is a stream of events cannot be replayed";
        return Err(Error::new(Code::SpecInvalid, words).hint("omit the key, or request application/json"));
    }
    Ok(String::from_utf8_lossy(key).into_owned())
}

/// Why a request with a known key does not run.
fn refusal(known: &KeyState) -> Error {
    match known {
        KeyState::Unknown => {
            let words = "a server received the same request and ended before it responded; its outcome is unknown";
            Error::new(Code::OutcomeUnknown, words).hint(NEW_KEY_HINT)
        }
        KeyState::Another => Error::new(Code::SpecInvalid, "Idempotency-Key: another request used this key")
            .hint("use a new key for a new request"),
        KeyState::Full => Error::new(Code::LimitExceeded, "this caller has used too many keys within a day")
            .hint("send requests without a key, or wait"),
        KeyState::Nothing | KeyState::Answered(_) | KeyState::Running => {
            Error::new(Code::RequestInProgress, "the same request is being carried out").hint("retry in a moment")
        }
    }
}

/// The hint for a request whose outcome is unknown.
const NEW_KEY_HINT: &str = "check the object of the request; to repeat it, send it with a new key";

/// What happens to a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retention {
    /// It is stored and replayed.
    Store,
    /// Nothing was changed: a retry runs.
    Discard,
    /// Something may have changed: retries get `outcome_unknown`.
    OutcomeUnknown,
}

/// Decides by the code of an error, and by whether the request had begun to change something.
fn retention(code: Option<Code>, begun: bool) -> Retention {
    let Some(code) = code else { return Retention::Store };
    match code {
        // A command that could not be started has not run.
        Code::CommandNotFound | Code::CommandCannotRun | Code::UserNotFound | Code::DirectoryNotFound => {
            Retention::Discard
        }
        _ if begun => Retention::OutcomeUnknown,
        Code::RateLimited
        | Code::AuditFailed
        | Code::QemuMissing
        | Code::QemuTooOld
        | Code::KvmUnavailable
        | Code::NestedUnavailable
        | Code::ToolMissing => Retention::Discard,
        _ => match code.kind() {
            Kind::Invalid | Kind::NotFound | Kind::Conflict | Kind::Denied => Retention::Discard,
            Kind::Unavailable | Kind::Internal => Retention::OutcomeUnknown,
        },
    }
}

/// Stores a response, or what replaces it. The client gets the response whether it could be stored or not.
async fn store_response(
    app: &App,
    owner: &str,
    key: &str,
    response: Response,
    begun: &ChangeStarted,
) -> Result<Response, Problem> {
    let code = response.extensions().get::<Code>().copied();
    let (parts, body) = response.into_parts();
    let status = parts.status;
    // It is in memory already.
    let bytes = to_bytes(body, usize::MAX).await.map_err(|e| Error::internal(e.to_string()))?;
    let location = parts.headers.get(header::LOCATION).and_then(|place| place.to_str().ok()).map(str::to_owned);
    let as_json = || match bytes.is_empty() {
        true => Some(serde_json::Value::Null),
        false => serde_json::from_slice(&bytes).ok(),
    };
    let kept = match retention(code, begun.is_set()) {
        Retention::Discard => None,
        Retention::OutcomeUnknown => Some(unknown(code, &bytes)?),
        Retention::Store if bytes.len() > RESPONSE_MAX => Some(too_large(status, bytes.len())?),
        Retention::Store => as_json().map(|body| StoredResponse { status: status.as_u16(), location, body }),
    };
    let text = kept.as_ref().and_then(|kept| serde_json::to_string(kept).ok());
    let mut ended = app.nido.answer_end(owner, key, text.as_deref());
    if let Err(error) = &ended
        && error.code() == Code::LimitExceeded
    {
        let short = serde_json::to_string(&too_large(status, bytes.len())?).ok();
        ended = app.nido.answer_end(owner, key, short.as_deref());
    }
    if let Err(error) = ended {
        tracing::error!("a response could not be stored: {error}");
    }
    Ok(Response::from_parts(parts, Body::from(bytes)))
}

/// The response to retries if something may have changed.
fn unknown(code: Option<Code>, bytes: &[u8]) -> Result<StoredResponse, Error> {
    let problem: Option<nido_api::error::Problem> = serde_json::from_slice(bytes).ok();
    let why = problem.map_or_else(|| "an error".to_owned(), |problem| problem.detail);
    let slug = code.map_or("internal", Code::slug);
    let words = format!("the same request was answered with {slug}; its outcome is unknown: {why}");
    kept_problem(&Error::new(Code::OutcomeUnknown, words).hint(NEW_KEY_HINT))
}

/// The response to retries if the response was too large to store.
fn too_large(status: StatusCode, length: usize) -> Result<StoredResponse, Error> {
    let words =
        format!("it was carried out with status {status}; the response of {length} bytes was too large to store");
    kept_problem(
        &Error::new(Code::AnswerTooLarge, words).hint("do not repeat it; request a smaller response with a new key"),
    )
}

fn kept_problem(error: &Error) -> Result<StoredResponse, Error> {
    let problem = error.problem_for(FrontEnd::Api);
    let body = serde_json::to_value(&problem).map_err(|e| Error::internal(e.to_string()))?;
    Ok(StoredResponse { status: problem.status, location: None, body })
}

/// The stored response; `None` if it was an operation that was refused before it changed anything.
fn replay(app: &App, caller: &Caller, kept: &str) -> Result<Option<Response>, Problem> {
    let mut kept: StoredResponse =
        serde_json::from_str(kept).map_err(|e| Error::internal(format!("a stored response: {e}")))?;
    let status = StatusCode::from_u16(kept.status).unwrap_or(StatusCode::OK);
    let id = kept.location.as_deref().and_then(|place| place.strip_prefix("/v1/operations/"));
    if let (StatusCode::ACCEPTED, Some(id)) = (status, id) {
        let operation = operation_view::get(&app.nido, id, caller).map_err(|_| {
            let words = "the same request started an operation that is no longer kept";
            Error::new(Code::OutcomeUnknown, words).hint(NEW_KEY_HINT)
        })?;
        let code = operation.error.as_ref().map(|problem| Code::from_slug(&problem.code));
        // An operation with a stage has begun to change something.
        let refused = operation.status == OperationStatus::Failed
            && retention(code, operation.stage.is_some()) == Retention::Discard;
        if refused {
            return Ok(None);
        }
        kept.body = serde_json::to_value(&operation).map_err(|e| Error::internal(e.to_string()))?;
    }
    let mut response = match kept.body {
        serde_json::Value::Null => response::empty(status),
        body => response::json(status, &body),
    };
    let headers = response.headers_mut();
    if status.is_client_error() {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    }
    if let Some(Ok(place)) = kept.location.map(|place| HeaderValue::from_str(&place)) {
        headers.insert(header::LOCATION, place);
    }
    headers.insert("idempotency-replayed", HeaderValue::from_static("true"));
    Ok(Some(response))
}

#[cfg(test)]
mod tests {
    use super::*;

    // After any 409, 429 or 5xx the same key ran the request again: a command whose VM was stopped meanwhile ran twice.
    #[test]
    fn only_requests_refused_before_any_change_are_retried() {
        for &code in Code::ALL {
            let begun = retention(Some(code), true);
            assert_ne!(begun, Retention::Store, "{code:?}: an error is not kept as it was");
            if begun == Retention::Discard {
                assert_eq!(code.status(), 422, "{code:?}");
            }
        }
        for code in
            [Code::VmNotFound, Code::SpecInvalid, Code::VmExists, Code::VmNotRunning, Code::Denied, Code::QemuMissing]
        {
            assert_eq!(retention(Some(code), false), Retention::Discard, "{code:?}");
        }
        // For these it is unknown whether something had begun.
        for code in [
            Code::AgentUnreachable,
            Code::Interrupted,
            Code::Timeout,
            Code::GuestFailed,
            Code::Internal,
            Code::DiskFull,
        ] {
            assert_eq!(retention(Some(code), false), Retention::OutcomeUnknown, "{code:?}");
        }
        assert_eq!((retention(None, true), retention(None, false)), (Retention::Store, Retention::Store));
    }
}
