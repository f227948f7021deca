//! VMs: made, listed, started, stopped, copied, deleted; and runs, which are all of that for one command.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::state::VmState;
use nido_api::{ForkResult, PageRequest, SpawnRequest, StartRequest, StopRequest, VmInfo, VmPage, VmQuery};
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::auth::CallerGrant;
use crate::extract::{JsonBody, PathParams, VmPathParams, escaped};
use crate::operations::{self, OperationContext, UndoGuard, value};
use crate::query::{LabelParams, QueryParams, switch};
use crate::response::{self, HandlerResult};
use crate::{App, precondition};

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(info, delete))
        .routes(routes!(start))
        .routes(routes!(stop))
        .routes(routes!(restart))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(fork))
}

/// Path of a VM.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct VmPath {
    /// Name of the VM, or its id.
    pub name: VmName,
}

impl VmPathParams for VmPath {
    fn vm_name(&mut self) -> Option<&mut VmName> {
        Some(&mut self.name)
    }
}

/// Filters for the list of VMs.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct VmFilter {
    /// VMs in one of these states, separated by commas.
    #[param(example = "running,paused")]
    status: Option<String>,
    /// At most this many; all if absent.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<usize>,
    /// The `next_cursor` of an earlier response.
    cursor: Option<String>,
}

/// Lists VMs, in order of creation. With `limit` one page of them; `next_cursor` and the header `Link` lead to the next
/// page.
#[utoipa::path(get, path = "/v1/vms", operation_id = "vm_list", tag = "vms",
    params(VmFilter, ("label" = Option<Vec<String>>, Query,
        description = "VMs with this label, `KEY` or `KEY=VALUE`; repeat it for VMs that have all of them.")),
    responses((status = 200, body = VmPage, headers(("Link" = String, description = "The next page, as `rel=\"next\"`.")))))]
async fn list(
    State(app): State<Arc<App>>,
    uri: Uri,
    LabelParams(labels): LabelParams,
    QueryParams(filter): QueryParams<VmFilter>,
) -> HandlerResult {
    let states = filter.status.as_deref().map(|words| words.split(',').map(state).collect::<Result<Vec<_>>>());
    let query = VmQuery {
        status: states.transpose()?.unwrap_or_default(),
        labels: labels.iter().flat_map(|label| label.parse()).collect(),
        page: PageRequest { limit: filter.limit, cursor: filter.cursor },
    };
    let page = app.nido().await?.list_page(&query).await?;
    let mut response = response::json(StatusCode::OK, &page);
    if let Some(next) = &page.next_cursor {
        let rest = uri.query().unwrap_or_default().split('&').filter(|part| !part.starts_with("cursor="));
        let query = rest.chain([&*format!("cursor={next}")]).collect::<Vec<_>>().join("&");
        if let Ok(link) = HeaderValue::from_str(&format!("<{}?{query}>; rel=\"next\"", uri.path())) {
            response.headers_mut().insert(header::LINK, link);
        }
    }
    Ok(response)
}

/// A state by its word.
fn state(word: &str) -> Result<VmState> {
    VmState::SHOWN.into_iter().find(|state| state.word() == word).ok_or_else(|| {
        let states = VmState::SHOWN.map(VmState::word).join(", ");
        Error::new(Code::SpecInvalid, format!("status: '{}' is not a state", escaped(word)))
            .hint(format!("one of {states}"))
    })
}

/// Creates a VM and starts it; the response follows when it is ready. With `"start": false` it is only created. If the
/// start fails, the VM is deleted.
#[utoipa::path(post, path = "/v1/vms", operation_id = "vm_spawn", tag = "vms", request_body = SpawnRequest,
    responses((status = 201, body = VmInfo, headers(("Location" = String, description = "The VM.")))))]
async fn create(
    State(app): State<Arc<App>>,
    CallerGrant(grant): CallerGrant,
    context: OperationContext,
    JsonBody(body): JsonBody<SpawnRequest>,
) -> HandlerResult {
    let place = HeaderValue::from_str(&format!("/v1/vms/{}", body.name));
    let owner = Arc::clone(&app);
    let context = context.about(&body.name);
    let mut response = operations::run(&app, context, op::VM_SPAWN, StatusCode::CREATED, |stage| {
        Box::pin(async move {
            let nido = owner.nido().await?;
            let net = nido.default_net(&body.template, &grant.limits);
            let (spec, start) = body.split(net);
            let Some(start) = start else { return value(&nido.create(spec, &grant).await?) };
            let undo = UndoGuard::new(&owner);
            let mut tell = |now| stage.start(now);
            let vm = nido.spawn_tracked(spec, start, &grant, &undo.begun, &mut tell).await;
            // If it failed, the core has removed it.
            undo.done();
            let vm = vm?;
            owner.metrics.spawn(&vm);
            value(&vm)
        })
    })
    .await?;
    if let (StatusCode::CREATED, Ok(place)) = (response.status(), place) {
        response.headers_mut().insert(header::LOCATION, place);
    }
    Ok(response)
}

/// Returns a VM.
#[utoipa::path(get, path = "/v1/vms/{name}", operation_id = "vm_info", tag = "vms", params(VmPath),
    responses((status = 200, body = VmInfo)))]
