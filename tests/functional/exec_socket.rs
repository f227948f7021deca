//! Commands over a WebSocket: who may, what goes in and comes out, terminals, and what the end of the connection means.

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::http::Server;
use crate::support::websocket::{Message, WebSocket};
use crate::support::{Home, until};

const PATH: &str = "/v1/vms/web/exec/socket";

fn open(server: &Server) -> WebSocket {
    let protocols = format!("nido, nido.token.{}", server.token());
    WebSocket::open(server.address(), PATH, &[("sec-websocket-protocol", &protocols)]).ok().unwrap()
}

fn start(server: &Server, what: &Value) -> WebSocket {
    let mut socket = open(server);
    socket.send_json(what);
    assert!(socket.until("started").0["pid"].as_u64().unwrap() > 0);
    socket
}

fn expect_none(home: &Home, command: &str) {
    until("the end of the command", || {
        let found = home.nido(["exec", "web", "--", "pgrep", "-fx", command]).run();
        found.text().trim().is_empty().then_some(())
    });
}

#[test]
fn input_goes_in_and_both_outputs_come_out() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let mut socket = start(&server, &json!({"start": {"command": "cat; echo err >&2; exit 7"}}));
    socket.bytes(b"one\n");
    socket.expect("one\n");
    socket.bytes(&[0, 255]);
    socket.send_json(&json!({"eof": true}));
    let (exit, out, err) = socket.until("exit");
    assert_eq!((&exit["exit_code"], &out[..], &err[..]), (&json!(7), &[0, 255][..], &b"err\n"[..]));
    assert_eq!(socket.next(), Message::Close);
    let mut socket = start(&server, &json!({"start": {"argv": ["sleep", "60"]}}));
    socket.send_json(&json!({"signal": 15}));
    assert_eq!(socket.until("exit").0["signal"], 15);
}

#[test]
fn a_terminal_has_the_requested_size() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let size = json!({"rows": 24, "columns": 80});
    let script = "stty size; echo $TERM; trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.05; done";
    let what = json!({"start": {"argv": ["sh", "-c", script]}, "pty": size, "term": "vt100"});
    let mut socket = start(&server, &what);
    socket.expect("24 80\r\nvt100\r\nready\r\n");
    socket.send_json(&json!({"resize": {"rows": 40, "columns": 120}}));
    let (exit, out, _) = socket.until("exit");
    assert!(String::from_utf8(out).unwrap().contains("40 120"), "{exit}");
    assert_eq!(exit["exit_code"], 0);
}

#[test]
fn the_end_of_the_connection_is_that_of_the_command() {
    let home = Home::new();
    let server = Server::with(&home, &["--patience", "1s"]);
    home.spawn("web");
    // A client that sends, does not send, does not read, or does not reply to a ping.
    let mut closed = start(&server, &json!({"start": {"argv": ["sleep", "98741"]}}));
    closed.close();
    expect_none(&home, "sleep 98741");
    drop(start(&server, &json!({"start": {"argv": ["sleep", "98742"]}})));
    expect_none(&home, "sleep 98742");
    let deaf = start(&server, &json!({"start": {"argv": ["yes", "98743"]}}));
    expect_none(&home, "yes 98743");
    drop(deaf);
    let silent = start(&server, &json!({"start": {"argv": ["sleep", "98744"]}}));
    expect_none(&home, "sleep 98744");
    drop(silent);
    // Who answers that may be quiet for as long as the command is.
    let mut quiet = start(&server, &json!({"start": {"command": "sleep 4; echo up"}}));
    quiet.expect("up\n");
    quiet.until("exit");
    until("the outcome of each", || {
        let told = outcomes(&home);
        let broken_off = told.iter().filter(|line| **line == ["unknown", "interrupted"]).count();
        (told.len() == 5 && broken_off == 4).then_some(())
    });
}

/// The lines in the audit log about commands that came over sockets.
fn lines(home: &Home, stage: &str) -> Vec<Value> {
    let lines = home.nido(["audit", "show", "--json", "--tool", "vm_exec"]).run().ok().json();
    let lines = lines["records"].as_array().unwrap().clone();
    lines.into_iter().filter(|line| line["face"] == "api" && line["stage"] == stage).collect()
}

/// Their results and reasons.
fn outcomes(home: &Home) -> Vec<[String; 2]> {
    let word = |line: &Value, key: &str| line[key].as_str().unwrap_or_default().to_owned();
    lines(home, "outcome").iter().map(|line| [word(line, "result"), word(line, "reason")]).collect()
}

