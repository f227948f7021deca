//! A guest that sends frames of its own making, and floods its network.

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::rig::{TestHome, Vm};

/// For the guest, as root: frames without its kernel. `barrier` returns what has come in when the gateway answers an echo request
/// that was sent after everything else.
const FRAMES: &str = r#"
import socket, struct, time
card = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)); card.bind(('eth0', 0)); card.settimeout(2)
MAC, GATEWAY = bytes.fromhex('525400123456'), bytes.fromhex('52550a000202')
v4, v6 = (lambda a: socket.inet_pton(socket.AF_INET, a)), (lambda a: socket.inet_pton(socket.AF_INET6, a))
OWN6 = [l.split()[0] for l in open('/proc/net/if_inet6') if l.startswith('fd6e')]
OWN6 = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(OWN6[0])) if OWN6 else None
def checksum(data):
    data += b'\0' * (len(data) % 2); total = sum(struct.unpack('>%dH' % (len(data) // 2), data))
    while total >> 16: total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff
def with_sum(packed, at, pseudo=b''): return packed[:at] + struct.pack('>H', checksum(pseudo + packed)) + packed[at + 2:]
def ip4(to, protocol, payload, source='10.0.2.15', flags=0, options=b''):
    head = struct.pack('>BBHHHBBH', 0x45 + len(options) // 4, 0, 20 + len(options) + len(payload), 7, flags, 64, protocol, 0)
    return with_sum(head + v4(source) + v4(to) + options, 10) + payload
def ip6(to, protocol, payload, source=None):
    return struct.pack('>IHBB', 6 << 28, len(payload), protocol, 64) + v6(source or OWN6) + v6(to) + payload
def pseudo(source, to, protocol, length): return source + to + (struct.pack('>BBH', 0, protocol, length) if len(to) == 4 else struct.pack('>II', length, protocol))
def syn(to, port, source=None, sender=40000):
    six = ':' in to; source = source or (OWN6 if six else '10.0.2.15')
    head = struct.pack('>HHIIBBHHH', sender, port, 1, 0, 5 << 4, 2, 65535, 0, 0)
    return with_sum(head, 16, pseudo((v6 if six else v4)(source), (v6 if six else v4)(to), 6, 20))
def datagram(to, port, data=b'x' * 8): return struct.pack('>HHHH', 40000, port, 8 + len(data), 0) + data
def put(packet, source=MAC): card.send(GATEWAY + source + (b'\x86\xdd' if packet[0] >> 4 == 6 else b'\x08\x00') + packet)
def barrier(mark=[0]):
    seen = []
    for attempt in range(30):
        mark[0] += 1; data = struct.pack('>HH', 77, mark[0])
        put(ip4('10.0.2.2', 1, with_sum(struct.pack('>BBH', 8, 0, 0) + data, 2)))
        try:
            while True:
                frame = card.recv(70000)
                if frame[6:12] != GATEWAY: continue
                if frame[34:36] == b'\0\0' and frame[23] == 1 and frame[38:42] == data: return seen
                seen.append(frame[12:])
        # What came in before may have left no room for the answer.
        except TimeoutError: pass
"#;

/// A server on the host's loopback that counts its connections and greets each.
fn counting_server() -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, count) = (listener.local_addr().unwrap().port(), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&count);
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            counted.fetch_add(1, Ordering::SeqCst);
            let _ = std::io::Write::write_all(&mut client, b"hello\n");
        }
    });
    (port, count)
}

/// What a script with [`FRAMES`] prints.
fn send(vm: &Vm<'_>, script: &str) -> String {
    vm.exec(["python3", "-c", &format!("{FRAMES}\n{script}")]).text()
}

/// Connects as a program does.
fn greeting(vm: &Vm<'_>, port: u16) -> String {
    let script =
        format!("import socket; print(socket.create_connection(('10.0.2.2', {port}), 20).recv(9).decode(), end='')");
    vm.exec(["python3", "-c", &script]).text()
}

