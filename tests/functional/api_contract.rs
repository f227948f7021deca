//! The REST API over the real program: what clients rely on whatever they ask for. Keys, lists, codes, owners, conditions.

use serde_json::{Value, json};

use crate::support::http::{HttpResponse, Server};
use crate::support::{Home, until};

const JSON: (&str, &str) = ("content-type", "application/json");

fn keyed(server: &Server, path: &str, key: &str, body: &Value) -> HttpResponse {
    server.send("POST", path, &[JSON, ("idempotency-key", key)], body.to_string().as_bytes())
}

/// A token of this scope, as a header.
fn bearer(home: &Home, name: &str, scope: &str) -> String {
    let made = home.nido(["token", "create", "--name", name, "--scope", scope, "--json"]).run().ok().json();
    format!("Bearer {}", made["token"].as_str().unwrap())
}

// A command whose VM was stopped meanwhile was answered with 504, and run once more by the same request with the same key.
#[test]
fn a_command_that_was_begun_is_never_run_again_under_its_key() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let proof = home.scratch("proof");
    let body = json!({ "command": format!("echo x >> '{}'; sleep 98741", proof.display()) });
    let bytes = body.to_string();
    let token = format!("Bearer {}", server.token());
    let headers = [JSON, ("idempotency-key", "k8"), ("authorization", &*token)];
    let waits = server.unread("POST", "/v1/vms/web/exec", &headers, bytes.as_bytes());
    until("the command", || proof.exists().then_some(()));
    home.nido(["stop", "--force", "web"]).run().ok();
    let first = Server::answer_to(waits);
    assert!(first.status >= 400, "{}", first.status);
    home.nido(["start", "web"]).run().ok();
    for _ in 0..2 {
        let again = keyed(&server, "/v1/vms/web/exec", "k8", &body);
        assert_eq!(again.header("idempotency-replayed"), "true");
        again.problem(409, "outcome_unknown");
    }
    assert_eq!(std::fs::read_to_string(proof).unwrap(), "x\n");
}

// A 404 was kept for a day: a loop that waits until a VM exists never ended.
#[test]
fn a_request_that_was_refused_before_it_began_may_be_sent_again_with_its_key() {
    let home = Home::new();
    let server = Server::start(&home);
    let body = json!({"argv": ["echo", "up"]});
    keyed(&server, "/v1/vms/web/exec", "k5", &body).problem(404, "vm_not_found");
    let wrong = json!({"argv": ["no-such-command"]});
    home.spawn("web");
    assert_eq!(keyed(&server, "/v1/vms/web/exec", "k5", &body).ok(200)["stdout"], "up\n");
    for _ in 0..2 {
        let refused = keyed(&server, "/v1/vms/web/exec", "k6", &wrong);
        assert_eq!(refused.header("idempotency-replayed"), "");
        refused.problem(422, "command_not_found");
    }
    // A stream of events cannot be given again, so a key would be a promise that is not kept.
    let headers = [JSON, ("idempotency-key", "k7"), ("accept", "text/event-stream")];
    server.send("POST", "/v1/vms/web/exec", &headers, body.to_string().as_bytes()).problem(422, "spec_invalid");
}

// The 202 of an operation was replayed when its operation no longer existed.
#[test]
fn repeating_a_key_returns_the_operations_current_state() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let headers = [JSON, ("idempotency-key", "k"), ("prefer", "respond-async")];
    let body = json!({"argv": ["echo", "done"]}).to_string();
    let send = || server.send("POST", "/v1/vms/web/exec", &headers, body.as_bytes());
    let place = send().header("location").to_owned();
    until("the end", || (server.get(&place).ok(200)["status"] == "succeeded").then_some(()));
    let again = send();
    assert_eq!((again.header("idempotency-replayed"), again.header("location")), ("true", &*place));
    assert_eq!(again.ok(202)["result"]["stdout"], "done\n");
    server.send("DELETE", &place, &[], b"").ok(200);
    send().problem(409, "outcome_unknown");
}

// A client that names JSON by default was refused where it sent no body.
#[test]
fn an_optional_body_may_be_empty_with_any_content_type() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    for (verb, status) in [("stop", "stopped"), ("start", "running"), ("restart", "running")] {
        for kind in ["application/json", "text/plain"] {
            let path = format!("/v1/vms/web/{verb}");
            assert_eq!(server.send("POST", &path, &[("content-type", kind)], b"").ok(200)["status"], status, "{verb}");
        }
    }
    let body = json!({"argv": ["echo", "x"], "command": null, "stdin": null, "env": null, "timeout_seconds": 9});
    assert_eq!(server.post("/v1/vms/web/exec", &body).ok(200)["stdout"], "x\n");
    let gzip = [JSON, ("content-encoding", "gzip")];
    server.send("POST", "/v1/vms/web/stop", &gzip, b"\x1f\x8b").problem(415, "media_type_unsupported");
    let part = [("content-range", "bytes 0-1/4")];
    server.send("PUT", "/v1/vms/web/files?path=/x", &part, b"ab").problem(400, "request_invalid");
}

