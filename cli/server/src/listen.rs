//! Sockets: TCP with or without TLS, or a unix socket; and the limits that keep one client from using up the server.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use nido_vmm::error::{Code, Error, Result};
use serde::Serialize;
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
use super::certificate::{OwnCertificate, names_of_host};
use super::guard::{Hosts, Peer};
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

/// A certificate and its key.
#[derive(Debug)]
pub struct TlsFiles {
    /// PEM: the server's certificate, then those between it and the root.
    pub certificate: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
}

/// A server that listens, and does not serve yet.
pub struct Bound {
    socket: Socket,
    tls: Option<TlsAcceptor>,
    own: Option<OwnCertificate>,
}

/// Where a server listens, for whoever started it.
#[derive(Debug, Serialize)]
pub struct Listening {
    /// Its address, as clients write it.
    pub address: String,
    /// The server's own certificate, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<OwnCertificate>,
    /// Whether clients need a token: over a unix socket the kernel says who they are.
    #[serde(skip)]
    pub takes_tokens: bool,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// Begins to listen. A certificate of the server's own is kept in `tls_dir`, and names the hosts that the server answers to.
pub async fn bind(listen: &Listen, tls_dir: &Path, hosts: &Hosts) -> Result<Bound> {
    match listen {
        Listen::Tcp { address, tls } => {
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
                std::io::ErrorKind::AddrInUse => {
                    Error::new(Code::PortInUse, format!("{address} is taken")).hint("choose another with --port")
                }
                _ => Error::io(format!("cannot listen on {address}"), e),
            })?;
            Ok(Bound { socket: Socket::Tcp(listener), tls, own })
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
            // Nobody else can connect before it is the owner's alone. Not 0177: a directory that another thread makes meanwhile has
            // to be usable.
            let old = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
            let listener = UnixListener::bind(path);
            rustix::process::umask(old);
            let listener = listener.map_err(broken)?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(broken)?;
            Ok(Bound { socket: Socket::Unix(listener, path.clone()), tls: None, own: None })
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

impl Bound {
    /// Where it listens.
    pub fn listening(&self) -> Listening {
        Listening {
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

    /// Serves until a signal comes; then what runs may finish.
    pub async fn run(self, router: Router, app: Arc<App>, mut signals: Signals) {
        let connections = TaskTracker::new();
        let places = Arc::new(Places::new(CONNECTIONS));
        loop {
            // A signal ends it also while there is no room.
            let accepted = tokio::select! {
                accepted = self.accept(&places) => accepted,
                _ = signals.next_end() => break,
            };
            match accepted {
                Ok((stream, peer, permit)) => {
                    let place = places.take(permit, connections.token());
                    let (unread, evicted) = (app.patience.unread, place.evicted());
                    let serving = Serving { router: router.clone(), ending: app.ending.clone(), unread, place };
                    app.metrics.connection();
                    let serving = serving.start(stream, peer, self.tls.clone());
                    tokio::spawn(async move {
                        let _ = evicted.run_until_cancelled(serving).await;
                    });
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
    async fn accept(&self, places: &Places) -> std::io::Result<(Stream, Peer, OwnedSemaphorePermit)> {
        let (stream, peer) = self.accept_one().await?;
        Ok((stream, peer, places.permit().await?))
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

/// The connections that may be open at once.
///
/// Invariant: while a connection is open that has shown no valid token, a new one finds room. The oldest such connection is
/// closed for it, so that clients without a token cannot keep others out by doing nothing.
#[derive(Debug)]
struct Places {
    room: Arc<Semaphore>,
    next: AtomicU64,
    strangers: Arc<Strangers>,
}

/// Connections that have shown no valid token yet, the oldest first, each with what closes it.
type Strangers = Mutex<BTreeMap<u64, CancellationToken>>;

impl Places {
    fn new(count: usize) -> Self {
        Self { room: Arc::new(Semaphore::new(count)), next: AtomicU64::new(0), strangers: Arc::default() }
    }

    async fn permit(&self) -> std::io::Result<OwnedSemaphorePermit> {
        if let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() {
            return Ok(permit);
        }
        let oldest = self.strangers.lock().unwrap_or_else(PoisonError::into_inner).pop_first();
        if let Some((_, close)) = oldest {
            close.cancel();
        }
        Arc::clone(&self.room).acquire_owned().await.map_err(std::io::Error::other)
    }

    fn take(&self, permit: OwnedSemaphorePermit, token: TaskTrackerToken) -> Place {
        let (number, close) = (self.next.fetch_add(1, Ordering::Relaxed), CancellationToken::new());
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner).insert(number, close.clone());
        let strangers = Arc::clone(&self.strangers);
        Place(Arc::new(Taken { number, close, strangers, _permit: permit, _token: token }))
    }
}

#[derive(Debug)]
struct Taken {
    number: u64,
    close: CancellationToken,
    strangers: Arc<Strangers>,
    _permit: OwnedSemaphorePermit,
    _token: TaskTrackerToken,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

/// The place of a connection among those that may be open, held by whatever goes on over it, also when it is not HTTP any more:
/// it is counted, and waited for when the server ends, for as long.
#[derive(Debug, Clone)]
pub struct Place(Arc<Taken>);

impl Place {
    /// Its client has shown a valid token: it is not closed for others any more.
    pub fn is_known(&self) {
        self.0.strangers.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0.number);
    }

    /// Done when the connection is closed for another one.
    fn evicted(&self) -> CancellationToken {
        self.0.close.clone()
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    // 600 idle connections without a token kept everybody waiting, for as long as they were renewed.
    #[tokio::test]
    async fn a_new_connection_takes_the_place_of_the_oldest_without_a_token() {
        let (places, tracker) = (Places::new(3), TaskTracker::new());
        let mut open = Vec::new();
        for _ in 0..3 {
            open.push(places.take(places.permit().await.unwrap(), tracker.token()));
        }
        open[0].is_known();
        let waiting = places.permit();
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        let evicted: Vec<_> = open.iter().map(|place| place.evicted().is_cancelled()).collect();
        assert_eq!(evicted, [false, true, false]);
        open.remove(1);
        let third = places.take(waiting.await.unwrap(), tracker.token());
        // If all are known, a new one waits until one of them ends.
        open.iter().for_each(Place::is_known);
        third.is_known();
        let waiting = places.permit();
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        drop(third);
        assert!(waiting.await.is_ok());
        assert!(open.iter().all(|place| !place.evicted().is_cancelled()));
    }
}