#[test]
fn frames_that_do_not_say_what_they_are_lead_nowhere() {
    let home = TestHome::new();
    let (port, connections) = counting_server();
    let vm = home.spawn("web", &["--net", "restricted", "--allow", &format!("host:{port}")]);
    // Fragments of any kind, options that name a route, senders that are not the guest, destinations that are the host by other
    // names: of what is allowed otherwise.
    let script = format!(
        "PORT = {port}\n{}",
        r"
whole = syn('10.0.2.2', PORT)
for first, rest in ((whole[:8], whole[8:]), (whole, b''), (whole, whole)):
    put(ip4('10.0.2.2', 6, first, flags=0x2000)); put(ip4('10.0.2.2', 6, rest, flags=1))
put(ip4('10.0.2.2', 6, whole, flags=0x8000)); put(ip4('10.0.2.2', 6, whole, flags=1))
put(ip4('10.0.2.2', 6, whole, options=b'\x83\x07\x04' + v4('10.0.2.2') + b'\0'))
put(ip4('10.0.2.2', 6, whole, options=b'\x01\x01\x01\0'))
for other in ('10.0.2.16', '10.0.2.2', '127.0.0.1', '192.168.1.7', '255.255.255.255', '0.0.0.0'):
    put(ip4('10.0.2.2', 6, syn('10.0.2.2', PORT, source=other), source=other))
put(ip4('10.0.2.2', 6, whole), source=bytes.fromhex('525400123457'))
put(ip4('10.0.2.2', 6, whole), source=GATEWAY); put(ip4('10.0.2.2', 6, whole), source=b'\xff' * 6)
put(ip4('10.0.2.2', 6, whole[:19])); put(ip4('10.0.2.2', 6, b'')); put(b'\x45' + b'\0' * 19); put(b'\x4f' + ip4('10.0.2.2', 6, whole)[1:])
for length in (0, 19, 40000, 65535): put(ip4('10.0.2.2', 6, whole)[:2] + struct.pack('>H', length) + ip4('10.0.2.2', 6, whole)[4:])
answers = barrier()
print(len(answers), end='; ')
for host in ('127.0.0.1', '0.0.0.0', '10.0.2.255', '255.255.255.255', '10.0.2.15', '10.0.2.3', '10.0.2.1', '224.0.0.1'):
    put(ip4(host, 6, syn(host, PORT)))
opened = [a for a in barrier() if a[0:2] == b'\x08\0' and a[11] == 6 and a[35] & 0x12 == 0x12]
print(len(opened))
"
    );
    assert_eq!(send(&vm, &script), "0; 0");
    assert_eq!(connections.load(Ordering::SeqCst), 0);
    // The same connection without any of that.
    assert_eq!((greeting(&vm, port).as_str(), connections.load(Ordering::SeqCst)), ("hello", 1));
}

#[test]
fn frames_of_ipv6_that_do_not_say_what_they_are_lead_nowhere() {
    let home = TestHome::new();
    let namespaces = crate::rig::Namespaces::new(&home);
    let vm = namespaces.spawn(&home, "web", &["--allow", "[2606:2800:21f::1]:22", "--allow", "host:22"]);
    vm.sh("until ip -6 -o address show eth0 scope global -tentative | grep -q fd6e; do sleep 0.1; done").ok();
    let script = r"
TO = '2606:2800:21f::1'; whole = syn(TO, 22)
def extended(kind, body): return ip6(TO, kind, bytes([6]) + body + whole)
put(extended(0, b'\0' + b'\1\4\0\0\0\0')); put(extended(60, b'\0' + b'\1\4\0\0\0\0'))
put(extended(43, b'\0\0\0\0\0\0\0')); put(extended(43, b'\2\0\1\0\0\0\0' + v6(TO)))
put(extended(44, b'\0\0\0\0\0\0\7')); put(extended(44, b'\0\0\1\0\0\0\7')); put(extended(44, b'\0\0\x09\0\0\0\7'))
put(extended(51, b'\4' + b'\0' * 22)); put(extended(135, b'\0' * 7)); put(extended(139, b'\0' * 7)); put(extended(253, b'\0' * 7))
for other in ('2001:db8::1', 'fd6e:6964:6f::2', 'fd6e:6964:6f::3', 'fd6e:6964:6f:1::9', '::1', '::', '::ffff:10.0.2.15', 'ff02::1'):
    put(ip6(TO, 6, syn(TO, 22, source=other), source=other))
put(ip6(TO, 6, whole), source=bytes.fromhex('525400123457'))
put(ip6(TO, 6, whole)[:50]); put(ip6(TO, 6, b'')); put(ip6(TO, 6, whole)[:4] + b'\xff\xff' + ip6(TO, 6, whole)[6:])
is_reply = lambda a: a[0:2] == b'\x86\xdd' and a[8] in (6, 58) and not (a[8] == 58 and a[42] in (134, 135, 136))
print(len([a for a in barrier() if is_reply(a)]), end='; ')
# The host under other names.
for host in ('::ffff:127.0.0.1', '::ffff:10.0.2.2', '::1', '::', 'fe80::1', '64:ff9b::7f00:1', '2002:7f00:1::', 'ff02::1', '::127.0.0.1'):
    put(ip6(host, 6, syn(host, 22)))
opened = [a for a in barrier() if a[0:2] == b'\x86\xdd' and a[8] == 6 and a[55] & 0x12 == 0x12]
print(len(opened), end='; ')
print(socket.create_connection((TO, 22), 20).recv(12).decode())
";
    assert_eq!(send(&vm, script), "0; 0; SSH-2.0-test");
}

