//! Namespaces of a test's own, in which public addresses and names are the loopback's: for what a guest reaches by name.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::call::Call;
use super::home::{TestHome, Vm};

/// The addresses of the loopback in the namespaces.
const ADDRESSES: [&str; 5] =
    ["93.184.215.14/32", "93.184.215.15/32", "10.77.0.1/32", "2606:2800:21f::1/128", "fd77::1/128"];
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
    if family == socket.AF_INET6: server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
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
        threading.Thread(target=serve, args=(family, address, port)).start()

# A name server on the loopback, which writes down what it is asked. The second answer for 'rebind' leads inside.
import struct, sys
asked = {}
def addresses(name, kind):
    asked[name, kind] = asked.get((name, kind), 0) + 1
    public, inside = ('93.184.215.14', None), ('127.0.0.1', '::ffff:10.0.0.1')
    return {'public': (public, None), 'chain': (public, 'middle.corp.example'), 'alias': (('10.9.9.9', None), 'in.corp.example'),
        'metadata': (('169.254.169.254', '64:ff9b::a9fe:a9fe'), None),
        'rebind': (public if asked[name, kind] == 1 else inside, None),
        'many': ((['93.184.%d.%d' % (i >> 7, i & 127) for i in range(200)], None), None)}.get(name.split('.')[0])
def wire(name): return b''.join(bytes([len(l)]) + l.encode() for l in name.split('.')) + b'\\0'
def answer(query, limit):
    at, labels = 12, []
    while query[at]: labels.append(query[at + 1:at + 1 + query[at]].decode()); at += 1 + query[at]
    name, kind = '.'.join(labels), struct.unpack('>H', query[at + 1:at + 3])[0]
    with open(sys.argv[1], 'a') as log: log.write('%s %d\\n' % (name, kind))
    question, found = query[12:at + 5], addresses(name, kind)
    if not found: return query[:2] + struct.pack('>5H', 0x8183, 1, 0, 0, 0) + question
    address, alias = found[0][0 if kind == 1 else 1], found[1]
    records, count = b'', 0
    if alias: records += wire(name) + struct.pack('>HHIH', 5, 1, 0, len(wire(alias))) + wire(alias); count = 1
    for one in address if isinstance(address, list) else [address] if address else []:
        data = socket.inet_pton(socket.AF_INET if kind == 1 else socket.AF_INET6, one)
        records += wire(alias or name) + struct.pack('>HHIH', kind, 1, 0, len(data)) + data; count += 1
    head = query[:2] + struct.pack('>5H', 0x8180, 1, count, 0, 0)
    if len(head + question + records) > limit: return query[:2] + struct.pack('>5H', 0x8380, 1, 0, 0, 0) + question
    return head + question + records
def serve_datagrams():
    while True:
        query, client = datagrams.recvfrom(4096); datagrams.sendto(answer(query, 512), client)
def serve_stream(client):
    stream = client.makefile('rb')
    while head := stream.read(2):
        reply = answer(stream.read(struct.unpack('>H', head)[0]), 65535)
        client.sendall(struct.pack('>H', len(reply)) + reply)
def serve_streams():
    while True: threading.Thread(target=serve_stream, args=(streams.accept()[0],), daemon=True).start()
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); datagrams.bind(('127.0.0.1', 53))
streams = socket.socket(); streams.bind(('127.0.0.1', 53)); streams.listen(8)
for work in (serve_datagrams, serve_streams): threading.Thread(target=work).start()
print('ready', flush=True)
";
/// For the guest: connects, sends, and prints the first line of the answer or how the connection ended.
pub const CLIENT: &str = r#"
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
pub struct Namespaces {
    child: Child,
    pid: String,
    queries: PathBuf,
}

impl Namespaces {
    pub fn new(home: &TestHome) -> Self {
        let queries = home.user_dir().join("queries");
        fs::write(&queries, "").unwrap();
        Self::with_server(home, &[SERVER, queries.to_str().unwrap()])
    }

    /// With a server: a program of Python that prints `ready`, and its arguments.
    pub fn with_server(home: &TestHome, server: &[&str]) -> Self {
        let (hosts, resolver) = (home.user_dir().join("hosts"), home.user_dir().join("resolv.conf"));
        fs::write(&hosts, HOSTS).unwrap();
        fs::write(&resolver, "nameserver 127.0.0.1\n").unwrap();
        let addresses = ADDRESSES.map(|address| format!("ip address add {address} dev lo; ")).concat();
        // A route for IPv6 is what makes the host have it.
        let script = format!(
            "set -e; mount --bind \"$0\" /etc/hosts; mount --bind \"$1\" /etc/resolv.conf; shift; ip link set lo up; \
             {addresses} ip -6 route add default dev lo; exec python3 -c \"$@\""
        );
        let mut child = Command::new("unshare")
            .args(["--user", "--map-current-user", "--keep-caps", "--mount", "--net", "sh", "-c", &script])
            .args([&hosts, &resolver])
            .args(server)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "the namespaces cannot be set up");
        let pid = child.id().to_string();
        Self { child, pid, queries: home.user_dir().join("queries") }
    }

    /// What the name server was asked: a name and the number of a type in each line.
    pub fn queries(&self) -> String {
        fs::read_to_string(&self.queries).unwrap()
    }

    /// A command of nido in these namespaces.
    pub fn nido(&self, home: &TestHome, arguments: &[&str]) -> Call {
        self.call(home.nido(arguments))
    }

    /// A call whose processes are in these namespaces.
    pub fn call(&self, call: Call) -> Call {
        call.behind(["nsenter", "--preserve-credentials", "--user", "--mount", "--net", "--target", &self.pid, "--"])
    }

    /// Spawns a VM whose supervisor is in these namespaces.
    pub fn spawn<'home>(&self, home: &'home TestHome, name: &'static str, flags: &[&str]) -> Vm<'home> {
        let arguments = [&["spawn", name, "--net", "restricted"], flags].concat();
        self.nido(home, &arguments).ok();
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
pub fn show(vm: &Vm<'_>, call: &str) -> String {
    vm.exec(["python3", "-c", &format!("{CLIENT}\n{call}")]).text()
}

pub fn reasons(vm: &Vm<'_>) -> Vec<String> {
    let denials = vm.info()["network"]["denials"].clone();
    denials.as_array().unwrap().iter().map(|denial| denial["reason"].as_str().unwrap().to_owned()).collect()
}
