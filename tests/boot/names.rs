//! Rules for names: what the guest resolves, and what the first bytes of its connections have to be. nido runs in namespaces of the
//! test's own, in which public addresses and names are the loopback's.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use crate::rig::{TestHome, Vm};

/// The addresses of the loopback in the namespaces.
const ADDRESSES: [&str; 3] = ["93.184.215.14/32", "93.184.215.15/32", "2606:2800:21f::1/128"];
/// The names that the host there knows.
const HOSTS: &str = "\
93.184.215.14 example.com www.example.com shared.example.net
2606:2800:21f::1 example.com
10.1.2.3 inside.example.com
127.0.0.1 loop.example.com
::ffff:169.254.169.254 mapped.example.com
";
/// A server on ports 22, 80, 443 and 8443 of each address: to whatever it gets it answers with `seen`, and on port 22 it speaks first.
const SERVER: &str = "
import socket, threading
def serve(family, address, port):
    server = socket.socket(family); server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, port)); server.listen(64)
    def talk(client):
        try:
            if port == 22: client.sendall(b'SSH-2.0-test\\n')
            while client.recv(65536): client.sendall(b'seen\\n')
        except OSError: pass
        client.close()
    while True: threading.Thread(target=talk, args=(server.accept()[0],), daemon=True).start()
for family, address in ((socket.AF_INET, '0.0.0.0'), (socket.AF_INET6, '::')):
    for port in (22, 80, 443, 8443):
        if family == socket.AF_INET6:
            address = '2606:2800:21f::1'
        threading.Thread(target=serve, args=(family, address, port)).start()
print('ready', flush=True)
";
/// For the guest: connects, sends, and prints the first line of the answer or how the connection ended.
const CLIENT: &str = r#"
import socket, ssl, errno, sys
def hello(name):
    out = ssl.MemoryBIO(); context = ssl.create_default_context(); context.check_hostname = False; context.verify_mode = ssl.CERT_NONE
    end = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    try: end.do_handshake()
    except ssl.SSLWantReadError: pass
    return out.read()
def request(name): return b'GET / HTTP/1.1\r\nHost: ' + name.encode() + b'\r\n\r\n'
def show(address, port, pieces):
    try:
        s = socket.create_connection((address, port), 20); s.settimeout(20)
        answer = b''
        for piece in pieces:
            s.sendall(piece); answer = s.recv(100)
            if not answer: break
        if not pieces: answer = s.recv(100)
        print(answer.decode().strip() or 'closed')
    except OSError as e: print(errno.errorcode.get(e.errno, type(e).__name__))
"#;

/// Namespaces of network, mounts and users. They end with the test.
struct Namespaces {
    child: Child,
    pid: String,
}

