//! Audit middleware for all routes. A request that changes something or reaches into a guest is recorded before it runs, and
//! its result afterwards. A request that only reads is recorded once, after it has run.
//!
//! ```text
//!  auth (caller) ──> here: attempt, synced ──> handler ──> here: outcome
//!                       └── AuditTicket ──> operations.rs, exec, files: complete their own entry
//!              ──> handler of a read ──> here: outcome, not synced
//!              ──> idempotency.rs responds by itself ──> here: outcome, not synced
//!              ──> handler of a WebSocket ──> here: a refusal; routes/socket.rs records the rest
//! ```
//!
//! Invariants: if the attempt cannot be written, the request does not run; if a read cannot be recorded, nothing is returned.
//! Parameters that no route reads never replace a name that a route reads.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{FromRequestParts, MatchedPath, RawPathParams, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use nido_api::error::{Code, Result};
use nido_api::operation::{self as op, Operation};
use nido_api::sanitize::head;
use nido_api::{Caller as AuditCaller, FrontEnd};
use nido_core::audit::AuditOutcome;
use nido_core::execute::{Request as Execution, Verdict};
use serde_json::{Map, Value, json};

use super::api_description::RouteInputs;
use super::audit_entry::{AuditTicket, user_agent};
use super::auth::Caller;
use super::extract::JSON_BODY_MAX;
use super::media_type::media_type;
use super::query::{pairs, shown};
use super::response::Problem;
use super::{App, access, timeouts};

/// Marks a response that has an entry in the audit log.
#[derive(Debug, Clone, Copy)]
struct AuditedResponse;

