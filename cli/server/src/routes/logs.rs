//! A VM's logs, as they are or as they grow.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures::stream;
use nido_api::{LogRequest, LogSource};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::vms::VmPath;
use crate::App;
use crate::extract::PathParams;
use crate::query::{QueryParams, switch};
use crate::response::HandlerResult;

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(logs))
}

/// Options for reading a log.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
#[derive(Default)]
struct LogQuery {
    /// The log.
    source: LogSource,
    /// At most this many lines, the last ones.
    tail: Option<u32>,
    /// Keep following the log until the VM is stopped.
    #[serde(deserialize_with = "switch")]
    follow: bool,
}

/// Returns a log, byte by byte. The guest wrote the console's: do not trust it, and expect control characters.
#[utoipa::path(get, path = "/v1/vms/{name}/logs", operation_id = "vm_logs", tag = "vms", params(VmPath, LogQuery),
    responses((status = 200, body = String, content_type = "text/plain")))]
async fn logs(
    State(app): State<Arc<App>>,
    PathParams(vm): PathParams<VmPath>,
    QueryParams(which): QueryParams<LogQuery>,
) -> HandlerResult {
    let tail_lines = which.tail.and_then(|lines| usize::try_from(lines).ok());
    let request = LogRequest { source: which.source, tail_lines, follow: which.follow };
    let log = app.nido().await?.logs(&vm.name, request)?;
    let pieces = stream::unfold((log, app.shutting_down.clone()), |(mut log, ending)| async move {
        let piece = tokio::select! {
            piece = log.next() => piece?,
            () = ending.cancelled() => return None,
        };
        Some((piece.map(Bytes::from).map_err(std::io::Error::other), (log, ending)))
    });
    let mut response: Response = Body::from_stream(pieces).into_response();
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}
