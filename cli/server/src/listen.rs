//! Sockets: TCP with or without TLS, or a unix socket; and the limits that keep one client from using up the server.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use nido_api::error::{Code, Error, Hint, Result};
use nido_files::private_dir::make_socket_private;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;

use super::App;
use super::auth::{Hosts, Peer};
use super::certificate::{OwnCertificate, TlsFiles, names_of_host};
use super::connections::{ConnectionSlot, ConnectionSlots};
use super::timeouts::WriteTimeoutStream;
use crate::signals::Signals;

/// How many connections may be open at once.
const CONNECTIONS_MAX: usize = 512;
/// How long a client may take to send the head of a request, or to agree on TLS.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest head, in bytes.
const HEAD_MAX: usize = 32 * 1024;
/// How long requests that are cancelled at shutdown may take to send their last message.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the server waits after a failed accept, for example when no file descriptor is left.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Where a server listens.
#[derive(Debug)]
pub enum ListenAddress {
    /// On a port.
    Tcp {
        /// Its address; port 0 takes a free one.
        address: SocketAddr,
        /// How it is encrypted, if it is.
        tls: Option<Tls>,
    },
    /// On a unix socket, which only its owner can use.
    Unix(PathBuf),
}

/// Where the certificate comes from.
#[derive(Debug)]
pub enum Tls {
    /// From files of the user's.
    Files(TlsFiles),
    /// It is the server's own, made on first use.
    Own,
}

/// A server whose socket is open and that does not serve yet.
pub struct BoundListener {
    socket: Socket,
    tls: Option<TlsAcceptor>,
    own: Option<OwnCertificate>,
}

/// The address of a server, for the command that has started it.
#[derive(Debug, Serialize)]
pub struct ServerAddress {
    /// Its address, as clients write it.
    pub address: String,
    /// The server's own certificate, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<OwnCertificate>,
    /// Whether clients need a token. Over a unix socket the kernel identifies them.
    #[serde(skip)]
    pub takes_tokens: bool,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// Opens the socket. The server's own certificate is in `tls_dir` and names the hosts of the server.
pub async fn bind(listen: &ListenAddress, tls_dir: &Path, hosts: &Hosts) -> Result<BoundListener> {
    match listen {
        ListenAddress::Tcp { address, tls } => {
            let own = matches!(tls, Some(Tls::Own)).then(|| {
                let names = names_of_host(address.ip(), &hosts.all_names());
                OwnCertificate::obtain(tls_dir, &names)
            });
            let own = own.transpose()?;
            let tls = match tls {
                None => None,
                Some(Tls::Files(files)) => Some(acceptor(files)?),
                Some(Tls::Own) => own.as_ref().map(|own| acceptor(&own.files())).transpose()?,
            };
            let listener = TcpListener::bind(address).await.map_err(|e| match e.kind() {
                std::io::ErrorKind::AddrInUse => Error::new(Code::PortInUse, format!("{address} is in use"))
                    .hint(Hint::command_line("choose another with --port")),
                _ => Error::io(format!("cannot listen on {address}"), e),
            })?;
            Ok(BoundListener { socket: Socket::Tcp(listener), tls, own })
        }
        ListenAddress::Unix(path) => {
            let shown = path.display();
            let broken = |e| Error::io(format!("cannot listen on {shown}"), e);
            if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
                if UnixStream::connect(path).await.is_ok() {
                    return Err(Error::new(Code::PortInUse, format!("another server uses {shown}"))
                        .hint(Hint::command_line("choose another with --socket")));
                }
                std::fs::remove_file(path).map_err(broken)?;
            }
            // No other user can connect before only the owner may. Not 0177: a directory that another thread makes meanwhile has
            // to be usable.
            let old = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
            let listener = UnixListener::bind(path);
            rustix::process::umask(old);
            let listener = listener.map_err(broken)?;
            make_socket_private(path).map_err(broken)?;
            Ok(BoundListener { socket: Socket::Unix(listener, path.clone()), tls: None, own: None })
        }
    }
}

fn acceptor(tls: &TlsFiles) -> Result<TlsAcceptor> {
    let bad = |what: &str, why: String| {
        Error::new(Code::SpecInvalid, format!("the {what} cannot be used: {why}")).hint("it has to be a PEM file")
    };
    let certificates = CertificateDer::pem_file_iter(&tls.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| bad("certificate", e.to_string()))?;
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|e| bad("key", e.to_string()))?;
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(certificates, key))
        .map_err(|e| bad("certificate", e.to_string()))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

