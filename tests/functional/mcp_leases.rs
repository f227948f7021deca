//! Ephemeral VMs of agents: they are deleted with the session that created them, however that ends, and no others are.

use serde_json::{Value, json};

use crate::leases::{await_gone, events};
use crate::mcp_http::{call, result, token};
use crate::support::http::Server;
use crate::support::mcp::{Client, Era};
use crate::support::{Home, until};

fn throw_away(name: &str) -> Value {
    json!({"name": name, "accel": "tcg", "ephemeral": true})
}

fn exists(home: &Home, vm: &Value) -> bool {
    home.path().join("vms").join(vm["id"].as_str().unwrap()).exists()
}

fn gone(home: &Home, vm: &Value) {
    await_gone(home, vm["id"].as_str().unwrap());
}

/// Two ephemeral VMs, a running and a stopped one, and two persistent ones.
fn fill(client: &mut Client) -> [Value; 4] {
    let mut outlives = throw_away("outlives");
    outlives["outlives_session"] = true.into();
    let vms = [
        client.good("vm_spawn", throw_away("runs")),
        client.good("vm_create", throw_away("rests")),
        client.good("vm_create", json!({"name": "kept", "accel": "tcg"})),
        client.good("vm_spawn", outlives),
    ];
    let lease = &vms[0]["lease"];
    assert!(lease.as_str().is_some_and(|lease| lease.len() == 16), "{lease}");
    assert_eq!(client.good("vm_info", json!({"name": "rests"}))["lease"], *lease, "one session, one lease");
    assert_eq!([&vms[2]["lease"], &vms[3]["lease"]], [&Value::Null; 2]);
    vms
}

fn session_ends(home: &Home) -> Vec<Value> {
    let log = home.nido(["audit", "show", "--json"]).run().ok().json();
    log["records"].as_array().unwrap().iter().filter(|line| line["tool"] == "session_end").cloned().collect()
}

#[test]
fn the_end_of_standard_input_and_a_signal_destroy_them_before_the_server_ends() {
    for era in Era::ALL {
        for by_signal in [false, true] {
            let home = Home::new();
            let mut client = Client::start(&home, era);
            let vms = fill(&mut client);
            let ran = if by_signal { client.told_to_end() } else { client.ended() };
            ran.ok();
            assert_eq!(vms.each_ref().map(|vm| exists(&home, vm)), [false, false, true, true]);
            assert_eq!(home.names(), ["kept", "outlives"]);
            let lines = session_ends(&home);
            let told: Vec<_> = lines.iter().map(|line| (&line["stage"], &line["result"])).collect();
            assert_eq!(told, [(&"attempt".into(), &"pending".into()), (&"outcome".into(), &"success".into())]);
            assert_eq!(lines[0]["params"], json!({"lease": vms[0]["lease"], "vms": ["runs", "rests"]}));
            assert!(lines[0]["actor"].as_str().unwrap().starts_with("uid:") && lines[0]["face"] == "mcp", "{lines:?}");
            let log = home.nido(["audit", "show", "--json"]).run().ok().json();
            assert_eq!(log["records"][1]["reason"], format!("lease:{}", vms[0]["lease"].as_str().unwrap()));
        }
    }
}

#[test]
fn ephemeral_vms_are_deleted_when_their_server_is_killed() {
    for era in Era::ALL {
        let home = Home::new();
        let mut client = Client::start(&home, era);
        let vms = fill(&mut client);
        client.killed();
        gone(&home, &vms[0]);
        let events = events(&home, "runs");
        let expired = events.iter().find(|event| event["event"] == "vm.expired").unwrap();
        assert_eq!(expired["details"]["limit"], "session");
        // That was a command: the stopped one was deleted with it.
        assert_eq!(vms.each_ref().map(|vm| exists(&home, vm)), [false, false, true, true]);
        assert_eq!(home.names(), ["kept", "outlives"]);
    }
}

