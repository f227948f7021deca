//! The guest's network card, and its absence.

use std::io::{Read, Write};
use std::net::TcpListener;

use rustix::process::Signal;

use crate::rig::{TestHome, Vm, eventually, send};

#[test]
fn nat_has_an_address_a_route_and_a_name_server() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "nat"]);
    assert_eq!(vm.info()["net"], "nat");
    assert_eq!(vm.sh("ip -4 -o address show eth0 | grep -o 'inet [^ ]*'").text(), "inet 10.0.2.15/24");
    assert!(vm.sh("ip route show default").text().starts_with("default via 10.0.2.2 dev eth0"));
    assert!(vm.exec(["cat", "/etc/resolv.conf"]).text().contains("nameserver 10.0.2.3"));
}

/// A server on the host's loopback that sends this to each client, and ends when the test does.
pub fn greeting_server(greeting: &'static [u8]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let _ = client.write_all(greeting);
        }
    });
    port
}

/// A program for the guest: prints what a server sends, or the name of the error.
fn client(address: &str, port: u16) -> String {
    format!(
        "import socket, errno\n\
         try: print(socket.create_connection(({address:?}, {port}), 20).makefile().readline(), end='')\n\
         except OSError as e: print(errno.errorcode.get(e.errno, type(e).__name__))"
    )
}

pub fn reach(vm: &Vm<'_>, address: &str, port: u16) -> String {
    vm.exec(["python3", "-c", &client(address, port)]).text()
}

#[test]
fn nat_reaches_the_host_only_where_a_rule_allows_it() {
    let home = TestHome::new();
    let (open, closed) = (greeting_server(b"hello\n"), greeting_server(b"never\n"));
    let vm = home.spawn("web", &["--net", "nat", "--allow", &format!("host:{open}")]);
    assert_eq!(reach(&vm, "10.0.2.2", open), "hello");
    for (address, port) in [("10.0.2.2", closed), ("10.0.2.3", closed), ("169.254.169.254", 80), ("168.63.129.16", 80)]
    {
        assert_eq!(reach(&vm, address, port), "ECONNREFUSED", "{address}");
    }
    // The guest's own loopback is its own.
    assert_eq!(reach(&vm, "127.0.0.1", closed), "ECONNREFUSED");
    let network = &vm.info()["network"];
    assert_eq!(network["denied"], 4);
    let denials = network["denials"].as_array().unwrap();
    let rule = format!("host:{closed}");
    assert!(denials.iter().any(|denial| denial["rule"] == rule.as_str()), "{network}");
    let events = home.nido(["events", "--event", "net.denied", "--json"]).text();
    assert!(events.contains(&rule) && events.contains("169.254.169.254"), "{events}");
    let shown = vm.nido("info", &[]).text();
    assert!(shown.contains(&format!("--allow {rule} allows it")), "{shown}");
}

#[test]
fn restricted_reaches_only_what_a_rule_names() {
    let home = TestHome::new();
    let port = greeting_server(b"hello\n");
    let vm = home.spawn("web", &["--net", "restricted", "--allow", &format!("host:{port}"), "--allow", "example.com"]);
    assert_eq!(reach(&vm, "10.0.2.2", port), "hello");
    for address in ["1.1.1.1", "192.168.1.1"] {
        assert_eq!(reach(&vm, address, 443), "ECONNREFUSED", "{address}");
    }
    // A name that no rule names is not resolved.
    assert_eq!(reach(&vm, "secret.attacker.example", 443), "gaierror");
    let udp = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20)\n\
               s.connect(('8.8.8.8', 53)); s.send(b'x')\n\
               try: s.recv(1)\n\
               except ConnectionRefusedError: print('refused')";
    assert_eq!(vm.exec(["python3", "-c", udp]).text(), "refused");
    let ping = vm.sh("ping -c 1 -W 20 1.1.1.1 2>&1 | grep -c -i 'filtered\\|prohibited'");
    assert_eq!(ping.text(), "1");
    assert!(vm.sh("ping -c 1 -W 20 10.0.2.2").text().contains("1 received"));
    let reasons: Vec<String> = vm.info()["network"]["denials"]
        .as_array()
        .unwrap()
        .iter()
        .map(|denial| format!("{} {}", denial["protocol"].as_str().unwrap(), denial["reason"].as_str().unwrap()))
        .collect();
    for reason in
        ["tcp address_not_learned", "tcp address_private", "dns name_not_allowed", "icmp protocol_not_allowed"]
    {
        assert!(reasons.iter().any(|found| found == reason), "{reason} is not among {reasons:?}");
    }
    // A fork has the same rules.
    home.nido(["fork", "web", "copy"]).ok();
    let copy = Vm { home: &home, name: "copy" };
    assert_eq!((reach(&copy, "10.0.2.2", port), reach(&copy, "1.1.1.1", 443)), ("hello".into(), "ECONNREFUSED".into()));
    // So it has after a restart.
    vm.nido("stop", &["--force"]).ok();
    vm.nido("start", &[]).ok();
    assert_eq!((reach(&vm, "10.0.2.2", port), reach(&vm, "1.1.1.1", 443)), ("hello".into(), "ECONNREFUSED".into()));
}

