//! The REST API over the real program: what of it stands in the audit log.

use std::io::Read as _;

use serde_json::{Value, json};

use crate::support::http::{HttpResponse, Server};
use crate::support::{Home, until};

/// The lines of the API that these filters want.
fn show<const N: usize>(home: &Home, filters: [&str; N]) -> Vec<Value> {
    let shown = filters.into_iter().fold(home.nido(["audit", "show", "--json"]), crate::support::Nido::arg);
    let records = shown.run().ok().json()["records"].as_array().unwrap().clone();
    records.into_iter().filter(|line| line["face"] == "api").collect()
}

/// How they ended: tool, result, reason.
fn ends<const N: usize>(home: &Home, filters: [&str; N]) -> Vec<[String; 3]> {
    let outcomes = show(home, filters).into_iter().filter(|line| line["stage"] == "outcome");
    outcomes.map(|line| ["tool", "result", "reason"].map(|key| line[key].as_str().unwrap_or_default().into())).collect()
}

fn text(home: &Home) -> String {
    std::fs::read_to_string(home.path().join("audit/mcp-audit.log")).unwrap()
}

#[test]
fn attempts_are_in_the_audit_log_before_they_run() {
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
    assert!(lines.iter().any(|line| line["actor"].as_str().unwrap().starts_with("token:tests#")));
    let log = format!("{lines:?}");
    assert!(!log.contains("s3cret") && !log.contains("hunter2"), "{log}");
    home.nido(["audit", "verify"]).run().ok();
    // Where it cannot be recorded, it is not done.
    let audit = home.path().join("audit");
    std::fs::rename(&audit, home.scratch("kept")).unwrap();
    std::fs::write(&audit, "").unwrap();
    server.send("DELETE", "/v1/vms/web?force=true", &[], b"").problem(503, "audit_failed");
    // Nor is anything returned.
    server.get("/v1/vms/web").problem(503, "audit_failed");
    server.get("/healthz").ok(200);
    std::fs::remove_file(&audit).unwrap();
    std::fs::rename(home.scratch("kept"), &audit).unwrap();
    assert_eq!(server.get("/v1/vms/web").ok(200)["status"], "running");
}

#[test]
fn reads_are_in_the_audit_log_once() {
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
    let words = |line: &Value| {
        let word = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
        let actor = word("actor").split('#').next().unwrap().to_owned();
        [word("tool"), word("stage"), word("result"), word("reason"), actor]
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
    let verdict = home.nido(["audit", "verify", "--json"]).run().ok().json();
    assert_eq!((&verdict["lines"], &verdict["reads"]["lines"]), (&json!(4), &json!(6)), "{verdict}");
}

#[test]
fn no_body_and_no_query_speaks_over_the_path() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    home.nido(["stop", "web"]).run().ok();
    server.post("/v1/vms/web/snapshots", &json!({"name": "first"})).ok(201);
    let forged = json!({"name": "innocent", "force": false}).to_string();
    let headers = [("content-type", "application/json")];
    let delete = |query: &str| server.send("DELETE", &format!("/v1/vms/web?{query}"), &headers, forged.as_bytes());
    delete("force=true&name=innocent&vm=innocent").problem(422, "spec_invalid");
    delete("force=true").ok(200);
    // What a route does not take from the query is no name either.
    let evil = json!({"name": "evil", "start": false});
    server.post("/v1/vms?name=innocent", &evil).problem(422, "spec_invalid");
    let of =
        |tool: &str| show(&home, ["--tool", tool]).into_iter().map(|line| line["params"].clone()).collect::<Vec<_>>();
    let snapshot = json!({"name": "web", "body": {"name": "first"}});
    assert_eq!(of("vm_snapshot"), [snapshot.clone(), snapshot]);
    let refused = json!({"name": "web", "force": "true", "query": {"name": "innocent", "vm": "innocent"}});
    let deleted = json!({"name": "web", "force": "true"});
    assert_eq!(of("vm_delete"), [refused.clone(), refused, deleted.clone(), deleted]);
    let spawned = json!({"name": "evil", "start": false, "query": {"name": "innocent"}});
    assert_eq!(of("vm_spawn"), [spawned.clone(), spawned]);
    assert_eq!([6, 2, 0], ["web", "evil", "innocent"].map(|vm| show(&home, ["--vm", vm]).len()));
}

