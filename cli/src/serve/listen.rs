//! Sockets: TCP with or without TLS, or a unix socket; and the limits that keep one client from using up the server.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use nido_vmm::error::{Code, Error, Result};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tower::Service;

use super::App;
use super::guard::Peer;
use super::pace::Watched;
use crate::signals::Signals;

/// How many connections may be open at once.
const CONNECTIONS: usize = 512;
/// How long a client may take to send the head of a request, or to agree on TLS.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// The largest head, in bytes.
const HEAD_MAX: usize = 32 * 1024;
/// How long what is cut off when the server ends may take to say so.
const GOODBYE_WITHIN: Duration = Duration::from_secs(5);
/// How long the server rests when the system has no more descriptors.
const REST: Duration = Duration::from_millis(100);

/// Where a server listens.
#[derive(Debug)]
pub enum Listen {
    /// On a port.
    Tcp {
        /// Its address; port 0 takes a free one.
        address: SocketAddr,
        /// Encrypted with this.
        tls: Option<Tls>,
    },
    /// On a unix socket, which only its owner can use.
    Unix(PathBuf),
}

/// A certificate and its key.
#[derive(Debug)]
pub struct Tls {
    /// PEM: the server's certificate, then those between it and the root.
    pub certificate: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
}

/// A server that listens, and does not serve yet.
pub struct Bound {
    socket: Socket,
    tls: Option<TlsAcceptor>,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// Begins to listen.
pub async fn bind(listen: &Listen) -> Result<Bound> {
    match listen {
        Listen::Tcp { address, tls } => {
            let tls = tls.as_ref().map(acceptor).transpose()?;
            let listener = TcpListener::bind(address).await.map_err(|e| match e.kind() {
                std::io::ErrorKind::AddrInUse => {
                    Error::new(Code::PortInUse, format!("{address} is taken")).hint("choose another with --port")
                }
                _ => Error::io(format!("cannot listen on {address}"), e),
            })?;
            Ok(Bound { socket: Socket::Tcp(listener), tls })
        }
        Listen::Unix(path) => {
            let shown = path.display();
            let broken = |e| Error::io(format!("cannot listen on {shown}"), e);
            if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
                if UnixStream::connect(path).await.is_ok() {
                    return Err(Error::new(Code::PortInUse, format!("{shown} is another server's"))
                        .hint("choose another with --socket"));
                }
                std::fs::remove_file(path).map_err(broken)?;
            }
            // Nobody else can connect before it is the owner's alone.
            let old = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
            let listener = UnixListener::bind(path);
            rustix::process::umask(old);
            let listener = listener.map_err(broken)?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(broken)?;
            Ok(Bound { socket: Socket::Unix(listener, path.clone()), tls: None })
        }
    }
}

fn acceptor(tls: &Tls) -> Result<TlsAcceptor> {
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

impl Bound {
    /// Where it listens, as clients write it.
    pub fn address(&self) -> String {
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

    /// Serves until a signal comes; then what runs may finish.
    pub async fn run(self, router: Router, app: Arc<App>, mut signals: Signals) {
        let connections = TaskTracker::new();
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            // A signal ends it also while there is no room.
            let accepted = tokio::select! {
                accepted = self.accept(&room) => accepted,
                _ = signals.next_end() => break,
            };
            match accepted {
                Ok((stream, peer, permit)) => {
                    let place = Place(Arc::new((permit, connections.token())));
                    let unread = app.patience.unread;
                    let serving = Serving { router: router.clone(), ending: app.ending.clone(), unread, place };
                    app.metrics.connection();
                    tokio::spawn(serving.start(stream, peer, self.tls.clone()));
                }
                // A client that has gone already, or no descriptors left.
                Err(error) => {
                    tracing::debug!("a connection was lost: {error}");
                    tokio::time::sleep(REST).await;
                }
            }
        }
        if let Socket::Unix(_, path) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
        drop(self);
        app.ending.cancel();
        connections.close();
        if tokio::time::timeout(app.patience.finish, connections.wait()).await.is_err() {
            tracing::warn!("requests are cut off: the server ends");
            app.over.cancel();
            let _ = tokio::time::timeout(GOODBYE_WITHIN, connections.wait()).await;
        }
    }

    /// The next client, once there is room for it.
    async fn accept(&self, room: &Arc<Semaphore>) -> std::io::Result<(Stream, Peer, OwnedSemaphorePermit)> {
        let permit = Arc::clone(room).acquire_owned().await.map_err(std::io::Error::other)?;
        let (stream, peer) = self.accept_one().await?;
        Ok((stream, peer, permit))
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

/// The place of a connection among those that may be open, held by whatever goes on over it, also when it is not HTTP any more:
/// it is counted, and waited for when the server ends, for as long.
#[derive(Debug, Clone)]
pub struct Place(
    #[expect(dead_code, reason = "it is there to be dropped")] Arc<(OwnedSemaphorePermit, TaskTrackerToken)>,
);

/// One connection.
struct Serving {
    router: Router,
    ending: CancellationToken,
    unread: Duration,
    place: Place,
}

impl Serving {
    async fn start(self, stream: Stream, peer: Peer, tls: Option<TlsAcceptor>) {
        match (stream, tls) {
            (Stream::Unix(stream), _) => self.serve(stream, peer).await,
            (Stream::Tcp(stream), None) => self.serve(stream, peer).await,
            (Stream::Tcp(stream), Some(tls)) => {
                if let Ok(Ok(stream)) = tokio::time::timeout(HEAD_WITHIN, tls.accept(stream)).await {
                    self.serve(stream, peer).await;
                }
            }
        }
    }

    async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, peer: Peer) {
        let (router, place) = (self.router, self.place);
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            let mut router = router.clone();
            let (peer, place) = (peer.clone(), place.clone());
            async move {
                let mut request = request.map(Body::new);
                request.extensions_mut().insert(peer);
                request.extensions_mut().insert(place);
                let Ok(response) = router.call(request).await;
                Ok::<_, Infallible>(response)
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_WITHIN)
            .max_buf_size(HEAD_MAX)
            .serve_connection(TokioIo::new(Watched::new(stream, self.unread)), service)
            .with_upgrades();
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.ending.cancelled() => {
                // What is being answered is answered, and then it is over.
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!("a connection ended: {error}");
        }
    }
}
