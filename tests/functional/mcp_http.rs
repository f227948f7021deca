//! The MCP server over HTTP: who may call, what they may, and that the REST server's guard is in front of it.

use serde_json::{Value, json};

use crate::support::http::{HttpResponse, Server};
use crate::support::{Home, until};

const VERSION: &str = "2026-07-28";

/// A request as clients without sessions send it.
pub fn body(method: &str, name: Option<&str>, arguments: Value) -> String {
    let mut params = json!({ "_meta": {
        "io.modelcontextprotocol/protocolVersion": VERSION,
        "io.modelcontextprotocol/clientInfo": { "name": "tests", "version": "1" },
        "io.modelcontextprotocol/clientCapabilities": {},
    }});
    if let Some(name) = name {
        params["name"] = name.into();
        params["arguments"] = arguments;
    }
    json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params }).to_string()
}

pub fn headers<'a>(method: &'a str, name: Option<&'a str>) -> Vec<(&'a str, &'a str)> {
    let mut headers = vec![
        ("content-type", "application/json"),
        ("accept", "application/json, text/event-stream"),
        ("mcp-protocol-version", VERSION),
        ("mcp-method", method),
    ];
    headers.extend(name.map(|name| ("mcp-name", name)));
    headers
}

/// The result in an answer, which may be a stream of one message.
pub fn result(answer: &HttpResponse) -> Value {
    let text = String::from_utf8(answer.body.clone()).unwrap();
    assert_eq!(answer.status, 200, "{text}");
    let message = text.lines().filter_map(|line| line.strip_prefix("data: ")).next_back().unwrap_or(&text).to_owned();
    let message: Value = serde_json::from_str(&message).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert!(message.get("error").is_none(), "{message}");
    message["result"].clone()
}

pub fn call(server: &Server, token: &str, tool: &str, arguments: Value) -> Value {
    let bearer = format!("Bearer {token}");
    let mut headers = headers("tools/call", Some(tool));
    headers.push(("authorization", &bearer));
    result(&server.plain("POST", "/mcp", &headers, body("tools/call", Some(tool), arguments).as_bytes()))
}

pub fn token(home: &Home, scope: &str) -> String {
    let made = home.nido(["token", "create", "--name", scope, "--scope", scope, "--json"]).run().ok().json();
    made["token"].as_str().unwrap().to_owned()
}

