//! The routes, one file per noun. A handler parses, calls one method of the core, and renders.

#![allow(unused_qualifications, reason = "the macros that describe routes write them")]

mod audit;
mod events;
mod examples;
mod exec;
mod files;
mod forwards;
mod host;
mod logs;
mod operations;
mod page;
mod pools;
mod snapshots;
mod socket;
mod templates;
mod vms;
mod webhooks;

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use nido_vmm::error::{Code, Error};
use utoipa_axum::router::OpenApiRouter;

use super::answer::Problem;
use super::audit as log;
use super::{App, ask, budget, condition, guard, lasting, once, pace, query};

/// The largest JSON body, in bytes.
pub const BODY_MAX: usize = 1 << 20;

/// Examples of what routes take and answer.
pub fn examples() -> Vec<examples::Example> {
    examples::all()
}

/// Every route, and what is described of it.
pub fn described() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .merge(vms::routes())
        .merge(exec::routes())
        .merge(socket::routes())
        .merge(files::routes())
        .merge(snapshots::routes())
        .merge(forwards::routes())
        .merge(templates::routes())
        .merge(pools::routes())
        .merge(webhooks::routes())
        .merge(logs::routes())
        .merge(events::routes())
        .merge(audit::routes())
        .merge(operations::routes())
        .merge(host::routes())
        .merge(page::routes())
}

/// The whole application.
pub fn router(app: &Arc<App>) -> Router {
    let (router, _) = described().split_for_parts();
    router
        .fallback(|| async { no_such_route() })
        .method_not_allowed_fallback(|| async { not_a_method() })
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .layer(middleware::from_fn_with_state(Arc::clone(app), condition::matched))
        .layer(middleware::from_fn(query::known))
        .layer(middleware::from_fn(ask::whole))
        .layer(middleware::from_fn_with_state(Arc::clone(app), log::audit))
        .layer(middleware::from_fn_with_state(Arc::clone(app), once::once))
        .layer(middleware::from_fn_with_state(Arc::clone(app), log::audit_again))
        .layer(middleware::from_fn_with_state(Arc::clone(app), pace::pace))
        .layer(middleware::from_fn_with_state(Arc::clone(app), lasting::lasting))
        .layer(middleware::from_fn_with_state(Arc::clone(app), guard::guard))
        .layer(middleware::from_fn_with_state(Arc::clone(app), count))
        .with_state(Arc::clone(app))
}

/// No routes: what is there is merged with it.
pub fn nothing(app: &Arc<App>) -> Router {
    Router::new()
        .fallback(|| async { no_such_route() })
        .layer(middleware::from_fn_with_state(Arc::clone(app), guard::guard))
        .layer(middleware::from_fn_with_state(Arc::clone(app), count))
}

fn no_such_route() -> Problem {
    Error::new(Code::RouteNotFound, "there is nothing at this path")
        .hint("GET /openapi.json tells what there is")
        .into()
}

fn not_a_method() -> Problem {
    Error::new(Code::MethodNotAllowed, "this resource does not know that method")
        .hint("the header Allow lists those it knows")
        .into()
}

/// Counts requests, and keeps browsers from guessing what answers are.
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
