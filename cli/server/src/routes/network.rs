//! The network of a VM: its rules, and what it has done.

use std::sync::Arc;

use axum::extract::State;
use nido_api::name::VmName;
use nido_api::{AllowEntry, PresetList, RuleChangeResult, RulesRequest, VmNetwork};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::vms::VmPath;
use crate::App;
use crate::auth::CallerGrant;
use crate::extract::{JsonBody, PathParams, VmPathParams};
use crate::operations::{self, OperationContext};
use crate::response::{self, HandlerResult};

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(show)).routes(routes!(allow)).routes(routes!(deny)).routes(routes!(presets))
}

/// Path of a rule.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
struct RulePath {
    /// Name of the VM, or its id.
    name: VmName,
    /// The rule or preset, percent-encoded: a slash is `%2F`.
    #[param(value_type = AllowEntry, example = "host:8080")]
    rule: String,
}

impl VmPathParams for RulePath {
    fn vm_name(&mut self) -> Option<&mut VmName> {
        Some(&mut self.name)
    }
}

/// Describes a VM's network: its rules, traffic, and what was refused with the rules that would have allowed it.
#[utoipa::path(get, path = "/v1/vms/{name}/network", operation_id = "net_show", tag = "network", params(VmPath),
    responses((status = 200, body = VmNetwork)))]
async fn show(State(app): State<Arc<App>>, PathParams(vm): PathParams<VmPath>) -> HandlerResult {
    response::ok(&app.nido().await?.net_show(&vm.name).await?)
}

/// Lists the presets that rules may name, with the rules that they have now.
#[utoipa::path(get, path = "/v1/network/presets", operation_id = "net_presets", tag = "network",
    responses((status = 200, body = PresetList)))]
async fn presets(State(app): State<Arc<App>>) -> HandlerResult {
    response::ok(&app.nido().await?.net_presets().await?)
}

/// Adds rules; a running VM follows them at once.
#[utoipa::path(post, path = "/v1/vms/{name}/network/rules", operation_id = "net_allow", tag = "network", params(VmPath),
    request_body = RulesRequest, responses((status = 200, body = RuleChangeResult)))]
async fn allow(
    State(app): State<Arc<App>>,
    CallerGrant(grant): CallerGrant,
    PathParams(vm): PathParams<VmPath>,
    context: OperationContext,
    JsonBody(request): JsonBody<RulesRequest>,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    let adding = async move { owner.nido().await?.net_allow(&vm.name, request.allow, &grant).await };
    response::ok(&operations::act(&app, context, adding).await?)
}

/// Removes a rule; connections of a running VM that no rule allows any more are reset.
#[utoipa::path(delete, path = "/v1/vms/{name}/network/rules/{rule}", operation_id = "net_deny", tag = "network",
    params(RulePath), responses((status = 200, body = RuleChangeResult)))]
async fn deny(
    State(app): State<Arc<App>>,
    PathParams(which): PathParams<RulePath>,
    context: OperationContext,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    let removing = async move {
        let rule: AllowEntry = which.rule.parse()?;
        owner.nido().await?.net_deny(&which.name, vec![rule]).await
    };
    response::ok(&operations::act(&app, context, removing).await?)
}
