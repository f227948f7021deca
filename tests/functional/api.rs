//! The REST API over the real program: VMs, mistakes, what takes long, and what outlives the server.

use rustix::process::Signal;
use serde_json::json;

use crate::support::http::Server;
use crate::support::{Home, processes, until};

#[test]
fn the_lifecycle_of_a_vm_over_http() {
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
    // A body may be absent if no field is required.
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
fn long_operations_are_polled_and_cancelled() {
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
        home.nido(["delete", &vm, "--force", "--yes"]).run().ok();
    }
}

// Operations were in the memory of a server: after a restart nothing was known of them.
#[test]
fn operations_outlive_their_server_and_those_of_a_killed_one_are_lost() {
    let home = Home::new();
    let server = Server::start(&home);
    let begin = |body: serde_json::Value| {
        let headers = [("content-type", "application/json"), ("prefer", "respond-async")];
        server.send("POST", "/v1/vms", &headers, body.to_string().as_bytes()).ok(202)["id"].as_str().unwrap().to_owned()
    };
    let place = |id: &str| format!("/v1/operations/{id}");
    let ended = begin(json!({"name": "one", "start": false}));
    until("its end", || (server.get(&place(&ended)).ok(200)["status"] == "succeeded").then_some(()));
    home.qemu("no-agent");
    let running = begin(json!({"name": "two", "accel": "tcg"}));
    until("its VM", || home.names().contains(&"two".to_owned()).then_some(()));
    let server = server.killed(&home);
    let of = |id: &str| server.get(&place(id)).ok(200);
    let now = of(&ended);
    assert_eq!((&now["status"], &now["result"]["name"]), (&"succeeded".into(), &"one".into()), "{now}");
    let now = of(&running);
    assert_eq!(
        (&now["kind"], &now["status"], &now["result"]),
        (&"vm_spawn".into(), &"lost".into(), &json!(null)),
        "{now}"
    );
    assert!(now["ended_at"].is_string(), "{now}");
    let list = server.get("/v1/operations").ok(200);
    let ids: Vec<_> = list["operations"].as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap()).collect();
    assert_eq!(ids, [&*ended, &*running]);
    assert_eq!(server.send("DELETE", &place(&running), &[], b"").ok(200)["status"], "lost");
    server.get(&place(&running)).problem(404, "operation_not_found");
    home.qemu("");
    for vm in home.names() {
        home.nido(["delete", &vm, "--force", "--yes"]).run().ok();
    }
}

#[test]
fn vms_outlive_the_server_and_running_requests_are_completed() {
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
    // What was refused is not kept.
    for _ in 0..2 {
        let mistake = send(&server, "k3", r#"{"name": "Web"}"#);
        assert_eq!(mistake.header("idempotency-replayed"), "");
        mistake.problem(422, "spec_invalid");
    }
    home.nido(["delete", "web", "--force", "--yes"]).run().ok();
    send(&server, "k2", web).ok(201);
}

#[test]
fn an_answer_that_is_too_large_to_keep_is_given_once_and_nothing_is_run_twice() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let proof = home.scratch("proof");
    let command = format!("echo x >> '{}'; head -c 4000000 /dev/zero", proof.display());
    let body = json!({ "command": command }).to_string();
    let headers = [("content-type", "application/json"), ("idempotency-key", "large")];
    let send = || server.send("POST", "/v1/vms/web/exec", &headers, body.as_bytes());
    let done = send().ok(200);
    assert_eq!((done["stdout"].as_str().unwrap().len(), &done["exit_code"]), (4_000_000, &json!(0)));
    for _ in 0..2 {
        let again = send();
        assert_eq!(again.header("idempotency-replayed"), "true");
        again.problem(409, "answer_too_large");
    }
    assert_eq!(std::fs::read_to_string(proof).unwrap(), "x\n");
}

