//! Secrets that a guest uses without having them: real programs of the guest, and a server of the test's own.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::json;

use crate::rig::{Call, Namespaces, TestHome, Vm};

/// Values that are nowhere else.
const VALUE: &str = "value-3f9a61c07d";
const ROTATED: &str = "value-b82e55d914";
/// A server of HTTPS on port 443: its arguments are its certificate, its key, and where it records requests.
const SERVER: &str = r#"
import http.server, ssl, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        with open(sys.argv[3], 'a') as seen:
            seen.write(' '.join([self.headers['Host'], self.path, *map(str, map(self.headers.get, ['Authorization', 'X-Other']))]) + '\n')
        self.send_response(200); self.send_header('Content-Length', '3'); self.end_headers(); self.wfile.write(b'ok\n')
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(('0.0.0.0', 443), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain(sys.argv[1], sys.argv[2])
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
print('ready', flush=True)
server.serve_forever()
"#;
/// For the guest: a request with the system's certificates; prints the status, or why it got no response.
const CLIENT: &str = r#"
import ssl, urllib.error, urllib.request
def get(url, verify=True):
    context = ssl.create_default_context() if verify else ssl._create_unverified_context()
    headers = {'Authorization': 'Bearer nido-secret-key', 'X-Other': 'nido-secret-key'}
    try: print(urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30, context=context).status)
    except urllib.error.HTTPError as e: print(e.code, e.read().decode())
    except urllib.error.URLError as e: print(getattr(e.reason, 'reason', e.reason))
"#;

/// A host whose server has a certificate of an authority that only this host knows.
struct Site {
    namespaces: Namespaces,
    root: PathBuf,
    seen: PathBuf,
}

impl Site {
    fn new(home: &TestHome) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let root_pem = params.self_signed(&key).unwrap().pem();
        let (issuer, key) = (Issuer::new(params, key), KeyPair::generate().unwrap());
        let server = CertificateParams::new(vec!["example.com".into(), "www.example.com".into()]).unwrap();
        let certificate_pem = server.signed_by(&key, &issuer).unwrap().pem();
        let write = |name: &str, text: &str| {
            let path = home.user_dir().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let root = write("root.pem", &root_pem);
        let paths = [write("certificate.pem", &certificate_pem), write("key.pem", &key.serialize_pem())];
        let seen = write("seen", "");
        let arguments = [&paths[0], &paths[1], &seen].map(|path| path.to_str().unwrap());
        let namespaces = Namespaces::with_server(home, &[&[SERVER], &arguments[..]].concat());
        Self { namespaces, root, seen }
    }

    /// A call on this host.
    fn call(&self, call: Call) -> Call {
        self.namespaces.call(call.env("SSL_CERT_FILE", &self.root))
    }

    /// What the server has got since this was last called.
    fn seen(&self) -> String {
        let seen = fs::read_to_string(&self.seen).unwrap();
        fs::write(&self.seen, "").unwrap();
        seen
    }
}

fn get(vm: &Vm<'_>, call: &str) -> String {
    vm.exec(["python3", "-c", &format!("{CLIENT}\n{call}")]).text()
}

fn set(home: &TestHome, value: &str) {
    home.nido(["secret", "set", "key"]).stdin(format!("{value}\n")).ok();
}

/// Files below a directory that have these bytes.
fn files_with(directory: &Path, text: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(files_with(&entry.path(), text));
        } else if kind.is_file() {
            let bytes = fs::read(entry.path()).unwrap_or_default();
            // Its first byte alone finds few places, so this is quick also for a disk.
            let mut rest = &bytes[..];
            while let Some(at) = rest.iter().position(|byte| *byte == text.as_bytes()[0]) {
                rest = &rest[at..];
                if rest.starts_with(text.as_bytes()) {
                    found.push(entry.path());
                    break;
                }
                rest = &rest[1..];
            }
        }
    }
    found
}

const EXAMPLE: &str = "get('https://example.com/')";
const OK: &str = "200";

