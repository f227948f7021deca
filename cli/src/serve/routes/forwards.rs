//! Ports of a guest published on the host.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use nido_vmm::api::{ForwardList, ForwardSpec};
use nido_vmm::error::{Code, Error};
use nido_vmm::name::VmName;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::vms::Vm;
use crate::serve::App;
use crate::serve::answer::{self, Answer};
use crate::serve::ask::{Body, Names};
use crate::serve::guard::{Looks, Uses};

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(list, add)).routes(routes!(remove))
}

/// A published port of a path.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
struct Which {
    /// Name of the VM.
    name: VmName,
    /// Port of the host.
    #[param(minimum = 1)]
    host_port: u16,
}

/// A VM's published ports, in order.
#[utoipa::path(get, path = "/v1/vms/{name}/forwards", operation_id = "forward_list", tag = "forwards", params(Vm),
    responses((status = 200, body = ForwardList)))]
async fn list(State(app): State<Arc<App>>, _: Looks, Names(vm): Names<Vm>) -> Answer {
    answer::ok(&app.nido().await?.forward_list(&vm.name)?)
}

/// Publishes a port; the answer says which port of the host it got.
#[utoipa::path(post, path = "/v1/vms/{name}/forwards", operation_id = "forward_add", tag = "forwards", params(Vm),
    request_body = ForwardSpec, responses((status = 201, body = ForwardSpec)))]
async fn add(State(app): State<Arc<App>>, _: Uses, Names(vm): Names<Vm>, Body(spec): Body<ForwardSpec>) -> Answer {
    let bound = app.nido().await?.forward_add(&vm.name, spec).await?;
    Ok(answer::json(StatusCode::CREATED, &bound))
}

/// Withdraws a published port; which one it was is the answer.
#[utoipa::path(delete, path = "/v1/vms/{name}/forwards/{host_port}", operation_id = "forward_remove", tag = "forwards",
    params(Which), responses((status = 200, body = ForwardSpec)))]
async fn remove(State(app): State<Arc<App>>, _: Uses, Names(which): Names<Which>) -> Answer {
    let nido = app.nido().await?;
    let found = nido.forward_list(&which.name)?.forwards.into_iter().find(|spec| spec.host_port == which.host_port);
    let spec = found.ok_or_else(|| {
        Error::new(Code::ForwardNotFound, format!("VM '{}' has nothing on port {}", which.name, which.host_port))
    })?;
    nido.forward_remove(&which.name, &spec).await?;
    answer::ok(&spec)
}
