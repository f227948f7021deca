//! `Idempotency-Key`: a POST that is sent again, because nobody knows whether it arrived, is answered as the first time and
//! not carried out again. The answers are in the store, so a server that was killed knows them too.
//!
//! Invariant: a request that was begun is never carried out again, unless its answer said so. Where the answer was not kept, the
//! key says what is known.

use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use nido_vmm::error::{Code, Error};
use nido_vmm::store::Known;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::App;
use super::answer::{self, Problem};
use super::ask::accepts;
use super::guard::Caller;
use super::pace;
use super::routes::BODY_MAX;

/// Longest key, in bytes.
const KEY_MAX: usize = 255;
/// The largest answer that is kept, in bytes. What a command has written may be longer: as JSON six times as much as it was.
const ANSWER_MAX: usize = 16 << 20;

/// An answer as it is kept.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    status: u16,
    location: Option<String>,
    body: serde_json::Value,
}

/// Carries out what was not, and tells again what was.
pub async fn once(State(app): State<Arc<App>>, request: Request, next: Next) -> Result<Response, Problem> {
    let key = request.headers().get("idempotency-key").cloned();
    let caller = request.extensions().get::<Caller>().map(|caller| caller.actor.clone());
    let streams = accepts(request.headers(), "text/event-stream");
    let (Some(key), Some(caller), &Method::POST, false) = (key, caller, request.method(), streams) else {
        return Ok(next.run(request).await);
    };
    let key = match key.to_str() {
        Ok(key) if (1..=KEY_MAX).contains(&key.len()) => key.to_owned(),
        _ => {
            let words = format!("Idempotency-Key: it has to be 1 to {KEY_MAX} printable characters");
            return Err(Error::new(Code::SpecInvalid, words).into());
        }
    };
    let (parts, body) = request.into_parts();
    let bytes = pace::read(body, BODY_MAX).await?;
    let mut digest = Sha256::new();
    digest.update(parts.uri.to_string());
    digest.update([0]);
    digest.update(&bytes);
    let sum = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    match app.nido.answer_begin(&caller, &key, &sum)? {
        Known::Nothing => {}
        Known::Answered(kept) => return again(&kept),
        Known::Running => {
            let words = "the same request is being carried out";
            return Err(Error::new(Code::VmBusy, words).hint("send it again in a moment").into());
        }
        Known::Unknown => {
            let words = "the same request was begun by a server that has ended; nobody knows how far it came";
            return Err(Error::new(Code::OutcomeUnknown, words)
                .hint("look at what it was about; to have it carried out once more, send it with a new key")
                .into());
        }
        Known::Another => {
            return Err(Error::new(Code::SpecInvalid, "Idempotency-Key: another request had this key")
                .hint("a new request takes a new key")
                .into());
        }
    }
    // Whoever hangs up finds the answer when they come back.
    let owner = Arc::clone(&app);
    let work = app.operations.go_on(async move {
        let response = next.run(Request::from_parts(parts, Body::from(bytes))).await;
        keep(&owner, &caller, &key, response).await
    });
    work.await.map_err(|e| Error::internal(format!("the request broke down: {e}")))?
}

/// Keeps an answer, unless trying again may help. Whoever waits for it gets it whether it could be kept or not.
async fn keep(app: &App, caller: &str, key: &str, response: Response) -> Result<Response, Problem> {
    let (parts, body) = response.into_parts();
    let status = parts.status;
    // It is in memory already.
    let bytes = to_bytes(body, usize::MAX).await.map_err(|e| Error::internal(e.to_string()))?;
    let passing = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS || status == StatusCode::CONFLICT;
    let location = parts.headers.get(header::LOCATION).and_then(|place| place.to_str().ok()).map(str::to_owned);
    let kept = match passing {
        true => None,
        false if bytes.len() > ANSWER_MAX => Some(too_large(status, bytes.len())?),
        false => serde_json::from_slice(&bytes).ok().map(|body| Kept { status: status.as_u16(), location, body }),
    };
    let text = kept.and_then(|kept| serde_json::to_string(&kept).ok());
    if let Err(error) = app.nido.answer_end(caller, key, text.as_deref()) {
        tracing::error!("an answer could not be kept: {error}");
    }
    Ok(Response::from_parts(parts, Body::from(bytes)))
}

/// What is answered from then on if an answer was too large to be kept.
fn too_large(status: StatusCode, length: usize) -> Result<Kept, Error> {
    let words =
        format!("it was carried out and answered with {status}; the {length} bytes of that were too many to keep");
    let problem =
        Error::new(Code::AnswerTooLarge, words).hint("what it has done is done; ask for less with a new key").problem();
    let body = serde_json::to_value(&problem).map_err(|e| Error::internal(e.to_string()))?;
    Ok(Kept { status: problem.status, location: None, body })
}

fn again(kept: &str) -> Result<Response, Problem> {
    let kept: Kept = serde_json::from_str(kept).map_err(|e| Error::internal(format!("a kept answer: {e}")))?;
    let status = StatusCode::from_u16(kept.status).unwrap_or(StatusCode::OK);
    let mut response = answer::json(status, &kept.body);
    let headers = response.headers_mut();
    if status.is_client_error() {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    }
    if let Some(Ok(place)) = kept.location.map(|place| HeaderValue::from_str(&place)) {
        headers.insert(header::LOCATION, place);
    }
    headers.insert("idempotency-replayed", HeaderValue::from_static("true"));
    Ok(response)
}
