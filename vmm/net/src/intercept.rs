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

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode, Uri, Version};
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
use tokio::sync::Mutex;
use tokio::task::spawn_local;
use tokio::time::timeout;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, client, server};

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
const HTTP_1: &[u8] = b"http/1.1";
const HTTP_2: &[u8] = b"h2";
/// Headers that are about one connection.
const HOP_HEADERS: [HeaderName; 6] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

type Body = Either<Incoming, Full<Bytes>>;
/// Why a request is not passed on: what the guest gets.
type Refusal = (StatusCode, String);

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
    /// There is none, and why.
    Refused(String),
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
        let (upstream, agreed) = match self.connect(server, protocols.clone()).await {
            Ok(tls) => {
                let agreed = tls.get_ref().1.alpn_protocol().unwrap_or(HTTP_1).to_vec();
                (self.handshake(tls, &agreed).await?, agreed)
            }
            Err(why) => {
                self.shared.deny_connection(self.remote, DenialReason::CertificateInvalid, Some(self.host.clone()));
                (Upstream::Refused(why), protocols.pop().unwrap_or_else(|| HTTP_1.to_vec()))
            }
        };
        let config = self.server_config(if offered.is_empty() { None } else { Some(agreed.clone()) })?;
        let guest = within(start.into_stream(config)).await?;
        self.serve(guest, upstream, agreed == HTTP_2).await
    }

    async fn connect(
        &self,
        server: TcpStream,
        protocols: Vec<Vec<u8>>,
    ) -> Result<client::TlsStream<TcpStream>, String> {
        let config = self.credentials.client(protocols).await?;
        let name = ServerName::try_from(self.host.clone()).map_err(|e| e.to_string())?;
        within(TlsConnector::from(Arc::new(config)).connect(name, server)).await.map_err(|e| e.to_string())
    }

    async fn handshake(&self, tls: client::TlsStream<TcpStream>, agreed: &[u8]) -> io::Result<Upstream> {
        let io = TokioIo::new(tls);
        if agreed == HTTP_2 {
            let mut builder = client2::Builder::new(LocalExecutor);
            builder.max_header_list_size(u32::try_from(HEAD_MAX).unwrap_or(u32::MAX));
            let (sender, connection) = builder.handshake(io).await.map_err(io::Error::other)?;
            spawn_local(async move { drop(connection.await) });
            return Ok(Upstream::Http2(sender));
        }
        let mut builder = client1::Builder::new();
        builder.max_buf_size(HEAD_MAX);
        let (sender, connection) = builder.handshake(io).await.map_err(io::Error::other)?;
        spawn_local(async move { drop(connection.await) });
        Ok(Upstream::Http1(Rc::new(Mutex::new(sender))))
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

    async fn serve(self, guest: server::TlsStream<DuplexStream>, upstream: Upstream, is_http2: bool) -> io::Result<()> {
        let this = Rc::new(self);
        let service = service_fn(move |request| {
            let (this, upstream) = (Rc::clone(&this), upstream.clone());
            async move { this.respond(request, upstream).await }
        });
        let io = TokioIo::new(guest);
        if is_http2 {
            let mut builder = server2::Builder::new(LocalExecutor);
            builder.timer(TokioTimer::new()).max_concurrent_streams(STREAMS_MAX);
            builder.max_header_list_size(u32::try_from(HEAD_MAX).unwrap_or(u32::MAX));
            return builder.serve_connection(io, service).await.map_err(io::Error::other);
        }
        let mut builder = server1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_MAX);
        builder.serve_connection(io, service).await.map_err(io::Error::other)
    }

    async fn respond(&self, request: Request<Incoming>, upstream: Upstream) -> hyper::Result<Response<Body>> {
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
            Upstream::Refused(why) => {
                let words = format!("{} is not asked, because its certificate cannot be verified: {why}", self.host);
                return Ok(refused((StatusCode::BAD_GATEWAY, words)));
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
            if !self.credentials.report(used).await {
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

/// The host that a request names, with its port if it has one; why the request is not clear about it.
fn authority_of(head: &http::request::Parts) -> Result<String, &'static str> {
    if head.method == http::Method::CONNECT {
        return Err("CONNECT is not passed on");
    }
    if head.headers.contains_key(header::TRANSFER_ENCODING) && head.headers.contains_key(header::CONTENT_LENGTH) {
        return Err("the request has two lengths");
    }
    let mut hosts = head.headers.get_all(header::HOST).iter();
    let (host, second) = (hosts.next(), hosts.next());
    let host = host.map(|host| host.to_str().map_err(|_| "the host of the request is not a name")).transpose()?;
    match (head.uri.authority(), host, second) {
        (_, _, Some(_)) => Err("the request has two hosts"),
        (None, None, None) => Err("the request has no host"),
        (Some(authority), None, None) => Ok(authority.as_str().to_owned()),
        (Some(authority), Some(host), None) if !authority.as_str().eq_ignore_ascii_case(host) => {
            Err("the request has two hosts")
        }
        (_, Some(host), None) => Ok(host.to_owned()),
    }
}

/// Whether an authority is this host, at this port or none.
fn is_for(authority: &str, host: &str, port: u16) -> bool {
    let (name, named_port) = authority.split_once(':').map_or((authority, None), |(name, port)| (name, Some(port)));
    name.eq_ignore_ascii_case(host) && named_port.is_none_or(|named| named == port.to_string())
}

/// Text of the guest's for a record.
fn shown(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_graphic()).take(253).collect()
}

/// The URI of the request that is passed on: in origin form, or with the authority as HTTP/2 wants it.
fn uri(authority: Option<&str>, uri: &Uri) -> Result<Uri, Refusal> {
    let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let built = match authority {
        Some(authority) => Uri::builder().scheme("https").authority(authority).path_and_query(path).build(),
        None => Uri::builder().path_and_query(path).build(),
    };
    built.map_err(|_| (StatusCode::BAD_REQUEST, "the request has no valid path".to_owned()))
}

fn has_word(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|found| found.trim().eq_ignore_ascii_case(word))
}

/// Removes what is about one connection, also what `Connection` names.
fn remove_hop_headers(headers: &mut HeaderMap) {
    let values = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let named: Vec<_> = values.flat_map(|value| value.split(',')).filter_map(|name| name.trim().parse().ok()).collect();
    for name in named.iter().chain(&HOP_HEADERS).filter(|name| **name != header::CONTENT_LENGTH) {
        headers.remove(name);
    }
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
