//! The MCP server at `/mcp`, behind the same authentication as every other route.
//!
//! Invariants: only the caller that opened a session can use it; an invalid message gets an error of the protocol.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use futures::StreamExt as _;
use nido_api::error::{Code, Error};
use nido_mcp::Principal;
use nido_mcp::http::{Agents, Http, MESSAGE_MAX, OversizedMessage, SESSION, refusal};

use super::auth::{self, Caller};
use super::response::Problem;
use super::{App, router, streams};

/// How much of a message that is too long is read, so that the client gets a response instead of a broken connection.
const DRAINED_MAX: usize = 64 << 20;
/// What clients of the protocol accept.
const ACCEPTED: HeaderValue = HeaderValue::from_static("application/json, text/event-stream");
/// How long a browser may remember what it may send, in seconds.
const PREFLIGHT_MAX_AGE: HeaderValue = HeaderValue::from_static("600");

/// The routes of MCP. The service itself writes audit entries and responses.
pub fn router<A: Agents>(app: &Arc<App>, http: &Http<A>) -> Router {
    Router::new()
        .route_service("/mcp", http.service())
        .route_service("/mcp/", http.service())
        .layer(middleware::from_fn_with_state(http.clone(), admit::<A>))
        .layer(middleware::from_fn_with_state(Arc::clone(app), streams::end_with_token))
        .layer(middleware::from_fn_with_state(Arc::clone(app), auth::authenticate))
        .route("/sse", any(no_sse))
        .layer(middleware::from_fn_with_state(Arc::clone(app), cross_origin))
        .layer(middleware::from_fn_with_state(Arc::clone(app), router::count))
}

/// Clients of the unserved 2024-11-05 transport get an error that names /mcp.
async fn no_sse() -> Problem {
    let words = "the transport HTTP+SSE of 2024 is not served here: the endpoint is /mcp, with Streamable HTTP";
    Error::new(Code::RouteNotFound, words)
        .hint("set the client's transport to streamable HTTP and its URL to /mcp")
        .into()
}

/// CORS for pages of the allowed origins.
async fn cross_origin(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let origin = request.headers().get(header::ORIGIN).filter(|origin| app.hosts.is_allowed_origin(origin)).cloned();
    let Some(origin) = origin else { return next.run(request).await };
    let preflight =
        *request.method() == Method::OPTIONS && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if preflight { StatusCode::NO_CONTENT.into_response() } else { next.run(request).await };
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.append(header::VARY, HeaderValue::from_static("origin"));
    headers.insert(
        header::ACCESS_CONTROL_EXPOSE_HEADERS,
        HeaderValue::from_static("mcp-session-id, mcp-protocol-version, www-authenticate"),
    );
    if preflight {
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, DELETE"));
        headers.insert(
            header::ACCESS_CONTROL_ALLOW_HEADERS,
            HeaderValue::from_static(
                "authorization, content-type, accept, last-event-id, mcp-session-id, mcp-protocol-version, mcp-method, mcp-name",
            ),
        );
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, PREFLIGHT_MAX_AGE);
    }
    response
}

/// Passes the authenticated caller to the service.
async fn admit<A: Agents>(State(http): State<Http<A>>, request: Request, next: Next) -> Result<Response, Problem> {
    let caller = request.extensions().get::<Caller>();
    let caller = caller.ok_or_else(|| Error::new(Code::Unauthorized, "a token is needed"))?;
    let principal = Principal { actor: caller.actor.clone(), scope: caller.scope, limits: caller.limits.clone() };
    let actor = principal.actor.clone();
    http.admit(request.headers(), &actor).await?;
    let ends = *request.method() == Method::DELETE;
    let mut request = match message(request).await {
        Ok(request) => request,
        Err(refused) => return Ok(refused),
    };
    request.extensions_mut().insert(principal);
    accept_all(request.headers_mut());
    let mut response = next.run(request).await;
    if let Some(session) = response.headers().get(SESSION).and_then(|session| session.to_str().ok()) {
        http.opened(session, &actor);
    }
    // Clients of the Python SDK take anything else for a failure.
    if ends && response.status() == StatusCode::ACCEPTED {
        *response.status_mut() = StatusCode::NO_CONTENT;
    }
    Ok(response)
}

/// A client that accepts everything accepts both media types of responses.
fn accept_all(headers: &mut HeaderMap) {
    let all = |value: &HeaderValue| {
        value.to_str().is_ok_and(|value| value.split(',').any(|one| one.trim().starts_with("*/*")))
    };
    if headers.get(header::ACCEPT).is_none_or(all) {
        headers.insert(header::ACCEPT, ACCEPTED);
    }
}

/// The request with its message, if that is valid; otherwise the response.
async fn message(request: Request) -> Result<Request, Response> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if *request.method() != Method::POST || !kind.trim_start().to_ascii_lowercase().starts_with("application/json") {
        return Ok(request);
    }
    let (parts, body) = request.into_parts();
    let mut stream = body.into_data_stream();
    let (mut bytes, mut too_long, mut length) = (Vec::new(), None::<OversizedMessage>, 0);
    while let Some(piece) = stream.next().await {
        let piece =
            piece.map_err(|error| Problem(Error::new(Code::RequestInvalid, error.to_string())).into_response())?;
        length += piece.len();
        if let Some(seeker) = &mut too_long {
            seeker.feed(&piece);
        } else {
            bytes.extend_from_slice(&piece);
            if bytes.len() > MESSAGE_MAX {
                let mut seeker = OversizedMessage::default();
                seeker.feed(&bytes);
                bytes = Vec::new();
                too_long = Some(seeker);
            }
        }
        if length > DRAINED_MAX {
            break;
        }
    }
    match too_long {
        Some(seeker) => Err(refused(StatusCode::PAYLOAD_TOO_LARGE, seeker.refusal())),
        None => match refusal(&bytes) {
            Some(answer) => Err(refused(StatusCode::BAD_REQUEST, answer)),
            None => Ok(Request::from_parts(parts, Body::from(bytes))),
        },
    }
}

fn refused(status: StatusCode, answer: String) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], answer).into_response()
}
