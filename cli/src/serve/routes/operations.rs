//! Operations: what goes on, polled and cancelled.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::serve::App;
use crate::serve::answer::{self, Answer};
use crate::serve::ask::Names;
use crate::serve::guard::{Caller, Looks, Uses};
use crate::serve::operations::{Operation, OperationList};

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

/// What goes on, and what has ended lately.
#[utoipa::path(get, path = "/v1/operations", operation_id = "operation_list", tag = "operations",
    responses((status = 200, body = OperationList)))]
async fn list(State(app): State<Arc<App>>, _: Looks, Extension(caller): Extension<Caller>) -> Answer {
    answer::ok(&app.operations.list(caller.scope))
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
    answer::ok(&app.operations.get(&which.id, caller.scope)?)
}

/// Cancels an operation, and forgets it. One that has ended is only forgotten.
#[utoipa::path(delete, path = "/v1/operations/{id}", operation_id = "operation_cancel", tag = "operations", params(Which),
    responses((status = 200, body = Operation)))]
async fn cancel(State(app): State<Arc<App>>, _: Uses, Names(which): Names<Which>) -> Answer {
    answer::ok(&app.operations.cancel(&which.id)?)
}