#[test]
fn other_protocols_are_refused_with_an_error() {
    let home = TestHome::new();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    udp.set_nonblocking(true).unwrap();
    let port = udp.local_addr().unwrap().port();
    let vm = home.spawn("web", &["--net", "restricted", "--allow", &format!("host:{port}"), "--allow", "1.1.1.1:*"]);
    // SCTP, DCCP, GRE, UDP-Lite, an unknown number, and IGMP, each to what is allowed with TCP; and the datagrams that QUIC would
    // send there. The answer is an ICMP error of each.
    let script = format!(
        "PORT = {port}\n{}",
        r"
count = 0
for host in ('10.0.2.2', '1.1.1.1'):
    for protocol in (132, 33, 47, 136, 200):
        put(ip4(host, protocol, datagram(host, PORT)))
        count += len([a for a in barrier() if a[11] == 1 and a[22:24] == b'\3\r'])
    put(ip4(host, 17, datagram(host, PORT))); put(ip4(host, 17, datagram(host, 443)))
    count += len([a for a in barrier() if a[11] == 1 and a[22:24] == b'\3\3'])
put(ip4('224.0.0.22', 2, b'\x22\0\xf9\2\0\0\0\1\4\0\0\0\xe0\0\0\xfb')); barrier()
print(count)
"
    );
    assert_eq!(send(&vm, &script), "14");
    assert_eq!(udp.recv(&mut [0; 16]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn a_published_port_is_no_way_out() {
    let home = TestHome::new();
    let vm = home.spawn("web", &["--net", "restricted"]);
    // A server of the guest's that is published on a port of the host.
    let server = "import socket; s = socket.create_server(('127.0.0.1', 8000)); open('/run/ready', 'w')\n\
                  while True: s.accept()[0].sendall(b'in\\n')";
    vm.exec(["sh", "-c", "nohup python3 -c \"$0\" >/dev/null 2>&1 &", server]).ok();
    vm.sh("until [ -e /run/ready ]; do sleep 0.1; done").ok();
    let added = home.nido(["forward", "add", "web", "8000"]).json();
    let port = u16::try_from(added["host_port"].as_u64().unwrap()).unwrap();
    let greeting = || {
        let mut line = String::new();
        BufReader::new(TcpStream::connect(("127.0.0.1", port)).unwrap()).read_line(&mut line).unwrap();
        line
    };
    assert_eq!(greeting(), "in\n");
    for address in ["10.0.2.2", "10.0.2.3", "93.184.215.14"] {
        let dial = format!(
            "import socket, errno\n\
             try: socket.create_connection(({address:?}, {port}), 20); print('connected')\n\
             except OSError as e: print(errno.errorcode.get(e.errno))"
        );
        assert_eq!(vm.exec(["python3", "-c", &dial]).text(), "ECONNREFUSED", "{address}");
    }
    assert_eq!(greeting(), "in\n");
}

/// The most memory that a process has had resident, in MiB.
fn peak_mib(process: &crate::rig::Process) -> u64 {
    let peak = process.status("VmHWM").unwrap();
    peak.split_whitespace().next().unwrap().parse::<u64>().unwrap() >> 10
}

#[test]
fn a_flood_costs_others_nothing_and_the_supervisor_little() {
    let home = TestHome::new();
    let (port, _connections) = counting_server();
    let flags = ["--net", "restricted", "--allow", &format!("host:{port}"), "--allow", "*.example.com"];
    let (flooding, other) = (home.spawn("flood", &flags), home.spawn("calm", &flags));
    // Connections to everywhere, more to the server than it may have, half of them never completed, and a name for each.
    let script = format!(
        "PORT = {port}\n{}",
        r"
query = struct.pack('>6H', 7, 0x100, 1, 0, 0, 0)
for i in range(10000):
    put(ip4('10.0.2.2', 6, syn('10.0.2.2', PORT, sender=1024 + i)))
    host = '9.%d.%d.1' % (i >> 8, i & 255)
    put(ip4(host, 6, syn(host, 443)))
    if i % 4: continue
    name = b'\x06n%05d\x07example\3com\0' % i
    put(ip4('10.0.2.3', 17, datagram('', 53, query + name + b'\0\1\0\1')))
    put(ip4('10.0.2.2', 17, datagram('', 1 + i)))
kept = []
for i in range(600):
    try: kept.append(socket.create_connection(('10.0.2.2', PORT), 1))
    except OSError: pass
barrier(); print('done', len(kept) <= 512)
"
    );
    assert_eq!(send(&flooding, &script), "done True");
    assert_eq!(greeting(&other, port), "hello");
    let peak = peak_mib(&flooding.supervisor());
    assert!(peak < 100, "the supervisor has had {peak} MiB");
    let events = home.nido(["events", "--event", "net.denied", "--json"]).text();
    assert!((1..=200).contains(&events.lines().count()), "{} events", events.lines().count());
    assert!(flooding.info()["network"]["denied"].as_u64().unwrap() > 10_000);
    // Its own network still works.
    assert_eq!(greeting(&flooding, port), "hello");
}