#[test]
fn a_command_is_in_the_audit_log_before_it_runs() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let command = json!({"argv": ["sh", "-c", "echo hi; exit 3"], "env": {"TOKEN": "s3cret"}, "stdin": "hunter2"});
    let mut socket = start(&server, &json!({"start": command, "pty": {"rows": 24, "columns": 80}}));
    socket.until("exit");
    // A client that is notified of the end finds it there.
    assert_eq!(outcomes(&home), [["success", "exit_code:3"]]);
    let params = &lines(&home, "attempt")[0]["params"];
    assert_eq!((&params["name"], &params["argv"][2]), (&json!("web"), &json!("echo hi; exit 3")), "{params}");
    assert_eq!(params["pty"], json!({"rows": 24, "columns": 80}));
    let text = params.to_string();
    assert!(!text.contains("s3cret") && !text.contains("hunter2"), "{text}");
    let mut socket = start(&server, &json!({"start": {"argv": ["sleep", "60"]}}));
    socket.send_json(&json!({"signal": 9}));
    socket.until("exit");
    assert_eq!(outcomes(&home)[1], ["success", "signal:9"]);
    let mut socket = open(&server);
    socket.send_json(&json!({"start": {"argv": ["no-such-command"]}}));
    socket.until("error");
    // An attempt is recorded although no command was begun.
    let mut socket = open(&server);
    socket.send_json(&json!({"begin": {}}));
    socket.until("error");
    assert_eq!(outcomes(&home)[2..], [["error", "command_not_found"], ["error", "spec_invalid"]]);
    assert_eq!(lines(&home, "attempt").len(), 3);
    // Where it cannot be recorded it is not run.
    let mut socket = open(&server);
    let (audit, proof) = (home.path().join("audit"), home.scratch("proof"));
    std::fs::rename(&audit, home.scratch("kept")).unwrap();
    std::fs::write(&audit, "").unwrap();
    socket.send_json(&json!({"start": {"argv": ["touch", proof]}}));
    assert_eq!(socket.until("error").0["code"], "audit_failed");
    assert_eq!((socket.next(), proof.exists()), (Message::Close, false));
    std::fs::remove_file(&audit).unwrap();
    std::fs::rename(home.scratch("kept"), &audit).unwrap();
    home.nido(["audit", "verify"]).run().ok();
}

#[test]
fn running_commands_may_finish_when_the_server_ends() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let mut idle = open(&server);
    let mut running = start(&server, &json!({"start": {"command": "echo up; sleep 1; echo done"}}));
    running.expect("up\n");
    server.live().signal(Signal::TERM);
    // A client that has sent nothing yet is too late.
    assert_eq!((idle.until("error").0["code"].as_str(), idle.next()), (Some("interrupted"), Message::Close));
    let (exit, out, _) = running.until("exit");
    assert_eq!((&exit["exit_code"], &out[..], running.next()), (&json!(0), &b"done\n"[..], Message::Close));
    assert_eq!((idle.code, running.code), (Some(1001), Some(1000)));
    drop((idle, running));
    server.ended();
    assert_eq!(outcomes(&home), [["error", "interrupted"], ["success", "exit_code:0"]]);
}

#[test]
fn endless_commands_are_notified_that_the_server_ends() {
    let home = Home::new();
    let server = Server::with(&home, &["--patience", "1s"]);
    home.spawn("web");
    let mut endless = start(&server, &json!({"start": {"argv": ["sleep", "98745"]}}));
    let bearer = format!("Bearer {}", server.token());
    let headers = [("authorization", &*bearer), ("content-type", "application/json"), ("accept", "text/event-stream")];
    let body = json!({"argv": ["sleep", "98746"], "timeout_ms": 0}).to_string();
    let mut stream = server.open("POST", "/v1/vms/web/exec", &headers, body.as_bytes());
    assert_eq!(stream.line(), "event: started");
    let waiting = server.unread("POST", "/v1/vms/web/exec", &headers[..2], body.as_bytes());
    until("the command", || (lines(&home, "attempt").len() == 3).then_some(()));
    server.live().signal(Signal::TERM);
    assert_eq!(endless.until("error").0["code"], "interrupted");
    assert_eq!((endless.next(), endless.code), (Message::Close, Some(1001)));
    drop(endless);
    while stream.line() != "event: error" {}
    assert!(stream.line().contains("\"code\":\"interrupted\""));
    Server::answer_to(waiting).problem(503, "interrupted");
    drop(stream);
    server.ended();
    for command in ["sleep 98745", "sleep 98746"] {
        expect_none(&home, command);
    }
    let told = outcomes(&home);
    assert!(told.len() == 3 && told.iter().all(|line| line[1] == "interrupted"), "{told:?}");
}

#[test]
fn a_server_that_is_full_counts_sockets_and_can_be_stopped() {
    let home = Home::new();
    let server = Server::with(&home, &["--rate", "10000"]);
    home.spawn("web");
    let mut sockets: Vec<_> = (0..512).map(|_| open(&server)).collect();
    let mut one_more = server.unread("GET", "/healthz", &[], b"");
    one_more.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
    let answer = std::io::Read::read(&mut one_more, &mut [0; 1]);
    assert!(answer.is_err(), "a server that is full has answered");
    sockets.pop().unwrap().close();
    assert_eq!(Server::answer_to(one_more).status, 200);
    sockets.push(open(&server));
    server.live().signal(Signal::TERM);
    for socket in &mut sockets {
        assert_eq!(socket.until("error").0["code"], "interrupted");
    }
    drop(sockets);
    server.ended();
}

