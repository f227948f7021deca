//! Streams and other long-running requests: event streams, terminals, followed logs, commands that a client waits for. They end
//! when the token of their caller is revoked or expires, and when the server shuts down.
//!
//! ```text
//!  auth.rs (token) ──> here ──> handler, and its response chunk by chunk
//!                       └── token revoked or expired, or the shutdown timeout has passed ──> the request is cancelled
//! ```
//!
//! Invariant: a handler sees the same as when the client disconnects, so it needs no code of its own for this.

use nido_api::FrontEnd;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody as _};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use futures::{StreamExt as _, stream};
use nido_api::error::{Code, Error};
use serde_json::json;

use super::App;
use super::auth::Caller;
use super::media_type::media_type;
use super::response::Problem;

/// How often the validity of a token is checked.
const TOKEN_CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Waits until a request has to end, which may be never, and returns why.
pub async fn wait_for_end(app: Arc<App>, token: Option<String>) -> Error {
    loop {
        tokio::select! {
            () = app.shutdown_deadline.cancelled() => return Error::new(Code::Interrupted, "the server shuts down"),
            () = tokio::time::sleep(TOKEN_CHECK_INTERVAL) => {}
        }
        let Some(id) = &token else { continue };
        match app.nido.token_holds(id) {
            Err(error) if error.code() == Code::Unauthorized => return error,
            // A failed check does not mean that the token is invalid; new requests are refused meanwhile.
            Err(error) => tracing::warn!("cannot check whether a token is still valid: {error}"),
            Ok(()) => {}
        }
    }
}

/// Ends a request with its token or the server: before its response, or in the middle of it.
pub async fn end_with_token(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let token = request.extensions().get::<Caller>().and_then(|caller| caller.token.clone());
    // Clients of the Model Context Protocol know no events but its own: their streams just end.
    let says_why = request.uri().path() != "/mcp";
    let mut over = Box::pin(wait_for_end(app, token));
    let response = tokio::select! {
        response = next.run(request) => response,
        error = &mut over => return Problem(error).into_response(),
    };
    if response.body().size_hint().exact().is_some() {
        return response;
    }
    let is_events = media_type(response.headers()).as_deref() == Some("text/event-stream");
    let last = move |error: Error| match (is_events, says_why) {
        (true, true) => Some(Ok(event(&error))),
        (true, false) => None,
        // Other bodies break off, so that no client takes them for complete.
        (false, _) => Some(Err(axum::Error::new(error))),
    };
    response.map(|body| Body::from_stream(until(body, over, last)))
}

/// The pieces of a body until it is over, and then a last one.
fn until(
    body: Body,
    over: Pin<Box<impl Future<Output = Error> + Send>>,
    last: impl FnOnce(Error) -> Option<Result<Bytes, axum::Error>> + Send,
) -> impl stream::Stream<Item = Result<Bytes, axum::Error>> + Send {
    stream::unfold(Some((body.into_data_stream(), over, last)), |running| async move {
        let (mut pieces, mut over, last) = running?;
        tokio::select! {
            // First: pieces that come without a pause must not keep it from being seen.
            biased;
            error = &mut over => last(error).map(|last| (last, None)),
            piece = pieces.next() => Some((piece?, Some((pieces, over, last)))),
        }
    })
}

fn event(error: &Error) -> Bytes {
    format!("event: error\ndata: {}\n\n", json!(error.problem_for(FrontEnd::Api))).into()
}
