//! Limits on a VM's life, kept by its supervisor.

use crate::rig::{TestHome, eventually};

#[test]
fn an_idle_vm_is_stopped_and_a_used_one_is_not() {
    let home = TestHome::new();
    // Booting takes longer than this, and is no idleness.
    let vm = home.spawn("web", &["--net", "none", "--idle", "5s"]);
    let info = vm.info();
    assert!(info["idle_at"].is_string() && info["expires_at"].is_null(), "{info:#}");
    // A command that is quiet for longer than the limit is activity nevertheless.
    vm.exec(["sleep", "11"]).ok();
    // A query does not count as use: if it did, this would never end.
    eventually("the end of an idle VM", || {
        home.nido(["ls"]).ok();
        (vm.status() == "stopped").then_some(())
    });
    assert_eq!(vm.info()["failure"], serde_json::Value::Null);
    let hit = &vm.info()["limits_hit"][0];
    assert_eq!((&hit["kind"], &hit["limit"], &hit["count"]), (&"time".into(), &5000.into(), &1.into()), "{hit}");
    let events = home.nido(["events", "--event", "vm.limit_hit", "--json"]).text();
    assert!(events.contains("\"limit_hit\":{\"kind\":\"time\",\"limit\":5000"), "{events}");
}

#[test]
fn a_guest_that_fills_its_disk_quota_sees_errors_and_keeps_running() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none", "--disk-quota", "64M"]);
    assert_eq!(vm.info()["disk_quota_bytes"], 64 << 20);
    assert!(vm.info()["limits_hit"].is_null());
    vm.sh("! dd if=/dev/urandom of=/root/filler bs=1M count=200 conv=fsync").ok();
    let hit = eventually("the limit hit", || vm.info()["limits_hit"].get(0).cloned());
    assert_eq!((&hit["kind"], &hit["limit"]), (&"disk".into(), &(64 << 20).into()), "{hit}");
    assert!(hit["evidence"]["used_bytes"].as_u64().is_some_and(|used| used <= (64 << 20) + (1 << 20)), "{hit}");
    assert_eq!((vm.status().as_str(), vm.exec(["echo", "alive"]).text().as_str()), ("running", "alive"));
    assert!(vm.nido("info", &[]).text().contains("limit hit"));
    let events = home.nido(["events", "--event", "vm.limit_hit", "--json"]).text();
    assert_eq!(events.lines().count(), 1, "{events}");
    // A snapshot has the memory, too.
    home.nido(["snapshot", "create", "web", "one"]).problem(1, "limit_exceeded");
}

#[test]
fn a_forwarded_connection_is_activity() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none", "--idle", "5s", "--ephemeral", "-p", "7000"]);
    // An echo that waits for as long as the client does.
    let server = "import socket; s = socket.create_server(('127.0.0.1', 7000)); print('up', flush=True)\n\
                  c = s.accept()[0]\nwhile d := c.recv(99): c.sendall(d)";
    vm.sh(&format!("setsid python3 -c \"{server}\" > /tmp/up 2>&1 & until grep -q up /tmp/up; do sleep 0.1; done"))
        .ok();
    let port = vm.info()["forwards"][0]["host_port"].as_u64().unwrap();
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", u16::try_from(port).unwrap())).unwrap();
    let mut echo = |word: &[u8]| {
        use std::io::{Read, Write};
        stream.write_all(word).unwrap();
        let mut back = vec![0; word.len()];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(back, word);
    };
    echo(b"one");
    let begun = std::time::Instant::now();
    eventually("twice the limit", || (begun.elapsed().as_secs() >= 11).then_some(()));
    echo(b"two");
    drop(stream);
    eventually("the end of an idle VM", || home.names().is_empty().then_some(()));
}

#[test]
fn a_vm_expires_on_time_after_any_kill() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none", "--ttl", "60s"]);
    assert!(vm.info()["expires_at"].is_string());
    let (busy, _keys) = vm.sh("echo up; sleep 98771").start();
    busy.read_until("up\n");
    busy.signal(rustix::process::Signal::KILL);
    busy.wait().expect(137);
    vm.kill_supervisor();
    // The next command starts another, which knows the limit.
    vm.exec(["true"]).ok();
    eventually("the end of its life", || (vm.status() == "stopped").then_some(()));
    assert_eq!(vm.info()["expires_at"], serde_json::Value::Null);
    // It counts from each start.
    vm.nido("start", &[]).ok();
    vm.exec(["true"]).ok();
}
