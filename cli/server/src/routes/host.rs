//! The host, the server's own health, and its description.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use nido_api::DoctorReport;
use serde::{Deserialize, Serialize};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::App;
use crate::response::{self, HandlerResult};

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(host))
        .routes(routes!(check))
        .routes(routes!(health))
        .routes(routes!(metrics))
        .routes(routes!(description))
}

/// Reports the host's health: the checks of `nido doctor`, with the cached result of the KVM test.
#[utoipa::path(get, path = "/v1/host", operation_id = "host", tag = "host", responses((status = 200, body = DoctorReport)))]
async fn host(State(app): State<Arc<App>>) -> HandlerResult {
    response::ok(&app.nido().await?.host_report().await?)
}

/// Tests KVM again, and reports the host's health.
#[utoipa::path(post, path = "/v1/host/check", operation_id = "host_check", tag = "host",
    responses((status = 200, body = DoctorReport)))]
async fn check(State(app): State<Arc<App>>) -> HandlerResult {
    response::ok(&app.nido().await?.doctor(false).await?)
}

/// State of the server.
#[derive(Debug, Serialize, Deserialize, utoipa::ToSchema)]
struct Health {
    /// `ok`.
    status: String,
    /// Version of nido.
    version: String,
}

/// Reports whether the server and its store respond. Needs no token.
#[utoipa::path(get, path = "/healthz", operation_id = "health", tag = "host", security(()),
    responses((status = 200, body = Health)))]
async fn health(State(app): State<Arc<App>>) -> HandlerResult {
    app.nido().await?.last_event()?;
    response::ok(&Health { status: "ok".into(), version: env!("CARGO_PKG_VERSION").into() })
}

/// Returns counters in the text format of Prometheus.
#[utoipa::path(get, path = "/metrics", operation_id = "metrics", tag = "host",
    responses((status = 200, body = String, content_type = "text/plain")))]
async fn metrics(State(app): State<Arc<App>>) -> HandlerResult {
    let nido = app.nido().await?;
    let text = app.metrics.render(&nido.list()?.vms, &nido.delivery_counts()?);
    Ok(typed("text/plain; version=0.0.4; charset=utf-8", text))
}

/// Returns this description. Needs no token.
#[utoipa::path(get, path = "/openapi.json", operation_id = "openapi", tag = "host", security(()),
    responses((status = 200, body = serde_json::Value)))]
async fn description(State(app): State<Arc<App>>) -> Response {
    typed("application/json", app.description.text().to_owned())
}

fn typed(kind: &'static str, text: String) -> Response {
    let mut response = text.into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