#[test]
fn contents_of_files_are_never_in_the_audit_log() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let path = format!("/v1/vms/web/files?path={}", home.scratch("there").display());
    let body = json!({"name": "innocent", "line": "s3cr3t"}).to_string();
    let put = |kind: &str| server.send("PUT", &path, &[("content-type", kind)], body.as_bytes());
    put("application/json").problem(415, "media_type_unsupported");
    put("application/json; charset=utf-8").problem(415, "media_type_unsupported");
    put("application/octet-stream").ok(200);
    put("application/x-tar").problem(422, "spec_invalid");
    server
        .send("PATCH", &path, &[("content-type", "application/json")], body.as_bytes())
        .problem(405, "method_not_allowed");
    assert_eq!(
        ends(&home, ["--vm", "web"]).iter().map(|[tool, _, reason]| [&**tool, &**reason]).collect::<Vec<_>>(),
        [
            ["vm_upload", "media_type_unsupported"],
            ["vm_upload", "media_type_unsupported"],
            ["vm_upload", ""],
            ["vm_upload", "spec_invalid"],
            ["other", "method_not_allowed"],
        ]
    );
    assert!(!text(&home).contains("s3cr3t") && !text(&home).contains("innocent"), "{}", text(&home));
}

#[test]
fn a_replayed_response_has_its_own_audit_line() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let send = |key: &str, body: &Value| {
        let headers = [("content-type", "application/json"), ("idempotency-key", key)];
        server.send("POST", "/v1/vms/web/exec", &headers, body.to_string().as_bytes())
    };
    let command = json!({"command": "echo out; exit 3", "stdin": "s3cr3t"});
    let first = send("k1", &command).ok(200);
    let again = send("k1", &command);
    assert_eq!(again.header("idempotency-replayed"), "true");
    assert_eq!(again.ok(200), first);
    send("k1", &json!({"command": "true"})).problem(422, "spec_invalid");
    send("k2", &json!({})).problem(422, "spec_invalid");
    send("k2", &json!({})).problem(422, "spec_invalid");
    let lines = show(&home, ["--tool", "vm_exec", "--vm", "web"]);
    let words =
        |line: &Value| ["stage", "result", "reason"].map(|key| line[key].as_str().unwrap_or_default().to_owned());
    let expected = [
        ["attempt", "pending", ""],
        ["outcome", "success", "exit_code:3"],
        ["attempt", "pending", ""],
        ["outcome", "error", "spec_invalid"],
        // What was refused is not kept.
        ["attempt", "pending", ""],
        ["outcome", "error", "spec_invalid"],
    ];
    let (acts, reads): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line["log"] == "acts");
    assert_eq!(acts.iter().copied().map(words).collect::<Vec<_>>(), expected);
    let told_again = [["outcome", "success", "replayed"], ["outcome", "error", "spec_invalid"]];
    assert_eq!(reads.iter().copied().map(words).collect::<Vec<_>>(), told_again);
    assert_eq!(reads[0]["params"], acts[0]["params"]);
    assert_ne!(reads[0]["id"], acts[0]["id"]);
    assert!(!text(&home).contains("s3cr3t"));
    // A replay that cannot be recorded is not sent.
    let audit = home.path().join("audit");
    std::fs::rename(&audit, home.scratch("kept")).unwrap();
    std::fs::write(&audit, "").unwrap();
    send("k1", &command).problem(503, "audit_failed");
    std::fs::remove_file(&audit).unwrap();
    std::fs::rename(home.scratch("kept"), &audit).unwrap();
    assert_eq!(send("k1", &command).ok(200), first);
}