#[test]
fn vms_in_creation_are_deleted_with_their_session() {
    let home = Home::new();
    let mut client = Client::start(&home, Era::Modern);
    // The guest never starts.
    home.qemu("no-agent");
    client.begin("vm_spawn", throw_away("late"), json!({}));
    until("the VM that is begun", || home.names().contains(&"late".to_owned()).then_some(()));
    client.told_to_end().ok();
    home.expect_empty();
}

#[test]
fn a_name_of_one_session_is_not_answered_as_another_s() {
    let home = Home::new();
    let (mut one, mut other) = (Client::start(&home, Era::Modern), Client::start(&home, Era::Legacy));
    let vm = one.good("vm_spawn", throw_away("box"));
    assert_eq!(one.good("vm_spawn", throw_away("box"))["id"], vm["id"]);
    // The same request, but it would go with a session that is not its own.
    other.bad("vm_spawn", throw_away("box"), "vm_exists");
    other.ended().ok();
    assert_eq!(home.names(), ["box"]);
    let wrong = json!({"name": "x", "outlives_session": true});
    let error = one.bad("vm_spawn", wrong, "spec_invalid");
    assert!(error["message"].as_str().unwrap().starts_with("outlives_session: "), "{error}");
    one.ended().ok();
    home.expect_empty();
}

/// A session of a client with `initialize`, over HTTP.
struct InitializedSession<'a> {
    server: &'a Server,
    session: String,
    bearer: String,
}

impl<'a> InitializedSession<'a> {
    fn begin(server: &'a Server) -> Self {
        let bearer = format!("Bearer {}", server.token());
        let hello = json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
            "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "old", "version": "1"}}});
        let mut old = Self { server, session: String::new(), bearer };
        let begun = server.plain("POST", "/mcp", &old.headers()[..3], hello.to_string().as_bytes());
        begun.header("mcp-session-id").clone_into(&mut old.session);
        let ready = json!({"jsonrpc": "2.0", "method": "notifications/initialized"});
        server.plain("POST", "/mcp", &old.headers(), ready.to_string().as_bytes());
        old
    }

    fn headers(&self) -> [(&str, &str); 5] {
        [
            ("content-type", "application/json"),
            ("accept", "application/json, text/event-stream"),
            ("authorization", &self.bearer),
            ("mcp-session-id", &self.session),
            ("mcp-protocol-version", "2025-11-25"),
        ]
    }

    fn request_body(tool: &str, arguments: &Value) -> String {
        json!({"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": tool, "arguments": arguments}})
            .to_string()
    }

    fn good(&self, tool: &str, arguments: &Value) -> Value {
        let answer = self.server.plain("POST", "/mcp", &self.headers(), Self::request_body(tool, arguments).as_bytes());
        let result = result(&answer);
        assert_eq!(result["isError"], false, "{result}");
        result["structuredContent"].clone()
    }

    fn end(self) {
        assert!(matches!(self.server.plain("DELETE", "/mcp", &self.headers(), b"").status, 200 | 202 | 204));
    }
}

#[test]
fn sessions_over_http_end_with_delete_and_with_the_server() {
    let home = Home::new();
    let server = Server::serving(&home, "mcp-server", &["--transport", "http", "--session-grace", "1ms"]);
    let (one, other) = (InitializedSession::begin(&server), InitializedSession::begin(&server));
    let first = one.good("vm_spawn", &throw_away("first"));
    let second = other.good("vm_spawn", &throw_away("second"));
    other.good("vm_create", &json!({"name": "kept", "accel": "tcg"}));
    assert_ne!(first["lease"], second["lease"]);
    // No ttl is put on it: the session is limit enough.
    assert_eq!(first["expires_at"], Value::Null);
    // Also while a command runs in it.
    let mark = home.scratch("mark");
    let command =
        json!({"name": "first", "command": format!("touch {}; exec sleep 1000", mark.display()), "timeout_ms": 0});
    let running =
        server.unread("POST", "/mcp", &one.headers(), InitializedSession::request_body("vm_exec", &command).as_bytes());
    until("the command", || mark.exists().then_some(()));
    one.end();
    gone(&home, &first);
    drop(running);
    assert_eq!(home.names(), ["second", "kept"]);
    until("the line about it", || (session_ends(&home).len() == 2).then_some(()));
    let lines = session_ends(&home);
    assert!(lines[0]["actor"].as_str().unwrap().starts_with("token:tests#"), "{}", lines[0]);
    assert_eq!(lines[0]["agent"], "old");
    server.live().signal(rustix::process::Signal::TERM);
    server.ended();
    assert!(!exists(&home, &second), "it is gone before the server is");
    assert_eq!(home.names(), ["kept"]);
}

