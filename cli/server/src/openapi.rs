//! The description of the API, made of the routes and the core's own types, with what holds for every route added once.

use axum::http::Method;
use nido_api::error::Problem;
use nido_api::operation;
use nido_api::{EventKind, LogSource};
use serde_json::{Value, json};
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{Operation, ParameterBuilder, ParameterIn};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::tag::TagBuilder;
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, InfoBuilder, LicenseBuilder, OpenApi, PathItem, Ref, RefOr, ResponseBuilder,
    SecurityRequirement,
};
use utoipa::{PartialSchema, ToSchema};

mod shapes;
mod statuses;

use super::api_description::ApiDescription;
use super::operation_view::ApiOperation as PendingOperation;
use super::{openapi_links, routes};

/// What each noun is about.
const TAGS: [(&str, &str); 13] = [
    ("host", "The host, and the server's own health."),
    ("audit", "The audit log: callers, operations and results."),
    ("vms", "Create, start, stop and delete virtual machines."),
    ("exec", "Run commands in a VM."),
    ("files", "Files of a VM, streamed."),
    ("snapshots", "Save and restore the state of a VM."),
    ("forwards", "Ports of a guest published on the host."),
    ("network", "What a guest may reach, and what it was refused."),
    ("templates", "Root disks and kernels from which VMs are created."),
    ("pools", "VMs that are started in advance."),
    ("webhooks", "Endpoints to which events are posted."),
    ("events", "What happened to VMs, snapshots and templates."),
    ("operations", "Requests that run in the background (`Prefer: respond-async`)."),
];

/// Whether an operation is answered with 202 if that is preferred.
fn may_be_async(id: &str) -> bool {
    operation::of_operation_id(id).is_some_and(|known| known.long_running)
}

/// The operations whose body may be left out.
const OPTIONAL_BODY_OPERATIONS: [&str; 6] =
    ["vm_start", "vm_stop", "vm_restart", "snapshot_restore", "template_build", "template_bake"];
/// What the guest's system calls cannot take.
const NO_NUL_PATTERN: &str = "^[^\\u0000]*$";

const ABOUT: &str = "Disposable virtual machines on this host. Every error is a problem (RFC 9457) with a stable `code` \
             and usually a `hint`. Requests that change something run to their end even if the client disconnects; with \
             `Prefer: respond-async` the response is 202 at once, with an operation to poll and to cancel.";

/// The OpenAPI document, as it is served and kept in the repository.
pub fn text() -> String {
    let mut api = serde_json::to_value(describe()).unwrap_or_default();
    refine_schemas(&mut api);
    serde_json::to_string_pretty(&api).unwrap_or_default() + "\n"
}

/// The same, with the inputs of each route.
pub fn api_description() -> ApiDescription {
    ApiDescription::parse(text())
}

/// What the types hold and their derived schemas do not express: how large numbers may be, what a command needs, which bodies
/// may be absent; and what a client can do next.
fn refine_schemas(api: &mut Value) {
    limit_numbers(api);
    lead_on(api);
    api["servers"] = json!([
        { "url": "/", "description": "The server that this description was fetched from." },
        { "url": "http://127.0.0.1:8080", "description": "`nido api-server start` without options." }
    ]);
    if let Some(responses) = api["components"].as_object_mut() {
        responses.insert("responses".into(), Value::Object(statuses::common()));
    }
    complete_operations(api);
    describe_operations(api);
    for path in api["paths"].as_object_mut().into_iter().flat_map(|paths| paths.values_mut()) {
        for operation in path.as_object_mut().into_iter().flat_map(|item| item.values_mut()) {
            if operation["operationId"].as_str().is_some_and(|id| OPTIONAL_BODY_OPERATIONS.contains(&id)) {
                operation["requestBody"]["required"] = json!(false);
                // What generated clients send for a body that was not given.
                let schema = &mut operation["requestBody"]["content"]["application/json"]["schema"];
                *schema = json!({ "oneOf": [{ "type": "null" }, schema.take()] });
            }
        }
    }
    let kinds = EventKind::ALL.map(|kind| kind.word().replace('.', "\\.")).join("|");
    let parameters = api["paths"]["/v1/events"]["get"]["parameters"].as_array_mut();
    if let Some(which) = parameters.and_then(|all| all.iter_mut().find(|one| one["name"] == "event")) {
        which["schema"]["pattern"] = json!(format!("^({kinds})(,({kinds}))*$"));
        which["schema"]["type"] = json!("string");
    }
    let schemas = &mut api["components"]["schemas"];
    let exec = &mut schemas["ExecBody"];
    exec["properties"]["timeout_seconds"] = json!({
        "type": "integer", "format": "int64", "minimum": 0, "maximum": i64::MAX,
        "description": "`timeout_ms` in seconds; give only one of them."
    });
    exec["properties"]["argv"]["minItems"] = json!(1);
    exec["properties"]["argv"]["items"]["pattern"] = json!(NO_NUL_PATTERN);
    exec["properties"]["env"]["additionalProperties"]["pattern"] = json!(NO_NUL_PATTERN);
    exec["properties"]["env"]["propertyNames"] = json!({ "pattern": "^[^=\\u0000]+$" });
    for word in ["command", "directory", "user"] {
        exec["properties"][word]["pattern"] = json!(NO_NUL_PATTERN);
    }
    exec["properties"]["stdin_base64"]["pattern"] =
        json!("^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$");
    schemas["ForwardSpec"]["properties"]["guest_port"]["minimum"] = json!(1);
    shapes::normalize_schemas(api);
}