#[test]
fn the_end_of_a_command_is_recorded_for_every_kind_of_request() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let commands = [
        (json!({"command": "exit 3"}), "exit_code:3"),
        (json!({"command": "kill -9 $$"}), "signal:9"),
        (json!({"argv": ["sleep", "60"], "timeout_ms": 100}), "timed_out"),
    ];
    let expect = |tool: &str, how: &str, reason: &str| {
        let end = until("the outcome", || {
            let lines = show(&home, ["--tool", tool, "--tail", "1"]);
            lines.into_iter().find(|line| line["stage"] == "outcome")
        });
        assert_eq!((&end["result"], &end["reason"]), (&json!("success"), &json!(reason)), "{tool} {how}");
    };
    for (body, reason) in commands {
        server.post("/v1/vms/web/exec", &body).ok(200);
        expect("vm_exec", "at once", reason);
        let ask = |accept: (&str, &str), path: &str, body: &Value| -> HttpResponse {
            let headers = [("content-type", "application/json"), accept];
            server.send("POST", path, &headers, body.to_string().as_bytes())
        };
        assert_eq!(ask(("accept", "text/event-stream"), "/v1/vms/web/exec", &body).status, 200);
        expect("vm_exec", "as events", reason);
        let place = ask(("prefer", "respond-async"), "/v1/vms/web/exec", &body).header("location").to_owned();
        // The operation is over before its line can be anything but written.
        until("its end", || (server.get(&place).ok(200)["status"] == "succeeded").then_some(()));
        expect("vm_exec", "as an operation", reason);
        ask(("accept", "*/*"), "/v1/runs", &json!({"exec": body, "vm": {"accel": "tcg", "name": "job"}})).ok(200);
        expect("vm_run", "in a VM of its own", reason);
    }
    assert_eq!(show(&home, ["--tool", "vm_run", "--vm", "job"]).len(), 6);
}

#[test]
fn a_download_ends_with_its_last_byte() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let (large, empty) = (home.scratch("large"), home.scratch("empty"));
    // More than whatever lies between the guest and the client can hold.
    std::fs::File::create(&large).unwrap().set_len(256 << 20).unwrap();
    std::fs::write(&empty, "").unwrap();
    let path = |file: &std::path::Path| format!("/v1/vms/web/files?path={}", file.display());
    let bearer = format!("Bearer {}", server.token());
    let begin = |method: &str| server.open(method, &path(&large), &[("authorization", &*bearer)], b"");
    let ends = || {
        ends(&home, ["--tool", "vm_download"])
            .into_iter()
            .map(|[_, result, reason]| [result, reason])
            .collect::<Vec<_>>()
    };

    let cut = begin("GET");
    assert_eq!((cut.status, ends().len()), (200, 0));
    drop(cut);
    until("the outcome", || (ends() == [["unknown", "interrupted"]]).then_some(()));

    let mut lost = server.unread("GET", &path(&large), &[("authorization", &*bearer)], b"");
    lost.read_exact(&mut [0; 15]).unwrap();
    home.nido(["delete", "web", "--force", "--yes"]).run().ok();
    let _ = std::io::copy(&mut lost, &mut std::io::sink());
    let end = until("the outcome", || ends().get(1).cloned());
    assert_eq!(end[0], "error", "{end:?}");

    home.spawn("web");
    assert_eq!(server.get(&path(&large)).body.len(), 256 << 20);
    assert_eq!(ends()[2..], [["success", ""]]);
    let nothing = server.get(&path(&empty));
    assert_eq!((nothing.status, nothing.body.len()), (200, 0));
    assert_eq!(server.get(&path(&empty)).status, 200);
    assert_eq!(ends()[3..], [["success", ""], ["success", ""]]);
    // A HEAD reaches into the guest as a GET does.
    assert_eq!(begin("HEAD").status, 200);
    assert_eq!(server.open("HEAD", &path(&home.scratch("none")), &[("authorization", &*bearer)], b"").status, 404);
    assert_eq!(ends()[5..], [["success", ""], ["error", "guest_not_found"]]);
    let attempts = show(&home, ["--tool", "vm_download", "--result", "pending"]).len();
    assert_eq!(attempts, 7);
    assert_eq!(show(&home, ["--tool", "other"]), [] as [Value; 0]);
}