#[test]
fn unused_sessions_over_http_end() {
    let home = Home::new();
    let server =
        Server::serving(&home, "mcp-server", &["--transport", "http", "--session-idle", "4s", "--session-grace", "1s"]);
    let used = InitializedSession::begin(&server);
    let unused = InitializedSession::begin(&server);
    let stays = used.good("vm_spawn", &throw_away("stays"));
    let goes = unused.good("vm_spawn", &throw_away("goes"));
    // Another open session does not take its VMs over, however often it calls.
    until("the end of the session that is not used", || {
        assert_eq!(used.good("vm_info", &json!({"name": "stays"}))["id"], stays["id"]);
        (!exists(&home, &goes)).then_some(())
    });
    gone(&home, &stays);
    home.nido(["mcp-server", "start", "--session-idle", "1s", "--json"]).input("").run().fails(2, "spec_invalid");
}

#[test]
fn sessions_over_http_end_with_a_server_that_is_killed() {
    let home = Home::new();
    let server = Server::serving(&home, "mcp-server", &["--transport", "http"]);
    let with_session = InitializedSession::begin(&server).good("vm_spawn", &throw_away("with-session"));
    let without = call(&server, server.token(), "vm_spawn", throw_away("without"))["structuredContent"].clone();
    server.gone();
    gone(&home, &with_session);
    gone(&home, &without);
    home.expect_empty();
}

#[test]
fn without_sessions_they_have_a_ttl_and_go_with_the_server() {
    let home = Home::new();
    let server = Server::serving(&home, "mcp-server", &["--transport", "http"]);
    let other = token(&home, "run");
    let good = |token: &str, tool: &str, arguments: Value| {
        let result = call(&server, token, tool, arguments);
        assert_eq!(result["isError"], false, "{result}");
        result["structuredContent"].clone()
    };
    let vm = good(server.token(), "vm_spawn", throw_away("box"));
    let facts = good(server.token(), "vm_info", json!({"name": "box"}));
    let time = |key: &str| facts[key].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    assert_eq!((time("expires_at") - time("started_at")).total(jiff::Unit::Minute).unwrap().round() as i64, 60);
    // The answer was the end of the request, and not of the VM.
    assert_eq!(good(server.token(), "vm_spawn", throw_away("box"))["id"], vm["id"]);
    let theirs = good(&other, "vm_spawn", throw_away("theirs"));
    assert_eq!(theirs["lease"], vm["lease"], "the server's");
    let mut short = throw_away("short");
    short["ttl_ms"] = 1500.into();
    let short = good(server.token(), "vm_spawn", short);
    gone(&home, &short);
    assert!(exists(&home, &vm) && exists(&home, &theirs));
    server.live().signal(rustix::process::Signal::TERM);
    server.ended();
    assert!(!exists(&home, &vm) && !exists(&home, &theirs));
    home.expect_empty();
    let lines = session_ends(&home);
    assert_eq!(lines[0]["params"]["vms"], json!(["box", "theirs"]));
    assert!(lines[0]["actor"].as_str().unwrap().starts_with("uid:"), "{lines:?}");
}
