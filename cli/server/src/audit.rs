//! The audit log of the API: whatever changes something or reaches into a guest is written down before it begins, and how it
//! ended when it has; what only looks, when it has. One place for all routes.
//!
//! ```text
//!  guard (who) ──> here: attempt, synced ──> handler ──> here: outcome
//!                       └── Ticket ──> operations.rs, exec, files: what ends later ends its own line
//!              ──> handler of what only looks ──> here: outcome, not waited for
//!              ──> once.rs answers by itself ──> here: outcome, not waited for
//!              ──> handler of what opens a door ──> here: a refusal; what goes through is written down there
//! ```
//!
//! Invariant: where the attempt cannot be written, nothing is done; where a look cannot be written, nothing is told. What a request
//! says and no route reads never stands where a name is looked for.

use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::extract::{FromRequestParts, MatchedPath, RawPathParams, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use nido_vmm::audit::{Audited, Caller as Who, Ending, Face};
use nido_vmm::error::{Code, Error, Result};
use nido_vmm::text::head;
use serde_json::{Map, Value, json};

use super::App;
use super::answer::Problem;
use super::ask::media_type;
use super::guard::Caller;
use super::openapi::{self, Takes};
use super::pace;
use super::query::{pairs, shown};
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
        Err(error) => end(audited, Ending::from(error), error.code().slug()),
    }
}

/// Of an answer: that a line tells of it.
#[derive(Debug, Clone, Copy)]
struct Told;

/// Writes down what is asked for and how it ended.
pub async fn audit(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> std::result::Result<Response, Problem> {
    let Some((tool, who)) = named(&request) else { return Ok(next.run(request).await) };
    let (request, arguments) = arguments(request).await?;
    let mut response = match tool {
        Tool::Acts(tool) => acted(&app, who, tool, arguments, request, next).await?,
        Tool::Looks(tool) | Tool::Opens(tool) => {
            let response = next.run(request).await;
            if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                return Ok(response);
            }
            let how = ending(&response);
            looked(&app, who, tool, arguments, how).await?;
            response
        }
    };
    response.extensions_mut().insert(Told);
    Ok(response)
}

