//! Webhooks. Their URLs may hold secrets, so only those who may do everything see them.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use nido_api::error::{Code, Error};
use nido_api::{Delivery, DeliveryList, WebhookAdded, WebhookInfo, WebhookList, WebhookRequest, WebhookTest};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::App;
use crate::extract::{JsonBody, PathParams, VmPathParams};
use crate::operations::{self, OperationContext};
use crate::query::number;
use crate::response::{self, HandlerResult};

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(list, add))
        .routes(routes!(info, remove))
        .routes(routes!(deliveries))
        .routes(routes!(test))
        .routes(routes!(redeliver))
}

/// Path of an endpoint.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
struct WebhookPath {
    /// Id of the endpoint.
    id: String,
}

impl VmPathParams for WebhookPath {}

/// Path of a delivery.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
struct DeliveryPath {
    /// Number of the delivery.
    #[serde(deserialize_with = "number")]
    delivery: u64,
}

impl VmPathParams for DeliveryPath {}

/// Lists endpoints.
#[utoipa::path(get, path = "/v1/webhooks", operation_id = "webhook_list", tag = "webhooks",
    responses((status = 200, body = WebhookList)))]
async fn list(State(app): State<Arc<App>>) -> HandlerResult {
    response::ok(&app.nido().await?.webhook_list()?)
}

/// Adds an endpoint. Only this response contains its secret.
#[utoipa::path(post, path = "/v1/webhooks", operation_id = "webhook_add", tag = "webhooks",
    request_body = WebhookRequest, responses((status = 201, body = WebhookAdded)))]
async fn add(
    State(app): State<Arc<App>>,
    context: OperationContext,
    JsonBody(request): JsonBody<WebhookRequest>,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    let added = operations::act(&app, context, async move { owner.nido().await?.webhook_add(request).await }).await?;
    Ok(response::created(&format!("/v1/webhooks/{}", added.webhook.id), &added))
}

/// Returns an endpoint.
#[utoipa::path(get, path = "/v1/webhooks/{id}", operation_id = "webhook_info", tag = "webhooks", params(WebhookPath),
    responses((status = 200, body = WebhookInfo)))]
async fn info(State(app): State<Arc<App>>, PathParams(webhook): PathParams<WebhookPath>) -> HandlerResult {
    let found = app.nido().await?.webhook_list()?.webhooks.into_iter().find(|known| known.id == webhook.id);
    response::ok(&found.ok_or_else(|| Error::new(Code::WebhookNotFound, "this webhook does not exist"))?)
}

/// Removes an endpoint; its pending deliveries are not sent.
#[utoipa::path(delete, path = "/v1/webhooks/{id}", operation_id = "webhook_remove", tag = "webhooks", params(WebhookPath),
    responses((status = 200, body = WebhookInfo)))]
async fn remove(
    State(app): State<Arc<App>>,
    PathParams(webhook): PathParams<WebhookPath>,
    context: OperationContext,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    response::ok(&operations::act(&app, context, async move { owner.nido().await?.webhook_remove(&webhook.id) }).await?)
}

/// Lists an endpoint's newest deliveries, the oldest of them first.
#[utoipa::path(get, path = "/v1/webhooks/{id}/deliveries", operation_id = "webhook_deliveries", tag = "webhooks",
    params(WebhookPath), responses((status = 200, body = DeliveryList)))]
async fn deliveries(State(app): State<Arc<App>>, PathParams(webhook): PathParams<WebhookPath>) -> HandlerResult {
    response::ok(&app.nido().await?.webhook_deliveries(Some(&webhook.id))?)
}

/// Sends an endpoint a test message, and reports the result.
#[utoipa::path(post, path = "/v1/webhooks/{id}/test", operation_id = "webhook_test", tag = "webhooks", params(WebhookPath),
    responses((status = 200, body = WebhookTest)))]
async fn test(
    State(app): State<Arc<App>>,
    PathParams(webhook): PathParams<WebhookPath>,
    context: OperationContext,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    response::ok(
        &operations::act(&app, context, async move { owner.nido().await?.webhook_test(&webhook.id).await }).await?,
    )
}

/// Sends a delivery again, under the same message id.
#[utoipa::path(post, path = "/v1/webhooks/deliveries/{delivery}/redeliver", operation_id = "webhook_redeliver",
    tag = "webhooks", params(DeliveryPath), responses((status = 202, body = Delivery)))]
async fn redeliver(State(app): State<Arc<App>>, PathParams(which): PathParams<DeliveryPath>) -> HandlerResult {
    let queued = app.nido().await?.webhook_redeliver(which.delivery)?;
    Ok(response::json(StatusCode::ACCEPTED, &queued))
}