// Filters that no route knew were ignored: `?status=stopped` listed every VM.
#[test]
fn lists_are_filtered_and_paged_and_refuse_unknown_parameters() {
    let home = Home::new();
    let server = Server::start(&home);
    for (name, job) in [("a", "1"), ("b", "2"), ("c", "1")] {
        server.post("/v1/vms", &json!({"name": name, "start": false, "labels": {"job": job}})).ok(201);
    }
    let names = |query: &str| {
        let page = server.get(&format!("/v1/vms{query}")).ok(200);
        let names = page["vms"].as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap().to_owned());
        (names.collect::<Vec<_>>().join(" "), page["next_cursor"].as_str().map(str::to_owned))
    };
    assert_eq!(names("").0, "a b c");
    assert_eq!(names("?label=job%3D1&status=created,stopped").0, "a c");
    assert_eq!((names("?label=job&label=job=2").0, names("?status=running").0), ("b".into(), String::new()));
    let (first, next) = names("?limit=2");
    assert_eq!(first, "a b");
    assert_eq!(names(&format!("?limit=2&cursor={}", next.unwrap())), ("c".into(), None));
    assert!(server.get("/v1/vms?limit=2").header("link").contains("rel=\"next\""));
    for path in [
        "/v1/vms?stat=x",
        "/v1/vms?status=x",
        "/v1/vms?limit=0",
        "/v1/vms?cursor=x",
        "/v1/vms/a?x=1",
        "/v1/host?x",
        "/metrics?x=1",
        "/v1/events?limit=0",
        "/v1/vms?limit=%ff",
    ] {
        server.get(path).problem(422, "spec_invalid");
    }
    assert_eq!(server.get("/v1/events?limit=1").ok(200)["events"][0]["vm_name"], "a");
    assert_eq!(server.get("/v1/events?tail=1&event=vm.created").ok(200)["events"][0]["vm_name"], "c");
    let lines = server.get("/v1/audit?limit=2").ok(200);
    assert_eq!((lines["records"].as_array().unwrap().len(), &lines["next_cursor"]), (2, &lines["records"][1]["seq"]));
    assert_eq!(server.send("DELETE", "/v1/vms/a?force=1", &[], b"").ok(200)["name"], "a");
}

// `a+b` was written as `a b`, and a byte that is not UTF-8 as U+FFFD.
#[test]
fn a_path_in_a_query_is_the_bytes_that_were_sent() {
    use std::os::unix::ffi::OsStrExt as _;
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let there = home.scratch("");
    for (sent, name) in [("a++.deb", &b"a++.deb"[..]), ("bad%ff", b"bad\xff")] {
        let path = format!("/v1/vms/web/files?path={}/{sent}", there.display());
        server.send("PUT", &path, &[], sent.as_bytes()).ok(200);
        assert_eq!(std::fs::read(there.join(std::ffi::OsStr::from_bytes(name))).unwrap(), sent.as_bytes());
        assert_eq!(server.get(&path).body, sent.as_bytes());
    }
    server.get("/v1/vms/web/files?path=/x%zz").problem(422, "spec_invalid");
}

// What the guest refused was `denied`, as if the token lacked a right.
#[test]
fn refusals_of_a_guest_and_of_nido_are_distinguished() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let denied = server.send("PUT", "/v1/vms/web/files?path=/sys/x", &[], b"x").problem(422, "guest_denied");
    assert!(!denied["hint"].as_str().unwrap().contains("--"), "{denied}");
    server.get("/v1/vms/web/files?path=/no/such/file").problem(404, "guest_not_found");
    let exec = |body: Value| server.post("/v1/vms/web/exec", &body);
    exec(json!({"argv": ["no-such-command"]})).problem(422, "command_not_found");
    exec(json!({"argv": ["true"], "user": "nobody-at-all"})).problem(422, "user_not_found");
    exec(json!({"argv": ["true"], "directory": "/no/such"})).problem(422, "directory_not_found");
}

// Any token of the scope `run` could cancel an operation of an admin and read what its command had written.
#[test]
fn an_operation_is_its_callers_and_the_admins() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let (one, two) = (bearer(&home, "one", "run"), bearer(&home, "two", "run"));
    let body = json!({"argv": ["echo", "secret"]}).to_string();
    let begin = |token: &str| {
        let headers = [JSON, ("prefer", "respond-async"), ("authorization", token)];
        server.plain("POST", "/v1/vms/web/exec", &headers, body.as_bytes()).header("location").to_owned()
    };
    let ask = |method: &str, path: &str, token: &str| server.plain(method, path, &[("authorization", token)], b"");
    let (of_one, of_admin) = (begin(&one), begin(&format!("Bearer {}", server.token())));
    until("the end", || (server.get(&of_one).ok(200)["status"] == "succeeded").then_some(()));
    for place in [&of_one, &of_admin] {
        for method in ["GET", "DELETE"] {
            ask(method, place, &two).problem(404, "operation_not_found");
        }
    }
    assert_eq!(ask("GET", "/v1/operations", &two).ok(200)["operations"], json!([]));
    let list = ask("GET", "/v1/operations", &one).ok(200);
    assert_eq!((list["operations"].as_array().unwrap().len(), &list["operations"][0]["result"]), (1, &Value::Null));
    assert_eq!(server.get("/v1/operations").ok(200)["operations"].as_array().unwrap().len(), 2);
    assert_eq!(ask("GET", &of_one, &one).ok(200)["result"]["stdout"], "secret\n");
    ask("DELETE", &of_one, &one).ok(200);
}