#[test]
fn large_transfers_arrive_as_they_were_sent_at_both_sizes_of_packets() {
    const LENGTH: usize = 48 << 20;
    let home = TestHome::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // Returns what it gets, once it has all of it.
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let mut received = Vec::new();
            client.read_to_end(&mut received).unwrap();
            client.write_all(&received).unwrap();
        }
    });
    let vm = home.spawn("web", &["--allow", &format!("host:{port}")]);
    let script = format!(
        "import socket, os, hashlib; data = os.urandom({LENGTH}); s = socket.create_connection(('10.0.2.2', {port})); \
         s.sendall(data); s.shutdown(1); back = hashlib.sha256(); n = 0\n\
         while chunk := s.recv(1 << 20): back.update(chunk); n += len(chunk)\n\
         print(n, back.digest() == hashlib.sha256(data).digest())"
    );
    for mtu in ["65520", "1500"] {
        vm.sh(&format!("ip link set eth0 mtu {mtu}")).ok();
        assert_eq!(vm.exec(["python3", "-c", &script]).text(), format!("{LENGTH} True"), "packets of {mtu} bytes");
    }
}

#[test]
fn a_gigabyte_arrives_as_it_was_sent() {
    const LENGTH: usize = 1 << 30;
    let home = TestHome::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // Another number in each block of 64 KiB, so that a block that is missing or comes twice changes the sum.
    std::thread::spawn(move || {
        let mut client = listener.accept().unwrap().0;
        let mut block = vec![0x5a; 1 << 16];
        for number in 0..(LENGTH >> 16) as u64 {
            block[..8].copy_from_slice(&number.to_le_bytes());
            client.write_all(&block).unwrap();
        }
    });
    let vm = home.spawn("web", &["--net", "restricted", "--allow", &format!("host:{port}")]);
    let script = format!(
        "import socket, zlib; s = socket.create_connection(('10.0.2.2', {port})); got = n = 0\n\
         while chunk := s.recv(1 << 20): got = zlib.crc32(chunk, got); n += len(chunk)\n\
         want = 0; rest = b'\\x5a' * 65528\n\
         for i in range({LENGTH} >> 16): want = zlib.crc32(rest, zlib.crc32(i.to_bytes(8, 'little'), want))\n\
         print(n, got == want)"
    );
    assert_eq!(vm.exec(["python3", "-c", &script]).text(), format!("{LENGTH} True"));
    assert_eq!(vm.info()["network"]["received_bytes"].as_u64(), Some(LENGTH as u64));
}

/// A program for the guest: connects, writes `connected` to a file, waits for data, and writes how that ended.
fn start_reader(vm: &Vm<'_>, port: u16) {
    let script = format!(
        "import socket, errno\n\
         s = socket.create_connection(('10.0.2.2', {port})); open('/run/reader', 'w').write('connected')\n\
         try: end = repr(s.recv(1))\n\
         except OSError as e: end = errno.errorcode[e.errno]\n\
         open('/run/reader', 'w').write(end)"
    );
    vm.exec(["sh", "-c", "nohup python3 -c \"$0\" >/dev/null 2>&1 &", &script]).ok();
    reader_is(vm, "connected");
}

fn reader_is(vm: &Vm<'_>, wanted: &str) {
    eventually(&format!("a reader that is {wanted}"), || {
        let state = vm.sh("cat /run/reader 2>/dev/null || true").text();
        (state == wanted).then_some(())
    });
}

#[test]
fn a_running_vm_follows_changes_of_its_rules() {
    let home = TestHome::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        for mut client in listener.incoming().flatten() {
            // One line for those that read, and an open connection for those that wait.
            let _ = client.write_all(b"hello\n");
            kept.push(client);
        }
    });
    let rule = format!("host:{port}");
    let vm = home.spawn("web", &["--net", "restricted"]);
    assert_eq!(reach(&vm, "10.0.2.2", port), "ECONNREFUSED");
    let shown = home.nido(["net", "show", "web"]).text();
    assert!(shown.contains(&format!("nido net allow web '{rule}' allows it")), "{shown}");
    home.nido(["net", "allow", "web", &rule]).ok();
    assert_eq!(reach(&vm, "10.0.2.2", port), "hello");
    let script = format!(
        "import socket, errno\n\
         s = socket.create_connection(('10.0.2.2', {port})); s.recv(6); open('/run/reader', 'w').write('connected')\n\
         try: end = repr(s.recv(1))\n\
         except OSError as e: end = errno.errorcode[e.errno]\n\
         open('/run/reader', 'w').write(end)"
    );
    vm.exec(["sh", "-c", "nohup python3 -c \"$0\" >/dev/null 2>&1 &", &script]).ok();
    reader_is(&vm, "connected");
    home.nido(["net", "deny", "web", &rule]).ok();
    reader_is(&vm, "ECONNRESET");
    assert_eq!(reach(&vm, "10.0.2.2", port), "ECONNREFUSED");
    // A stopped VM has the rule from its next start.
    vm.nido("stop", &["--force"]).ok();
    home.nido(["net", "allow", "web", &rule]).ok();
    vm.nido("start", &[]).ok();
    assert_eq!(reach(&vm, "10.0.2.2", port), "hello");
}

