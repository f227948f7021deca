//! Limits of the network of a VM that its user sets. Frames are sent to the network in place of QEMU.

use std::net::UdpSocket;
use std::time::Duration;

use serde_json::{Value, json};

use super::control::vm_dir;
use crate::support::http::Server;
use crate::support::mcp::{Client, Era};
use crate::support::{Home, processes, until};

const DATAGRAM: usize = 9000;

fn spawn(home: &Home, flags: &[&str]) -> String {
    let nido = home.nido(["spawn", "web", "--accel", "tcg", "--json"]);
    let made = flags.iter().fold(nido, |nido, flag| nido.arg(*flag)).run().ok().json();
    made["id"].as_str().unwrap().to_owned()
}

/// The guest's datagram to that port of the host's loopback, in an Ethernet frame.
fn datagram(to: u16) -> Vec<u8> {
    let mut udp = [&4000u16.to_be_bytes()[..], &to.to_be_bytes(), &((8 + DATAGRAM) as u16).to_be_bytes()].concat();
    udp.extend([0, 0]);
    udp.extend([7; DATAGRAM]);
    let mut ip = vec![0x45, 0];
    ip.extend(((20 + udp.len()) as u16).to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 17, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
    let ethernet = [0x52, 0x55, 0x0a, 0, 2, 2, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 8, 0];
    [&ethernet[..], &ip, &udp].concat()
}

fn send(home: &Home, id: &str, to: u16) {
    let socket = std::os::unix::net::UnixDatagram::unbound().unwrap();
    until("the network", || socket.send_to(&datagram(to), vm_dir(home, id).join("qemu/net.sock")).ok());
}

fn network(home: &Home, name: &str) -> Value {
    until("the network", || {
        let shown = home.nido(["net", "show", name, "--json"]).run().ok().json()["network"].clone();
        shown.is_object().then_some(shown)
    })
}

fn sent(home: &Home, name: &str) -> u64 {
    network(home, name)["sent_bytes"].as_u64().unwrap()
}

fn kill_supervisor(home: &Home) {
    for (pid, line) in processes::of(&home.path()) {
        if line.contains(" supervise ") {
            processes::kill_if_alive(pid);
        }
    }
}

#[test]
fn limits_are_kept_by_restarts_and_copies_and_shown() {
    let home = Home::new();
    home.qemu("migrates");
    let set = ["connections=16", "new-connections=20", "udp=4", "questions=5", "sent=1G", "received=2G"];
    let nido = home.nido(["spawn", "web", "--accel", "tcg", "--json"]);
    let nido = set.iter().fold(nido, |nido, limit| nido.arg("--net-limit").arg(*limit));
    let limits = json!({"connections": 16, "new_connections": 20, "udp": 4, "questions": 5, "sent_bytes": 1 << 30,
        "received_bytes": 1u64 << 31});
    assert_eq!(nido.run().ok().json()["net_limits"], limits);
    home.nido(["fork", "web", "copy"]).run().ok();
    home.nido(["restart", "web"]).run().ok();
    for name in ["web", "copy"] {
        assert_eq!(home.info(name)["net_limits"], limits);
        assert_eq!(home.nido(["net", "show", name, "--json"]).run().ok().json()["limits"], limits);
    }
    for text in [home.nido(["info", "web"]).run().ok(), home.nido(["net", "show", "web"]).run().ok()] {
        let words = "connections 16, new-connections 20, udp 4, questions 5, sent 1";
        assert!(text.text().contains(words), "{}", text.text());
    }
    home.nido(["create", "plain"]).run().ok();
    assert!(home.info("plain").get("net_limits").is_none());
}

#[test]
fn limits_that_a_network_cannot_have_are_refused() {
    let home = Home::new();
    let create = |flags: &[&str]| {
        let nido =
            flags.iter().fold(home.nido(["create", "web", "--json"]), |nido, flag| nido.arg("--net-limit").arg(*flag));
        nido.run()
    };
    for wrong in ["connections", "speed=1", "sent=1", "udp=many", "connections=-1"] {
        create(&[wrong]).exits(2);
    }
    for (wrong, words) in [("connections=0", "from 1 to 4096"), ("udp=1025", "from 1 to 1024")] {
        let problem = create(&[wrong]).fails(2, "spec_invalid");
        assert!(problem["detail"].as_str().unwrap().contains(words), "{problem}");
    }
    let alone = home.nido(["create", "web", "--net", "none", "--net-limit", "sent=1M", "--json"]);
    let problem = alone.run().fails(2, "spec_invalid");
    assert!(problem["detail"].as_str().unwrap().contains("no network to limit"), "{problem}");
    let server = Server::start(&home);
    let post = |limits: Value| server.post("/v1/vms", &json!({"name": "web", "start": false, "net_limits": limits}));
    for (limits, words) in [
        (json!({"speed": 1}), "net_limits.speed: unknown field"),
        (json!({"udp": "many"}), "net_limits.udp: "),
        (json!({"questions": 1001}), "net_limits: questions is 1001"),
    ] {
        let problem = post(limits).problem(422, "spec_invalid");
        assert!(problem["detail"].as_str().unwrap().starts_with(words), "{problem}");
    }
    assert!(home.names().is_empty());
    assert_eq!(post(json!({"sent_bytes": 1000})).ok(201)["net_limits"], json!({"sent_bytes": 1000}));
    // An agent cannot set them.
    let mut client = Client::start(&home, Era::Modern);
    client.bad("vm_create", json!({"name": "b", "net_limits": {"connections": 4096}}), "spec_invalid");
}

// A guest whose supervisor was killed, or that was restarted by its policy, could send as much again.
#[test]
fn sent_bytes_count_across_supervisors_and_restarts_by_policy() {
    const LIMIT: u64 = 100 << 10;
    let home = Home::new();
    home.qemu("migrates");
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let port = server.local_addr().unwrap().port();
    let rule = format!("host:{port}/udp");
    let flags = ["--net", "restricted", "--allow", &rule, "--net-limit", "sent=100K", "--restart", "always"];
    let id = spawn(&home, &flags);
    let pass = |count: u64| {
        for _ in 0..count {
            send(&home, &id, port);
            assert_eq!(server.recv(&mut [0; 10_000]).unwrap(), DATAGRAM);
        }
    };
    pass(4);
    let mut least = 4 * DATAGRAM as u64;
    assert_eq!(sent(&home, "web"), least);
    kill_supervisor(&home);
    // What is not written yet is lost: less than two datagrams.
    let counted = sent(&home, "web");
    assert!(counted <= least && counted + (16 << 10) > least, "{counted}");
    pass(3);
    least = counted + 3 * DATAGRAM as u64;
    assert_eq!(sent(&home, "web"), least);
    // Its policy restarts it.
    let qemu = processes::of(&home.path()).into_iter().find(|(_, line)| line.contains("path=qemu/qmp.sock")).unwrap();
    processes::kill_if_alive(qemu.0);
    home.await_info("web", |info| info["restarts"] == 1 && info["agent"]["ready"] == true);
    let counted = sent(&home, "web");
    assert!(counted <= least && counted + (16 << 10) > least, "{counted}");
    home.nido(["fork", "web", "copy"]).run().ok();
    assert_eq!(sent(&home, "copy"), 0);
    pass((LIMIT - counted).div_ceil(DATAGRAM as u64));
    let hit = home.await_info("web", |info| info["limits_hit"].is_array());
    let (hit, sent_bytes) = (&hit["limits_hit"][0], sent(&home, "web"));
    assert_eq!((&hit["kind"], &hit["limit"]), (&json!("egress_bytes"), &json!(LIMIT)), "{hit}");
    assert_eq!(hit["evidence"], json!({"sent_bytes": sent_bytes, "received_bytes": 0}));
    assert!((LIMIT..LIMIT + DATAGRAM as u64).contains(&sent_bytes), "{sent_bytes}");
    // Closed, also for the next supervisor.
    for _ in 0..2 {
        send(&home, &id, port);
        let denied = until("a refusal", || Some(network(&home, "web")).filter(|network| network["denied"] != 0));
        assert_eq!(denied["denials"][0]["reason"], "byte_limit");
        assert!(denied["denials"][0].get("rule").is_none());
        kill_supervisor(&home);
        assert_eq!(sent(&home, "web"), sent_bytes);
    }
    let events = home.nido(["events", "--event", "vm.limit_hit", "--json"]).run().ok();
    assert!(events.text().contains("\"kind\":\"egress_bytes\""), "{}", events.text());
    // A user's start begins again.
    home.nido(["restart", "web"]).run().ok();
    assert_eq!(sent(&home, "web"), 0);
    pass(1);
}
