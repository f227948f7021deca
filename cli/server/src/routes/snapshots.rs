//! Snapshots of a VM.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use nido_api::error::{Code, Error};
use nido_api::name::{SnapshotName, VmName};
use nido_api::operation as op;
use nido_api::{RestoreRequest, SnapshotInfo, SnapshotList, VmInfo};
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::vms::VmPath;
use crate::App;
use crate::extract::{JsonBody, PathParams, VmPathParams};
use crate::operations::{self, OperationContext, value};
use crate::response::{self, HandlerResult};

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(list, create)).routes(routes!(info, delete)).routes(routes!(restore))
}

/// Path of a snapshot.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
struct SnapshotPath {
    /// Name of the VM, or its id.
    name: VmName,
    /// Name of the snapshot.
    snapshot: SnapshotName,
}

impl VmPathParams for SnapshotPath {
    fn vm_name(&mut self) -> Option<&mut VmName> {
        Some(&mut self.name)
    }
}

/// A snapshot to take.
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// Its name.
    name: SnapshotName,
}

/// Lists a VM's snapshots, the oldest first.
#[utoipa::path(get, path = "/v1/vms/{name}/snapshots", operation_id = "snapshot_list", tag = "snapshots", params(VmPath),
    responses((status = 200, body = SnapshotList)))]
async fn list(State(app): State<Arc<App>>, PathParams(vm): PathParams<VmPath>) -> HandlerResult {
    response::ok(&app.nido().await?.snapshot_list(&vm.name)?)
}

/// Takes a snapshot: memory, devices and disk of a running VM, the disk of a stopped one.
#[utoipa::path(post, path = "/v1/vms/{name}/snapshots", operation_id = "snapshot_create", tag = "snapshots", params(VmPath),
    request_body = SnapshotRequest, responses((status = 201, body = SnapshotInfo)))]
async fn create(
    State(app): State<Arc<App>>,
    PathParams(vm): PathParams<VmPath>,
    context: OperationContext,
    JsonBody(what): JsonBody<SnapshotRequest>,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    let place = format!("/v1/vms/{}/snapshots/{}", vm.name, what.name);
    let mut response = operations::run(&app, context, op::VM_SNAPSHOT, StatusCode::CREATED, |_| {
        Box::pin(async move { value(&owner.nido().await?.snapshot_create(&vm.name, &what.name).await?) })
    })
    .await?;
    response::locate(&mut response, &place);
    Ok(response)
}

/// Returns a snapshot.
#[utoipa::path(get, path = "/v1/vms/{name}/snapshots/{snapshot}", operation_id = "snapshot_info", tag = "snapshots",
    params(SnapshotPath), responses((status = 200, body = SnapshotInfo)))]
async fn info(State(app): State<Arc<App>>, PathParams(which): PathParams<SnapshotPath>) -> HandlerResult {
    let list = app.nido().await?.snapshot_list(&which.name)?;
    let found = list.snapshots.into_iter().find(|snapshot| snapshot.name == which.snapshot);
    response::ok(&found.ok_or_else(|| {
        Error::new(Code::SnapshotNotFound, format!("VM '{}' has no snapshot '{}'", which.name, which.snapshot))
    })?)
}

/// Deletes a snapshot; the response describes the deleted one.
#[utoipa::path(delete, path = "/v1/vms/{name}/snapshots/{snapshot}", operation_id = "snapshot_delete", tag = "snapshots",
    params(SnapshotPath), responses((status = 200, body = SnapshotInfo)))]
async fn delete(
    State(app): State<Arc<App>>,
    PathParams(which): PathParams<SnapshotPath>,
    context: OperationContext,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    let deleted =
        operations::act(
            &app,
            context,
            async move { owner.nido().await?.snapshot_delete(&which.name, &which.snapshot) },
        );
    response::ok(&deleted.await?)
}

/// Restores a VM to a snapshot. What the VM has done since is lost.
#[utoipa::path(post, path = "/v1/vms/{name}/snapshots/{snapshot}/restore", operation_id = "snapshot_restore",
    tag = "snapshots", params(SnapshotPath), request_body = RestoreRequest,
    responses((status = 200, body = VmInfo)))]
async fn restore(
    State(app): State<Arc<App>>,
    PathParams(which): PathParams<SnapshotPath>,
    context: OperationContext,
    JsonBody(how): JsonBody<RestoreRequest>,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    operations::run(&app, context, op::VM_RESTORE, StatusCode::OK, |stage| {
        Box::pin(async move {
            let nido = owner.nido().await?;
            value(&nido.snapshot_restore(&which.name, &which.snapshot, how, &mut |now| stage.start(now)).await?)
        })
    })
    .await
}
