//! The guest's network card, and its absence.

use std::io::{Read, Write};
use std::net::TcpListener;

use crate::rig::TestHome;

#[test]
fn nat_has_an_address_a_route_and_a_name_server() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "nat"]);
    assert_eq!(vm.info()["net"], "nat");
    assert_eq!(vm.sh("ip -4 -o address show eth0 | grep -o 'inet [^ ]*'").text(), "inet 10.0.2.15/24");
    assert!(vm.sh("ip route show default").text().starts_with("default via 10.0.2.2 dev eth0"));
    assert!(vm.exec(["cat", "/etc/resolv.conf"]).text().contains("nameserver 10.0.2.3"));
    // Outwards it reaches what this host reaches.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let greet = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        client.write_all(b"hello\n").unwrap();
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        said
    });
    let script = format!(
        "import socket; s = socket.create_connection(('10.0.2.2', {port})); \
         print(s.makefile().readline(), end=''); s.sendall(b'thanks')"
    );
    assert_eq!(vm.exec(["python3", "-c", &script]).text(), "hello");
    assert_eq!(greet.join().unwrap(), "thanks");
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
