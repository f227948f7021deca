//! Encrypted connections: the API's, and those of webhooks, to endpoints that an authority vouches for.

use std::io::{Read as _, Write as _};

use rustix::process::Signal;
use serde_json::Value;

use super::mcp_http::{body, headers};
use super::webhooks::{await_taken, expect_no_deliverer};
use crate::support::receiver::Receiver;
use crate::support::tls::Authority;
use crate::support::{Home, until};

#[test]
fn the_api_is_served_encrypted() {
    let home = Home::new();
    let (authority, stranger) = (Authority::new(), Authority::new());
    let [_, certificate, key] = authority.write(&home);
    let token = home.nido(["token", "create", "--name", "t", "--scope", "read", "--json"]).run().ok().json();
    let live = home
        .nido(["api-server", "start", "--port", "0", "--allow-remote", "--bind", "127.0.0.1", "--tls-cert"])
        .arg(&certificate)
        .arg("--tls-key")
        .arg(&key)
        .start();
    let line = live.line();
    let address = line.strip_prefix("https://").unwrap();
    let ask = |authority: &Authority| {
        let mut stream = authority.connect(address);
        let head = format!(
            "GET /v1/vms HTTP/1.1\r\nhost: localhost\r\norigin: https://localhost\r\nconnection: close\r\n\
             authorization: Bearer {}\r\n\r\n",
            token["token"].as_str().unwrap()
        );
        stream.write_all(head.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    };
    let answer = ask(&authority).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("{\"vms\":[]}"), "{answer}");
    // A client that does not trust its certificate, or does not encrypt, gets nothing; the server continues.
    ask(&stranger).unwrap_err();
    let mut plain = std::net::TcpStream::connect(address).unwrap();
    plain.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{}", answer.escape_ascii());
    assert!(ask(&authority).unwrap().starts_with("HTTP/1.1 200"));
    live.signal(Signal::TERM);
    live.wait().ok();
    let wrong = home.nido(["api-server", "start", "--port", "0", "--json", "--tls-cert"]);
    wrong.arg(&key).arg("--tls-key").arg(&key).run().fails(2, "spec_invalid");
}

#[test]
fn webhooks_go_to_endpoints_whose_authority_the_host_trusts_and_to_no_others() {
    let (trusted, stranger) = (Authority::new(), Authority::new());
    let (good, bad) = (Receiver::encrypted(trusted.server()), Receiver::encrypted(stranger.server()));
    let home = Home::new();
    let [root, ..] = trusted.write(&home);
    // The delivery worker is started by the commands, and has their environment.
    let nido = |arguments: [&str; 5]| home.nido(arguments).env("SSL_CERT_FILE", &root);
    for receiver in [&good, &bad] {
        nido(["webhook", "add", "--allow-private", "--url", &receiver.url()]).run().ok();
    }
    nido(["create", "web", "--accel", "tcg", "--json"]).run().ok();
    assert_eq!(await_taken(&good, 1)[0].json()["event"], "vm.created");
    let deliveries = || {
        let told = nido(["webhook", "deliveries", "--json", "--quiet", "--no-color"]).run().ok().json();
        told["deliveries"].as_array().unwrap().clone()
    };
    let refused = until("the refusal", || deliveries().into_iter().find(|one| one["last_error"].is_string()));
    assert_eq!((&refused["state"], &refused["last_status"]), (&"pending".into(), &Value::Null));
    assert!(refused["last_error"].as_str().unwrap().contains("certificate"), "{refused}");
    assert!(bad.messages().is_empty(), "not one byte of it was told");
    let id = refused["webhook_id"].as_str().unwrap();
    nido(["webhook", "remove", id, "--quiet", "--json"]).run().ok();
    expect_no_deliverer(&home);
    nido(["delete", "web", "--yes", "--quiet", "--no-color"]).run().ok();
    await_taken(&good, 2);
    expect_no_deliverer(&home);
}

#[test]
fn agents_are_served_encrypted() {
    let home = Home::new();
    let authority = Authority::new();
    let [_, certificate, key] = authority.write(&home);
    let token =
        home.nido(["token", "create", "--name", "t", "--scope", "run", "--only", "mcp", "--json"]).run().ok().json();
    let live = home
        .nido(["mcp-server", "start", "--transport", "http", "--port", "0", "--allow-remote", "--bind", "127.0.0.1"])
        .arg("--tls-cert")
        .arg(&certificate)
        .arg("--tls-key")
        .arg(&key)
        .start();
    let line = live.line();
    let mut stream = authority.connect(line.strip_prefix("https://").unwrap());
    let body = body("tools/list", None, serde_json::json!(null));
    let mut head = String::from("POST /mcp HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
    for (name, value) in headers("tools/list", None) {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let token = token["token"].as_str().unwrap();
    head.push_str(&format!("authorization: Bearer {token}\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"vm_spawn\""), "{answer}");
    live.signal(Signal::TERM);
    live.wait().ok();
}