#[test]
fn a_server_full_of_listeners_can_be_stopped() {
    let home = Home::new();
    let server = Server::with(&home, &["--rate", "10000"]);
    let bearer = format!("Bearer {}", server.token());
    let headers = [("authorization", &*bearer), ("accept", "text/event-stream")];
    let listeners: Vec<_> = (0..512).map(|_| server.open("GET", "/v1/events", &headers, b"")).collect();
    assert!(listeners.iter().all(|listener| listener.status == 200));
    // Not before the server is waiting for room.
    let next = server.unread("GET", "/healthz", &[], b"");
    server.live().signal(Signal::TERM);
    server.ended();
    drop((listeners, next));
}

#[test]
fn long_running_streams_end_with_their_token() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let made = home.nido(["token", "create", "--name", "short", "--scope", "run", "--json"]).run().ok().json();
    let (token, bearer) = (made["token"].as_str().unwrap(), format!("Bearer {}", made["token"].as_str().unwrap()));
    let protocols = format!("nido, nido.token.{token}");
    let mut socket = WebSocket::open(server.address(), PATH, &[("sec-websocket-protocol", &protocols)]).ok().unwrap();
    socket.send_json(&json!({"start": {"argv": ["sleep", "98747"]}}));
    socket.until("started");
    let json = ("content-type", "application/json");
    let stream = ("accept", "text/event-stream");
    let body = json!({"argv": ["sleep", "98748"], "timeout_ms": 0}).to_string();
    let mut exec =
        server.open("POST", "/v1/vms/web/exec", &[("authorization", &bearer), json, stream], body.as_bytes());
    assert_eq!(exec.line(), "event: started");
    let waiting = server.unread("POST", "/v1/vms/web/exec", &[("authorization", &bearer), json], body.as_bytes());
    let mut events = server.open("GET", "/v1/events", &[("authorization", &bearer), stream], b"");
    let mut log = server.unread("GET", "/v1/vms/web/logs?follow=true", &[("authorization", &bearer)], b"");
    let good = format!("Bearer {}", server.token());
    let mut other = server.open("GET", "/v1/events", &[("authorization", &good), stream], b"");
    until("the commands", || (lines(&home, "attempt").len() == 3).then_some(()));
    home.nido(["token", "revoke", "short"]).run().ok();
    assert_eq!(socket.until("error").0["code"], "unauthorized");
    assert_eq!((socket.next(), socket.code), (Message::Close, Some(1008)));
    for stream in [&mut exec, &mut events] {
        while stream.line() != "event: error" {}
        assert!(stream.line().contains("\"code\":\"unauthorized\""));
    }
    Server::answer_to(waiting).problem(401, "unauthorized");
    // A log that breaks off is not taken for whole.
    let mut text = String::new();
    std::io::Read::read_to_string(&mut log, &mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200") && !text.ends_with("0\r\n\r\n"), "{text}");
    for command in ["sleep 98747", "sleep 98748"] {
        expect_none(&home, command);
    }
    // No other client is disconnected.
    home.nido(["stop", "web"]).run().ok();
    while other.line() != "event: vm.stopped" {}
}

#[test]
fn unauthorized_clients_are_refused_before_the_upgrade() {
    let home = Home::new();
    let server = Server::with(&home, &["--allow-host", "ci.example"]);
    home.spawn("web");
    let read = home.nido(["token", "create", "--name", "read", "--scope", "read", "--json"]).run().ok().json();
    let read = format!("nido, nido.token.{}", read["token"].as_str().unwrap());
    let good = format!("nido, nido.token.{}", server.token());
    let refused = |headers: &[(&str, &str)], path: &str, status: u16, code: &str| {
        let Err((said, body)) = WebSocket::open(server.address(), path, headers) else { panic!("{headers:?} got in") };
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((said, &body["code"]), (status, &json!(code)), "{body}");
    };
    let protocol = "sec-websocket-protocol";
    refused(&[(protocol, "nido")], PATH, 401, "unauthorized");
    refused(&[(protocol, "nido, nido.token.wrong")], PATH, 401, "unauthorized");
    refused(&[(protocol, &read)], PATH, 403, "denied");
    refused(&[(protocol, &good), ("origin", "http://evil.example")], PATH, 403, "denied");
    refused(&[(protocol, &good), ("origin", "null")], PATH, 403, "denied");
    refused(&[(protocol, &good)], "/v1/vms/nobody/exec/socket", 404, "vm_not_found");
    let own = format!("http://{}", server.address());
    WebSocket::open(server.address(), PATH, &[(protocol, &good), ("origin", &own)]).ok().unwrap();
    server.get(PATH).problem(400, "request_invalid");
}

#[test]
fn an_invalid_first_message_is_reported() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let wrong = [
        (json!({"start": {}}), "spec_invalid"),
        (json!({"begin": {"argv": ["true"]}}), "spec_invalid"),
        (json!({"start": {"argv": ["no-such-command"]}}), "command_not_found"),
    ];
    for (what, code) in wrong {
        let mut socket = open(&server);
        socket.send_json(&what);
        assert_eq!(socket.until("error").0["code"], code, "{what}");
        let expected = if code == "spec_invalid" { 1007 } else { 1008 };
        assert_eq!((socket.next(), socket.code), (Message::Close, Some(expected)));
    }
}