impl BoundListener {
    /// Where it listens.
    pub fn listening(&self) -> ServerAddress {
        ServerAddress {
            address: self.address(),
            tls: self.own.clone(),
            takes_tokens: matches!(self.socket, Socket::Tcp(_)),
        }
    }

    fn address(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        match &self.socket {
            Socket::Tcp(listener) => {
                listener.local_addr().map_or_else(|e| e.to_string(), |address| format!("{scheme}://{address}"))
            }
            Socket::Unix(_, path) => path.display().to_string(),
        }
    }

    /// Whether other machines can reach it.
    pub fn is_remote(&self) -> bool {
        match &self.socket {
            Socket::Tcp(listener) => !listener.local_addr().is_ok_and(|address| address.ip().is_loopback()),
            Socket::Unix(..) => false,
        }
    }

    /// Serves until a signal arrives; then open requests have the shutdown timeout to end.
    pub async fn run(self, router: Router, app: Arc<App>, mut signals: Signals) {
        let connections = TaskTracker::new();
        let slots = Arc::new(ConnectionSlots::new(CONNECTIONS_MAX));
        loop {
            // A signal ends it also while there is no room.
            let accepted = tokio::select! {
                accepted = self.accept(&slots) => accepted,
                _ = signals.next_end() => break,
            };
            match accepted {
                Ok((stream, peer, permit)) => {
                    let slot = slots.take(permit, connections.token());
                    let (write_stall, evicted) = (app.timeouts.write_stall, slot.evicted());
                    let connection = ServedConnection {
                        router: router.clone(),
                        ending: app.shutting_down.clone(),
                        write_stall,
                        slot,
                    };
                    app.metrics.connection();
                    let serving = connection.start(stream, peer, self.tls.clone());
                    tokio::spawn(async move {
                        let _ = evicted.run_until_cancelled(serving).await;
                    });
                }
                // A client that has gone already, or no descriptors left.
                Err(error) => {
                    tracing::debug!("a connection was lost: {error}");
                    tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                }
            }
        }
        if let Socket::Unix(_, path) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
        drop(self);
        app.shutting_down.cancel();
        connections.close();
        if tokio::time::timeout(app.timeouts.shutdown, connections.wait()).await.is_err() {
            tracing::warn!("the server shuts down: requests are interrupted");
            app.shutdown_deadline.cancel();
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, connections.wait()).await;
        }
    }

    /// The next client, once there is room for it.
    async fn accept(&self, slots: &ConnectionSlots) -> std::io::Result<(Stream, Peer, OwnedSemaphorePermit)> {
        let (stream, peer) = self.accept_one().await?;
        Ok((stream, peer, slots.permit().await?))
    }

    async fn accept_one(&self) -> std::io::Result<(Stream, Peer)> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                let _ = stream.set_nodelay(true);
                Ok((Stream::Tcp(stream), Peer::Network { tls: self.tls.is_some() }))
            }
            Socket::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                let uid = stream.peer_cred()?.uid();
                Ok((Stream::Unix(stream), Peer::Local { uid }))
            }
        }
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// One connection.
struct ServedConnection {
    router: Router,
    ending: CancellationToken,
    write_stall: Duration,
    slot: ConnectionSlot,
}

impl ServedConnection {
    async fn start(self, stream: Stream, peer: Peer, tls: Option<TlsAcceptor>) {
        match (stream, tls) {
            (Stream::Unix(stream), _) => self.serve(stream, peer).await,
            (Stream::Tcp(stream), None) => self.serve(stream, peer).await,
            (Stream::Tcp(stream), Some(tls)) => {
                if let Ok(Ok(stream)) = tokio::time::timeout(HEAD_TIMEOUT, tls.accept(stream)).await {
                    self.serve(stream, peer).await;
                }
            }
        }
    }

    async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, peer: Peer) {
        let (router, slot) = (self.router, self.slot);
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            let mut router = router.clone();
            let (peer, slot) = (peer.clone(), slot.clone());
            async move {
                let mut request = request.map(Body::new);
                request.extensions_mut().insert(peer);
                request.extensions_mut().insert(slot);
                let Ok(response) = router.call(request).await;
                Ok::<_, Infallible>(response)
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(HEAD_MAX)
            .serve_connection(TokioIo::new(WriteTimeoutStream::new(stream, self.write_stall)), service)
            .with_upgrades();
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.ending.cancelled() => {
                // The response in progress is completed; then the connection is closed.
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!("a connection ended: {error}");
        }
    }
}