#[test]
fn a_program_of_the_guest_uses_a_secret_that_the_guest_does_not_have() {
    let home = TestHome::new();
    let site = Site::new(&home);
    let flags = [
        "--allow",
        "example.com",
        "--allow",
        "www.example.com",
        "--secret",
        "key@example.com",
        "--secret-env",
        "TOKEN=key",
    ];
    let spawn = |name: &str| home.nido(["spawn", name, "--net", "restricted"]).args(flags);
    spawn("early").problem(1, "secret_not_found");
    set(&home, VALUE);
    site.call(spawn("web")).ok();
    let web = Vm { home: &home, name: "web" };
    assert_eq!(web.info()["secrets"], json!(["key@example.com:authorization"]));

    // Its system trusts the VM's authority; the value is put into the header that was named.
    assert_eq!(get(&web, EXAMPLE), OK);
    assert_eq!(site.seen(), format!("example.com / Bearer {VALUE} nido-secret-key\n"));
    // Commands have variables for it, unless they are given others.
    assert_eq!(web.info()["secret_env"], json!(["TOKEN=key"]));
    assert_eq!(web.sh("echo $TOKEN $SSL_CERT_FILE").text(), "nido-secret-key /etc/ssl/certs/ca-certificates.crt");
    assert_eq!(
        home.nido(["exec", "web", "-e", "TOKEN=own", "--", "sh", "-c", "echo $TOKEN"]).ok().text().trim(),
        "own"
    );
    // Another host of the same server: not ended here, so its certificate is the server's own, and nothing is put in.
    let other = get(&web, "get('https://www.example.com/')");
    assert!(other.contains("CERTIFICATE_VERIFY_FAILED"), "{other}");
    assert_eq!(get(&web, "get('https://www.example.com/', verify=False)"), OK);
    assert_eq!(site.seen(), "www.example.com / Bearer nido-secret-key nido-secret-key\n");

    // A new value while it runs.
    set(&home, ROTATED);
    assert_eq!(get(&web, EXAMPLE), OK);
    assert_eq!(site.seen(), format!("example.com / Bearer {ROTATED} nido-secret-key\n"));
    let events = home.nido(["events", "--json", "--since", "0"]).ok().text();
    assert!(events.contains("secret.used") && events.contains("key@example.com:authorization"), "{events}");
    // Three requests of one use: the first is a line at once, the others are counted until the VM ends.
    let show = ["audit", "show", "--log", "events", "--tool", "secret.used", "--vm", "web", "--json"];
    let counts = || {
        let shown = home.nido(show).ok().json();
        let records = shown["records"].as_array().unwrap().clone();
        let details = records.iter().map(|record| record["params"]["details"].clone());
        details.map(|one| (one["secret"].clone(), one["secret_requests"].clone())).collect::<Vec<_>>()
    };
    let of = |requests: u64| (json!("key@example.com:authorization"), json!(requests));
    assert_eq!(counts(), [of(1)]);

    // After a restart.
    site.call(home.nido(["restart", "web"])).ok();
    assert_eq!(counts(), [of(1), of(1)]);
    assert_eq!(get(&web, EXAMPLE), OK);
    assert_eq!(site.seen(), format!("example.com / Bearer {ROTATED} nido-secret-key\n"));

    let receipt = home.nido(["audit", "receipt", "web"]).ok().json();
    assert_eq!((&receipt["secrets"][0]["secret"], &receipt["secrets"][0]["requests"]), (&of(3).0, &of(3).1));
    // The values are in no file of the home: disks, logs, records, the database.
    for value in [VALUE, ROTATED] {
        assert_eq!(files_with(&home.path(), value), Vec::<PathBuf>::new());
    }
    // Without the secret the request fails; the rest works.
    home.nido(["secret", "delete", "key", "--yes"]).ok();
    let gone = get(&web, EXAMPLE);
    assert!(gone.starts_with("502") && gone.contains("there is no secret 'key'"), "{gone}");
    assert_eq!(site.seen(), "");
}

#[test]
fn copies_of_a_vm_have_its_secrets_only_if_asked() {
    let home = TestHome::new();
    let site = Site::new(&home);
    set(&home, VALUE);
    let flags = ["--allow", "example.com", "--secret", "key@example.com"];
    site.call(home.nido(["spawn", "web", "--net", "restricted"]).args(flags)).ok();
    site.call(home.nido(["fork", "web", "without"])).ok();
    site.call(home.nido(["fork", "web", "with", "--secrets"])).ok();
    let [without, with] = ["without", "with"].map(|name| Vm { home: &home, name });
    assert_eq!(without.info().get("secrets"), None);
    assert_eq!(without.sh("echo ${SSL_CERT_FILE-none}").text(), "none");
    let refused = get(&without, EXAMPLE);
    assert!(refused.contains("CERTIFICATE_VERIFY_FAILED"), "{refused}");
    assert_eq!(get(&without, "get('https://example.com/', verify=False)"), OK);
    assert_eq!(site.seen(), "example.com / Bearer nido-secret-key nido-secret-key\n");
    assert_eq!(get(&with, EXAMPLE), OK);
    assert_eq!(site.seen(), format!("example.com / Bearer {VALUE} nido-secret-key\n"));
    // One authority each: one block in the bundle.
    assert_eq!(with.sh("grep -c '^# nido begin$' /etc/ssl/certs/ca-certificates.crt").text(), "1");
}
