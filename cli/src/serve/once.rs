//! `Idempotency-Key`: a POST that is sent again, because nobody knows whether it arrived, is answered as the first time and
//! not carried out again. The answers are in the store, so a server that was killed knows them too.

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
/// The largest answer that is kept, in bytes; it holds what a command may write.
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
    match app.nido.answer_begin(&caller, &key, &sum, &app.run)? {
        Known::Nothing => {}
        Known::Answered(kept) => return again(&kept),
        Known::Running => {
            let words = "the same request is being carried out";
            return Err(Error::new(Code::VmBusy, words).hint("send it again in a moment").into());
        }
        Known::Another => {
            return Err(Error::new(Code::SpecInvalid, "Idempotency-Key: another request had this key")
                .hint("a new request takes a new key")
                .into());
        }
    }
    // Whoever hangs up finds the answer when they come back.
    let owner = Arc::clone(&app);
    let work = tokio::spawn(async move {
        let response = next.run(Request::from_parts(parts, Body::from(bytes))).await;
        keep(&owner, &caller, &key, response).await
    });
    work.await.map_err(|e| Error::internal(format!("the request broke down: {e}")))?
}

/// Keeps an answer, unless trying again may help.
async fn keep(app: &App, caller: &str, key: &str, response: Response) -> Result<Response, Problem> {
    let (parts, body) = response.into_parts();
    let status = parts.status;
    let bytes = to_bytes(body, ANSWER_MAX).await.map_err(|e| Error::internal(e.to_string()))?;
    let passing = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS || status == StatusCode::CONFLICT;
    let location = parts.headers.get(header::LOCATION).and_then(|place| place.to_str().ok()).map(str::to_owned);
    let kept = serde_json::from_slice(&bytes).ok().filter(|_| !passing);
    let kept = kept.map(|body| Kept { status: status.as_u16(), location, body });
    let text = kept.and_then(|kept| serde_json::to_string(&kept).ok());
    app.nido.answer_end(caller, key, text.as_deref())?;
    Ok(Response::from_parts(parts, Body::from(bytes)))
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