async fn info(State(app): State<Arc<App>>, PathParams(vm): PathParams<VmPath>) -> HandlerResult {
    let info = app.nido().await?.info(&vm.name).await?;
    let mut response = response::json(StatusCode::OK, &info);
    precondition::tag(&mut response, &info.id);
    Ok(response)
}

/// Options of a deletion.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct DeleteQuery {
    /// Delete the VM even if it runs.
    #[serde(default, deserialize_with = "switch")]
    force: bool,
}

/// Deletes a VM with its disk; the response describes the VM when it was stopped. A running one is deleted only with
/// `force=true`.
#[utoipa::path(delete, path = "/v1/vms/{name}", operation_id = "vm_delete", tag = "vms", params(VmPath, DeleteQuery),
    responses((status = 200, body = VmInfo)))]
async fn delete(
    State(app): State<Arc<App>>,
    PathParams(vm): PathParams<VmPath>,
    QueryParams(how): QueryParams<DeleteQuery>,
    context: OperationContext,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    operations::run(&app, context, op::VM_DELETE, StatusCode::OK, |_| {
        Box::pin(async move { value(&owner.nido().await?.delete(&vm.name, how.force).await?) })
    })
    .await
}

/// Starts a VM; the response follows when it is ready. A running one stays as it is.
#[utoipa::path(post, path = "/v1/vms/{name}/start", operation_id = "vm_start", tag = "vms", params(VmPath),
    request_body = StartRequest, responses((status = 200, body = VmInfo)))]
async fn start(
    State(app): State<Arc<App>>,
    PathParams(vm): PathParams<VmPath>,
    context: OperationContext,
    JsonBody(how): JsonBody<StartRequest>,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    operations::run(&app, context, op::VM_START, StatusCode::OK, |stage| {
        Box::pin(async move {
            let info = owner.nido().await?.start(&vm.name, how, &mut |now| stage.start(now)).await?;
            owner.metrics.spawn(&info);
            value(&info)
        })
    })
    .await
}

/// Stops a VM: the guest powers off; with `"force": true` QEMU is terminated at once. A stopped one stays as it is.
#[utoipa::path(post, path = "/v1/vms/{name}/stop", operation_id = "vm_stop", tag = "vms", params(VmPath),
    request_body = StopRequest, responses((status = 200, body = VmInfo)))]
async fn stop(
    State(app): State<Arc<App>>,
    PathParams(vm): PathParams<VmPath>,
    context: OperationContext,
    JsonBody(how): JsonBody<StopRequest>,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    operations::run(&app, context, op::VM_STOP, StatusCode::OK, |_| {
        Box::pin(async move { value(&owner.nido().await?.stop(&vm.name, how).await?) })
    })
    .await
}

/// Stops a VM and starts it again.
#[utoipa::path(post, path = "/v1/vms/{name}/restart", operation_id = "vm_restart", tag = "vms", params(VmPath),
    request_body = StopRequest, responses((status = 200, body = VmInfo)))]
async fn restart(
    State(app): State<Arc<App>>,
    PathParams(vm): PathParams<VmPath>,
    context: OperationContext,
    JsonBody(how): JsonBody<StopRequest>,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    operations::run(&app, context, op::VM_RESTART, StatusCode::OK, |stage| {
        Box::pin(async move {
            let start = StartRequest::default();
            value(&owner.nido().await?.restart(&vm.name, how, start, &mut |now| stage.start(now)).await?)
        })
    })
    .await
}

/// Pauses a VM's CPUs.
#[utoipa::path(post, path = "/v1/vms/{name}/pause", operation_id = "vm_pause", tag = "vms", params(VmPath),
    responses((status = 200, body = VmInfo)))]
async fn pause(
    State(app): State<Arc<App>>,
    PathParams(vm): PathParams<VmPath>,
    context: OperationContext,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    response::ok(&operations::act(&app, context, async move { owner.nido().await?.pause(&vm.name).await }).await?)
}

/// Resumes a paused VM.
#[utoipa::path(post, path = "/v1/vms/{name}/resume", operation_id = "vm_resume", tag = "vms", params(VmPath),
    responses((status = 200, body = VmInfo)))]
async fn resume(
    State(app): State<Arc<App>>,
    PathParams(vm): PathParams<VmPath>,
    context: OperationContext,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    response::ok(&operations::act(&app, context, async move { owner.nido().await?.resume(&vm.name).await }).await?)
}

/// Copies to create.
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// Their names.
    #[schema(min_items = 1)]
    names: Vec<VmName>,
}

/// Copies a running VM: the same memory, disk and processes, each copy with an identity of its own. If one copy fails,
/// none is created.
#[utoipa::path(post, path = "/v1/vms/{name}/fork", operation_id = "vm_fork", tag = "vms", params(VmPath),
    request_body = ForkRequest, responses((status = 201, body = ForkResult)))]
async fn fork(
    State(app): State<Arc<App>>,
    CallerGrant(grant): CallerGrant,
    PathParams(vm): PathParams<VmPath>,
    context: OperationContext,
    JsonBody(how): JsonBody<ForkRequest>,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    operations::run(&app, context, op::VM_FORK, StatusCode::CREATED, |stage| {
        Box::pin(async move {
            let nido = owner.nido().await?;
            value(&nido.fork(&vm.name, &how.names, &grant, &mut |_, now| stage.start(now)).await?)
        })
    })
    .await
}
