//! The REST API over the real program: commands, their streams, and what ends them.

use serde_json::json;

use crate::support::http::Server;
use crate::support::{Home, until};

#[test]
fn commands_run_and_stream() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let exec = |body| server.post("/v1/vms/web/exec", &body);
    let done = exec(json!({"argv": ["sh", "-c", "echo out; echo err >&2; exit 3"]})).ok(200);
    assert_eq!((&done["stdout"], &done["stderr"], &done["exit_code"]), (&"out\n".into(), &"err\n".into(), &3.into()));
    assert_eq!(
        exec(json!({"command": "cat; echo $A", "stdin": "in\n", "env": {"A": "b"}})).ok(200)["stdout"],
        "in\nb\n"
    );
    assert_eq!(exec(json!({"argv": ["printf", "\\377"]})).ok(200)["stdout_base64"], "/w==");
    assert_eq!(exec(json!({"argv": ["sleep", "60"], "timeout_ms": 100})).ok(200)["timed_out"], true);
    exec(json!({"argv": ["no-such-command"]})).problem(422, "command_not_found");
    exec(json!({})).problem(422, "spec_invalid");
    exec(json!({"argv": ["true"], "command": "true"})).problem(422, "spec_invalid");
    let bearer = format!("Bearer {}", server.token());
    let headers = [("authorization", &*bearer), ("content-type", "application/json"), ("accept", "text/event-stream")];
    let body = json!({"command": "echo one; read x; echo $x", "stdin": "two\n"}).to_string();
    let mut stream = server.open("POST", "/v1/vms/web/exec", &headers, body.as_bytes());
    let mut told = Vec::new();
    while told.last().is_none_or(|line: &String| line != "event: exit") {
        told.push(stream.line());
    }
    assert!(told.contains(&"event: started".to_owned()) && stream.line().contains("\"exit_code\":0"), "{told:?}");
    assert!(told.iter().any(|line| line.contains("one")) && told.iter().any(|line| line.contains("two")), "{told:?}");
}

#[test]
fn a_command_ends_with_its_listener() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let bearer = format!("Bearer {}", server.token());
    let headers = [("authorization", &*bearer), ("content-type", "application/json"), ("accept", "text/event-stream")];
    let body = json!({"argv": ["sleep", "98731"]}).to_string();
    let mut stream = server.open("POST", "/v1/vms/web/exec", &headers, body.as_bytes());
    assert_eq!(stream.line(), "event: started");
    drop(stream);
    until("the end of the command", || {
        let found = home.nido(["exec", "web", "--", "pgrep", "-fx", "sleep 98731"]).run();
        found.text().trim().is_empty().then_some(())
    });
}

#[test]
fn a_command_ends_with_a_listener_that_does_not_read() {
    let home = Home::new();
    let server = Server::with(&home, &["--patience", "500ms"]);
    home.spawn("web");
    let bearer = format!("Bearer {}", server.token());
    let headers = [("authorization", &*bearer), ("content-type", "application/json"), ("accept", "text/event-stream")];
    let body = json!({"argv": ["sh", "-c", "exec yes 98732"]}).to_string();
    let mut stream = server.open("POST", "/v1/vms/web/exec", &headers, body.as_bytes());
    assert_eq!(stream.line(), "event: started");
    until("the end of the command", || {
        let found = home.nido(["exec", "web", "--", "pgrep", "-fx", "yes 98732"]).run();
        found.text().trim().is_empty().then_some(())
    });
    drop(stream);
    // A client that still receives is not disconnected: so much takes longer than that.
    let body = json!({"command": "for n in 1 2 3 4; do sleep 0.2; echo $n; done"}).to_string();
    let mut stream = server.open("POST", "/v1/vms/web/exec", &headers, body.as_bytes());
    while stream.line() != "event: exit" {}
}
