//! Operations: what goes on, polled and cancelled.

use std::sync::Arc;

use axum::Extension;
use axum::body::HttpBody as _;
use axum::extract::State;
use axum::http::StatusCode;
use nido_vmm::error::{Code, Error};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::App;
use crate::answer::{self, Answer};
use crate::ask::{Names, OfVm};
use crate::guard::{Caller, Looks, Uses};
use crate::operations::{Operation, OperationList};

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(get, cancel))
}

/// The operation of a path.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
struct Which {
    /// Its id.
    id: String,
}

impl OfVm for Which {}

/// What goes on, and what has ended lately, of the caller's: without results. An admin's list has everybody's.
#[utoipa::path(get, path = "/v1/operations", operation_id = "operation_list", tag = "operations",
    responses((status = 200, body = OperationList)))]
async fn list(State(app): State<Arc<App>>, _: Looks, Extension(caller): Extension<Caller>) -> Answer {
    answer::ok(&app.operations.list(&caller))
}

/// How an operation is.
#[utoipa::path(get, path = "/v1/operations/{id}", operation_id = "operation_get", tag = "operations", params(Which),
    responses((status = 200, body = Operation)))]
async fn get(
    State(app): State<Arc<App>>,
    _: Looks,
    Extension(caller): Extension<Caller>,
    Names(which): Names<Which>,
) -> Answer {
    let operation = app.operations.get(&which.id, &caller)?;
    let mut response = answer::json(StatusCode::OK, &operation);
    let mut held = app.output.hold();
    if !held.grow(usize::try_from(response.body().size_hint().upper().unwrap_or(0)).unwrap_or(usize::MAX)) {
        return Err(Error::new(Code::RateLimited, "too many long answers are being sent").hint("wait a second").into());
    }
    held.leave_to(&mut response);
    Ok(response)
}

/// Cancels an operation, and forgets it. One that has ended is only forgotten.
#[utoipa::path(delete, path = "/v1/operations/{id}", operation_id = "operation_cancel", tag = "operations", params(Which),
    responses((status = 200, body = Operation)))]
async fn cancel(
    State(app): State<Arc<App>>,
    _: Uses,
    Extension(caller): Extension<Caller>,
    Names(which): Names<Which>,
) -> Answer {
    answer::ok(&app.operations.cancel(&which.id, &caller)?)
}