#[test]
fn a_request_with_a_key_is_carried_out_by_one_server_and_never_again() {
    let home = Home::new();
    let (first, headers) = (Server::start(&home), [("content-type", "application/json"), ("idempotency-key", "k")]);
    let second = first.beside(&home);
    home.spawn("web");
    let (proof, go) = (home.scratch("proof"), home.scratch("go"));
    let command = |then: &str| format!("echo x >> '{}'; {then}", proof.display());
    let begin = |server: &Server, key: &str, body: &str| {
        let bearer = format!("Bearer {}", server.token());
        let headers = [headers[0], ("idempotency-key", key), ("authorization", &bearer)];
        server.unread("POST", "/v1/vms/web/exec", &headers, body.as_bytes())
    };
    let begun = |times: usize| {
        until("the command", || (std::fs::read_to_string(&proof).unwrap_or_default().len() == 2 * times).then_some(()));
    };
    let body =
        json!({ "command": command(&format!("until [ -e '{}' ]; do sleep 0.05; done", go.display())) }).to_string();
    let waits = begin(&first, "k", &body);
    begun(1);
    let ask = |body: &str| second.send("POST", "/v1/vms/web/exec", &headers, body.as_bytes());
    ask(&body).problem(409, "request_in_progress");
    std::fs::write(&go, "").unwrap();
    let done = Server::answer_to(waits).ok(200);
    let again = ask(&body);
    assert_eq!(again.header("idempotency-replayed"), "true");
    assert_eq!(again.ok(200), done);
    // The outcome of a killed one is unknown.
    let body = json!({ "command": command("sleep 98751") }).to_string();
    let lost = begin(&first, "lost", &body);
    begun(2);
    first.gone();
    drop(lost);
    for _ in 0..2 {
        let headers = [headers[0], ("idempotency-key", "lost")];
        let again = second.send("POST", "/v1/vms/web/exec", &headers, body.as_bytes());
        again.problem(409, "outcome_unknown");
    }
    assert_eq!(std::fs::read_to_string(&proof).unwrap(), "x\nx\n");
}

#[test]
fn output_of_commands_needs_more_than_the_read_scope() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let token = |scope: &str| {
        let made = home.nido(["token", "create", "--name", scope, "--scope", scope, "--json"]).run().ok().json();
        format!("Bearer {}", made["token"].as_str().unwrap())
    };
    let (read, run) = (token("read"), token("run"));
    let headers = [("content-type", "application/json"), ("prefer", "respond-async"), ("authorization", &*run)];
    let body = json!({"argv": ["echo", "hunter2"]}).to_string();
    let begun = server.plain("POST", "/v1/vms/web/exec", &headers, body.as_bytes());
    let place = begun.header("location").to_owned();
    until("the end", || (server.get(&place).ok(200)["status"] == "succeeded").then_some(()));
    let look = |token: &str, path: &str| server.plain("GET", path, &[("authorization", token)], b"").ok(200);
    assert_eq!(look(&run, &place)["result"]["stdout"], "hunter2\n");
    server.plain("GET", &place, &[("authorization", &*read)], b"").problem(404, "operation_not_found");
    let shown = look(&read, "/v1/operations").to_string();
    assert!(!shown.contains("hunter2"), "{shown}");
}

#[test]
fn a_server_with_sighup_ignored_survives_its_terminal() {
    use std::io::BufRead as _;
    let home = Home::new();
    // As `nohup` starts it.
    let mut server = std::process::Command::new("sh")
        .args(["-c", "trap '' HUP; exec \"$0\" api-server start --port 0", env!("CARGO_BIN_EXE_nido")])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", home.scratch(""))
        .env("NIDO_HOME", home.path())
        .env("NIDO_QEMU", home.qemu_path())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("http://"), "{line}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.id())).unwrap();
    let mask = |key: &str| {
        let mask = status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim();
        u64::from_str_radix(mask, 16).unwrap()
    };
    let hangup = 1 << (Signal::HUP.as_raw() - 1);
    let terminate = 1 << (Signal::TERM.as_raw() - 1);
    assert_eq!((mask("SigIgn:") & hangup, mask("SigCgt:") & hangup), (hangup, 0));
    assert_eq!(mask("SigCgt:") & terminate, terminate);
    rustix::process::kill_process(rustix::process::Pid::from_child(&server), Signal::TERM).unwrap();
    assert!(server.wait().unwrap().success());
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
