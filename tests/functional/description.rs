//! The description as a client uses it that knows nothing else: it sends the examples and follows the links.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::http::{HttpResponse, Server};
use crate::support::receiver::Receiver;
use crate::support::{Home, until};

/// Links that lead where QEMU's part in it cannot be played: copies of a VM that runs.
const EXCLUDED_OPERATIONS: [&str; 1] = ["vm_fork"];

/// A client that has read the description.
struct Client<'a> {
    server: &'a Server,
    /// By operation: method, path, and its description.
    operations: BTreeMap<String, (String, String, Value)>,
    /// The links that were followed.
    followed: Vec<String>,
}

/// A response, and the request's part in it.
struct RecordedResponse {
    operation: String,
    status: u16,
    path: BTreeMap<String, String>,
    body: Value,
}

impl<'a> Client<'a> {
    fn new(server: &'a Server) -> Self {
        let api = server.get("/openapi.json").ok(200);
        let mut operations = BTreeMap::new();
        for (path, item) in api["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                let id = operation["operationId"].as_str().unwrap().to_owned();
                operations.insert(id, (method.to_uppercase(), path.clone(), operation.clone()));
            }
        }
        Self { server, operations, followed: Vec::new() }
    }

    /// Asks for an operation: what is no part of the path goes into the query.
    fn send_request(
        &self,
        id: &str,
        parameters: &BTreeMap<String, String>,
        body: Option<&Value>,
        prefer: &str,
    ) -> RecordedResponse {
        let (method, template, operation) = &self.operations[id];
        let (mut path, mut query, mut of_path) = (template.clone(), Vec::new(), BTreeMap::new());
        for (name, value) in parameters {
            let place = format!("{{{name}}}");
            if path.contains(&place) {
                path = path.replace(&place, value);
                of_path.insert(name.clone(), value.clone());
            } else {
                query.push(format!("{name}={value}"));
            }
        }
        assert!(!path.contains('{'), "{id}: {path} lacks a part");
        if !query.is_empty() {
            path = format!("{path}?{}", query.join("&"));
        }
        let example = &operation["requestBody"]["content"]["application/json"]["example"];
        let body = body.or(Some(example).filter(|example| !example.is_null()));
        let mut headers = vec![("prefer", prefer)];
        headers.extend(body.map(|_| ("content-type", "application/json")));
        let bytes = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let HttpResponse { status, body, .. } = self.server.send(method, &path, &headers, &bytes);
        let text = String::from_utf8_lossy(&body).into_owned();
        assert!((200..300).contains(&status), "{method} {path}: {status} {text}");
        assert!(operation["responses"][status.to_string()].is_object(), "{id} does not speak of {status}");
        RecordedResponse {
            operation: id.into(),
            status,
            path: of_path,
            body: serde_json::from_str(&text).unwrap_or(json!(text)),
        }
    }

    /// Follows every link of an answer, and those of what comes then.
    fn follow_all(&mut self, told: &RecordedResponse, depth: u8) {
        let (_, _, operation) = &self.operations[&told.operation];
        let links = operation["responses"][told.status.to_string()]["links"].as_object().cloned().unwrap_or_default();
        for (name, link) in links.iter().filter(|_| depth > 0) {
            let target = link["operationId"].as_str().unwrap();
            assert!(self.operations.contains_key(target), "{name} leads to {target}, which is not there");
            if EXCLUDED_OPERATIONS.contains(&target) {
                continue;
            }
            let parameters = link["parameters"].as_object().unwrap().iter();
            let parameters =
                parameters.map(|(name, from)| (name.clone(), found(from.as_str().unwrap(), told))).collect();
            let next = self.send_request(target, &parameters, None, "wait=60");
            self.followed.push(format!("{} {name}", told.operation));
            self.follow_all(&next, depth - 1);
        }
    }
}

/// The value of a runtime expression.
fn found(expression: &str, told: &RecordedResponse) -> String {
    if let Some(name) = expression.strip_prefix("$request.path.") {
        return told.path[name].clone();
    }
    let pointer = expression.strip_prefix("$response.body#").unwrap_or_else(|| panic!("{expression}?"));
    match told.body.pointer(pointer) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(number)) => number.to_string(),
        other => panic!("{}: {expression} is {other:?} in {}", told.operation, told.body),
    }
}

#[test]
fn openapi_links_lead_to_the_described_operations() {
    let receiver = Receiver::start();
    let home = Home::new();
    let server = Server::start(&home);
    let mut client = Client::new(&server);
    let hook = json!({ "url": receiver.url(), "allow_private": true });
    let hook = client.send_request("webhook_add", &BTreeMap::new(), Some(&hook), "");

    let vm = client.send_request("vm_spawn", &BTreeMap::new(), None, "");
    assert_eq!(vm.body["name"], "web");
    for first in ["vm_list", "events", "template_list", "webhook_list"] {
        let told = client.send_request(first, &BTreeMap::new(), None, "");
        client.follow_all(&told, 1);
    }
    // Ends with the deletion of the VM.
    client.follow_all(&vm, 2);
    assert!(home.names().is_empty());

    // Not before something has been delivered there is something to redeliver.
    until("a delivery", || receiver.messages().first().map(drop));
    client.follow_all(&hook, 2);

    let begun = json!({ "name": "later", "start": false });
    let begun = client.send_request("vm_spawn", &BTreeMap::new(), Some(&begun), "respond-async");
    assert_eq!(begun.status, 202);
    // Polled, then cancelled; after that it does not exist any more.
    client.follow_all(&begun, 1);

    let mut all: Vec<_> = client.operations.iter().flat_map(|(id, (_, _, operation))| names(id, operation)).collect();
    all.retain(|link| !client.followed.contains(link));
    let later = |link: &String| link.starts_with("vm_fork ") || link.starts_with("template_create ");
    all.retain(|link| {
        !later(link) && link != "vm_spawn fork" && !link.ends_with(" poll") && !link.ends_with(" cancel")
    });
    assert_eq!(all, [""; 0], "nobody has followed these");
    assert!(client.followed.contains(&"vm_spawn poll".to_owned()), "{:?}", client.followed);
}

/// All links of an operation.
fn names(id: &str, operation: &Value) -> Vec<String> {
    let answers = operation["responses"].as_object().unwrap().values();
    let links = answers.filter_map(|answer| answer["links"].as_object()).flat_map(|links| links.keys());
    links.map(|name| format!("{id} {name}")).collect()
}