// A request with a key continued after its token had been revoked.
#[test]
fn a_command_with_a_key_ends_with_its_token() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let token = bearer(&home, "ci", "run");
    let proof = home.scratch("proof");
    let body =
        json!({"command": format!("touch '{}'; exec sleep 98742", proof.display()), "timeout_ms": 0}).to_string();
    let headers = [JSON, ("idempotency-key", "k"), ("authorization", &*token)];
    let waits = server.unread("POST", "/v1/vms/web/exec", &headers, body.as_bytes());
    until("the command", || proof.exists().then_some(()));
    home.nido(["token", "revoke", "ci"]).run().ok();
    until("the end of the command", || {
        let found = home.nido(["exec", "web", "--", "pgrep", "-fx", "sleep 98742"]).run();
        found.text().trim().is_empty().then_some(())
    });
    Server::answer_to(waits).problem(401, "unauthorized");
}

// What was decided about one VM could be done to another that had its name meanwhile.
#[test]
fn a_vm_is_named_by_its_id_and_guarded_by_it() {
    let home = Home::new();
    let server = Server::start(&home);
    let make =
        || server.post("/v1/vms", &json!({"name": "web", "start": false})).ok(201)["id"].as_str().unwrap().to_owned();
    let old = make();
    let info = server.get(&format!("/v1/vms/{old}"));
    assert_eq!(info.header("etag"), format!("\"{old}\""));
    assert_eq!(info.ok(200)["name"], "web");
    assert_eq!(home.info(&old)["id"], *old);
    let taken = json!({"name": old, "start": false});
    server.post("/v1/vms", &taken).problem(409, "vm_exists");
    home.nido(["delete", &old, "--yes"]).run().ok();
    let new = make();
    let delete = |tag: &str| server.send("DELETE", "/v1/vms/web", &[("if-match", tag)], b"");
    delete(&format!("\"{old}\"")).problem(412, "vm_replaced");
    delete("web").problem(400, "request_invalid");
    assert_eq!(delete(&format!("\"{new}\"")).ok(200)["id"], *new);
}

// A cursor that was pruned, or that is ahead of the log, was answered with silence.
#[test]
fn a_cursor_outside_of_the_log_is_reported() {
    let home = Home::new();
    let server = Server::start(&home);
    server.post("/v1/vms", &json!({"name": "web", "start": false})).ok(201);
    assert_eq!(server.get("/v1/events").ok(200)["oldest"], 1);
    server.get("/v1/events?since=100000").problem(410, "cursor_expired");
    let token = format!("Bearer {}", server.token());
    let headers = [("authorization", &*token), ("accept", "text/event-stream"), ("last-event-id", "99999")];
    let mut stream = server.open("GET", "/v1/events", &headers, b"");
    assert!(stream.line().starts_with("retry: "));
    let mut told = Vec::new();
    while told.last().is_none_or(|line: &String| line != "event: vm.created") {
        told.push(stream.line());
    }
    assert!(told.contains(&"event: gap".to_owned()), "{told:?}");
}

// Two forwards of the same port of the same address were accepted, and the VM then could not start.
#[test]
fn a_port_of_the_host_is_published_once() {
    let home = Home::new();
    let server = Server::start(&home);
    let twice = json!([{"host_port": 18080, "guest_port": 80}, {"host_port": 18080, "guest_port": 81}]);
    server.post("/v1/vms", &json!({"name": "web", "start": false, "forwards": twice})).problem(422, "spec_invalid");
    server.post("/v1/vms", &json!({"name": "web", "start": false})).ok(201);
    let add = |guest: u16| server.post("/v1/vms/web/forwards", &json!({"host_port": 18080, "guest_port": guest}));
    let first = add(80);
    assert_eq!(first.header("location"), "/v1/vms/web/forwards/127.0.0.1:18080");
    let place = first.header("location").to_owned();
    first.ok(201);
    add(81).problem(409, "port_in_use");
    // Fits the pattern of the description, and was a 422.
    let unknown = server.send("DELETE", "/v1/vms/web/forwards/there:80", &[], b"").problem(404, "forward_not_found");
    assert!(unknown["hint"].as_str().unwrap().contains("ADDRESS:PORT"), "{unknown}");
    server.send("DELETE", &place, &[], b"").ok(200);
    server.send("PUT", "/v1/pools/zz-none", &[JSON], br#"{"wanted": 0}"#).problem(404, "template_not_found");
}