#[test]
fn connections_from_before_are_reset_where_they_have_no_other_end() {
    let home = TestHome::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        kept.extend(listener.incoming().flatten());
    });
    let vm = home.spawn("web", &["--allow", &format!("host:{port}")]);
    start_reader(&vm, port);
    // Of a copy; the original's connection stays.
    home.nido(["fork", "web", "copy"]).ok();
    let copy = Vm { home: &home, name: "copy" };
    reader_is(&copy, "ECONNRESET");
    assert_eq!(vm.sh("cat /run/reader").text(), "connected");
    // Of a guest whose supervisor was replaced.
    home.nido(["snapshot", "create", "web", "s"]).ok();
    vm.kill_supervisor();
    reader_is(&vm, "ECONNRESET");
    start_reader(&vm, port);
    // Of a guest that was restored.
    home.nido(["snapshot", "restore", "web", "s"]).ok();
    reader_is(&vm, "ECONNRESET");
    assert_eq!(vm.info()["status"], "running");
}

#[test]
fn a_supervisor_that_is_suspended_or_killed_keeps_no_guest_from_running() {
    let home = TestHome::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // Reads and writes without end.
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let mut other = client.try_clone().unwrap();
            std::thread::spawn(move || std::io::copy(&mut std::io::repeat(1), &mut other));
            std::thread::spawn(move || std::io::copy(&mut client, &mut std::io::sink()));
        }
    });
    let vm = home.spawn("web", &["--allow", &format!("host:{port}")]);
    let load = format!(
        "import socket, threading; s = socket.create_connection(('10.0.2.2', {port})); b = bytes(65536)\n\
         def send():\n while True: s.sendall(b)\n\
         threading.Thread(target=send).start()\n\
         while s.recv(65536): pass"
    );
    for _ in 0..2 {
        vm.exec(["sh", "-c", "nohup python3 -c \"$0\" >/dev/null 2>&1 &", &load]).ok();
    }
    eventually("traffic", || (vm.info()["network"]["sent_bytes"].as_u64()? > 1 << 20).then_some(()));
    // What QEMU prints on the console shows that the guest keeps running while nobody takes its frames.
    vm.sh("nohup sh -c 'while sleep 0.1; do echo tick > /dev/console; done' >/dev/null 2>&1 &").ok();
    let console = vm.dir().join("console.log");
    let ticks = || std::fs::read_to_string(&console).map_or(0, |text| text.matches("tick").count());
    eventually("a tick", || (ticks() > 0).then_some(()));
    let supervisor = vm.supervisor();
    send(supervisor.pid, Signal::STOP);
    let before = ticks();
    eventually("ten more ticks", || (ticks() >= before + 10).then_some(()));
    send(supervisor.pid, Signal::CONT);
    assert_eq!(vm.sh("echo alive").text(), "alive");
    vm.kill_supervisor();
    // The next command starts another one, and the network works again.
    assert_eq!(vm.sh("echo alive").text(), "alive");
    let greeting = greeting_server(b"hello\n");
    assert_eq!(reach(&vm, "10.0.2.2", greeting), "ECONNREFUSED");
    vm.exec(["sh", "-c", "nohup python3 -c \"$0\" >/dev/null 2>&1 &", &load]).ok();
    eventually("traffic again", || (vm.info()["network"]["sent_bytes"].as_u64()? > 1 << 20).then_some(()));
}

#[test]
fn none_has_only_the_loopback() {
    let home = TestHome::new();
    for template in ["sandbox", "debian-12"] {
        let vm = home.spawn("web", &["--net", "none", "--template", template]);
        assert_eq!(vm.exec(["ls", "/sys/class/net"]).text(), "lo", "{template}");
        assert_eq!(vm.sh("cat /sys/class/net/lo/flags").text(), "0x9", "{template}: it is up");
        assert_eq!(vm.info()["ip_address"], serde_json::Value::Null);
        vm.delete();
    }
}

#[test]
fn systemd_guests_have_the_same_network() {
    let home = TestHome::new();
    let vm = home.spawn("deb", &["--template", "debian-12"]);
    assert_eq!(vm.sh("ip -4 -o address show eth0 | grep -o 'inet [^ ]*'").text(), "inet 10.0.2.15/24");
    assert!(vm.exec(["cat", "/etc/resolv.conf"]).text().contains("nameserver 10.0.2.3"));
}
