//! The REST API over the real program: who may ask, from where, and how slowly.

use std::io::{Read as _, Write as _};

use rustix::process::Signal;

use crate::support::Home;
use crate::support::http::Server;
use crate::support::tls::Authority;

#[test]
fn requests_without_a_valid_token_are_refused() {
    let home = Home::new();
    let server = Server::start(&home);
    let ask = |headers: &[(&str, &str)]| server.plain("GET", "/v1/vms", headers, b"");
    assert_eq!(ask(&[]).header("www-authenticate"), "Bearer realm=\"nido\"");
    let good = format!("Bearer {}", server.token());
    for bad in ["", "Bearer", "Bearer x", "Basic eDp5", &good[..good.len() - 1], &format!("{good}0")] {
        ask(&[("authorization", bad)]).problem(401, "unauthorized");
    }
    ask(&[("authorization", &good)]).ok(200);
    // Routes without information about VMs are open.
    server.plain("GET", "/healthz", &[], b"").ok(200);
    server.plain("GET", "/openapi.json", &[], b"").ok(200);
    server.plain("GET", "/metrics", &[], b"").problem(401, "unauthorized");
    home.nido(["token", "revoke", "tests"]).run().ok();
    ask(&[("authorization", &good)]).problem(401, "unauthorized");
}

#[test]
fn a_scope_allows_exactly_its_operations() {
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
    // Also for what needs no token, but for probes, which name a server as they like.
    server.plain("GET", "/openapi.json", &[("host", "evil.example")], b"").problem(403, "denied");
    server.plain("GET", "/healthz", &[("host", "10.0.0.1.nip.io")], b"").ok(200);
}

// Behind a proxy with TLS the page's own requests were refused, and links lost the path that the proxy had removed.
#[test]
fn behind_a_proxy_its_host_and_origin_are_accepted_and_links_lead_there() {
    let home = Home::new();
    home.nido(["api-server", "start", "--public-url", "ci.example", "--json"]).run().exits(2);
    let server = Server::with(&home, &["--public-url", "https://ci.example/nido/", "--mcp"]);
    let token = format!("Bearer {}", server.token());
    let headers = [
        ("authorization", token.as_str()),
        ("host", "ci.example"),
        ("origin", "https://ci.example"),
        ("content-type", "application/json"),
    ];
    let made = server.plain("POST", "/v1/vms", &headers, br#"{"name": "web", "start": false}"#);
    assert_eq!(made.header("location"), "/nido/v1/vms/web");
    made.ok(201);
    server.plain("POST", "/v1/vms", &headers, br#"{"name": "db", "start": false}"#).ok(201);
    let page = server.plain("GET", "/v1/vms?limit=1", &headers, b"");
    assert!(page.header("link").starts_with("</nido/v1/vms?"), "{}", page.header("link"));
    let other = [headers[0], headers[1], ("origin", "https://other.example")];
    server.plain("GET", "/v1/vms", &other, b"").problem(403, "denied");
    let index = String::from_utf8(server.plain("GET", "/", &headers[..2], b"").body).unwrap();
    assert!(index.contains("src=\"page/app.js\"") && !index.contains("=\"/"), "{index}");
}

// Proxies keep an answer until a buffer is full, unless a header forbids it.
#[test]
fn a_stream_of_events_is_not_buffered_by_proxies() {
    let home = Home::new();
    let server = Server::start(&home);
    let bearer = format!("Bearer {}", server.token());
    let headers = [("authorization", bearer.as_str()), ("accept", "text/event-stream")];
    let stream = server.open("GET", "/v1/events", &headers, b"");
    assert_eq!(stream.header("x-accel-buffering"), "no");
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
    refused(&["--bind", "0.0.0.0"]);
    let server = Server::with(&home, &["--allow-remote", "--insecure-http"]);
    assert!(server.address().starts_with("0.0.0.0:"));
    // Without a certificate of the user's the server makes its own, and prints its fingerprint.
    let live = home.nido(["api-server", "start", "--port", "0", "--allow-remote", "--json"]).start();
    let listening: serde_json::Value = serde_json::from_str(&live.line()).unwrap();
    let address = listening["address"].as_str().unwrap().strip_prefix("https://0.0.0.0:").unwrap().to_owned();
    let tls = &listening["tls"];
    assert_eq!((tls["made"].clone(), tls["sha256"].as_str().unwrap().len()), (true.into(), 95), "{listening}");
    let certificate = std::fs::read_to_string(tls["certificate"].as_str().unwrap()).unwrap();
    let authority = Authority { root: certificate, certificate: String::new(), key: String::new() };
    let mut stream = authority.connect(&format!("127.0.0.1:{address}"));
    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    live.signal(Signal::TERM);
    live.wait().ok();
    let again = home.nido(["api-server", "start", "--port", "0", "--allow-remote"]).start();
    again.line();
    again.signal(Signal::TERM);
    let said = again.wait().ok().stderr;
    assert!(said.contains(tls["sha256"].as_str().unwrap()) && said.contains("kept"), "{said}");
}

#[test]
fn over_a_unix_socket_the_kernel_identifies_the_caller() {
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
fn a_head_without_an_end_is_refused() {
    let home = Home::new();
    let server = Server::start(&home);
    let long = "x".repeat(1 << 20);
    let mut refused = Vec::new();
    // What was not read any more may take the answer with it.
    let _ = std::io::Read::read_to_end(&mut server.unread("GET", "/healthz", &[("x", &long)], b""), &mut refused);
    assert!(refused.is_empty() || refused.starts_with(b"HTTP/1.1 431 "), "{}", refused.escape_ascii());
    server.get("/healthz").ok(200);
}

#[test]
fn a_slow_sender_gets_a_timeout() {
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
