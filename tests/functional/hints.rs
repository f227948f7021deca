//! Hints of errors: each front end proposes its own calls.

use serde_json::{Value, json};

use crate::support::http::Server;
use crate::support::mcp::{Client, Era};
use crate::support::websocket::WebSocket;
use crate::support::{Home, until};

const REQUEST: &str = "POST /v1/vms/web/start";

// Errors in streams, over the WebSocket and in operations proposed commands of the command line to clients of the REST API.
#[test]
fn each_front_end_proposes_its_own_calls() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    home.nido(["stop", "web", "--force"]).run().ok();

    let command = home.nido(["exec", "web", "--json", "--", "true"]).run().fails(125, "vm_not_running");
    assert_eq!(command["hint"], "nido start web");

    let body = json!({"argv": ["true"]});
    let response = server.post("/v1/vms/web/exec", &body).problem(409, "vm_not_running");
    assert_eq!(response["hint"], REQUEST);

    let protocols = format!("nido, nido.token.{}", server.token());
    let headers = [("sec-websocket-protocol", &*protocols)];
    let mut socket = WebSocket::open(server.address(), "/v1/vms/web/exec/socket", &headers).ok().unwrap();
    socket.send_json(&json!({ "start": body }));
    assert_eq!(socket.until("error").0["hint"], REQUEST);

    let mut client = Client::start(&home, Era::Modern);
    let failure = client.bad("vm_exec", json!({"name": "web", "argv": ["true"]}), "vm_not_running");
    assert_eq!(failure["hint"], r#"vm_start {"name":"web"}"#);
}

#[test]
fn the_error_of_an_operation_is_read_over_each_front_end_in_its_own_words() {
    let home = Home::new();
    let server = Server::start(&home);
    let bearer = format!("Bearer {}", server.token());
    let headers = [("authorization", &*bearer), ("content-type", "application/json"), ("prefer", "respond-async")];
    let body = json!({"name": "web", "template": "debian-12"}).to_string();
    let begun = server.plain("POST", "/v1/vms", &headers, body.as_bytes());
    let place = begun.header("location").to_owned();
    let error = until("the end of the operation", || {
        let operation: Value = server.get(&place).ok(200);
        operation.get("error").filter(|error| !error.is_null()).cloned()
    });
    assert_eq!(error["code"], "template_not_found");
    assert_eq!(error["hint"], "build it: POST /v1/templates/debian-12/build");
    assert!(error.get("hints").is_none(), "the hints as data are nido's own: {error}");
}