#[test]
fn tokens_limit_tools_and_are_recorded() {
    let home = Home::new();
    let server = Server::serving(&home, "mcp-server", &["--transport", "http", "--confirm", "never"]);
    let (read, run) = (token(&home, "read"), token(&home, "run"));
    let tools = |token: &str| {
        let bearer = format!("Bearer {token}");
        let mut headers = headers("tools/list", None);
        headers.push(("authorization", &bearer));
        let list = result(&server.plain("POST", "/mcp", &headers, body("tools/list", None, json!(null)).as_bytes()));
        list["tools"]
            .as_array()
            .unwrap()
            .iter()
            .map(|tool| tool["name"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(tools(&read), ["vm_ls", "vm_info", "vm_logs", "template_list", "job_get"]);
    assert!(tools(&run).contains(&"vm_exec".into()) && !tools(&run).contains(&"template_create".into()));
    assert_eq!(tools(server.token()).len(), 21);
    let denied = call(&server, &read, "vm_spawn", json!({"name": "web"}));
    assert_eq!((&denied["isError"], &denied["structuredContent"]["error"]["code"]), (&true.into(), &"denied".into()));
    let vm = call(&server, &run, "vm_spawn", json!({"name": "web", "accel": "tcg"}));
    assert_eq!(vm["structuredContent"]["status"], "running");
    // Files of the host are not accessible over the network.
    let upload = json!({"name": "web", "path": "/x", "source": "/etc/passwd"});
    assert_eq!(call(&server, &run, "vm_upload", upload)["structuredContent"]["error"]["code"], "denied");
    let log = home.nido(["audit", "show", "--json"]).run().ok().json();
    let lines: Vec<_> = log["records"].as_array().unwrap().iter().filter(|line| line["tool"] == "vm_spawn").collect();
    assert!(lines[0]["actor"].as_str().unwrap().starts_with("token:read#"), "{}", lines[0]);
    assert_eq!(lines[0]["reason"], "scope");
    assert!(lines[1]["actor"].as_str().unwrap().starts_with("token:run#"), "{}", lines[1]);
    assert_eq!(lines[1]["agent"], "tests");
}

#[test]
fn the_same_guard_is_in_front() {
    let home = Home::new();
    let server = Server::serving(&home, "mcp-server", &["--transport", "http", "--confirm", "never"]);
    let bearer = format!("Bearer {}", server.token());
    let list = body("tools/list", None, json!(null));
    let ask = |more: &[(&'static str, &str)]| {
        let mut headers = headers("tools/list", None);
        headers.extend_from_slice(more);
        server.plain("POST", "/mcp", &headers, list.as_bytes())
    };
    ask(&[]).problem(401, "unauthorized");
    ask(&[("authorization", "Bearer x")]).problem(401, "unauthorized");
    ask(&[("authorization", &bearer), ("host", "evil.example")]).problem(403, "denied");
    ask(&[("authorization", &bearer), ("origin", "http://evil.example")]).problem(403, "denied");
    result(&ask(&[("authorization", &bearer)]));
    server.get("/v1/vms").problem(404, "route_not_found");
    // A guest reaches the host's loopback: without a token no port is served, whatever it listens on.
    for flags in
        [&["--no-token", "--allow-remote", "--insecure-http"][..], &["--no-token"], &["--no-token", "--bind", "::1"]]
    {
        let start = home.nido(["mcp-server", "start", "--transport", "http", "--json"]);
        flags.iter().fold(start, |nido, flag| nido.arg(*flag)).run().fails(1, "denied");
    }
    home.nido(["mcp-server", "start", "--port", "0", "--json"]).run().fails(2, "spec_invalid");
}

#[test]
fn both_can_be_served_at_once_with_a_token_and_without_one_neither_is() {
    let home = Home::new();
    let server = Server::serving(&home, "mcp-server", &["--transport", "http", "--confirm", "never"]);
    let list = body("tools/list", None, json!(null));
    server.plain("POST", "/mcp", &headers("tools/list", None), list.as_bytes()).problem(401, "unauthorized");
    drop(server);
    home.nido(["token", "revoke", "tests"]).run().ok();
    let server = Server::with(&home, &["--mcp"]);
    call(&server, server.token(), "vm_ls", json!({}));
    server.get("/v1/vms").ok(200);
}

#[test]
fn a_token_for_agents_is_limited_to_mcp_and_the_policy() {
    let home = Home::new();
    let policy = home.scratch("policy.toml");
    std::fs::write(&policy, "confirm = 'never'\n[[allow]]\nprogram = \"echo\"\nargs = [\"**\"]\n").unwrap();
    let server = Server::with(&home, &["--mcp", "--mcp-policy", policy.to_str().unwrap()]);
    let create = home.nido(["token", "create", "--name", "agents", "--scope", "run", "--only", "mcp", "--json"]);
    let made = create.run().ok().json();
    assert_eq!((&made["scope"], &made["only"]), (&"run".into(), &"mcp".into()), "{made}");
    let list = home.nido(["token", "list", "--json"]).run().ok().json();
    let only: Vec<_> =
        list["tokens"].as_array().unwrap().iter().map(|token| (&token["name"], &token["only"])).collect();
    assert_eq!(only, [(&json!("agents"), &json!("mcp")), (&json!("tests"), &json!(null))]);
    let table = home.nido(["token", "list"]).run().ok();
    assert!(table.text().lines().any(|line| line.starts_with("agents") && line.contains(" mcp ")), "{}", table.text());
    let token = made["token"].as_str().unwrap();
    let bearer = format!("Bearer {token}");
    home.spawn("web");
    // What the policy forbids is forbidden there, and cannot be reached over the REST API.
    let words = |program: &str| json!({"name": "web", "argv": [program, "hi"]});
    assert_eq!(call(&server, token, "vm_exec", words("echo"))["structuredContent"]["stdout"], "hi\n");
    assert_eq!(call(&server, token, "vm_exec", words("cat"))["structuredContent"]["error"]["code"], "denied");
    let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
    for (method, path, body) in [
        ("GET", "/v1/vms", ""),
        ("POST", "/v1/vms/web/exec", r#"{"argv": ["cat", "hi"]}"#),
        ("DELETE", "/v1/vms/web?force=true", ""),
        ("GET", "/metrics", ""),
        ("GET", "/v1/mcp", ""),
        ("GET", "/mcp/v1", ""),
    ] {
        let problem = server.plain(method, path, &headers, body.as_bytes()).problem(403, "denied");
        assert!(problem["hint"].as_str().unwrap().contains("without --only"), "{problem}");
    }
    let protocol = format!("nido.v1, nido.token.{token}");
    let upgrade = [
        ("connection", "upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "AAAAAAAAAAAAAAAAAAAAAA=="),
        ("sec-websocket-protocol", &protocol),
    ];
    server.plain("GET", "/v1/vms/web/exec", &upgrade, b"").problem(403, "denied");
    assert_eq!(home.names(), ["web"]);
    // Any other token is valid for both.
    server.get("/v1/vms").ok(200);
    call(&server, server.token(), "vm_ls", json!({}));
    home.nido(["token", "create", "--name", "x", "--scope", "run", "--only", "rest", "--json"])
        .run()
        .fails(2, "spec_invalid");
}

#[test]
fn invalid_calls_are_explained_over_http_too() {
    let home = Home::new();
    let server = Server::serving(&home, "mcp-server", &["--transport", "http", "--confirm", "never"]);
    let bearer = format!("Bearer {}", server.token());
    let mut headers = headers("tools/call", Some("vm_ls"));
    headers.push(("authorization", &bearer));
    let asked = body("tools/call", Some("vm_ls"), json!("{}"));
    let answer = server.plain("POST", "/mcp", &headers, asked.as_bytes());
    let text = String::from_utf8(answer.body).unwrap();
    let message = text.lines().filter_map(|line| line.strip_prefix("data: ")).next_back().unwrap_or(&text);
    let message: Value = serde_json::from_str(message).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_eq!(message["error"]["code"], -32602, "{message}");
    assert!(message["error"]["message"].as_str().unwrap().starts_with("arguments: invalid type: string"), "{message}");
}

#[test]
fn hanging_up_kills_the_command() {
    let home = Home::new();
    let server = Server::serving(&home, "mcp-server", &["--transport", "http", "--confirm", "never"]);
    home.spawn("web");
    let mark = home.scratch("mark");
    let command = format!("echo $$ > {}; exec sleep 1000", mark.display());
    let asked = body("tools/call", Some("vm_exec"), json!({"name": "web", "command": command, "timeout_ms": 0}));
    let bearer = format!("Bearer {}", server.token());
    let mut headers = headers("tools/call", Some("vm_exec"));
    headers.push(("authorization", &bearer));
    let stream = server.unread("POST", "/mcp", &headers, asked.as_bytes());
    let pid: u32 = until("the command", || std::fs::read_to_string(&mark).ok()?.trim().parse().ok());
    drop(stream);
    until("its end", || (!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
}

#[test]
fn streams_and_commands_end_with_their_token() {
    let home = Home::new();
    let server = Server::serving(&home, "mcp-server", &["--transport", "http", "--confirm", "never"]);
    home.spawn("web");
    let bearer = format!("Bearer {}", token(&home, "run"));
    let usual = [
        ("content-type", "application/json"),
        ("accept", "application/json, text/event-stream"),
        ("authorization", bearer.as_str()),
    ];
    let hello = json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
        "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "old", "version": "1"}}});
    let session = server.plain("POST", "/mcp", &usual, hello.to_string().as_bytes());
    let session = session.header("mcp-session-id").to_owned();
    let listens = [("accept", "text/event-stream"), usual[2], ("mcp-session-id", session.as_str())];
    let mut stream = server.unread("GET", "/mcp", &listens, b"");
    let mark = home.scratch("mark");
    let command = format!("echo $$ > {}; exec sleep 1000", mark.display());
    let asked = body("tools/call", Some("vm_exec"), json!({"name": "web", "command": command, "timeout_ms": 0}));
    let mut headers = headers("tools/call", Some("vm_exec"));
    headers.push(("authorization", &bearer));
    let _runs = server.unread("POST", "/mcp", &headers, asked.as_bytes());
    let pid: u32 = until("the command", || std::fs::read_to_string(&mark).ok()?.trim().parse().ok());
    home.nido(["token", "revoke", "run"]).run().ok();
    // It just ends: to a client of the protocol an unknown event would have no meaning.
    let mut told = String::new();
    std::io::Read::read_to_string(&mut stream, &mut told).unwrap();
    assert!(told.starts_with("HTTP/1.1 200") && told.ends_with("\r\n0\r\n\r\n") && !told.contains("error"), "{told}");
    until("its end", || (!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
}

#[test]
fn sessions_of_clients_with_initialize_work_over_http() {
    let home = Home::new();
    let server = Server::serving(&home, "mcp-server", &["--transport", "http", "--confirm", "never"]);
    let bearer = format!("Bearer {}", server.token());
    let usual = [
        ("content-type", "application/json"),
        ("accept", "application/json, text/event-stream"),
        ("authorization", bearer.as_str()),
    ];
    let hello = json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
        "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "old", "version": "1"}}});
    let begun = server.plain("POST", "/mcp", &usual, hello.to_string().as_bytes());
    let session = begun.header("mcp-session-id").to_owned();
    assert_eq!(result(&begun)["protocolVersion"], "2025-11-25");
    let with_session =
        [&usual[..], &[("mcp-session-id", session.as_str()), ("mcp-protocol-version", "2025-11-25")]].concat();
    let ready = json!({"jsonrpc": "2.0", "method": "notifications/initialized"});
    assert_eq!(server.plain("POST", "/mcp", &with_session, ready.to_string().as_bytes()).status, 202);
    let asked =
        json!({"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "vm_ls", "arguments": {}}});
    let answer = server.plain("POST", "/mcp", &with_session, asked.to_string().as_bytes());
    assert_eq!(result(&answer)["structuredContent"], json!({"vms": []}));
    assert!(matches!(server.plain("DELETE", "/mcp", &with_session, b"").status, 200 | 202 | 204));
    assert_eq!(server.plain("POST", "/mcp", &with_session, asked.to_string().as_bytes()).status, 404);
}

#[test]
fn there_is_an_end_to_sessions() {
    let home = Home::new();
    let server = Server::serving(&home, "mcp-server", &["--transport", "http", "--confirm", "never"]);
    let bearer = format!("Bearer {}", server.token());
    let hello = json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
        "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "old", "version": "1"}}});
    let usual = [
        ("content-type", "application/json"),
        ("accept", "application/json, text/event-stream"),
        ("authorization", bearer.as_str()),
    ];
    let begin = || server.plain("POST", "/mcp", &usual, hello.to_string().as_bytes());
    let session = begin().header("mcp-session-id").to_owned();
    for _ in 1..256 {
        assert_eq!(begin().status, 200);
    }
    begin().problem(429, "rate_limited");
    // Clients without sessions are served nevertheless, and one that ends makes room.
    call(&server, server.token(), "vm_ls", json!({}));
    let with_session = [&usual[..], &[("mcp-session-id", session.as_str())]].concat();
    server.plain("DELETE", "/mcp", &with_session, b"");
    until("room", || (begin().status == 200).then_some(()));
}
