//! The audit log of the API: whatever changes something or reaches into a guest is written down before it begins, and how it
//! ended when it has; what only looks, when it has. One place for all routes.
//!
//! ```text
//!  guard (who) ──> here: attempt, synced ──> handler ──> here: outcome
//!                       └── Ticket ──> operations.rs, exec: what ends later ends its own line
//!              ──> handler of what only looks ──> here: outcome, not waited for
//!              ──> handler of what opens a door ──> here: a refusal; what goes through is written down there
//! ```
//!
//! Invariant: where the attempt cannot be written, nothing is done; where a look cannot be written, nothing is told.

use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::extract::{FromRequestParts, MatchedPath, RawPathParams, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use nido_vmm::audit::{Audited, Caller as Who, Ending, Face};
use nido_vmm::error::{Code, Error, Result};
use serde_json::{Map, Value, json};

use super::App;
use super::answer::Problem;
use super::ask::media_type;
use super::guard::Caller;
use super::pace;
use super::routes::BODY_MAX;

/// The line about a request that is still open.
#[derive(Debug, Clone)]
pub struct Ticket(Arc<Mutex<Option<Audited>>>);

impl Ticket {
    /// Takes the line over: whoever does so ends it.
    pub fn take(&self) -> Option<Audited> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Ends a line. It has been done; that only the line about it is missing goes to the server's own log.
pub fn end(audited: Option<Audited>, ending: Ending, reason: &str) {
    if let Some(audited) = audited
        && let Err(error) = audited.end_as(ending, reason)
    {
        tracing::error!("{error}");
    }
}

/// Ends a line with how something ended.
pub fn end_with<T>(audited: Option<Audited>, outcome: &Result<T>) {
    match outcome {
        Ok(_) => end(audited, Ending::Success, ""),
        Err(error) => end(audited, Ending::Error, error.code().slug()),
    }
}

/// Writes down what is asked for and how it ended.
pub async fn audit(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> std::result::Result<Response, Problem> {
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let tool = route.and_then(|route| tool(request.method(), &route));
    let (Some(tool), Some(caller)) = (tool, request.extensions().get::<Caller>().cloned()) else {
        return Ok(next.run(request).await);
    };
    let (mut request, arguments) = arguments(request).await?;
    let who = Who { face: Face::Api, actor: caller.actor, agent: None };
    let owner = Arc::clone(&app);
    let tool = match tool {
        Tool::Acts(tool) => tool,
        Tool::Looks(tool) | Tool::Opens(tool) => {
            let response = next.run(request).await;
            if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                return Ok(response);
            }
            let (ending, reason) = ending(&response);
            // Short, but another process may hold the log.
            blocking(move || owner.nido.audit_looked(&who, tool, &arguments, ending, reason)).await?;
            return Ok(response);
        }
    };
    // It is synced to the disk, which may take its time.
    let audited = blocking(move || owner.nido.audit_begin(&who, tool, &arguments)).await?;
    let ticket = Ticket(Arc::new(Mutex::new(Some(audited))));
    request.extensions_mut().insert(ticket.clone());
    let response = next.run(request).await;
    if let Some(audited) = ticket.take() {
        let (ending, reason) = ending(&response);
        blocking(move || {
            end(Some(audited), ending, reason);
            Ok(())
        })
        .await?;
    }
    Ok(response)
}

/// Writes to the log without keeping others from being served: it may have to wait for the disk or for another process.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Error::internal(format!("the audit log broke down: {e}")))?
}

/// What an answer says of how it ended, and a word that says why.
fn ending(response: &Response) -> (Ending, &'static str) {
    match response.extensions().get::<Code>() {
        None if response.status().is_client_error() => (Ending::Error, "refused"),
        None => (Ending::Success, ""),
        Some(code @ (Code::Denied | Code::Unauthorized)) => (Ending::Denied, code.slug()),
        Some(code) => (Ending::Error, code.slug()),
    }
}

/// What a request is called in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tool {
    /// It changes something or reaches into a guest.
    Acts(&'static str),
    /// It only looks.
    Looks(&'static str),
    /// It opens a connection over which is said later what shall be done: whoever hears that writes it down.
    Opens(&'static str),
}

/// What a request is called in the log; the names are those of the tools for agents. Not written down is what tells nothing
/// about VMs (the page, the description, health), and the counters, which a program fetches all day.
fn tool(method: &Method, route: &str) -> Option<Tool> {
    use Tool::{Acts, Looks, Opens};
    Some(match (method.as_str(), route) {
        ("GET", "/v1/vms/{name}/files") => Acts("vm_download"),
        ("PUT", "/v1/vms/{name}/files") => Acts("vm_upload"),
        ("POST", "/v1/vms/{name}/exec") => Acts("vm_exec"),
        ("GET", "/v1/vms/{name}/exec/socket") => Opens("vm_exec"),
        (_, "/" | "/page/{file}" | "/healthz" | "/openapi.json" | "/metrics") => return None,
        ("GET" | "HEAD", route) => Looks(look(route)),
        // Answered by what is allowed, without a look.
        ("OPTIONS", _) => return None,
        ("POST", "/v1/vms") => Acts("vm_spawn"),
        ("DELETE", "/v1/vms/{name}") => Acts("vm_delete"),
        (_, "/v1/vms/{name}/start") => Acts("vm_start"),
        (_, "/v1/vms/{name}/stop") => Acts("vm_stop"),
        (_, "/v1/vms/{name}/restart") => Acts("vm_restart"),
        (_, "/v1/vms/{name}/pause") => Acts("vm_pause"),
        (_, "/v1/vms/{name}/resume") => Acts("vm_resume"),
        (_, "/v1/vms/{name}/fork") => Acts("vm_fork"),
        ("POST", "/v1/vms/{name}/snapshots") => Acts("vm_snapshot"),
        ("DELETE", "/v1/vms/{name}/snapshots/{snapshot}") => Acts("vm_snapshot_delete"),
        (_, "/v1/vms/{name}/snapshots/{snapshot}/restore") => Acts("vm_restore"),
        ("POST", "/v1/vms/{name}/forwards") => Acts("forward_add"),
        ("DELETE", "/v1/vms/{name}/forwards/{host_port}") => Acts("forward_remove"),
        ("POST", "/v1/runs") => Acts("vm_run"),
        ("POST", "/v1/templates") => Acts("template_create"),
        ("DELETE", "/v1/templates/{name}") => Acts("template_delete"),
        (_, "/v1/templates/{name}/build") => Acts("template_build"),
        (_, "/v1/templates/{name}/bake") => Acts("template_bake"),
        (_, "/v1/pools/{name}") => Acts("pool_set"),
        ("DELETE", "/v1/operations/{id}") => Acts("operation_cancel"),
        ("POST", "/v1/webhooks") => Acts("webhook_add"),
        ("DELETE", "/v1/webhooks/{id}") => Acts("webhook_remove"),
        (_, "/v1/webhooks/{id}/test") => Acts("webhook_test"),
        (_, "/v1/webhooks/deliveries/{delivery}/redeliver") => Acts("webhook_redeliver"),
        // A route that this list does not know is written down all the same.
        _ => Acts("other"),
    })
}

/// What a look is called.
fn look(route: &str) -> &'static str {
    match route {
        "/v1/vms" => "vm_ls",
        "/v1/vms/{name}" => "vm_info",
        "/v1/vms/{name}/logs" => "vm_logs",
        "/v1/vms/{name}/snapshots" => "snapshot_list",
        "/v1/vms/{name}/forwards" => "forward_list",
        "/v1/templates" => "template_list",
        "/v1/templates/{name}" => "template_info",
        "/v1/pools" => "pool_list",
        "/v1/webhooks" => "webhook_list",
        "/v1/webhooks/{id}/deliveries" => "webhook_deliveries",
        "/v1/events" => "events",
        "/v1/audit" => "audit_show",
        "/v1/operations" => "operation_list",
        "/v1/operations/{id}" => "operation_info",
        "/v1/host" => "host_info",
        _ => "other",
    }
}

/// What is asked: the names of the path, the query, and a JSON body. Files are not read.
async fn arguments(request: Request) -> Result<(Request, Value)> {
    let (mut parts, body) = request.into_parts();
    let mut arguments = Map::new();
    if let Ok(names) = RawPathParams::from_request_parts(&mut parts, &()).await {
        for (name, value) in &names {
            arguments.insert(name.to_owned(), value.into());
        }
    }
    if let Some(query) = parts.uri.query() {
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            arguments.insert(key.into_owned(), value.into_owned().into());
        }
    }
    let mut body = body;
    if media_type(&parts.headers).as_deref() == Some("application/json") {
        let bytes = pace::read(body, BODY_MAX).await?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(fields)) => arguments.extend(fields),
            Ok(other) => drop(arguments.insert("body".into(), other)),
            Err(_) => drop(arguments.insert("body".into(), json!({ "bytes": bytes.len() }))),
        }
        body = Body::from(bytes);
    }
    Ok((Request::from_parts(parts, body), Value::Object(arguments)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_that_is_described_has_a_name() {
        let api: Value = serde_json::from_str(&crate::serve::openapi()).unwrap();
        let mut looks = 0;
        for (route, item) in api["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys() {
                let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
                let tool = tool(&method, route);
                assert!(!matches!(tool, Some(Tool::Acts("other") | Tool::Looks("other"))), "{method} {route}");
                let open = matches!(route.as_str(), "/healthz" | "/openapi.json" | "/metrics");
                assert_eq!(tool.is_none(), open, "{method} {route}");
                looks += u32::from(matches!(tool, Some(Tool::Looks(_))));
            }
        }
        assert!(looks > 10);
    }

    #[test]
    fn what_reaches_into_a_guest_is_no_look() {
        let get = |route| tool(&Method::GET, route);
        assert_eq!(get("/v1/vms/{name}/files"), Some(Tool::Acts("vm_download")));
        assert_eq!(get("/v1/vms/{name}/exec/socket"), Some(Tool::Opens("vm_exec")));
        assert_eq!(get("/v1/vms"), Some(Tool::Looks("vm_ls")));
        assert_eq!(tool(&Method::HEAD, "/v1/vms"), Some(Tool::Looks("vm_ls")));
        assert_eq!(tool(&Method::PATCH, "/v1/vms"), Some(Tool::Acts("other")));
    }
}
