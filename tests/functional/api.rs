//! The REST API over the real program: VMs, mistakes, what takes long, and what outlives the server.

use rustix::process::Signal;
use serde_json::json;

use crate::support::http::Server;
use crate::support::{Home, processes, until};

#[test]
fn a_vm_lives_over_http() {
    let home = Home::new();
    let server = Server::start(&home);
    let made = server.post("/v1/vms", &json!({"name": "web", "accel": "tcg", "labels": {"a": "b"}}));
    assert_eq!(made.header("location"), "/v1/vms/web");
    let vm = made.ok(201);
    assert_eq!(
        (&vm["status"], &vm["labels"]["a"], &vm["agent"]["ready"]),
        (&"running".into(), &"b".into(), &true.into())
    );
    assert_eq!(server.get("/v1/vms").ok(200)["vms"][0]["name"], "web");
    // The same as on the command line.
    assert_eq!(server.get("/v1/vms/web").ok(200), home.info("web"));
    server.post("/v1/vms", &json!({"name": "web"})).problem(409, "vm_exists");
    server.get("/v1/vms/nobody").problem(404, "vm_not_found");
    assert_eq!(server.post("/v1/vms/web/pause", &json!({})).ok(200)["status"], "paused");
    assert_eq!(server.post("/v1/vms/web/resume", &json!({})).ok(200)["status"], "running");
    server.send("DELETE", "/v1/vms/web", &[], b"").problem(409, "vm_busy");
    // A body may be absent where nothing has to be said.
    assert_eq!(server.send("POST", "/v1/vms/web/stop", &[], b"").ok(200)["status"], "stopped");
    assert_eq!(server.post("/v1/vms/web/start", &json!({"wait": true})).ok(200)["status"], "running");
    assert_eq!(server.send("DELETE", "/v1/vms/web?force=true", &[], b"").ok(200)["name"], "web");
    assert!(home.names().is_empty());
    let only_made = server.post("/v1/vms", &json!({"name": "cold", "start": false})).ok(201);
    assert_eq!(only_made["status"], "created");
}

