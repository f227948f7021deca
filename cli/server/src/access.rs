//! Which operation a route does, and so which scope it requires: derived from the registry (`nido_api::operation`).
//!
//! Invariant: a route that neither belongs to an operation nor is listed here is refused.

use axum::http::Method;
use nido_api::Scope;
use nido_api::error::{Error, Result};
use nido_api::operation::{self, Operation};

/// The WebSocket of `vm_exec`, which is not part of the OpenAPI document.
pub const EXEC_SOCKET: &str = "/v1/vms/{name}/exec/socket";
/// Routes that reveal nothing about VMs: they need no token.
const OPEN_ROUTES: [&str; 4] = ["/", "/page/{file}", "/healthz", "/openapi.json"];
/// The metrics, which are polled and belong to no operation.
const METRICS: &str = "/metrics";

/// Whether requests for a route are left out of the audit log.
pub fn is_unrecorded(route: &str) -> bool {
    route == METRICS || OPEN_ROUTES.contains(&route)
}

/// The operation of a route. A `HEAD` runs like a `GET`; only the body is not sent.
pub fn operation_of(method: &Method, route: &str) -> Option<&'static Operation> {
    let method = if method == Method::HEAD { &Method::GET } else { method };
    if method == Method::GET && route == EXEC_SOCKET {
        return Some(operation::VM_EXEC);
    }
    operation::of_route(method.as_str(), route)
}

/// The scope that a route requires; `None` if it needs none, or has no such method, which its fallback reports.
///
/// # Errors
/// `internal` for a route that has no entry in the registry.
pub fn required_scope(method: &Method, route: &str) -> Result<Option<Scope>> {
    if OPEN_ROUTES.contains(&route) {
        return Ok(None);
    }
    if route == METRICS {
        return Ok(Some(Scope::Read));
    }
    if let Some(operation) = operation_of(method, route) {
        return Ok(Some(operation.scope));
    }
    let is_known = route == EXEC_SOCKET
        || operation::ALL.iter().any(|operation| operation.route.is_some_and(|known| known.path == route));
    if is_known { Ok(None) } else { Err(Error::internal(format!("{method} {route} belongs to no operation"))) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;

    /// Routes of the OpenAPI document that belong to no operation, by `operationId`.
    const NO_OPERATION: [&str; 3] = ["health", "metrics", "openapi"];

    #[test]
    fn the_routes_are_those_of_the_registry() {
        let api: Value = serde_json::from_str(&crate::openapi()).unwrap();
        let mut described = BTreeSet::new();
        for (path, item) in api["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                let id = operation["operationId"].as_str().unwrap().to_owned();
                if !NO_OPERATION.contains(&id.as_str()) {
                    described.insert((method.to_ascii_uppercase(), path.clone(), id));
                }
            }
        }
        let routes = operation::ALL.iter().filter_map(|operation| operation.route);
        let registry = routes.map(|route| (route.method.word().into(), route.path.into(), route.operation_id.into()));
        assert_eq!(described, registry.collect());
    }

    #[test]
    fn every_route_has_a_scope_and_an_unknown_one_is_refused() {
        let of = |method, route| required_scope(&method, route).unwrap();
        assert_eq!([of(Method::GET, "/"), of(Method::GET, "/openapi.json")], [None, None]);
        assert_eq!(of(Method::HEAD, "/v1/vms"), Some(Scope::Read));
        assert_eq!(of(Method::POST, "/v1/vms"), Some(Scope::Run));
        assert_eq!(of(Method::GET, "/v1/vms/{name}/files"), Some(Scope::Run));
        assert_eq!(of(Method::GET, EXEC_SOCKET), Some(Scope::Run));
        assert_eq!(of(Method::GET, METRICS), Some(Scope::Read));
        assert_eq!(of(Method::DELETE, "/v1/templates/{name}"), Some(Scope::Admin));
        assert_eq!(of(Method::PATCH, "/v1/vms"), None, "the fallback answers 405");
        assert!(required_scope(&Method::GET, "/v1/forgotten").is_err());
    }
}