impl Namespaces {
    fn new(home: &TestHome) -> Self {
        let hosts = home.user_dir().join("hosts");
        fs::write(&hosts, HOSTS).unwrap();
        let addresses = ADDRESSES.map(|address| format!("ip address add {address} dev lo; ")).concat();
        // A route for IPv6 is what makes the host have it.
        let script = format!(
            "set -e; mount --bind \"$0\" /etc/hosts; ip link set lo up; {addresses} \
             ip -6 route add default dev lo; exec python3 -c \"$1\""
        );
        let mut child = Command::new("unshare")
            .args(["--user", "--map-current-user", "--keep-caps", "--mount", "--net", "sh", "-c", &script])
            .args([hosts.as_os_str(), SERVER.as_ref()])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "the namespaces cannot be set up");
        let pid = child.id().to_string();
        Self { child, pid }
    }

    /// Spawns a VM whose supervisor is in these namespaces.
    fn spawn<'home>(&self, home: &'home TestHome, name: &'static str, flags: &[&str]) -> Vm<'home> {
        let wrapper = ["nsenter", "--preserve-credentials", "--user", "--mount", "--net", "--target", &self.pid, "--"];
        home.nido(["spawn", name, "--net", "restricted"]).args(flags).behind(wrapper).ok();
        Vm { home, name }
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a line of [`CLIENT`] prints.
fn show(vm: &Vm<'_>, call: &str) -> String {
    vm.exec(["python3", "-c", &format!("{CLIENT}\n{call}")]).text()
}

fn reasons(vm: &Vm<'_>) -> Vec<String> {
    let denials = vm.info()["network"]["denials"].clone();
    denials.as_array().unwrap().iter().map(|denial| denial["reason"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_name_is_resolved_and_reached_only_where_a_rule_names_it() {
    let home = TestHome::new();
    let namespaces = Namespaces::new(&home);
    let vm = namespaces.spawn(&home, "web", &["--allow", "example.com:22,80,443,8443"]);
    // Before it is resolved, its address is one as any other.
    assert_eq!(show(&vm, "show('93.184.215.14', 80, [request('example.com')])"), "ECONNREFUSED");
    assert_eq!(show(&vm, "print(socket.gethostbyname('EXAMPLE.com'))"), "93.184.215.14");
    let v6 = "print([a[4][0] for a in socket.getaddrinfo('example.com', 80, socket.AF_INET6)][0])";
    assert_eq!(show(&vm, v6), "2606:2800:21f::1");
    for address in ["93.184.215.14", "2606:2800:21f::1"] {
        let reached = format!("show('{address}', 80, [request('example.com')])");
        assert_eq!(show(&vm, &reached), "seen", "{address}");
        assert_eq!(show(&vm, &format!("show('{address}', 443, [hello('example.com')])")), "seen", "{address}");
        // Server names and hosts of others at the same address, also in a later request.
        for denied in [
            format!("show('{address}', 443, [hello('shared.example.net')])"),
            format!("show('{address}', 8443, [hello('shared.example.net')])"),
            format!("show('{address}', 443, [hello(None)])"),
            format!("show('{address}', 443, [b'GET / HTTP/1.1'])"),
            format!("show('{address}', 80, [request('shared.example.net')])"),
            format!("show('{address}', 80, [request('example.com'), request('shared.example.net')])"),
            format!("show('{address}', 80, [request('{address}')])"),
        ] {
            assert_eq!(show(&vm, &denied), "ECONNRESET", "{denied}");
        }
        // Where the server speaks first, the address decides.
        assert_eq!(show(&vm, &format!("show('{address}', 22, [])")), "SSH-2.0-test", "{address}");
    }
    // A neighbor of an allowed address, and a name with another address.
    assert_eq!(show(&vm, "show('93.184.215.15', 80, [request('example.com')])"), "ECONNREFUSED");
    assert_eq!(show(&vm, "show('www.example.com', 80, [])"), "gaierror");
    vm.sh("echo 93.184.215.15 example.com >> /etc/hosts").ok();
    assert_eq!(show(&vm, "show('example.com', 80, [request('example.com')])"), "ECONNREFUSED");
    let reasons = reasons(&vm);
    for reason in ["address_not_learned", "name_not_allowed", "sni_mismatch", "sni_missing", "host_mismatch"] {
        assert!(reasons.iter().any(|found| found == reason), "{reason} is not among {reasons:?}");
    }
}

#[test]
fn a_name_leads_to_no_private_address() {
    let home = TestHome::new();
    let namespaces = Namespaces::new(&home);
    let vm = namespaces.spawn(&home, "web", &["--allow", "*.example.com:*"]);
    for name in ["inside", "loop", "mapped"] {
        assert_eq!(show(&vm, &format!("show('{name}.example.com', 80, [])")), "gaierror", "{name}");
    }
    assert_eq!(show(&vm, "show('10.1.2.3', 80, [])"), "ECONNREFUSED");
    let denied =
        vm.info()["network"]["denials"].as_array().unwrap().iter().find(|d| d["name"] == "inside.example.com").cloned();
    assert_eq!(denied.unwrap()["rule"], "10.1.2.3");
    // The apex is not below the wildcard.
    assert_eq!(show(&vm, "show('example.com', 80, [])"), "gaierror");
    assert_eq!(show(&vm, "show('www.example.com', 80, [request('www.example.com')])"), "seen");
}

#[test]
fn the_name_server_answers_only_for_addresses_of_allowed_names() {
    let home = TestHome::new();
    let namespaces = Namespaces::new(&home);
    let vm = namespaces.spawn(&home, "web", &["--allow", "example.com"]);
    // Type, name -> the response code and the number of answers; over UDP, and with `True` over TCP.
    let ask = r#"
import struct
def ask(name, kind, tcp=False, server='10.0.2.3'):
    labels = b''.join(bytes([len(l)]) + l.encode() for l in name.split('.')) + b'\0'
    query = struct.pack('>6H', 7, 0x100, 1, 0, 0, 0) + labels + struct.pack('>2H', kind, 1)
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM); s.settimeout(20)
    try:
        s.connect((server, 53))
        s.sendall(struct.pack('>H', len(query)) + query if tcp else query)
        answer = s.recv(4096)[2 if tcp else 0:]
        print(answer[3] & 15, struct.unpack('>H', answer[6:8])[0], end='; ')
    except OSError as e: print(errno.errorcode.get(e.errno, type(e).__name__), end='; ')
"#;
    let calls = "ask('example.com', 1); ask('example.com', 28); ask('example.com', 16); ask('example.com', 65); \
         ask('example.com', 1, True); ask('evil.example', 1); ask('evil.example', 16); ask('x.example.com', 1); \
         ask('host.nido.internal', 1); ask('example.com', 1, False, '8.8.8.8'); ask('example.com', 1, True, '8.8.8.8')";
    let answers = show(&vm, &format!("{ask}\n{calls}"));
    assert_eq!(answers, "0 1; 0 1; 0 0; 0 0; 0 1; 3 0; 3 0; 3 0; 0 1; ECONNREFUSED; ECONNREFUSED; ");
}