#[test]
fn of_an_endpoint_only_the_host_is_in_the_audit_log() {
    let home = Home::new();
    let server = Server::start(&home);
    let url = "http://127.0.0.1:9/services/s3cr3t?s3cr3t#s3cr3t";
    let added = server.post("/v1/webhooks", &json!({"url": url, "allow_private": true, "format": "slack"})).ok(201);
    server.post("/v1/webhooks", &json!({"url": "ftp://s3cr3t"})).problem(422, "webhook_invalid");
    server.send("DELETE", &format!("/v1/webhooks/{}", added["id"].as_str().unwrap()), &[], b"").ok(200);
    home.nido(["webhook", "add", "--allow-private", "--url", url]).run().ok();
    assert!(!text(&home).contains("s3cr3t"), "{}", text(&home));
    let all = home.nido(["audit", "show", "--json", "--tool", "webhook_add"]).run().ok().json()["records"].clone();
    let urls: Vec<_> = all.as_array().unwrap().iter().map(|line| line["params"]["url"].as_str().unwrap()).collect();
    let kept = "http://127.0.0.1:9/[redacted: 30 bytes]";
    assert_eq!(urls, [kept, kept, "[redacted: 12 bytes]", "[redacted: 12 bytes]", kept, kept]);
}

// A token that may only read wrote what it liked into the log, a thousand times a second, until nothing else was left in it.
#[test]
fn reads_push_no_act_out_of_the_log_and_repeat_in_one_line() {
    let home = Home::new();
    let server = Server::start(&home);
    server.send("DELETE", "/v1/vms/gone", &[], b"").problem(404, "vm_not_found");
    let long = "x".repeat(4000);
    for _ in 0..50 {
        server.send("GET", "/v1/vms", &[("user-agent", "a script/1.0")], b"");
    }
    server.send("GET", &format!("/v1/vms?x={long}"), &[], b"");
    server.live().signal(rustix::process::Signal::TERM);
    server.ended();
    let lines = show(&home, ["--tool", "vm_ls"]);
    assert!(lines.len() <= 11 && lines.iter().all(|line| line["log"] == "reads"), "{lines:?}");
    assert!(lines.iter().any(|line| line["reason"] == "repeated:42"), "{lines:?}");
    assert_eq!(lines[0]["agent"], "a script/1.0");
    assert!(!text(&home).contains("x".repeat(100).as_str()));
    assert_eq!(show(&home, ["--tool", "vm_delete"]).len(), 2);
}

// An agent that tried its token at the REST API left no trace; nor did attempts to guess tokens.
#[test]
fn refused_clients_are_recorded() {
    let home = Home::new();
    let server = Server::with(&home, &["--mcp"]);
    let create = home.nido(["token", "create", "--name", "agents", "--scope", "run", "--only", "mcp", "--json"]);
    let made = create.run().ok().json();
    let bearer = format!("Bearer {}", made["token"].as_str().unwrap());
    server.plain("DELETE", "/v1/vms/web?force=true", &[("authorization", &bearer)], b"").problem(403, "denied");
    server.plain("GET", "/v1/vms", &[("authorization", "Bearer nido_x_y")], b"").problem(401, "unauthorized");
    server.plain("GET", "/v1/vms", &[], b"").problem(401, "unauthorized");
    server.plain("GET", "/v1/vms", &[("host", "evil.example")], b"").problem(403, "denied");
    server.plain("GET", "/v1/vms", &[("origin", "http://evil.example")], b"").problem(403, "denied");
    let lines = show(&home, ["--tool", "request", "--result", "denied"]);
    let reasons: Vec<_> = lines.iter().map(|line| line["reason"].as_str().unwrap()).collect();
    assert_eq!(reasons, ["wrong_door", "bad_token", "no_token", "wrong_host", "wrong_origin"]);
    let actor = format!("token:agents#{}", made["id"].as_str().unwrap());
    assert_eq!((&lines[0]["actor"], &lines[0]["params"]["path"]), (&json!(actor), &json!("/v1/vms/web")));
}