/// Writes down what was answered without being carried out, because of its `Idempotency-Key`: an answer that is told again, a key
/// that is refused. Nothing is done, so it is a look.
pub async fn audit_again(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> std::result::Result<Response, Problem> {
    let has_key = request.method() == Method::POST && request.headers().contains_key("idempotency-key");
    let named = named(&request).filter(|_| has_key);
    let Some((Tool::Acts(tool) | Tool::Looks(tool) | Tool::Opens(tool), who)) = named else {
        return Ok(next.run(request).await);
    };
    let (request, arguments) = arguments(request).await?;
    let response = next.run(request).await;
    if response.extensions().get::<Told>().is_none() {
        let (ending, reason) = ending(&response);
        let is_again = response.headers().contains_key("idempotency-replayed");
        looked(&app, who, tool, arguments, (ending, if is_again { "replayed" } else { reason })).await?;
    }
    Ok(response)
}

/// What a request is called, and who asks; nothing if it is not written down.
fn named(request: &Request) -> Option<(Tool, Who)> {
    let tool = tool(request.method(), request.extensions().get::<MatchedPath>()?.as_str())?;
    let caller = request.extensions().get::<Caller>()?;
    Some((tool, Who { face: Face::Api, actor: caller.actor.clone(), agent: agent(request.headers()) }))
}

/// What a client says it is.
pub fn agent(headers: &HeaderMap) -> Option<String> {
    let agent = headers.get(header::USER_AGENT)?;
    Some(String::from_utf8_lossy(agent.as_bytes()).into_owned())
}

/// The one line about a look. Short, but another process may hold the log.
async fn looked(
    app: &Arc<App>,
    who: Who,
    tool: &'static str,
    arguments: Value,
    (ending, reason): (Ending, &'static str),
) -> Result<()> {
    let owner = Arc::clone(app);
    blocking(move || owner.nido.audit_looked(&who, tool, &arguments, ending, reason)).await
}

/// Attempt and outcome around what changes something or reaches into a guest.
async fn acted(
    app: &Arc<App>,
    who: Who,
    tool: &'static str,
    arguments: Value,
    mut request: Request,
    next: Next,
) -> Result<Response> {
    let owner = Arc::clone(app);
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
        Some(code) => (Ending::of_code(*code), code.slug()),
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
    // To answer a HEAD is to do what a GET asks for, and to keep the body.
    let method = if method == Method::HEAD { &Method::GET } else { method };
    Some(match (method.as_str(), route) {
        ("GET", "/v1/vms/{name}/files") => Acts("vm_download"),
        ("PUT", "/v1/vms/{name}/files") => Acts("vm_upload"),
        ("POST", "/v1/vms/{name}/exec") => Acts("vm_exec"),
        ("GET", "/v1/vms/{name}/exec/socket") => Opens("vm_exec"),
        (_, "/" | "/page/{file}" | "/healthz" | "/openapi.json" | "/metrics") => return None,
        ("GET", route) => Looks(look(route)),
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
        ("POST", "/v1/host/check") => Acts("host_check"),
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
        "/v1/vms/{name}/snapshots/{snapshot}" => "snapshot_info",
        "/v1/vms/{name}/forwards" => "forward_list",
        "/v1/templates" => "template_list",
        "/v1/templates/{name}" => "template_info",
        "/v1/pools" => "pool_list",
        "/v1/pools/{name}" => "pool_info",
        "/v1/webhooks" => "webhook_list",
        "/v1/webhooks/{id}" => "webhook_info",
        "/v1/webhooks/{id}/deliveries" => "webhook_deliveries",
        "/v1/events" => "events",
        "/v1/audit" => "audit_show",
        "/v1/operations" => "operation_list",
        "/v1/operations/{id}" => "operation_info",
        "/v1/host" => "host_info",
        _ => "other",
    }
}

/// What is asked: the names of the path, and what the route takes beside them. Files are not read.
async fn arguments(request: Request) -> Result<(Request, Value)> {
    let (mut parts, mut body) = request.into_parts();
    let route = parts.extensions.get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let takes = openapi::takes(&parts.method, &route.unwrap_or_default());
    let mut path = Map::new();
    if let Ok(names) = RawPathParams::from_request_parts(&mut parts, &()).await {
        path.extend(names.iter().map(|(name, value)| (name.to_owned(), value.into())));
    }
    let mut json = None;
    if takes.json && media_type(&parts.headers).as_deref() == Some("application/json") {
        let bytes = pace::read(body, BODY_MAX).await?;
        json = Some(bytes.clone());
        body = Body::from(bytes);
    }
    let told = told(path, parts.uri.query().unwrap_or_default(), json.as_deref(), takes);
    Ok((Request::from_parts(parts, body), told))
}

/// Where is kept what may not stand beside the names of the path.
const APART: [&str; 2] = ["query", "body"];

/// How many names of a query are kept that the route does not take, and how much of each and of its value, in bytes.
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

/// The path counts before the query, the query before the body. What the route does not take of the query, and a field whose name
/// stands already, is kept apart: a name that nobody acts upon would hide the one that is acted upon.
fn told(path: Map<String, Value>, query: &str, body: Option<&[u8]>, takes: &Takes) -> Value {
    let mut arguments = path;
    let mut put = |place: &str, name: String, value: Value, taken: bool| {
        let (name, value) = if taken || place == "body" { (name, value) } else { (short(&name), short_value(value)) };
        if taken && !APART.contains(&name.as_str()) && !arguments.contains_key(&name) {
            arguments.insert(name, value);
        } else if let Value::Object(apart) = arguments.entry(place).or_insert_with(|| json!({})) {
            apart.insert(name, value);
        }
    };
    match pairs(query) {
        Ok(pairs) => {
            for (name, value) in pairs {
                let taken = takes.query.contains(&name);
                put("query", name, shown(&value).into(), taken);
            }
        }
        // Such a request is refused.
        Err(_) => put("query", "raw".into(), query.into(), false),
    }
    match body.filter(|body| !body.is_empty()).map(|body| (serde_json::from_slice(body), body.len())) {
        Some((Ok(Value::Object(fields)), _)) => {
            fields.into_iter().for_each(|(name, value)| put("body", name, value, true));
        }
        // No route takes such a thing.
        Some((_, bytes)) => put("body", "bytes".into(), bytes.into(), false),
        None => {}
    }
    // What nobody reads is not worth a log.
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
    use super::*;

    #[test]
    fn every_route_that_is_described_has_a_name() {
        let api: Value = serde_json::from_str(&crate::openapi()).unwrap();
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
        assert_eq!(tool(&Method::HEAD, "/v1/vms/{name}/files"), Some(Tool::Acts("vm_download")));
        assert_eq!(tool(&Method::PATCH, "/v1/vms"), Some(Tool::Acts("other")));
    }

    fn told_of(method: &Method, route: &str, (query, body): (&str, &str)) -> Value {
        let path = Map::from_iter([("name".to_owned(), json!("web"))]);
        told(path, query, Some(body.as_bytes()).filter(|body| !body.is_empty()), openapi::takes(method, route))
    }

    #[test]
    fn what_no_route_reads_hides_no_name() {
        let delete = |query, body| told_of(&Method::DELETE, "/v1/vms/{name}", (query, body));
        assert_eq!(delete("force=true", ""), json!({ "name": "web", "force": "true" }));
        assert_eq!(
            delete("force=true&name=innocent&vm=other&force=false&query=q&body=b", ""),
            json!({
                "name": "web", "force": "true",
                "query": { "name": "innocent", "vm": "other", "force": "false", "query": "q", "body": "b" }
            })
        );
        let snapshot = |query, body| told_of(&Method::POST, "/v1/vms/{name}/snapshots", (query, body));
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
    fn what_no_route_reads_is_not_kept_at_length() {
        let long = "x".repeat(4000);
        let told = told_of(&Method::GET, "/v1/vms", (&format!("x={long}&{long}=1"), ""));
        assert!(told.to_string().len() < 400, "{told}");
        let many: String = (0..500).map(|n| format!("q{n}=1&")).collect();
        let told = told_of(&Method::GET, "/v1/vms", (&many, ""));
        assert_eq!((told["query"].as_object().unwrap().len(), &told["query"]["left_out"]), (9, &json!(492)));
    }

    #[test]
    fn a_body_is_read_where_one_is_taken() {
        let json = |method, route| openapi::takes(&method, route).json;
        assert!(json(Method::POST, "/v1/vms") && json(Method::PUT, "/v1/pools/{name}"));
        assert!(json(Method::POST, "/v1/vms/{name}/exec") && json(Method::POST, "/v1/vms/{name}/stop"));
        assert!(!json(Method::DELETE, "/v1/vms/{name}") && !json(Method::PUT, "/v1/vms/{name}/files"));
        assert!(!json(Method::PATCH, "/v1/vms") && !json(Method::GET, "/v1/nothing"));
    }
}
