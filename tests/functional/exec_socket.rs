//! Commands over a WebSocket: who may, what goes in and comes out, terminals, and what the end of the connection means.

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
    socket.say(what);
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
    socket.say(&json!({"eof": true}));
    let (exit, out, err) = socket.until("exit");
    assert_eq!((&exit["exit_code"], &out[..], &err[..]), (&json!(7), &[0, 255][..], &b"err\n"[..]));
    assert_eq!(socket.next(), Message::Close);
    let mut socket = start(&server, &json!({"start": {"argv": ["sleep", "60"]}}));
    socket.say(&json!({"signal": 15}));
    assert_eq!(socket.until("exit").0["signal"], 15);
}

#[test]
fn a_terminal_has_the_size_it_is_told() {
    let home = Home::new();
    let server = Server::start(&home);
    home.spawn("web");
    let size = json!({"rows": 24, "columns": 80});
    let script = "stty size; echo $TERM; trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.05; done";
    let what = json!({"start": {"argv": ["sh", "-c", script]}, "pty": size, "term": "vt100"});
    let mut socket = start(&server, &what);
    socket.expect("24 80\r\nvt100\r\nready\r\n");
    socket.say(&json!({"resize": {"rows": 40, "columns": 120}}));
    let (exit, out, _) = socket.until("exit");
    assert!(String::from_utf8(out).unwrap().contains("40 120"), "{exit}");
    assert_eq!(exit["exit_code"], 0);
}

#[test]
fn the_end_of_the_connection_is_that_of_the_command() {
    let home = Home::new();
    let server = Server::with(&home, &["--patience", "200ms"]);
    home.spawn("web");
    // Said, or not said, or not read any more.
    let mut closed = start(&server, &json!({"start": {"argv": ["sleep", "98741"]}}));
    closed.close();
    expect_none(&home, "sleep 98741");
    drop(start(&server, &json!({"start": {"argv": ["sleep", "98742"]}})));
    expect_none(&home, "sleep 98742");
    let deaf = start(&server, &json!({"start": {"argv": ["yes", "98743"]}}));
    expect_none(&home, "yes 98743");
    drop(deaf);
    // Nobody is made to say anything while nothing is to be read.
    let mut quiet = start(&server, &json!({"start": {"command": "sleep 1; echo up"}}));
    quiet.expect("up\n");
    quiet.until("exit");
    until("the outcome of each", || {
        let lines = home.nido(["audit", "show", "--json", "--tool", "vm_exec"]).run().ok().json();
        let lines = lines["records"].as_array().unwrap().clone();
        let outcomes = lines.iter().filter(|line| line["face"] == "api" && line["stage"] == "outcome");
        (outcomes.count() == 4).then_some(())
    });
}

#[test]
fn who_may_not_is_refused_before_anything_is_opened() {
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
fn a_first_message_that_starts_nothing_is_told_so() {
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
        socket.say(&what);
        assert_eq!(socket.until("error").0["code"], code, "{what}");
        assert_eq!(socket.next(), Message::Close);
    }
}
