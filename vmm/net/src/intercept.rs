//! A connection of TLS whose requests get secrets: ended here under the VM's authority, and made again to the server, whose
//! certificate is verified as on the host.
//!
//! ```text
//!  ClientHello -> server (offered what the guest offers) -> valid:   the guest gets what the server agreed to; each request is
//!                                                                    checked, gets its secrets, and is passed on
//!                                                        -> invalid: the guest gets 502 for each request
//! ```
//!
//! Invariants: a request whose host is not the name of the connection is not passed on; a secret is put into its own header, in
//! place of its placeholder, and nowhere else; both ends speak the same version of HTTP; every wait of a handshake has a deadline.

mod head;
#[cfg(test)]
mod tests;

use std::future::{Future, pending};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode, Version};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1 as client1, http2 as client2};
use hyper::server::conn::{http1 as server1, http2 as server2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use nido_api::egress::DenialReason;
use rustls::ServerConfig;
use rustls::pki_types::ServerName;
use rustls::server::ResolvesServerCert;
use tokio::io::DuplexStream;
use tokio::net::TcpStream;
use tokio::sync::{Mutex, oneshot};
use tokio::task::spawn_local;
use tokio::time::timeout;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, client, server};

use self::head::{Refusal, authority_of, has_word, is_for, remove_hop_headers, shown, uri};
use crate::credentials::Credentials;
use crate::shared::Shared;

/// How long a handshake may take, at each end.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a guest may take to send the head of a request, and a connection may have none.
const HEAD_TIMEOUT: Duration = Duration::from_secs(300);
/// How long the head of a request may be, in bytes.
const HEAD_MAX: usize = 64 << 10;
/// How many streams of a connection are open at a time.
const STREAMS_MAX: u32 = 64;
/// How many bytes of a stream, and of a connection, of HTTP/2 wait for their receiver.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 512 << 10;
const SEND_BUFFER: usize = 64 << 10;
const HTTP_1: &[u8] = b"http/1.1";
const HTTP_2: &[u8] = b"h2";

type Body = Either<Incoming, Full<Bytes>>;

/// A connection whose requests get secrets.
pub struct Interception {
    /// What all connections share.
    pub shared: Rc<Shared>,
    /// The VM's secrets.
    pub credentials: Rc<Credentials>,
    /// What the guest connected to.
    pub remote: SocketAddr,
    /// The name in its ClientHello.
    pub host: String,
}

/// A connection to the server, in its version of HTTP.
#[derive(Clone)]
enum Upstream {
    Http1(Rc<Mutex<client1::SendRequest<Incoming>>>),
    Http2(client2::SendRequest<Incoming>),
}

impl Interception {
    /// Carries the connection to its end.
    pub async fn run(self, guest: DuplexStream, server: TcpStream) {
        let host = self.host.clone();
        if let Err(error) = self.carry(guest, server).await {
            tracing::debug!(host, "a connection that gets secrets ended: {error}");
        }
    }

