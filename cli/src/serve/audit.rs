//! The audit log of the API: whatever changes something or reaches into a guest is written down before it begins, and how it
//! ended when it has. One place for all routes.
//!
//! ```text
//!  guard (who) ──> here: attempt, synced ──> handler ──> here: outcome
//!                       └── Ticket ──> operations.rs, exec: what ends later ends its own line
//! ```
//!
//! Invariant: where the attempt cannot be written, nothing is done.

use std::sync::{Arc, Mutex, PoisonError};

use axum::body::{Body, to_bytes};
use axum::extract::{FromRequestParts, MatchedPath, RawPathParams, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use nido_vmm::audit::{Audited, Caller as Who, Ending, Face};
use nido_vmm::error::{Code, Error, Result};
use serde_json::{Map, Value, json};

use super::App;
use super::answer::Problem;
use super::ask::media_type;
use super::guard::Caller;
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
    // It is synced to the disk, which may take its time.
    let begun = tokio::task::spawn_blocking(move || owner.nido.audit_begin(&who, tool, &arguments)).await;
    let audited = begun.map_err(|e| Error::internal(format!("the audit log broke down: {e}")))??;
    let ticket = Ticket(Arc::new(Mutex::new(Some(audited))));
    request.extensions_mut().insert(ticket.clone());
    let response = next.run(request).await;
    if let Some(audited) = ticket.take() {
        let (ending, reason) = match response.extensions().get::<Code>() {
            None if response.status().is_client_error() => (Ending::Error, "refused"),
            None => (Ending::Success, ""),
            Some(code @ (Code::Denied | Code::Unauthorized)) => (Ending::Denied, code.slug()),
            Some(code) => (Ending::Error, code.slug()),
        };
        let ended = tokio::task::spawn_blocking(move || end(Some(audited), ending, reason)).await;
        ended.map_err(|e| Error::internal(e.to_string()))?;
    }
    Ok(response)
}

/// What a request is called in the log; the names are those of the tools for agents. What only looks is not written down.
fn tool(method: &Method, route: &str) -> Option<&'static str> {
    let tool = match (method.as_str(), route) {
        ("GET", "/v1/vms/{name}/files") => "vm_download",
        ("PUT", "/v1/vms/{name}/files") => "vm_upload",
        ("POST", "/v1/vms/{name}/exec") | ("GET", "/v1/vms/{name}/exec/socket") => "vm_exec",
        ("GET" | "HEAD" | "OPTIONS", _) => return None,
        ("POST", "/v1/vms") => "vm_spawn",
        ("DELETE", "/v1/vms/{name}") => "vm_delete",
        (_, "/v1/vms/{name}/start") => "vm_start",
        (_, "/v1/vms/{name}/stop") => "vm_stop",
        (_, "/v1/vms/{name}/restart") => "vm_restart",
        (_, "/v1/vms/{name}/pause") => "vm_pause",
        (_, "/v1/vms/{name}/resume") => "vm_resume",
        (_, "/v1/vms/{name}/fork") => "vm_fork",
        ("POST", "/v1/vms/{name}/snapshots") => "vm_snapshot",
        ("DELETE", "/v1/vms/{name}/snapshots/{snapshot}") => "vm_snapshot_delete",
        (_, "/v1/vms/{name}/snapshots/{snapshot}/restore") => "vm_restore",
        ("POST", "/v1/vms/{name}/forwards") => "forward_add",
        ("DELETE", "/v1/vms/{name}/forwards/{host_port}") => "forward_remove",
        ("POST", "/v1/runs") => "vm_run",
        ("POST", "/v1/templates") => "template_create",
        ("DELETE", "/v1/templates/{name}") => "template_delete",
        (_, "/v1/templates/{name}/build") => "template_build",
        (_, "/v1/templates/{name}/bake") => "template_bake",
        (_, "/v1/pools/{name}") => "pool_set",
        ("DELETE", "/v1/operations/{id}") => "operation_cancel",
        ("POST", "/v1/webhooks") => "webhook_add",
        ("DELETE", "/v1/webhooks/{id}") => "webhook_remove",
        (_, "/v1/webhooks/{id}/test") => "webhook_test",
        (_, "/v1/webhooks/deliveries/{delivery}/redeliver") => "webhook_redeliver",
        // A route that this list does not know is written down all the same.
        _ => "other",
    };
    Some(tool)
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
        let too_large = |_| Error::new(Code::BodyTooLarge, format!("the body is longer than {BODY_MAX} bytes"));
        let bytes = to_bytes(body, BODY_MAX).await.map_err(too_large)?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(fields)) => arguments.extend(fields),
            Ok(other) => drop(arguments.insert("body".into(), other)),
            Err(_) => drop(arguments.insert("body".into(), json!({ "bytes": bytes.len() }))),
        }
        body = Body::from(bytes);
    }
    Ok((Request::from_parts(parts, body), Value::Object(arguments)))
}
