//! Warm pools.

use std::sync::Arc;

use axum::extract::State;
use nido_api::{PoolInfo, PoolList, PoolRequest};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::templates::TemplatePath;
use crate::App;
use crate::extract::{JsonBody, PathParams};
use crate::operations::{self, OperationContext};
use crate::response::{self, HandlerResult};

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(info, set))
}

/// Lists all pools.
#[utoipa::path(get, path = "/v1/pools", operation_id = "pool_list", tag = "pools",
    responses((status = 200, body = PoolList)))]
async fn list(State(app): State<Arc<App>>) -> HandlerResult {
    response::ok(&app.nido().await?.pool_list().await?)
}

/// Lists the pools of a template, one for each kind of machine.
#[utoipa::path(get, path = "/v1/pools/{name}", operation_id = "pool_info", tag = "pools", params(TemplatePath),
    responses((status = 200, body = PoolList)))]
async fn info(State(app): State<Arc<App>>, PathParams(template): PathParams<TemplatePath>) -> HandlerResult {
    let nido = app.nido().await?;
    nido.template_info(&template.name)?;
    let mut list = nido.pool_list().await?;
    list.pools.retain(|pool| pool.template == template.name);
    response::ok(&list)
}

/// Sets the number of waiting clones of a template, for one kind of machine. They are created in the background.
#[utoipa::path(put, path = "/v1/pools/{name}", operation_id = "pool_set", tag = "pools", params(TemplatePath),
    request_body = PoolRequest, responses((status = 200, body = PoolInfo)))]
async fn set(
    State(app): State<Arc<App>>,
    PathParams(template): PathParams<TemplatePath>,
    context: OperationContext,
    JsonBody(request): JsonBody<PoolRequest>,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    let set =
        operations::act(&app, context, async move { owner.nido().await?.pool_set(&template.name, &request).await });
    response::ok(&set.await?)
}