/// An operation that one sentence describes has it as its description, too: generators print that.
fn describe_operations(api: &mut Value) {
    let items = api["paths"].as_object_mut().into_iter().flat_map(|paths| paths.values_mut());
    for operation in items.filter_map(Value::as_object_mut).flat_map(|item| item.values_mut()) {
        if let Some(summary) = operation.get("summary").cloned()
            && operation.get("description").is_none()
        {
            operation["description"] = summary;
        }
    }
}

/// Adds what holds for all operations of a kind: their errors, and the headers of requests and answers.
fn complete_operations(api: &mut Value) {
    let text = |about: &str| json!({ "description": about, "schema": { "type": "string" } });
    for (path, item) in api["paths"].as_object_mut().into_iter().flatten() {
        for (method, operation) in item.as_object_mut().into_iter().flatten() {
            let method = Method::from_bytes(method.to_ascii_uppercase().as_bytes()).unwrap_or_default();
            for (status, answer) in operation["responses"].as_object_mut().into_iter().flatten() {
                if answer["description"].as_str().is_none_or(str::is_empty) {
                    answer["description"] = json!(default_description(status));
                }
                if method == Method::POST {
                    answer["headers"]["Idempotency-Replayed"] =
                        text("`true` if this response is a replay for the same `Idempotency-Key`.");
                }
                if status == "202" {
                    answer["headers"]["Preference-Applied"] = text("`respond-async`, if it was requested and applied.");
                }
                if status == "201" && answer["headers"].get("Location").is_none() {
                    answer["headers"]["Location"] = text("The created resource; absent if there are several.");
                }
            }
            if path == "/v1/vms/{name}" && method == Method::GET {
                operation["responses"]["200"]["headers"]["ETag"] = text("The id of the VM, for `If-Match`.");
            }
            statuses::add(operation, &method, path);
            add_parameters(operation, &method, path);
        }
    }
}

/// The headers that requests of a kind may carry.
fn add_parameters(operation: &mut Value, method: &Method, path: &str) {
    let header = |name: &str, about: &str, schema: Value| json!({ "name": name, "in": "header", "required": false, "description": about, "schema": schema });
    let mut more = Vec::new();
    if method == Method::POST {
        let about = "If a request is sent again with its key within a day, the first response is replayed, and the request \
             is not carried out again. A key belongs to one request.";
        let schema = json!({ "type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]*[!-~][ -~]*$" });
        more.push(header("Idempotency-Key", about, schema));
    }
    if path.starts_with("/v1/vms/{name}") && method != Method::GET {
        let about = "The VM's `ETag`, its id in double quotes: the request fails if another VM has the name by now. `*` is any VM.";
        more.push(header("If-Match", about, json!({ "type": "string", "pattern": "^(\\*|\"[0-9a-f]{16}\")$" })));
    }
    if more.is_empty() {
        return;
    }
    match operation["parameters"].as_array_mut() {
        Some(all) => all.extend(more),
        None => operation["parameters"] = Value::Array(more),
    }
}

