//! The REST API over the real program: who may ask, what is answered, what streams, and what outlives the server.

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
fn nobody_is_let_in_without_a_good_token() {
    let home = Home::new();
    let server = Server::start(&home);
    let ask = |headers: &[(&str, &str)]| server.plain("GET", "/v1/vms", headers, b"");
    assert_eq!(ask(&[]).header("www-authenticate"), "Bearer realm=\"nido\"");
    let good = format!("Bearer {}", server.token());
    for bad in ["", "Bearer", "Bearer x", "Basic eDp5", &good[..good.len() - 1], &format!("{good}0")] {
        ask(&[("authorization", bad)]).problem(401, "unauthorized");
    }
    ask(&[("authorization", &good)]).ok(200);
    // What says nothing about VMs is open.
    server.plain("GET", "/healthz", &[], b"").ok(200);
    server.plain("GET", "/openapi.json", &[], b"").ok(200);
    server.plain("GET", "/metrics", &[], b"").problem(401, "unauthorized");
    home.nido(["token", "revoke", "tests"]).run().ok();
    ask(&[("authorization", &good)]).problem(401, "unauthorized");
}

#[test]
fn a_scope_holds_what_it_says_and_no_more() {
    let home = Home::new();
    let server = Server::start(&home);
    let token = |scope: &str| {
        let made = home.nido(["token", "create", "--name", scope, "--scope", scope, "--json"]).run().ok().json();
        format!("Bearer {}", made["token"].as_str().unwrap())
    };
    let (read, run) = (token("read"), token("run"));
    let ask = |token: &str, method: &str, path: &str, body: &str| {
        let headers = [("authorization", token), ("content-type", "application/json")];
        server.plain(method, path, &headers, body.as_bytes())
    };
    ask(&read, "GET", "/v1/vms", "").ok(200);
    ask(&read, "POST", "/v1/vms", r#"{"name": "web"}"#).problem(403, "denied");
    ask(&run, "POST", "/v1/vms", r#"{"name": "web", "accel": "tcg"}"#).ok(201);
    for (method, path) in [("POST", "/v1/vms/web/exec"), ("GET", "/v1/vms/web/files?path=/etc/hostname")] {
        ask(&read, method, path, r#"{"argv": ["true"]}"#).problem(403, "denied");
    }
    ask(&run, "DELETE", "/v1/templates/sandbox", "").problem(403, "denied");
    ask(&run, "PUT", "/v1/pools/sandbox", r#"{"wanted": 1}"#).problem(403, "denied");
}

#[test]
fn pages_of_others_and_names_that_point_here_are_refused() {
    let home = Home::new();
    let server = Server::with(&home, &["--allow-host", "ci.example"]);
    let token = format!("Bearer {}", server.token());
    let ask = |key: &str, value: &str| server.plain("GET", "/v1/vms", &[("authorization", &token), (key, value)], b"");
    ask("host", "evil.example").problem(403, "denied");
    ask("host", "ci.example").ok(200);
    for origin in ["http://evil.example", "null", "https://localhost"] {
        ask("origin", origin).problem(403, "denied");
    }
    let own = format!("http://{}", server.address());
    let answer = ask("origin", &own);
    assert_eq!(answer.header("access-control-allow-origin"), "");
    answer.ok(200);
    // Also for what needs no token.
    server.plain("GET", "/healthz", &[("host", "evil.example")], b"").problem(403, "denied");
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
    exec(json!({"argv": ["no-such-command"]})).problem(404, "command_not_found");
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
fn a_command_dies_with_its_listener() {
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
fn files_go_both_ways() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let there = home.scratch("there");
    let path = format!("/v1/vms/web/files?path={}", there.display());
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let sent = server.send("PUT", &format!("{path}&mode=600"), &[], &bytes).ok(200);
    assert_eq!(sent["bytes"], 3_000_000);
    let got = server.get(&path);
    assert_eq!((got.header("content-type"), got.body == bytes), ("application/octet-stream", true));
    server.get("/v1/vms/web/files?path=/no/such/file").problem(404, "path_not_found");
    server.get("/v1/vms/web/files?path=relative").problem(422, "path_invalid");
    server.send("PUT", &format!("{path}&mode=7777"), &[], b"x").problem(422, "spec_invalid");
}

#[test]
fn directories_go_both_ways_as_archives() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let (here, there) = (home.scratch("here"), home.scratch("there"));
    std::fs::create_dir_all(here.join("a/b")).unwrap();
    std::fs::write(here.join("a/b/file"), vec![5; 3_000_000]).unwrap();
    std::os::unix::fs::symlink("../nowhere", here.join("a/link")).unwrap();
    let tar = |arguments: &[&str]| std::process::Command::new("tar").args(arguments).output().unwrap().stdout;
    let whole = tar(&["-C", here.to_str().unwrap(), "-c", "."]);
    let path = format!("/v1/vms/web/files?path={}", there.display());
    let put = |path: &str, body: &[u8]| server.send("PUT", path, &[("content-type", "application/x-tar")], body);
    put(&path, &whole[..1_000_000]).problem(422, "spec_invalid");
    assert!(!there.exists());
    let sent = put(&path, &whole).ok(200);
    assert_eq!((&sent["entries"], &sent["bytes"]), (&5.into(), &3_000_000.into()));
    assert_eq!(std::fs::read(there.join("a/b/file")).unwrap(), [5; 3_000_000]);
    let got = server.send("GET", &path, &[("accept", "application/x-tar")], b"");
    assert_eq!((got.status, got.header("content-type")), (200, "application/x-tar"));
    let packed = home.scratch("packed.tar");
    std::fs::write(&packed, got.body).unwrap();
    let mut listed: Vec<_> =
        String::from_utf8(tar(&["-tf", packed.to_str().unwrap()])).unwrap().lines().map(str::to_owned).collect();
    listed.sort();
    assert_eq!(listed, ["./", "./a/", "./a/b/", "./a/b/file", "./a/link"]);
    // Whoever does not know is told.
    let problem = server.get(&path).problem(422, "path_invalid");
    assert!(problem["hint"].as_str().unwrap().contains("application/x-tar"), "{problem}");
    put(&format!("{path}&mode=600"), &whole).problem(422, "spec_invalid");
    let unknown = server.send("PUT", &path, &[("content-type", "application/zip")], &whole);
    unknown.problem(415, "media_type_unsupported");
    // A body that breaks off leaves nothing.
    let twice = home.scratch("twice");
    let path = format!("/v1/vms/web/files?path={}", twice.display());
    let headers = format!("Bearer {}", server.token());
    let headers = [("authorization", &*headers), ("content-type", "application/x-tar"), ("host", "localhost")];
    drop(server.begin("PUT", &path, &headers, whole.len(), &whole[..2_000_000]));
    until("nothing is left", || {
        let names = std::fs::read_dir(home.scratch("")).unwrap().map(|entry| entry.unwrap().file_name());
        let left = names.filter(|name| name.to_str().is_some_and(|name| name.starts_with(".nido-") || name == "twice"));
        (left.count() == 0).then_some(())
    });
}

#[test]
fn events_are_told_to_those_who_listen_and_those_who_come_back() {
    let home = Home::new();
    let server = Server::start(&home);
    let bearer = format!("Bearer {}", server.token());
    let listen = |last: Option<&str>| {
        let mut headers = vec![("authorization", &*bearer), ("accept", "text/event-stream")];
        headers.extend(last.map(|cursor| ("last-event-id", cursor)));
        server.open("GET", "/v1/events?vm=web", &headers, b"")
    };
    let mut live = listen(None);
    assert_eq!(live.status, 200);
    home.spawn("web");
    let kind = |stream: &mut crate::support::http::Stream| loop {
        if let Some(kind) = stream.line().strip_prefix("event: ") {
            return kind.to_owned();
        }
    };
    assert_eq!([kind(&mut live), kind(&mut live)], ["vm.created", "vm.started"]);
    home.nido(["stop", "web"]).run().ok();
    assert_eq!(kind(&mut live), "vm.stopped");
    // Somebody who was away goes on where they were.
    let all = server.get("/v1/events?vm=web").ok(200);
    let cursor = all["events"][0]["cursor"].to_string();
    let mut back = listen(Some(&cursor));
    assert_eq!([kind(&mut back), kind(&mut back)], ["vm.started", "vm.stopped"]);
    let crashes = server.get("/v1/events?event=vm.crashed").ok(200);
    assert_eq!(crashes["events"], json!([]));
    server.get("/v1/events?event=vm.sneezed").problem(422, "spec_invalid");
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
    assert_eq!(server.get(&place).ok(200)["status"], "cancelled");
    // Nothing half-made stays.
    until("the VM is gone", || home.names().is_empty().then_some(()));
    home.qemu("");
    let begun = server.plain("POST", "/v1/vms", &headers, br#"{"name": "two", "accel": "tcg"}"#).ok(202);
    let place = format!("/v1/operations/{}", begun["id"].as_str().unwrap());
    let ended = until("the end", || Some(server.get(&place).ok(200)).filter(|now| now["status"] != "running"));
    assert_eq!((&ended["status"], &ended["result"]["name"]), (&"succeeded".into(), &"two".into()), "{ended}");
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
fn other_machines_are_let_in_over_tls_only() {
    let home = Home::new();
    let refused = |flags: &[&str]| {
        let mut nido = home.nido(["api-server", "start", "--port", "0", "--json"]);
        for flag in flags {
            nido = nido.arg(flag);
        }
        nido.run().fails(1, "denied");
    };
    refused(&["--allow-remote"]);
    refused(&["--bind", "0.0.0.0"]);
    let server = Server::with(&home, &["--allow-remote", "--insecure-http"]);
    assert!(server.address().starts_with("0.0.0.0:"));
}

#[test]
fn over_a_unix_socket_the_kernel_says_who_asks() {
    use std::io::{Read as _, Write as _};
    use std::os::unix::fs::PermissionsExt as _;
    let home = Home::new();
    let socket = home.scratch("api.sock");
    let live = home.nido(["api-server", "start", "--socket"]).arg(&socket).start();
    assert_eq!(live.line(), socket.display().to_string());
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    stream.write_all(b"GET /v1/vms HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("{\"vms\":[]}"), "{answer}");
    home.nido(["api-server", "start", "--json", "--socket"]).arg(&socket).run().fails(1, "port_in_use");
    live.signal(Signal::TERM);
    live.wait().ok();
    assert!(!socket.exists());
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
    assert_eq!(home.nido(["audit", "verify", "--json"]).run().ok().json()["lines"], 6);
}

#[test]
fn who_sends_too_slowly_is_told() {
    let home = Home::new();
    let server = Server::with(&home, &["--patience", "300ms"]);
    home.spawn("web");
    let bearer = format!("Bearer {}", server.token());
    let begin = |method: &str, path: &str, kind: &str, extra: (&str, &str), sent: &[u8]| {
        let headers = [
            ("authorization", &*bearer),
            ("content-type", kind),
            ("host", "localhost"),
            ("connection", "close"),
            extra,
        ];
        server.begin(method, path, &headers, 4000, sent)
    };
    let json = "application/json";
    for extra in [("accept", json), ("idempotency-key", "k")] {
        let stalled = begin("POST", "/v1/vms", json, extra, b"{");
        Server::answer_to(stalled).problem(408, "request_timeout");
    }
    // Every drop comes in time, all of them do not.
    let mut dripping = begin("POST", "/v1/vms", json, ("accept", json), b"{");
    let drops = std::thread::spawn({
        let mut stream = dripping.try_clone().unwrap();
        move || {
            let pause = std::time::Duration::from_millis(50);
            (0..200)
                .take_while(|_| {
                    std::thread::sleep(pause);
                    std::io::Write::write_all(&mut stream, b" ").is_ok()
                })
                .count()
        }
    });
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut dripping, &mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    drop(dripping);
    assert!(drops.join().unwrap() < 200);
    let there = home.scratch("there");
    let path = format!("/v1/vms/web/files?path={}", there.display());
    for kind in ["application/octet-stream", "application/x-tar"] {
        let stalled = begin("PUT", &path, kind, ("accept", json), &[0; 100]);
        Server::answer_to(stalled).problem(408, "request_timeout");
    }
    assert!(!there.exists());
    server.get("/v1/vms").ok(200);
}

#[test]
fn a_command_dies_with_a_listener_who_does_not_read() {
    let home = Home::new();
    let server = Server::with(&home, &["--patience", "200ms"]);
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
    // Who is still written to is not cut off: so much takes longer than that.
    let body = json!({"command": "for n in 1 2 3 4; do sleep 0.2; echo $n; done"}).to_string();
    let mut stream = server.open("POST", "/v1/vms/web/exec", &headers, body.as_bytes());
    while stream.line() != "event: exit" {}
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
