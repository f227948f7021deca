//! Every request that has an id is answered, whatever is wrong with it, over both transports; and sessions are their owners'.

use serde_json::{Value, json};

use crate::mcp_http::{result, token};
use crate::support::Home;
use crate::support::http::{HttpResponse, Server};
use crate::support::mcp::{Client, Era};

const WEB: &str = "http://localhost:6274";

#[test]
fn over_stdio_invalid_messages_are_answered_with_their_id() {
    // The answers never came: clients waited until they gave up.
    let home = Home::new();
    let mut client = Client::start(&home, Era::Legacy);
    client.raw("{bad json");
    let parse = client.next_error();
    assert_eq!(
        (&parse["error"]["code"], parse.get("id").is_none_or(Value::is_null)),
        (&json!(-32700), true),
        "{parse}"
    );
    client.raw(r#"{"jsonrpc":"2.0","id":701,"method":7}"#);
    assert_eq!(client.answer(701)["error"]["code"], -32600);
    let deep =
        format!(r#"{{"jsonrpc":"2.0","id":702,"method":"ping","params":{}{}}}"#, "[".repeat(500), "]".repeat(500));
    client.raw(&deep);
    assert_eq!(client.answer(702)["error"]["code"], -32600);
    let long = "x".repeat(17 << 20);
    client.raw(&format!(r#"{{"jsonrpc":"2.0","method":"tools/call","params":{{"name":"{long}"}},"id":703}}"#));
    let answer = client.answer(703);
    assert!(answer["error"]["message"].as_str().unwrap().contains("longer than"), "{answer}");
    // A second request with the id of one that is still open.
    client.good("vm_spawn", json!({"name": "web", "accel": "tcg"}));
    let call =
        json!({"name": "vm_exec", "arguments": {"name": "web", "argv": ["sleep", "1000"], "timeout_seconds": 0}});
    let call = json!({"jsonrpc": "2.0", "id": 704, "method": "tools/call", "params": call});
    client.send_json(&call);
    client.send_json(&call);
    let twice = client.answer(704);
    assert_eq!(twice["error"]["code"], -32600, "{twice}");
    client.send_json(&json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 704}}));
    client.good("vm_ls", json!({}));
}

fn server(home: &Home, flags: &[&str]) -> Server {
    Server::serving(home, "mcp-server", &[&["--transport", "http"], flags].concat())
}

fn hello() -> String {
    json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
        "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "old", "version": "1"}}})
    .to_string()
}

fn post(server: &Server, token: &str, more: &[(&str, &str)], body: &[u8]) -> HttpResponse {
    let bearer = format!("Bearer {token}");
    let usual = [("content-type", "application/json"), ("accept", "*/*"), ("authorization", bearer.as_str())];
    server.plain("POST", "/mcp", &[&usual[..], more].concat(), body)
}

#[test]
fn over_http_invalid_messages_are_protocol_errors() {
    // Malformed JSON was 415 with the library's words, and a body that was too long broke the connection.
    let home = Home::new();
    let server = server(&home, &[]);
    let deep = format!(r#"{{"jsonrpc":"2.0","id":9,"method":"ping","params":{}{}}}"#, "[".repeat(500), "]".repeat(500));
    for (body, status, id, code) in [
        ("{bad json".to_owned(), 400, json!(null), -32700),
        (r#"{"jsonrpc":"2.0","id":7,"method":7}"#.to_owned(), 400, json!(7), -32600),
        (deep, 400, json!(9), -32600),
        (format!(r#"{{"id":8,"x":"{}"}}"#, "x".repeat(20 << 20)), 413, json!(8), -32600),
    ] {
        let answer = post(&server, server.token(), &[], body.as_bytes());
        let said = answer.json();
        assert_eq!((answer.status, &said["id"], &said["error"]["code"]), (status, &id, &json!(code)), "{said}");
    }
    assert_eq!(result(&post(&server, server.token(), &[], hello().as_bytes()))["protocolVersion"], "2025-11-25");
}

#[test]
fn a_session_belongs_to_its_caller() {
    // A read token that knew the id could end an admin's session, and with it the admin's ephemeral VMs.
    let home = Home::new();
    let server = server(&home, &[]);
    let read = token(&home, "read");
    let session = post(&server, server.token(), &[], hello().as_bytes()).header("mcp-session-id").to_owned();
    let with_session = [("mcp-session-id", session.as_str()), ("mcp-protocol-version", "2025-11-25")];
    let ping = json!({"jsonrpc": "2.0", "id": 2, "method": "ping"}).to_string();
    post(&server, &read, &with_session, ping.as_bytes()).problem(404, "route_not_found");
    let delete = |token: &str| {
        let bearer = format!("Bearer {token}");
        server.plain("DELETE", "/mcp", &[&with_session[..], &[("authorization", bearer.as_str())]].concat(), b"")
    };
    delete(&read).problem(404, "route_not_found");
    assert_eq!(post(&server, server.token(), &with_session, ping.as_bytes()).status, 200);
    assert_eq!(delete(server.token()).status, 204);
    // A caller can fill no more than a share of the table.
    for _ in 0..256 {
        assert_eq!(post(&server, &read, &[], hello().as_bytes()).status, 200);
    }
    post(&server, &read, &[], hello().as_bytes()).problem(429, "rate_limited");
    assert_eq!(post(&server, server.token(), &[], hello().as_bytes()).status, 200);
}

#[test]
fn clients_of_the_old_transport_get_the_new_endpoint() {
    let home = Home::new();
    let server = server(&home, &[]);
    let said = server.plain("GET", "/sse", &[("accept", "text/event-stream")], b"").problem(404, "route_not_found");
    assert!(said["detail"].as_str().unwrap().contains("/mcp"), "{said}");
    let bearer = format!("Bearer {}", server.token());
    let usual = [("content-type", "application/json"), ("accept", "*/*"), ("authorization", bearer.as_str())];
    assert_eq!(server.plain("POST", "/mcp/", &usual, hello().as_bytes()).status, 200);
}

#[test]
fn pages_of_an_allowed_origin_can_use_the_server() {
    // Web clients were refused whatever they did: 403, and 405 to the browser's own question.
    let home = Home::new();
    let server = server(&home, &["--allow-origin", WEB]);
    let preflight = |origin: &str| {
        let asked = [
            ("origin", origin),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "authorization,content-type,mcp-protocol-version"),
        ];
        server.plain("OPTIONS", "/mcp", &asked, b"")
    };
    let allowed = preflight(WEB);
    assert_eq!((allowed.status, allowed.header("access-control-allow-origin")), (204, WEB));
    assert!(allowed.header("access-control-allow-headers").contains("authorization"));
    assert!(allowed.header("access-control-allow-methods").contains("POST"));
    let begun = post(&server, server.token(), &[("origin", WEB)], hello().as_bytes());
    assert_eq!((begun.status, begun.header("access-control-allow-origin")), (200, WEB));
    assert!(begun.header("access-control-expose-headers").contains("mcp-session-id"));
    for evil in ["http://evil.example", "http://localhost:6275", "null"] {
        assert_eq!(preflight(evil).header("access-control-allow-origin"), "");
        let refused = post(&server, server.token(), &[("origin", evil)], hello().as_bytes());
        assert_eq!((refused.status, refused.header("access-control-allow-origin")), (403, ""));
    }
    home.nido(["mcp-server", "start", "--transport", "http", "--allow-origin", "*", "--json"])
        .run()
        .fails(2, "spec_invalid");
}

#[test]
fn ephemeral_vms_wait_for_the_next_session_of_the_same_caller() {
    // Adapters that open a session for each call lost their VM between vm_spawn and vm_exec.
    let home = Home::new();
    let server = server(&home, &["--session-grace", "1h"]);
    let other = token(&home, "run");
    let call = |token: &str, tool: &str, arguments: Value| {
        let session = post(&server, token, &[], hello().as_bytes()).header("mcp-session-id").to_owned();
        let with_session = [("mcp-session-id", session.as_str()), ("mcp-protocol-version", "2025-11-25")];
        let call = json!({"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": tool, "arguments": arguments}});
        let answer = result(&post(&server, token, &with_session, call.to_string().as_bytes()));
        let bearer = format!("Bearer {token}");
        server.plain("DELETE", "/mcp", &[&with_session[..], &[("authorization", bearer.as_str())]].concat(), b"");
        answer["structuredContent"].clone()
    };
    let vm = call(server.token(), "vm_spawn", json!({"name": "lc-1", "accel": "tcg", "ephemeral": true}));
    call(&other, "vm_ls", json!({}));
    for _ in 0..2 {
        let done = call(server.token(), "vm_exec", json!({"name": "lc-1", "argv": ["echo", "on"]}));
        assert_eq!(done["stdout"], "on\n", "{done}");
    }
    let again = call(server.token(), "vm_spawn", json!({"name": "lc-1", "accel": "tcg", "ephemeral": true}));
    assert_eq!(again["id"], vm["id"]);
    server.live().signal(rustix::process::Signal::TERM);
    server.ended();
    home.expect_empty();
}

#[test]
fn a_vm_deleted_with_its_session_is_reported_as_such() {
    // "There is no VM, vm_spawn makes one": a model that did so with a session for each call did it for ever.
    let home = Home::new();
    let mut client = Client::start(&home, Era::Legacy);
    client.good("vm_spawn", json!({"name": "lc-1", "accel": "tcg", "ephemeral": true}));
    client.ended().ok();
    let mut client = Client::start(&home, Era::Legacy);
    let error = client.bad("vm_exec", json!({"name": "lc-1", "argv": ["true"]}), "vm_not_found");
    let step = error["next_step"].as_str().unwrap();
    assert!(step.contains("went with its session") && step.contains("outlives_session"), "{step}");
    let error = client.bad("vm_exec", json!({"name": "never", "argv": ["true"]}), "vm_not_found");
    assert!(!error["next_step"].as_str().unwrap().contains("session"), "{error}");
}