#[test]
fn mistakes_are_problems_that_name_the_field() {
    let home = Home::new();
    let server = Server::start(&home);
    let post = |body: &str, kind: &str| server.send("POST", "/v1/vms", &[("content-type", kind)], body.as_bytes());
    let wrong = |body: &str, field: &str| {
        let problem = post(body, "application/json").problem(422, "spec_invalid");
        assert!(problem["detail"].as_str().unwrap().starts_with(field), "{problem}");
    };
    wrong(r#"{"name": "web", "cpus": "two"}"#, "cpus: ");
    wrong(r#"{"name": "Web"}"#, "name: 'Web' is not a VM name");
    wrong(r#"{"name": "web", "forwards": [{"guest_port": 80}, {"guest_port": "x"}]}"#, "forwards[1].guest_port: ");
    wrong(r#"{"name": "web", "colour": "red"}"#, "colour: unknown field");
    wrong(r#"{"name": "web", "forwards": [{"guest_port": 0}]}"#, "forwards[0].guest_port: a port is 1 to 65535");
    wrong("[]", "");
    wrong(r#"{"name": "web", "forwards": [["127.0.0.1", 0, 80]]}"#, "forwards[0]: it is an object, not a list");
    post("{", "application/json").problem(400, "request_invalid");
    post("{} {}", "application/json").problem(400, "request_invalid");
    post("{}", "text/plain").problem(415, "media_type_unsupported");
    post(&"x".repeat(2 << 20), "application/json").problem(413, "body_too_large");
    server.get("/v1/nothing").problem(404, "route_not_found");
    let not_allowed = server.send("PATCH", "/v1/vms", &[], b"");
    assert_eq!(not_allowed.header("allow"), "GET,HEAD,POST");
    not_allowed.problem(405, "method_not_allowed");
    server.get("/v1/vms/Web").problem(422, "name_invalid");
    server.get("/v1/events?since=x").problem(422, "spec_invalid");
    server.get("/v1/operations/x").problem(404, "operation_not_found");
    assert!(home.names().is_empty());
}

#[test]
fn what_takes_long_is_polled_and_cancelled() {
    let home = Home::new();
    home.qemu("no-agent");
    let server = Server::start(&home);
    let bearer = format!("Bearer {}", server.token());
    let headers = [("authorization", &*bearer), ("content-type", "application/json"), ("prefer", "respond-async")];
    let begun = server.plain("POST", "/v1/vms", &headers, br#"{"name": "web", "accel": "tcg"}"#);
    let place = begun.header("location").to_owned();
    assert_eq!(begun.header("preference-applied"), "respond-async");
    assert_eq!(begun.ok(202)["status"], "running");
    until("its VM", || home.names().contains(&"web".to_owned()).then_some(()));
    assert_eq!(server.send("DELETE", &place, &[], b"").ok(200)["status"], "cancelled");
    server.get(&place).problem(404, "operation_not_found");
    server.send("DELETE", &place, &[], b"").problem(404, "operation_not_found");
    // Nothing half-made stays.
    until("the VM is gone", || home.names().is_empty().then_some(()));
    home.qemu("");
    let begun = server.plain("POST", "/v1/vms", &headers, br#"{"name": "two", "accel": "tcg"}"#).ok(202);
    let place = format!("/v1/operations/{}", begun["id"].as_str().unwrap());
    let ended = until("the end", || Some(server.get(&place).ok(200)).filter(|now| now["status"] != "running"));
    assert_eq!((&ended["status"], &ended["result"]["name"]), (&"succeeded".into(), &"two".into()), "{ended}");
    assert_eq!(server.send("DELETE", &place, &[], b"").ok(200), ended);
    server.get(&place).problem(404, "operation_not_found");
    for vm in home.names() {
        home.nido(["delete", &vm, "--force"]).run().ok();
    }
}

#[test]
fn vms_outlive_the_server_and_what_runs_is_finished() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let bearer = format!("Bearer {}", server.token());
    let headers = [("authorization", &*bearer), ("content-type", "application/json"), ("accept", "text/event-stream")];
    let body = json!({"command": "echo up; sleep 0.3; echo done"}).to_string();
    let mut running = server.open("POST", "/v1/vms/web/exec", &headers, body.as_bytes());
    while !running.line().contains("up") {}
    server.live().signal(Signal::TERM);
    while !running.line().contains("done") {}
    drop(running);
    server.ended();
    assert_eq!(home.info("web")["status"], "running");
    home.nido(["exec", "web", "--", "true"]).run().ok();
}

#[test]
fn a_supervisor_that_was_killed_is_replaced_for_the_next_request() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    for _ in 0..3 {
        let supervisors = processes::of(&home.path()).into_iter().filter(|(_, line)| line.contains("supervise"));
        supervisors.for_each(|(pid, _)| processes::kill(pid));
        let done = server.post("/v1/vms/web/exec", &json!({"argv": ["echo", "back"]})).ok(200);
        assert_eq!(done["stdout"], "back\n");
    }
}

#[test]
fn a_request_with_a_key_is_carried_out_once() {
    let home = Home::new();
    let server = Server::start(&home);
    let send = |server: &Server, key: &str, body: &str| {
        let headers = [("content-type", "application/json"), ("idempotency-key", key)];
        server.send("POST", "/v1/vms", &headers, body.as_bytes())
    };
    let web = r#"{"name": "web", "accel": "tcg"}"#;
    let first = send(&server, "k1", web);
    assert_eq!(first.header("idempotency-replayed"), "");
    let first = first.ok(201);
    let again = send(&server, "k1", web);
    assert_eq!((again.header("idempotency-replayed"), again.header("location")), ("true", "/v1/vms/web"));
    assert_eq!(again.ok(201), first);
    send(&server, "k1", r#"{"name": "other"}"#).problem(422, "spec_invalid");
    send(&server, "k2", web).problem(409, "vm_exists");
    send(&server, &"k".repeat(300), web).problem(422, "spec_invalid");
    // A mistake stays one; what the state of things forbade may be tried again.
    send(&server, "k3", r#"{"name": "Web"}"#).problem(422, "spec_invalid");
    let mistake = send(&server, "k3", r#"{"name": "Web"}"#);
    assert_eq!(mistake.header("idempotency-replayed"), "true");
    mistake.problem(422, "spec_invalid");
    home.nido(["delete", "web", "--force"]).run().ok();
    send(&server, "k2", web).ok(201);
}

#[test]
fn the_description_in_the_repository_is_the_one_that_is_served() {
    let home = Home::bare();
    let now = home.nido(["api-server", "openapi"]).run().ok();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
    if std::env::var_os("NIDO_BLESS").is_some() {
        std::fs::write(path, &now.stdout).unwrap();
    }
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(now.text() == kept, "docs/openapi.json is stale; NIDO_BLESS=1 writes it anew");
}
