//! What lasts: streams, terminals, logs that are followed, commands that are waited for. It was let in once; it goes on for as long
//! as it would be let in again, and no longer than the server.
//!
//! ```text
//!  guard.rs (whose token) ──> here ──> handler, and its answer piece by piece
//!                              └── the token is not good any more, or the server's end has had its time ──> it is over
//! ```
//!
//! Invariant: to a handler that is the same as a client who hangs up, so it needs no code of its own for it.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody as _};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use futures::{StreamExt as _, stream};
use nido_vmm::error::{Code, Error};
use serde_json::json;

use super::App;
use super::answer::Problem;
use super::ask::media_type;
use super::guard::Caller;

/// How often is looked whether a token is still good.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Waits until something may not go on any more, which may be never, and says why.
pub async fn over(app: Arc<App>, token: Option<String>) -> Error {
    loop {
        tokio::select! {
            () = app.over.cancelled() => return Error::new(Code::Interrupted, "the server ends"),
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        let Some(id) = &token else { continue };
        match app.nido.token_holds(id) {
            Err(error) if error.code() == Code::Unauthorized => return error,
            // That it cannot be looked at says nothing about it; new requests are refused meanwhile.
            Err(error) => tracing::warn!("cannot see whether a token is still good: {error}"),
            Ok(()) => {}
        }
    }
}

/// Ends what lasts when it is over: before it is answered, or in the middle of its answer.
pub async fn lasting(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let token = request.extensions().get::<Caller>().and_then(|caller| caller.token.clone());
    // Clients of the Model Context Protocol know no events but its own: their streams just end.
    let says_why = request.uri().path() != "/mcp";
    let mut over = Box::pin(over(app, token));
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
        // What has no words of its own breaks off, so that nobody takes it for whole.
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
    format!("event: error\ndata: {}\n\n", json!(error.problem())).into()
}
