//! The router: all routes with their middleware, in the order in which it runs.
//!
//! ```text
//!  count ──> auth ──> streams ──> timeouts ──> audit (replays) ──> idempotency ──> audit ──> whole body, query, If-Match, scope ──> route
//! ```

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use nido_api::error::{Code, Error};

use super::extract::{self, JSON_BODY_MAX};
use super::response::Problem;
use super::{App, audit, auth, budget, idempotency, precondition, query, routes, streams, timeouts};

/// The REST API and the page, with all middleware. Layers that are added last run first.
pub fn rest(app: &Arc<App>) -> Router {
    let (router, _) = routes::described().split_for_parts();
    router
        .fallback(|| async { no_such_route() })
        .method_not_allowed_fallback(|| async { not_a_method() })
        .layer(DefaultBodyLimit::max(JSON_BODY_MAX))
        .layer(middleware::from_fn(auth::require_scope))
        .layer(middleware::from_fn_with_state(Arc::clone(app), precondition::check_if_match))
        .layer(middleware::from_fn_with_state(Arc::clone(app), query::reject_unknown))
        .layer(middleware::from_fn(extract::require_whole_body))
        .layer(middleware::from_fn_with_state(Arc::clone(app), audit::audit_request))
        .layer(middleware::from_fn_with_state(Arc::clone(app), idempotency::replay_or_run))
        .layer(middleware::from_fn_with_state(Arc::clone(app), audit::audit_replay))
        .layer(middleware::from_fn_with_state(Arc::clone(app), timeouts::limit_body_time))
        .layer(middleware::from_fn_with_state(Arc::clone(app), streams::end_with_token))
        .layer(middleware::from_fn_with_state(Arc::clone(app), auth::authenticate))
        .layer(middleware::from_fn_with_state(Arc::clone(app), count))
        .with_state(Arc::clone(app))
}

/// A router without routes, for a server that serves MCP only.
pub fn without_rest(app: &Arc<App>) -> Router {
    Router::new()
        .fallback(|| async { no_such_route() })
        .layer(middleware::from_fn_with_state(Arc::clone(app), auth::authenticate))
        .layer(middleware::from_fn_with_state(Arc::clone(app), count))
}

fn no_such_route() -> Problem {
    Error::new(Code::RouteNotFound, "this path does not exist").hint("GET /openapi.json lists the paths").into()
}

fn not_a_method() -> Problem {
    Error::new(Code::MethodNotAllowed, "this resource does not have that method")
        .hint("the header Allow lists its methods")
        .into()
}

/// Counts requests, and sets the headers of every response: no content sniffing, no caching, links through the proxy.
pub async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let mut response = budget::until_sent(next.run(request).await.into_response());
    app.metrics.request(method.as_str(), route.as_deref().unwrap_or("-"), response.status().as_u16());
    if let Some(code) = response.extensions().get::<Code>() {
        app.metrics.error(code.slug());
    }
    let headers = response.headers_mut();
    if let Some(public) = &app.hosts.public {
        public.adapt(headers);
    }
    // Proxies such as nginx would keep a stream of events until a buffer is full.
    if headers.get("content-type").is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream")) {
        headers.insert("x-accel-buffering", axum::http::HeaderValue::from_static("no"));
    }
    headers.insert("x-content-type-options", axum::http::HeaderValue::from_static("nosniff"));
    headers.entry("cache-control").or_insert(axum::http::HeaderValue::from_static("no-store"));
    response
}
