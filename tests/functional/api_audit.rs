//! The REST API over the real program: what of it stands in the audit log.

use serde_json::json;

use crate::support::Home;
use crate::support::http::Server;

#[test]
fn what_is_asked_for_is_in_the_audit_log_before_it_is_done() {
    let home = Home::new();
    let server = Server::start(&home);
    server.post("/v1/vms", &json!({"name": "web", "accel": "tcg"})).ok(201);
    server
        .post("/v1/vms/web/exec", &json!({"command": "exit 3", "env": {"TOKEN": "s3cret"}, "stdin": "hunter2"}))
        .ok(200);
    server.get("/v1/vms/web/files?path=/etc/hostname");
    server.post("/v1/vms/nobody/stop", &json!({})).problem(404, "vm_not_found");
    let lines = home.nido(["audit", "show", "--json"]).run().ok().json()["records"].as_array().unwrap().clone();
    let told: Vec<_> = lines
        .iter()
        .filter(|line| line["face"] == "api")
        .map(|line| ["tool", "stage", "result", "reason"].map(|key| line[key].as_str().unwrap_or_default().to_owned()))
        .collect();
    let expect = |tool: &str, result: &str, reason: &str| {
        let attempt = told.iter().position(|line| line[0] == tool && line[1] == "attempt").unwrap();
        let outcome = told[attempt..].iter().position(|line| line == &[tool, "outcome", result, reason]);
        assert!(outcome.is_some(), "{tool} {result} {reason}: {told:#?}");
    };
    expect("vm_spawn", "success", "");
    expect("vm_exec", "success", "exit_code:3");
    expect("vm_download", "success", "");
    expect("vm_stop", "error", "vm_not_found");
    assert!(lines.iter().any(|line| line["actor"] == "token:tests"));
    let log = format!("{lines:?}");
    assert!(!log.contains("s3cret") && !log.contains("hunter2"), "{log}");
    home.nido(["audit", "verify"]).run().ok();
    // Where it cannot be written down, it is not done.
    let audit = home.path().join("audit");
    std::fs::rename(&audit, home.scratch("kept")).unwrap();
    std::fs::write(&audit, "").unwrap();
    server.send("DELETE", "/v1/vms/web?force=true", &[], b"").problem(503, "audit_failed");
    // Nor is anything told.
    server.get("/v1/vms/web").problem(503, "audit_failed");
    server.get("/healthz").ok(200);
    std::fs::remove_file(&audit).unwrap();
    std::fs::rename(home.scratch("kept"), &audit).unwrap();
    assert_eq!(server.get("/v1/vms/web").ok(200)["status"], "running");
}

#[test]
fn looks_are_in_the_audit_log_once() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    server.get("/v1/vms").ok(200);
    server.get("/v1/vms/web").ok(200);
    server.get("/v1/vms/nobody").problem(404, "vm_not_found");
    server.get("/v1/events?vm=web").ok(200);
    let read = home.nido(["token", "create", "--name", "read", "--scope", "read", "--json"]).run().ok().json();
    let read = format!("Bearer {}", read["token"].as_str().unwrap());
    server.plain("GET", "/v1/audit", &[("authorization", &read)], b"").problem(403, "denied");
    for not in ["/", "/healthz", "/openapi.json", "/metrics"] {
        assert_eq!(server.get(not).status, 200);
    }
    let told = server.get("/v1/audit").ok(200)["records"].clone();
    let told: Vec<_> = told.as_array().unwrap().iter().filter(|line| line["face"] == "api").collect();
    let words = |line: &serde_json::Value| {
        ["tool", "stage", "result", "reason", "actor"].map(|key| line[key].as_str().unwrap_or_default().to_owned())
    };
    let told: Vec<_> = told.into_iter().map(words).collect();
    let expected = [
        ["vm_ls", "outcome", "success", "", "token:tests"],
        ["vm_info", "outcome", "success", "", "token:tests"],
        ["vm_info", "outcome", "error", "vm_not_found", "token:tests"],
        ["events", "outcome", "success", "", "token:tests"],
        ["audit_show", "outcome", "denied", "denied", "token:read"],
    ];
    assert_eq!(told, expected);
    assert_eq!(home.nido(["audit", "verify", "--json"]).run().ok().json()["lines"], 10);
}