    async fn carry(self, guest: DuplexStream, server: TcpStream) -> io::Result<()> {
        let accept = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), guest);
        let start = within(accept).await?;
        let offered: Vec<Vec<u8>> = start.client_hello().alpn().into_iter().flatten().map(<[u8]>::to_vec).collect();
        let known = |protocol: &&[u8]| offered.iter().any(|offer| offer == protocol);
        let mut protocols: Vec<_> = [HTTP_2, HTTP_1].into_iter().filter(known).map(<[u8]>::to_vec).collect();
        if !offered.is_empty() && protocols.is_empty() {
            return Err(io::Error::other("the guest offers neither HTTP/1.1 nor HTTP/2"));
        }
        if offered.is_empty() {
            protocols.push(HTTP_1.to_vec());
        }
        let (upstream, is_over, agreed) = match self.connect(server, protocols.clone()).await {
            Ok(tls) => {
                let agreed = tls.get_ref().1.alpn_protocol().unwrap_or(HTTP_1).to_vec();
                let (upstream, is_over) = handshake(tls, &agreed).await?;
                (Ok(upstream), Some(is_over), agreed)
            }
            Err(error) => (Err(self.explain(&error)), None, protocols.pop().unwrap_or_else(|| HTTP_1.to_vec())),
        };
        let config = self.server_config(if offered.is_empty() { None } else { Some(agreed.clone()) })?;
        let guest = within(start.into_stream(config)).await?;
        self.serve(guest, upstream, is_over, agreed == HTTP_2).await
    }

    async fn connect(&self, server: TcpStream, protocols: Vec<Vec<u8>>) -> io::Result<client::TlsStream<TcpStream>> {
        let config = self.credentials.client(protocols).await.map_err(io::Error::other)?;
        let name = ServerName::try_from(self.host.clone()).map_err(io::Error::other)?;
        within(TlsConnector::from(Arc::new(config)).connect(name, server)).await
    }

    /// Why there is no connection to the server. A certificate that is not valid is a refusal; the rest is a failure of the server's.
    fn explain(&self, error: &io::Error) -> String {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        if !matches!(tls, Some(rustls::Error::InvalidCertificate(_))) {
            return format!("no connection over TLS to {}: {error}", self.host);
        }
        self.shared.deny_connection(self.remote, DenialReason::CertificateInvalid, Some(self.host.clone()));
        format!("the certificate of {} is not valid, so nothing is sent: {error}", self.host)
    }

    fn server_config(&self, protocol: Option<Vec<u8>>) -> io::Result<Arc<ServerConfig>> {
        let certified = self.credentials.authority().certify(&self.host).map_err(io::Error::other)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let mut config = versions
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(OneCertificate(certified)) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = protocol.into_iter().collect();
        Ok(Arc::new(config))
    }

    /// Serves the guest until it, or the server, ends the connection.
    async fn serve(
        self,
        guest: server::TlsStream<DuplexStream>,
        upstream: Result<Upstream, String>,
        is_over: Option<oneshot::Receiver<()>>,
        is_http2: bool,
    ) -> io::Result<()> {
        let this = Rc::new(self);
        let service = service_fn(move |request| {
            let (this, upstream) = (Rc::clone(&this), upstream.clone());
            async move { this.respond(request, upstream).await }
        });
        let io = TokioIo::new(guest);
        let is_over = async {
            match is_over {
                Some(is_over) => drop(is_over.await),
                None => pending().await,
            }
        };
        if is_http2 {
            let mut builder = server2::Builder::new(LocalExecutor);
            builder.timer(TokioTimer::new()).max_concurrent_streams(STREAMS_MAX).max_send_buf_size(SEND_BUFFER);
            builder.initial_stream_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW);
            builder.max_header_list_size(u32::try_from(HEAD_MAX).unwrap_or(u32::MAX));
            let mut connection = pin!(builder.serve_connection(io, service));
            tokio::select! {
                ended = connection.as_mut() => return ended.map_err(io::Error::other),
                () = is_over => connection.as_mut().graceful_shutdown(),
            }
            return connection.await.map_err(io::Error::other);
        }
        let mut builder = server1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_MAX);
        let mut connection = pin!(builder.serve_connection(io, service));
        tokio::select! {
            ended = connection.as_mut() => return ended.map_err(io::Error::other),
            () = is_over => connection.as_mut().graceful_shutdown(),
        }
        connection.await.map_err(io::Error::other)
    }

    async fn respond(
        &self,
        request: Request<Incoming>,
        upstream: Result<Upstream, String>,
    ) -> hyper::Result<Response<Body>> {
        let upstream = match upstream {
            Ok(upstream) => upstream,
            Err(why) => return Ok(refused((StatusCode::BAD_GATEWAY, why))),
        };
        let request = match self.prepare(request).await {
            Ok(request) => request,
            Err(refusal) => return Ok(refused(refusal)),
        };
        let response = match upstream {
            Upstream::Http1(sender) => {
                let mut sender = sender.lock().await;
                sender.ready().await?;
                sender.send_request(request).await?
            }
            Upstream::Http2(mut sender) => {
                sender.ready().await?;
                sender.send_request(request).await?
            }
        };
        let (mut head, body) = response.into_parts();
        let closes = has_word(&head.headers, &header::CONNECTION, "close");
        remove_hop_headers(&mut head.headers);
        if closes && head.version == Version::HTTP_11 {
            head.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(Response::from_parts(head, Either::Left(body)))
    }

    /// Checks a request, and puts its secrets in.
    async fn prepare(&self, request: Request<Incoming>) -> Result<Request<Incoming>, Refusal> {
        let (mut head, body) = request.into_parts();
        let authority = match authority_of(&head) {
            Ok(authority) => authority,
            Err(why) => return Err((StatusCode::BAD_REQUEST, why.to_owned())),
        };
        if !is_for(&authority, &self.host, self.remote.port()) {
            self.shared.deny_connection(self.remote, DenialReason::HostMismatch, Some(shown(&authority)));
            let words = format!("the host of the request is not {}, the name of its connection", self.host);
            return Err((StatusCode::MISDIRECTED_REQUEST, words));
        }
        head.uri = if head.version == Version::HTTP_2 {
            head.headers.remove(header::HOST);
            uri(Some(&authority), &head.uri)?
        } else {
            uri(None, &head.uri)?
        };
        remove_hop_headers(&mut head.headers);
        self.fill(&mut head.headers).await?;
        Ok(Request::from_parts(head, body))
    }

    async fn fill(&self, headers: &mut HeaderMap) -> Result<(), Refusal> {
        for used in self.credentials.uses_of(&self.host) {
            let Ok(name) = HeaderName::from_bytes(used.header.as_bytes()) else { continue };
            if !headers.get_all(&name).iter().any(|value| used.is_in(value.as_bytes())) {
                continue;
            }
            let unavailable = |why: &str| {
                self.shared.deny_connection(self.remote, DenialReason::SecretUnavailable, Some(self.host.clone()));
                (StatusCode::BAD_GATEWAY, format!("the secret {} cannot be used: {why}", used.name))
            };
            let secret = self.credentials.read(used).await.map_err(|why| unavailable(&why))?;
            let fill = |value: &HeaderValue| match used.fill(value.as_bytes(), &secret) {
                Some(filled) => HeaderValue::from_bytes(&filled).map(|mut value| {
                    value.set_sensitive(true);
                    value
                }),
                None => Ok(value.clone()),
            };
            let filled: Result<Vec<_>, _> = headers.get_all(&name).iter().map(fill).collect();
            let filled = filled.map_err(|_| unavailable("it is no value of a header"))?;
            // Before it leaves.
            if !self.credentials.record(used).await {
                return Err(unavailable("its use cannot be recorded"));
            }
            headers.remove(&name);
            for value in filled {
                headers.append(name.clone(), value);
            }
        }
        Ok(())
    }
}