/// The description of a success, if the route has none.
fn default_description(status: &str) -> &'static str {
    match status {
        "201" => "Created.",
        "202" => "Accepted: the operation runs.",
        "204" => "Done; the response has no body.",
        _ => "Success.",
    }
}

/// Adds examples, and the links from answers to what can be asked next.
fn lead_on(api: &mut Value) {
    let examples = routes::examples();
    let items = api["paths"].as_object_mut().into_iter().flat_map(|paths| paths.values_mut());
    for operation in items.flat_map(|item| item.as_object_mut()).flat_map(|item| item.values_mut()) {
        let Some(id) = operation["operationId"].as_str().map(str::to_owned) else { continue };
        for (_, place, example) in examples.iter().filter(|(of, ..)| *of == id) {
            let holder = match place {
                None => &mut operation["requestBody"],
                Some(status) => &mut operation["responses"][status.to_string()],
            };
            holder["content"]["application/json"]["example"] = example.clone();
        }
        let may_wait = may_be_async(&id);
        for (status, answer) in operation["responses"].as_object_mut().into_iter().flatten() {
            if let Some(links) = openapi_links::of(&id, status, may_wait) {
                answer["links"] = links;
            }
        }
    }
}

/// Adds to every integer the range of its type. The formats are those of OpenAPI itself, which has none without a sign: a generator
/// that does not know a format takes 32 bits, too few for the size of a disk.
fn limit_numbers(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            let (format, most) = match object.get("format").and_then(Value::as_str) {
                Some("u-int8" | "uint8") => ("int32", u64::from(u8::MAX)),
                Some("u-int16" | "uint16") => ("int32", u64::from(u16::MAX)),
                Some("u-int32" | "uint32") => ("int64", u64::from(u32::MAX)),
                Some("u-int64" | "uint64") => ("int64", i64::MAX.unsigned_abs()),
                _ => ("", 0),
            };
            if most > 0 {
                object.insert("format".into(), json!(format));
                object.entry("maximum").or_insert(json!(most));
                object.entry("minimum").or_insert(json!(0));
            }
            object.values_mut().for_each(limit_numbers);
        }
        Value::Array(items) => items.iter_mut().for_each(limit_numbers),
        _ => {}
    }
}

fn describe() -> OpenApi {
    let mut api = routes::described().into_openapi();
    api.info = InfoBuilder::new()
        .title("nido")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(ABOUT))
        .license(Some(LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build()))
        .build();
    let tags = TAGS.map(|(name, about)| TagBuilder::new().name(name).description(Some(about)).build());
    api.tags = Some(tags.to_vec());
    let bearer = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
    let mut components = api.components.take().unwrap_or_else(|| ComponentsBuilder::new().build());
    components.schemas.insert(Problem::name().into_owned(), Problem::schema());
    components.schemas.insert(LogSource::name().into_owned(), LogSource::schema());
    components.schemas.insert(PendingOperation::name().into_owned(), PendingOperation::schema());
    components.add_security_scheme("token", bearer);
    api.components = Some(components);
    api.security = Some(vec![SecurityRequirement::new("token", [""; 0])]);
    for operation in api.paths.paths.values_mut().flat_map(operations) {
        if operation.operation_id.as_deref().is_some_and(may_be_async) {
            let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(PendingOperation::name()))).build();
            let location = HeaderBuilder::new().description(Some("The operation.")).build();
            let accepted = ResponseBuilder::new()
                .description("Accepted: an operation to poll, for requests with `Prefer: respond-async`.")
                .content("application/json", content)
                .header("Location", location)
                .build();
            operation.responses.responses.insert("202".into(), RefOr::T(accepted));
            let prefer = ParameterBuilder::new()
                .name("Prefer")
                .parameter_in(ParameterIn::Header)
                .description(Some("`respond-async`: respond at once with an operation."))
                .schema(Some(String::schema()))
                .build();
            operation.parameters.get_or_insert_default().push(RefOr::T(prefer));
        }
    }
    api
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.put, &mut item.post, &mut item.delete].into_iter().filter_map(Option::as_mut)
}
