//! Ports of a guest published on the host.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::State;
use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::{ForwardList, ForwardSpec};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::vms::VmPath;
use crate::App;
use crate::auth::CallerGrant;
use crate::extract::{JsonBody, PathParams, VmPathParams, escaped};
use crate::operations::{self, OperationContext};
use crate::response::{self, HandlerResult};

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(list, add)).routes(routes!(remove))
}

/// Path of a published port.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
struct ForwardPath {
    /// Name of the VM, or its id.
    name: VmName,
    /// Port of the host, with its address if several addresses publish that port: `8080`, `127.0.0.1:8080`,
    /// `[::1]:8080`.
    #[param(pattern = "^(.+:)?[1-9][0-9]{0,4}$", example = "8080")]
    host_port: String,
}

impl VmPathParams for ForwardPath {
    fn vm_name(&mut self) -> Option<&mut VmName> {
        Some(&mut self.name)
    }
}

impl ForwardPath {
    /// The published port with this path.
    fn find(&self, forwards: Vec<ForwardSpec>) -> Result<ForwardSpec> {
        let (address, port) = match self.host_port.rsplit_once(':') {
            Some((address, port)) => (Some(address), port),
            None => (None, &*self.host_port),
        };
        // What fits the pattern and is not an address, or too large, names a port that is not published.
        let fits = port.starts_with(|first| ('1'..='9').contains(&first))
            && port.len() <= 5
            && port.bytes().all(|byte| byte.is_ascii_digit());
        let unknown = || {
            let error = if fits {
                let words = format!("VM '{}' does not publish port {}", self.name, escaped(&self.host_port));
                Error::new(Code::ForwardNotFound, words)
            } else {
                Error::new(Code::SpecInvalid, format!("host_port: '{}' is not a port", escaped(&self.host_port)))
            };
            error.hint("name it as it is listed: PORT, or ADDRESS:PORT")
        };
        let bare =
            |text: &'_ str| text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text).to_owned();
        let host = address.map(|text| bare(text).parse::<IpAddr>()).transpose().map_err(|_| unknown())?;
        let port = port.parse::<u16>().map_err(|_| unknown())?;
        let is_it = |spec: &ForwardSpec| spec.host_port == port && host.is_none_or(|host| spec.host == host);
        let mut found = forwards.into_iter().filter(is_it);
        match (found.next(), found.next()) {
            (Some(spec), None) => Ok(spec),
            (Some(_), Some(_)) => {
                let words = format!("host_port: VM '{}' publishes port {port} on several addresses", self.name);
                Err(Error::new(Code::SpecInvalid, words).hint(format!("name the address as well: 127.0.0.1:{port}")))
            }
            (None, _) => Err(unknown()),
        }
    }
}

/// Lists a VM's published ports, in order.
#[utoipa::path(get, path = "/v1/vms/{name}/forwards", operation_id = "forward_list", tag = "forwards", params(VmPath),
    responses((status = 200, body = ForwardList)))]
async fn list(State(app): State<Arc<App>>, PathParams(vm): PathParams<VmPath>) -> HandlerResult {
    response::ok(&app.nido().await?.forward_list(&vm.name)?)
}

/// Publishes a port; the response contains the host port.
#[utoipa::path(post, path = "/v1/vms/{name}/forwards", operation_id = "forward_add", tag = "forwards", params(VmPath),
    request_body = ForwardSpec, responses((status = 201, body = ForwardSpec)))]
async fn add(
    State(app): State<Arc<App>>,
    CallerGrant(grant): CallerGrant,
    PathParams(vm): PathParams<VmPath>,
    context: OperationContext,
    JsonBody(spec): JsonBody<ForwardSpec>,
) -> HandlerResult {
    let (owner, name) = (Arc::clone(&app), vm.name.clone());
    let adding = async move { owner.nido().await?.forward_add(&name, spec, &grant).await };
    let bound = operations::act(&app, context, adding).await?;
    let place = format!("/v1/vms/{}/forwards/{}", vm.name, SocketAddr::new(bound.host, bound.host_port));
    Ok(response::created(&place, &bound))
}

/// Removes a published port; the response describes the removed one.
#[utoipa::path(delete, path = "/v1/vms/{name}/forwards/{host_port}", operation_id = "forward_remove", tag = "forwards",
    params(ForwardPath), responses((status = 200, body = ForwardSpec)))]
async fn remove(
    State(app): State<Arc<App>>,
    PathParams(which): PathParams<ForwardPath>,
    context: OperationContext,
) -> HandlerResult {
    let owner = Arc::clone(&app);
    let removed = operations::act(&app, context, async move {
        let nido = owner.nido().await?;
        let spec = which.find(nido.forward_list(&which.name)?.forwards)?;
        nido.forward_remove(&which.name, &spec).await?;
        Ok(spec)
    });
    response::ok(&removed.await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    // The first of several addresses with that port was withdrawn, whichever it was.
    #[test]
    fn a_port_on_several_addresses_is_named_with_its_address() {
        let specs =
            || ["127.0.0.1:8080:80", "[::1]:8080:81", "127.0.0.1:9090:90"].map(|text| text.parse().unwrap()).to_vec();
        let find = |host_port: &str| {
            let which = ForwardPath { name: "web".parse().unwrap(), host_port: host_port.into() };
            which.find(specs()).map(|spec| spec.guest_port).map_err(|error| error.code())
        };
        assert_eq!((find("9090"), find("127.0.0.1:8080"), find("[::1]:8080")), (Ok(90), Ok(80), Ok(81)));
        assert_eq!(
            (find("8080"), find("x"), find("nowhere:x")),
            (Err(Code::SpecInvalid), Err(Code::SpecInvalid), Err(Code::SpecInvalid))
        );
        // The pattern in the description permits these.
        for unknown in ["1", "0.0.0.0:8080", "nowhere:1", "99999"] {
            assert_eq!(find(unknown), Err(Code::ForwardNotFound), "{unknown}");
        }
    }
}
