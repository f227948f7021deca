//! Templates: listed, built from recipes, made of VMs, baked, deleted.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use nido_api::name::{TemplateName, VmName};
use nido_api::operation as op;
use nido_api::{
    AllowEntry, BakeRequest, BakeResult, BuildRequest, BuildResult, CaptureRequest, KernelChoice, TemplateInfo,
    TemplateList,
};
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::App;
use crate::extract::{JsonBody, PathParams, VmPathParams};
use crate::operations::{self, OperationContext, value};
use crate::response::{self, HandlerResult};

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(info, delete))
        .routes(routes!(build))
        .routes(routes!(bake))
}

/// Path of a template.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct TemplatePath {
    /// Name of the template.
    pub name: TemplateName,
}

impl VmPathParams for TemplatePath {}

/// A template to create from a VM.
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TemplateRequest {
    /// Its name.
    name: TemplateName,
    /// The VM whose disk it gets.
    from: VmName,
    /// Create no warm image: VMs boot.
    #[serde(default)]
    no_bake: bool,
    /// Rules and presets that bound the rules of its VMs, none if empty. If absent, they are bounded as those of the VM are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, max_items = 256)]
    allow: Option<Vec<AllowEntry>>,
}

/// Options of a build.
#[derive(Debug, Default, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RecipeRequest {
    /// Download packages again even if the recipe has not changed.
    rebuild: bool,
    /// Create no warm image: VMs boot.
    no_bake: bool,
    /// Kernel compiled for guests (true) or Debian's (false); unchanged if absent.
    slim_kernel: Option<bool>,
}

/// Lists templates, and recipes that can be built.
#[utoipa::path(get, path = "/v1/templates", operation_id = "template_list", tag = "templates",
    responses((status = 200, body = TemplateList)))]
async fn list(State(app): State<Arc<App>>) -> HandlerResult {
    response::ok(&app.nido().await?.template_list()?)
}

/// Creates a template from a VM's disk. A running VM is paused for a moment, and then resumed.
#[utoipa::path(post, path = "/v1/templates", operation_id = "template_create", tag = "templates",
    request_body = TemplateRequest, responses((status = 201, body = BuildResult)))]
async fn create(
    State(app): State<Arc<App>>,
    context: OperationContext,
    JsonBody(what): JsonBody<TemplateRequest>,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    let place = format!("/v1/templates/{}", what.name);
    let mut response = operations::run(&app, context, op::TEMPLATE_CREATE, StatusCode::CREATED, |stage| {
        Box::pin(async move {
            let nido = owner.nido().await?;
            let mut tell = |step: nido_api::BuildStep| stage.word(&step.stage);
            let request = CaptureRequest { bake: !what.no_bake, allow: what.allow };
            value(&nido.template_create(&what.name, &what.from, request, &mut tell).await?)
        })
    })
    .await?;
    response::locate(&mut response, &place);
    Ok(response)
}

/// Returns a template.
#[utoipa::path(get, path = "/v1/templates/{name}", operation_id = "template_info", tag = "templates", params(TemplatePath),
    responses((status = 200, body = TemplateInfo)))]
async fn info(State(app): State<Arc<App>>, PathParams(template): PathParams<TemplatePath>) -> HandlerResult {
    response::ok(&app.nido().await?.template_info(&template.name)?)
}

/// Deletes a template that no VM uses.
#[utoipa::path(delete, path = "/v1/templates/{name}", operation_id = "template_delete", tag = "templates",
    params(TemplatePath), responses((status = 204)))]
async fn delete(
    State(app): State<Arc<App>>,
    PathParams(template): PathParams<TemplatePath>,
    context: OperationContext,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    operations::act(&app, context, async move { owner.nido().await?.template_delete(&template.name).await }).await?;
    Ok(response::empty(StatusCode::NO_CONTENT))
}

/// Builds a template from the recipe of its name. Takes minutes: send `Prefer: respond-async`.
#[utoipa::path(post, path = "/v1/templates/{name}/build", operation_id = "template_build", tag = "templates",
    params(TemplatePath), request_body = RecipeRequest, responses((status = 200, body = BuildResult)))]
async fn build(
    State(app): State<Arc<App>>,
    PathParams(template): PathParams<TemplatePath>,
    context: OperationContext,
    JsonBody(how): JsonBody<RecipeRequest>,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    let kernel = how.slim_kernel.map(|slim| if slim { KernelChoice::Slim } else { KernelChoice::Stock });
    let request = BuildRequest { rebuild: how.rebuild, bake: !how.no_bake, kernel };
    operations::run(&app, context, op::TEMPLATE_BUILD, StatusCode::OK, |stage| {
        Box::pin(async move {
            let nido = owner.nido().await?;
            let mut tell = |step: nido_api::BuildStep| stage.word(&step.stage);
            value(&nido.template_build(&template.name, request, &mut tell).await?)
        })
    })
    .await
}

/// Creates a warm image of a template for one kind of machine, so that such VMs are forked.
#[utoipa::path(post, path = "/v1/templates/{name}/bake", operation_id = "template_bake", tag = "templates",
    params(TemplatePath), request_body = BakeRequest, responses((status = 200, body = BakeResult)))]
async fn bake(
    State(app): State<Arc<App>>,
    PathParams(template): PathParams<TemplatePath>,
    context: OperationContext,
    JsonBody(how): JsonBody<BakeRequest>,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    operations::run(&app, context, op::TEMPLATE_BAKE, StatusCode::OK, |stage| {
        Box::pin(async move {
            value(&owner.nido().await?.template_bake(&template.name, &how, &mut |now| stage.start(now)).await?)
        })
    })
    .await
}
