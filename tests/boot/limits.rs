//! Limits on a VM's life, kept by its supervisor.

use std::io::Read as _;
use std::net::TcpListener;

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
    // Its kernel may have given up the file system, so that no command can be read.
    assert_eq!((vm.status().as_str(), &vm.info()["agent"]["ready"]), ("running", &true.into()));
    assert!(vm.nido("info", &[]).text().contains("limit hit"));
    let events = home.nido(["events", "--event", "vm.limit_hit", "--json"]).text();
    assert_eq!(events.lines().count(), 1, "{events}");
    // A snapshot has the memory, too.
    home.nido(["snapshot", "create", "web", "one"]).problem(1, "limit_exceeded");
}

#[test]
fn a_command_that_starts_too_many_processes_leaves_room_for_others() {
    let home = TestHome::new();
    let too_many = "n=0; while [ $n -lt 200 ]; do sleep 600 & n=$((n + 1)); done";
    for flags in [&["--max-processes", "64"][..], &["--max-processes", "64", "--cold"]] {
        let vm = home.spawn("web", &[flags, &["--net", "none"]].concat());
        assert_eq!(vm.info()["max_processes"], 64);
        assert!(vm.info()["limits_hit"].is_null());
        let refused = vm.sh(too_many).run();
        assert!(refused.code != 0 && refused.stderr.contains("fork"), "{}", refused.stderr);
        // They still run: one command has 56 processes, and the shell was one of them.
        let count =
            "for p in /proc/[0-9]*; do cat $p/cmdline 2>/dev/null | tr '\\0' ' '; echo; done | grep -c '^sleep 600'";
        assert_eq!(vm.sh(count).text(), "55");
        vm.exec(["sh", "-c", "echo kept > /root/file && cat /root/file"]).ok();
        let hit = eventually("the limit hit", || vm.info()["limits_hit"].get(0).cloned());
        assert_eq!((&hit["kind"], &hit["limit"]), (&"processes".into(), &64.into()), "{hit}");
        assert!(hit["evidence"]["refused"].as_u64().is_some_and(|refused| refused > 0), "{hit}");
        let events = home.nido(["events", "--event", "vm.limit_hit", "--json"]).text();
        assert!(events.contains("\"limit_hit\":{\"kind\":\"processes\",\"limit\":64"), "{events}");
        vm.delete();
    }
}

#[test]
fn the_limit_of_processes_is_kept_by_copies_and_restarts() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "none", "--max-processes", "32"]);
    let refusal = "n=0; while [ $n -lt 100 ]; do sleep 1 & n=$((n + 1)); done";
    let is_limited = |vm: &crate::rig::Vm<'_>| {
        assert_eq!(vm.info()["max_processes"], 32);
        assert!(vm.info()["limits_hit"].is_null(), "a hit of another VM, or of the time before");
        assert_ne!(vm.sh(refusal).run().code, 0);
        eventually("the limit hit", || vm.info()["limits_hit"].get(0).cloned());
    };
    is_limited(&vm);
    home.nido(["fork", "web", "copy"]).ok();
    let copy = crate::rig::Vm { home: &home, name: "copy" };
    is_limited(&copy);
    copy.delete();
    vm.nido("restart", &[]).ok();
    is_limited(&vm);
    home.nido(["spawn", "other", "--max-processes", "15"]).problem(2, "spec_invalid");
}

#[test]
fn a_guest_that_has_sent_its_bytes_has_no_network_until_it_is_started_again() {
    const LIMIT: u64 = 8 << 20;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            std::thread::spawn(move || while client.read(&mut [0; 65_536]).is_ok_and(|count| count > 0) {});
        }
    });
    let home = TestHome::new();
    let rule = format!("host:{port}");
    let vm = home.spawn("web", &["--net", "restricted", "--allow", &rule, "--net-limit", "sent=8M"]);
    assert_eq!(vm.info()["net_limits"], serde_json::json!({ "sent_bytes": LIMIT }));
    // Sends so many MiB, and reports how that ended.
    let send = |mib: u32| {
        let program = format!(
            "import socket, errno\n\
             try:\n s = socket.create_connection(('10.0.2.2', {port}), 20)\n s.sendall(bytes({mib} << 20))\n\
             \x20s.shutdown(1)\n s.recv(1)\n print('sent')\n\
             except OSError as e: print(errno.errorcode.get(e.errno, type(e).__name__))"
        );
        vm.exec(["python3", "-c", &program]).text()
    };
    let sent = || vm.info()["network"]["sent_bytes"].as_u64();
    assert_eq!((send(5).as_str(), sent()), ("sent", Some(5 << 20)));
    vm.kill_supervisor();
    let counted = eventually("the next supervisor", sent);
    assert!(counted <= 5 << 20 && counted + (16 << 10) > 5 << 20, "{counted}");
    // The last one if the reset comes when everything is in the guest's buffer.
    let ended = send(5);
    assert!(["ECONNRESET", "EPIPE", "ENOTCONN"].contains(&ended.as_str()), "{ended}");
    assert_eq!(sent(), Some(LIMIT));
    assert_eq!(send(1), "ECONNREFUSED");
    let info = vm.info();
    let (hit, denial) = (&info["limits_hit"][0], &info["network"]["denials"][0]);
    assert_eq!((&hit["kind"], &hit["evidence"]["sent_bytes"]), (&"egress_bytes".into(), &LIMIT.into()), "{info:#}");
    assert_eq!(denial["reason"], "byte_limit", "{info:#}");
    vm.nido("restart", &[]).ok();
    assert_eq!(send(1), "sent");
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