/// Begins HTTP on a connection to the server; what is received when it ends.
async fn handshake(tls: client::TlsStream<TcpStream>, agreed: &[u8]) -> io::Result<(Upstream, oneshot::Receiver<()>)> {
    let io = TokioIo::new(tls);
    let (end, is_over) = oneshot::channel();
    if agreed == HTTP_2 {
        let mut builder = client2::Builder::new(LocalExecutor);
        builder.initial_stream_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW);
        builder.max_send_buf_size(SEND_BUFFER).max_header_list_size(u32::try_from(HEAD_MAX).unwrap_or(u32::MAX));
        let (sender, connection) = builder.handshake(io).await.map_err(io::Error::other)?;
        spawn_local(async move { drop((connection.await, end)) });
        return Ok((Upstream::Http2(sender), is_over));
    }
    let mut builder = client1::Builder::new();
    builder.max_buf_size(HEAD_MAX);
    let (sender, connection) = builder.handshake(io).await.map_err(io::Error::other)?;
    spawn_local(async move { drop((connection.await, end)) });
    Ok((Upstream::Http1(Rc::new(Mutex::new(sender))), is_over))
}

fn refused((status, why): Refusal) -> Response<Body> {
    let mut response = Response::new(Either::Right(Full::from(format!("nido: {why}\n"))));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    response
}

async fn within<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(HANDSHAKE_TIMEOUT, work).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Runs the tasks of hyper on the engine's thread.
#[derive(Debug, Clone, Copy)]
struct LocalExecutor;

impl<F: Future<Output: 'static> + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, task: F) {
        spawn_local(task);
    }
}

#[derive(Debug)]
struct OneCertificate(Arc<rustls::sign::CertifiedKey>);

impl ResolvesServerCert for OneCertificate {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<rustls::sign::CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}