/// Records each request and its result.
pub async fn audit_request(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> std::result::Result<Response, Problem> {
    let Some((action, caller)) = named(&request) else { return Ok(next.run(request).await) };
    let (mut request, arguments) = arguments(&app, request).await?;
    let asked = Execution { operation: action.operation(), caller, arguments };
    let mut response = if let AuditAction::Write(_) = action {
        // It is synced to the disk, which may take its time.
        let ticket = AuditTicket::new(app.nido.attempt(asked).await?);
        request.extensions_mut().insert(ticket.clone());
        let response = next.run(request).await;
        if let Some(attempt) = ticket.take()
            && let Err(error) = attempt.end(verdict(&response)).await
        {
            tracing::error!("{error}");
        }
        response
    } else {
        let response = next.run(request).await;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        app.nido.owe(asked).end(verdict(&response)).await?;
        response
    };
    response.extensions_mut().insert(AuditedResponse);
    Ok(response)
}

/// Records requests that did not run because of their `Idempotency-Key`: a replayed response, a refused key. They change nothing, so
/// they are recorded as reads.
pub async fn audit_replay(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> std::result::Result<Response, Problem> {
    let has_key = request.method() == Method::POST && request.headers().contains_key("idempotency-key");
    let Some((action, caller)) = named(&request).filter(|_| has_key) else { return Ok(next.run(request).await) };
    let (request, arguments) = arguments(&app, request).await?;
    let response = next.run(request).await;
    if response.extensions().get::<AuditedResponse>().is_none() {
        let mut verdict = verdict(&response);
        if response.headers().contains_key("idempotency-replayed") {
            verdict.reason = "replayed".into();
        }
        app.nido.owe(Execution { operation: action.operation(), caller, arguments }).end(verdict).await?;
    }
    Ok(response)
}

/// The action and the caller of a request; `None` if it is not recorded.
fn named(request: &Request) -> Option<(AuditAction, AuditCaller)> {
    let action = action(request.method(), request.extensions().get::<MatchedPath>()?.as_str())?;
    let caller = request.extensions().get::<Caller>()?;
    Some((
        action,
        AuditCaller { face: FrontEnd::Api, actor: caller.actor.clone(), agent: user_agent(request.headers()) },
    ))
}

/// The outcome that a response stands for.
fn verdict(response: &Response) -> Verdict {
    match response.extensions().get::<Code>() {
        None if response.status().is_client_error() => {
            Verdict { ending: AuditOutcome::Error, reason: "refused".into() }
        }
        None => Verdict::success(""),
        Some(code) => Verdict { ending: AuditOutcome::of_code(*code), reason: code.slug().into() },
    }
}

/// How a request is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AuditAction {
    /// It changes something or reaches into a guest.
    Write(&'static Operation),
    /// It only reads.
    Read(&'static Operation),
    /// It opens a connection, whose handler records what is requested over it.
    Open(&'static Operation),
}

impl AuditAction {
    const fn operation(self) -> &'static Operation {
        let (Self::Write(operation) | Self::Read(operation) | Self::Open(operation)) = self;
        operation
    }
}

/// The action of a request. `None` for requests that reveal nothing about VMs (the page, the description, health) and for the metrics,
/// which are polled.
fn action(method: &Method, route: &str) -> Option<AuditAction> {
    // The response of OPTIONS lists the allowed methods and reads nothing.
    if access::is_unrecorded(route) || method == Method::OPTIONS {
        return None;
    }
    Some(match access::operation_of(method, route) {
        Some(operation) if route == access::EXEC_SOCKET => AuditAction::Open(operation),
        Some(operation) if operation.is_read() => AuditAction::Read(operation),
        Some(operation) => AuditAction::Write(operation),
        // A method that the route does not have is recorded nevertheless.
        None if *method == Method::GET || *method == Method::HEAD => AuditAction::Read(op::OTHER),
        None => AuditAction::Write(op::OTHER),
    })
}

/// The arguments of a request: path parameters, query and JSON body. Files are not read.
async fn arguments(app: &App, request: Request) -> Result<(Request, Value)> {
    let (mut parts, mut body) = request.into_parts();
    let route = parts.extensions.get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let inputs = app.description.inputs(&parts.method, &route.unwrap_or_default());
    let mut path = Map::new();
    if let Ok(names) = RawPathParams::from_request_parts(&mut parts, &()).await {
        path.extend(names.iter().map(|(name, value)| (name.to_owned(), value.into())));
    }
    let mut json = None;
    if inputs.json && media_type(&parts.headers).as_deref() == Some("application/json") {
        let bytes = timeouts::read_body(body, JSON_BODY_MAX).await?;
        json = Some(bytes.clone());
        body = Body::from(bytes);
    }
    let recorded = recorded_arguments(path, parts.uri.query().unwrap_or_default(), json.as_deref(), inputs);
    Ok((Request::from_parts(parts, body), recorded))
}

/// Members that hold arguments which must not be mixed with the path parameters.
const RESERVED_MEMBERS: [&str; 2] = ["query", "body"];

/// How many unknown query parameters are recorded, and the most bytes of each name and value.
const UNKNOWN_MAX: usize = 8;
const UNKNOWN_BYTES: usize = 64;

fn short(text: &str) -> String {
    match text.len() {
        0..=UNKNOWN_BYTES => text.to_owned(),
        length => format!("{}[{} bytes]", head(text, UNKNOWN_BYTES), length),
    }
}

fn short_value(value: Value) -> Value {
    match value {
        Value::String(text) => short(&text).into(),
        other => other,
    }
}

/// Path parameters take precedence over the query, the query over the body. Unknown query parameters, and fields whose name is taken,
/// are recorded apart, so they cannot hide an argument that is used.
fn recorded_arguments(path: Map<String, Value>, query: &str, body: Option<&[u8]>, inputs: &RouteInputs) -> Value {
    let mut arguments = path;
    let mut put = |place: &str, name: String, value: Value, taken: bool| {
        let (name, value) = if taken || place == "body" { (name, value) } else { (short(&name), short_value(value)) };
        if taken && !RESERVED_MEMBERS.contains(&name.as_str()) && !arguments.contains_key(&name) {
            arguments.insert(name, value);
        } else if let Value::Object(apart) = arguments.entry(place).or_insert_with(|| json!({})) {
            apart.insert(name, value);
        }
    };
    match pairs(query) {
        Ok(pairs) => {
            for (name, value) in pairs {
                let taken = inputs.query.contains(&name);
                put("query", name, shown(&value).into(), taken);
            }
        }
        // The route refuses such a request.
        Err(_) => put("query", "raw".into(), query.into(), false),
    }
    match body.filter(|body| !body.is_empty()).map(|body| (serde_json::from_slice(body), body.len())) {
        Some((Ok(Value::Object(fields)), _)) => {
            fields.into_iter().for_each(|(name, value)| put("body", name, value, true));
        }
        // No route accepts such a body.
        Some((_, bytes)) => put("body", "bytes".into(), bytes.into(), false),
        None => {}
    }
    // Arguments that no route reads must not fill the log.
    if let Some(Value::Object(unknown)) = arguments.get_mut("query")
        && unknown.len() > UNKNOWN_MAX
    {
        let all = unknown.len();
        *unknown = std::mem::take(unknown).into_iter().take(UNKNOWN_MAX).collect();
        unknown.insert("left_out".into(), (all - UNKNOWN_MAX).into());
    }
    Value::Object(arguments)
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;
    use crate::api_description::ApiDescription;

    static API: LazyLock<ApiDescription> = LazyLock::new(crate::openapi::api_description);

    #[test]
    fn every_route_that_is_described_has_a_name() {
        let api: Value = serde_json::from_str(&crate::openapi()).unwrap();
        let mut reads = 0;
        for (route, item) in api["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys() {
                let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
                let found = action(&method, route);
                assert!(found.is_none_or(|found| found.operation() != op::OTHER), "{method} {route}");
                let open = matches!(route.as_str(), "/healthz" | "/openapi.json" | "/metrics");
                assert_eq!(found.is_none(), open, "{method} {route}");
                reads += u32::from(matches!(found, Some(AuditAction::Read(_))));
            }
        }
        assert!(reads > 10);
    }

    #[test]
    fn requests_that_reach_into_a_guest_are_writes() {
        let get = |route| action(&Method::GET, route);
        assert_eq!(get("/v1/vms/{name}/files"), Some(AuditAction::Write(op::VM_DOWNLOAD)));
        assert_eq!(get("/v1/vms/{name}/exec/socket"), Some(AuditAction::Open(op::VM_EXEC)));
        assert_eq!(get("/v1/vms"), Some(AuditAction::Read(op::VM_LS)));
        assert_eq!(action(&Method::HEAD, "/v1/vms"), Some(AuditAction::Read(op::VM_LS)));
        assert_eq!(action(&Method::HEAD, "/v1/vms/{name}/files"), Some(AuditAction::Write(op::VM_DOWNLOAD)));
        assert_eq!(action(&Method::PATCH, "/v1/vms"), Some(AuditAction::Write(op::OTHER)));
    }

    fn recorded_of(method: &Method, route: &str, (query, body): (&str, &str)) -> Value {
        let path = Map::from_iter([("name".to_owned(), json!("web"))]);
        recorded_arguments(
            path,
            query,
            Some(body.as_bytes()).filter(|body| !body.is_empty()),
            API.inputs(method, route),
        )
    }

    #[test]
    fn unread_arguments_do_not_hide_used_ones() {
        let delete = |query, body| recorded_of(&Method::DELETE, "/v1/vms/{name}", (query, body));
        assert_eq!(delete("force=true", ""), json!({ "name": "web", "force": "true" }));
        assert_eq!(
            delete("force=true&name=innocent&vm=other&force=false&query=q&body=b", ""),
            json!({
                "name": "web", "force": "true",
                "query": { "name": "innocent", "vm": "other", "force": "false", "query": "q", "body": "b" }
            })
        );
        let snapshot = |query, body| recorded_of(&Method::POST, "/v1/vms/{name}/snapshots", (query, body));
        assert_eq!(snapshot("", r#"{"name": "first"}"#), json!({ "name": "web", "body": { "name": "first" } }));
        assert_eq!(
            snapshot("body=x", r#"{"body": {"name": "a"}, "query": 1, "x": 2}"#),
            json!({ "name": "web", "x": 2, "query": { "body": "x" }, "body": { "body": { "name": "a" }, "query": 1 } })
        );
        for not in ["[1]", "\"text\"", "{", "{} {}"] {
            assert_eq!(snapshot("", not), json!({ "name": "web", "body": { "bytes": not.len() } }), "{not}");
        }
    }

    // A token that may only read wrote four thousand bytes into the log with each request: nothing reads what it sent.
    #[test]
    fn unread_arguments_are_truncated() {
        let long = "x".repeat(4000);
        let told = recorded_of(&Method::GET, "/v1/vms", (&format!("x={long}&{long}=1"), ""));
        assert!(told.to_string().len() < 400, "{told}");
        let many: String = (0..500).map(|n| format!("q{n}=1&")).collect();
        let told = recorded_of(&Method::GET, "/v1/vms", (&many, ""));
        assert_eq!((told["query"].as_object().unwrap().len(), &told["query"]["left_out"]), (9, &json!(492)));
    }

    #[test]
    fn bodies_are_recorded_for_routes_that_accept_json() {
        let json = |method, route| API.inputs(&method, route).json;
        assert!(json(Method::POST, "/v1/vms") && json(Method::PUT, "/v1/pools/{name}"));
        assert!(json(Method::POST, "/v1/vms/{name}/exec") && json(Method::POST, "/v1/vms/{name}/stop"));
        assert!(!json(Method::DELETE, "/v1/vms/{name}") && !json(Method::PUT, "/v1/vms/{name}/files"));
        assert!(!json(Method::PATCH, "/v1/vms") && !json(Method::GET, "/v1/nothing"));
    }
}
