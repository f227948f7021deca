//! Operations: requests that run in the background, polled and cancelled.

use std::sync::Arc;

use axum::Extension;
use axum::body::HttpBody as _;
use axum::extract::State;
use axum::http::StatusCode;
use nido_api::error::{Code, Error};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::App;
use crate::auth::Caller;
use crate::extract::{PathParams, VmPathParams};
use crate::operation_view::{self, ApiOperation, OperationList};
use crate::response::{self, HandlerResult};

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(get, cancel))
}

/// Path of an operation.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
struct OperationPath {
    /// Its id.
    id: String,
}

impl VmPathParams for OperationPath {}

/// Lists the caller's operations, running ones and those that ended recently, without results. Admins see those of all
/// callers. Calls of MCP tools that continue as jobs are among them.
#[utoipa::path(get, path = "/v1/operations", operation_id = "operation_list", tag = "operations",
    responses((status = 200, body = OperationList)))]
async fn list(State(app): State<Arc<App>>, Extension(caller): Extension<Caller>) -> HandlerResult {
    response::ok(&operation_view::list(app.nido().await?, &caller)?)
}

/// Returns the state of an operation.
#[utoipa::path(get, path = "/v1/operations/{id}", operation_id = "operation_get", tag = "operations", params(OperationPath),
    responses((status = 200, body = ApiOperation)))]
async fn get(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    PathParams(which): PathParams<OperationPath>,
) -> HandlerResult {
    let operation = operation_view::get(app.nido().await?, &which.id, &caller)?;
    let mut response = response::json(StatusCode::OK, &operation);
    let mut held = app.output.hold();
    if !held.grow(usize::try_from(response.body().size_hint().upper().unwrap_or(0)).unwrap_or(usize::MAX)) {
        return Err(Error::new(Code::RateLimited, "too many large responses are being sent")
            .hint("wait a second")
            .into());
    }
    held.leave_to(&mut response);
    Ok(response)
}

/// Cancels an operation and deletes it. One that has ended is only deleted.
#[utoipa::path(delete, path = "/v1/operations/{id}", operation_id = "operation_cancel", tag = "operations", params(OperationPath),
    responses((status = 200, body = ApiOperation)))]
async fn cancel(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    PathParams(which): PathParams<OperationPath>,
) -> HandlerResult {
    response::ok(&operation_view::cancel(app.nido().await?, &which.id, &caller)?)
}
