//! Connections that get secrets: a client that trusts the VM's authority, and a server of the test's own on the loopback.

mod http1;
mod http2;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::net::SocketAddr;
use std::os::unix::net::UnixDatagram;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nido_api::SecretValue;
use nido_api::egress::{Denial, DenialReason};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{Interception, OneCertificate};
use crate::authority::Authority;
use crate::credentials::{Credentials, UseReport};
use crate::policy::{Mode, Policy};
use crate::port::Port;
use crate::shared::{Settings, Shared};

const HOST: &str = "api.example.com";
/// What the guest has connected to.
const REMOTE: &str = "93.184.215.14:443";
const VALUE: &str = "the-real-value";
const PLACEHOLDER: &str = "nido-secret-key";
const TIMEOUT: Duration = Duration::from_secs(60);

type Guest = tokio_rustls::client::TlsStream<DuplexStream>;
type Accepted = tokio_rustls::server::TlsStream<TcpStream>;

/// What the server has received.
type Seen = Rc<RefCell<Vec<String>>>;

/// A VM with the secret `key` for [`HOST`], and the authority of the servers that its host trusts.
struct World {
    shared: Rc<Shared>,
    credentials: Rc<Credentials>,
    denials: mpsc::Receiver<Denial>,
    /// Uses that were recorded.
    used: Rc<RefCell<Vec<String>>>,
    /// Whether uses can be recorded.
    records: Rc<Cell<bool>>,
    vm_authority: Arc<Authority>,
    server_authority: Authority,
    value: Arc<Mutex<Option<String>>>,
    seen: Seen,
    _qemu: UnixDatagram,
}

impl World {
    fn new() -> Self {
        let (vm_authority, server_authority) =
            (Arc::new(Authority::generate().unwrap()), Authority::generate().unwrap());
        let value = Arc::new(Mutex::new(Some(VALUE.to_owned())));
        let source = {
            let value = Arc::clone(&value);
            Arc::new(move |_: &_| match value.lock().unwrap().clone() {
                Some(value) => SecretValue::new(value.into()),
                None => Err(nido_api::error::Error::internal("it is gone")),
            })
        };
        let (reports, mut received) = mpsc::channel::<UseReport>(64);
        let (used, records) = (Rc::<RefCell<Vec<String>>>::default(), Rc::new(Cell::new(true)));
        let (recorded, is_recording) = (Rc::clone(&used), Rc::clone(&records));
        spawn_local(async move {
            while let Some(report) = received.recv().await {
                if is_recording.get() {
                    recorded.borrow_mut().push(report.used.to_string());
                }
                let _ = report.recorded.send(is_recording.get());
            }
        });
        let uses = ["key@api.example.com".parse().unwrap()].into();
        let credentials = Credentials::new(uses, source, Arc::clone(&vm_authority), reports);
        let credentials = Rc::new(credentials.with_roots(roots(&server_authority)));
        let (ours, qemu) = UnixDatagram::pair().unwrap();
        let port = Port::new(ours, "/nonexistent".into()).unwrap();
        let policy = Policy { mode: Mode::Nat, rules: Vec::new() };
        let (reports, denials) = mpsc::channel(64);
        let shared = Shared::new(port, Settings::new(policy), reports, mpsc::channel(1).0);
        let seen = Seen::default();
        Self { shared, credentials, denials, used, records, vm_authority, server_authority, value, seen, _qemu: qemu }
    }

    /// A server for these protocols, of this authority, for one connection after the other.
    async fn serve<F: Future<Output = ()> + 'static>(
        &self,
        authority: &Authority,
        protocols: &[&str],
        carry: impl Fn(Accepted, Seen) -> F + 'static,
    ) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let certified = authority.certify(HOST).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let mut config = versions.with_no_client_auth().with_cert_resolver(Arc::new(OneCertificate(certified)));
        config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let seen = Rc::clone(&self.seen);
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Ok(tls) = acceptor.accept(stream).await {
                    spawn_local(carry(tls, Rc::clone(&seen)));
                }
            }
        });
        address
    }

    /// Begins a connection to a server; its task, and the guest's end.
    async fn begin(&self, server: SocketAddr) -> (JoinHandle<()>, DuplexStream) {
        let stream = TcpStream::connect(server).await.unwrap();
        let (ours, theirs) = tokio::io::duplex(16 << 10);
        let connection = Interception {
            shared: Rc::clone(&self.shared),
            credentials: Rc::clone(&self.credentials),
            remote: REMOTE.parse().unwrap(),
            host: HOST.into(),
        };
        (spawn_local(connection.run(ours, stream)), theirs)
    }

    /// A connection of the guest's over TLS, which trusts the VM's authority.
    async fn open(&self, server: SocketAddr, protocols: &[&str]) -> (JoinHandle<()>, Guest) {
        let (task, stream) = self.begin(server).await;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let mut config = versions.with_root_certificates(roots(&self.vm_authority)).with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        let name = ServerName::try_from(HOST).unwrap();
        (task, TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap())
    }

    /// What the server has received so far.
    fn seen(&self) -> String {
        self.seen.borrow().join("\n")
    }

    fn set(&self, value: Option<&str>) {
        *self.value.lock().unwrap() = value.map(str::to_owned);
    }

    fn reasons(&mut self) -> Vec<DenialReason> {
        std::iter::from_fn(|| self.denials.try_recv().ok()).map(|denial| denial.reason).collect()
    }

    fn used(&mut self) -> Vec<String> {
        std::mem::take(&mut *self.used.borrow_mut())
    }
}

fn roots(authority: &Authority) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.certificate().as_bytes()).unwrap()).unwrap();
    roots
}

/// Runs a test on a thread as the engine's is.
fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async { tokio::time::timeout(TIMEOUT, test).await.unwrap() });
}

/// Reads one message of HTTP/1.1 with a length, chunks or no body; `None` at the end of the connection.
async fn message(stream: &mut (impl AsyncReadExt + Unpin)) -> Option<String> {
    let mut text = String::new();
    loop {
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let head = head.to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
            let is_chunked = head.contains("transfer-encoding: chunked");
            if if is_chunked { body.ends_with("0\r\n\r\n") } else { body.len() >= length } {
                return Some(text);
            }
        }
        text.push(char::from(stream.read_u8().await.ok()?));
    }
}

/// A server of HTTP/1.1 that answers each request with its number.
async fn answer(mut stream: Accepted, seen: Seen) {
    while let Some(request) = message(&mut stream).await {
        seen.borrow_mut().push(request);
        let number = seen.borrow().len().to_string();
        let response = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{number}", number.len());
        if stream.write_all(response.as_bytes()).await.is_err() {
            return;
        }
    }
}
