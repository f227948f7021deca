//! Ports of a guest on the host, and on standard streams. The "guest" listens on this host's loopback.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};

use crate::support::Home;

/// A server that answers every connection with what it got, in capitals.
fn server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let (mut stream, mut text) = (stream, Vec::new());
                let _ = stream.read_to_end(&mut text);
                let _ = stream.write_all(&text.to_ascii_uppercase());
            });
        }
    });
    port
}

fn send_request(port: u16, text: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_port_is_published_and_unpublished() {
    let home = Home::new();
    home.spawn("web");
    let guest = server();
    let added = home.nido(["forward", "add", "web", "--json"]).arg(guest.to_string()).run().ok().json();
    let host = u16::try_from(added["host_port"].as_u64().unwrap()).unwrap();
    assert_eq!(send_request(host, "hello"), "HELLO");
    let list = home.nido(["forward", "ls", "web", "--json"]).run().ok().json();
    assert_eq!(list["forwards"][0]["guest_port"], guest);
    let named = format!("127.0.0.1:{host}:{guest}");
    assert_eq!(home.nido(["forward", "ls", "web", "-q"]).run().ok().text(), format!("{named}\n"));
    home.nido(["forward", "rm", "web", &named]).run().ok();
    assert!(TcpStream::connect(("127.0.0.1", host)).is_err());
    home.nido(["forward", "rm", "web", "--json", &named]).run().fails(1, "forward_not_found");
}

#[test]
fn a_port_in_use_is_reported() {
    let home = Home::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    home.spawn("web");
    home.nido(["forward", "add", "web", "--json"]).arg(format!("{port}:80")).run().fails(1, "port_in_use");
    home.nido(["spawn", "other", "--json", "-p"]).arg(format!("{port}:80")).run().fails(1, "port_in_use");
    assert_eq!(home.names(), ["web"]);
}

#[test]
fn ports_named_at_spawn_are_there_from_the_start_and_after_a_restart() {
    let home = Home::new();
    let guest = server();
    let vm = home.nido(["spawn", "web", "--json", "-p"]).arg(format!("0:{guest}")).run().ok().json();
    let host = u16::try_from(vm["forwards"][0]["host_port"].as_u64().unwrap()).unwrap();
    assert_eq!(send_request(host, "one"), "ONE");
    home.nido(["restart", "web", "--force"]).run().ok();
    assert_eq!(send_request(host, "two"), "TWO");
}

#[test]
fn standard_streams_reach_a_port() {
    let home = Home::new();
    home.spawn("web");
    let ran = home.nido(["proxy", "web"]).arg(server().to_string()).input("through a pipe").run().ok();
    assert_eq!(ran.text(), "THROUGH A PIPE");
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    home.nido(["proxy", "web", "--json"]).arg(free.to_string()).run().fails(1, "port_closed");
}
