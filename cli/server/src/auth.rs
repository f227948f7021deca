//! Authentication and request filtering, before any other middleware: host, origin, token, scope and rate limit.
//!
//! A browser sends requests for any page that it shows, so pages of other origins must not reach this API: `Host` must be a name of
//! this server (protection against DNS rebinding), and `Origin` must be this server itself.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, Version, header};
use axum::middleware::Next;
use axum::response::Response;
use nido_api::error::{Code, Error, Hint};
use nido_api::{Caller as AuditCaller, FrontEnd, Grant, Limits, Scope, TokenAudience};

use super::connections::ConnectionSlot;
use super::public_url::PublicUrl;
use super::response::Problem;
use super::{App, access, refusals};

/// Which hosts this server answers to.
#[derive(Debug, Clone, Default)]
pub struct Hosts {
    /// Names, beside `localhost` and addresses.
    pub names: Vec<String>,
    /// Origins of other servers whose pages may use the MCP server.
    pub origins: Vec<String>,
    /// Where clients reach this server through a proxy.
    pub public: Option<PublicUrl>,
}

impl Hosts {
    /// Every name, that of the proxy included.
    pub fn all_names(&self) -> Vec<String> {
        self.names.iter().cloned().chain(self.public.as_ref().map(|public| public.host.clone())).collect()
    }

    /// Every origin whose pages may use the MCP server, that of the proxy included.
    pub fn all_origins(&self) -> Vec<String> {
        self.origins.iter().cloned().chain(self.public.as_ref().map(|public| public.origin.clone())).collect()
    }

    /// Whether pages of this origin are this server's own, as clients see it through the proxy.
    fn is_public_origin(&self, origin: &HeaderValue) -> bool {
        let origin = origin.to_str().unwrap_or_default();
        self.public.as_ref().is_some_and(|public| public.origin.eq_ignore_ascii_case(origin))
    }

    /// Whether pages of this origin were allowed by name.
    pub fn is_allowed_origin(&self, origin: &HeaderValue) -> bool {
        let origin = origin.to_str().unwrap_or_default();
        self.origins.iter().any(|allowed| allowed.eq_ignore_ascii_case(origin))
    }

    /// Whether `Host: VALUE` means this server. An address cannot be made to point elsewhere; a name can.
    fn is_ours(&self, value: &str) -> bool {
        let host = match value.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => value.rsplit_once(':').map_or(value, |(host, _)| host),
        };
        host.eq_ignore_ascii_case("localhost")
            || host.parse::<IpAddr>().is_ok()
            || self.names.iter().any(|name| name.eq_ignore_ascii_case(host))
            || self.public.as_ref().is_some_and(|public| public.host.eq_ignore_ascii_case(host))
    }
}

/// How a client is connected.
#[derive(Debug, Clone)]
pub enum Peer {
    /// Over TCP: the client needs a token.
    Network {
        /// The connection is encrypted.
        tls: bool,
    },
    /// Over the unix socket: the kernel reports its user id.
    Local {
        /// Their user id.
        uid: u32,
    },
}

/// The authenticated caller of a request.
#[derive(Debug, Clone)]
pub struct Caller {
    /// For the audit log: `token:NAME#ID` or `uid:N`.
    pub actor: String,
    /// Its scope.
    pub scope: Scope,
    /// The id of its token, if it has one.
    pub token: Option<String>,
    /// The limits of VMs that it creates.
    pub limits: Limits,
}

impl Caller {
    /// The owner of this caller's operations and stored responses: the id of a token, because names can be reused.
    pub fn owner(&self) -> String {
        self.token.as_ref().map_or_else(|| self.actor.clone(), |id| format!("token:{id}"))
    }
}

/// Why a request is refused: the error, and the reason and caller for the audit log.
struct Refusal {
    error: Box<Error>,
    reason: &'static str,
    actor: String,
}

/// Admits authenticated requests. A refusal is written to the audit log, up to a rate limit.
pub async fn authenticate(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Result<Response, Problem> {
    match admit(&app, &request) {
        Ok(None) => Ok(next.run(request).await),
        Ok(Some(caller)) => {
            if let Some(slot) = request.extensions().get::<ConnectionSlot>() {
                slot.mark_authenticated();
            }
            app.rate_limiter.take(&caller.actor)?;
            request.extensions_mut().insert(caller);
            Ok(next.run(request).await)
        }
        Err(Refusal { error, reason, actor }) => {
            refusals::write(&app, &request, actor, reason).await;
            Err((*error).into())
        }
    }
}

/// The host and port that the target of a request names, if it does.
fn authority(request: &Request) -> Option<&str> {
    request.uri().authority().map(Authority::as_str)
}

/// The caller of a request; `None` for routes that need no token.
fn admit(app: &App, request: &Request) -> Result<Option<Caller>, Refusal> {
    let peer = request.extensions().get::<Peer>().cloned().unwrap_or(Peer::Network { tls: false });
    let unknown = |reason| move |error| Refusal { error: Box::new(error), reason, actor: "unknown".into() };
    check_head(request).map_err(unknown("malformed"))?;
    // Probes of load balancers name the server as they like, and learn nothing.
    if request.uri().path() != "/healthz" {
        check_host(&app.hosts, &peer, request.headers(), authority(request)).map_err(unknown("wrong_host"))?;
    }
    let for_agents = request.uri().path().trim_end_matches('/') == TokenAudience::Mcp.path();
    let origin = request.headers().get(header::ORIGIN);
    if !(for_agents && origin.is_some_and(|origin| app.hosts.is_allowed_origin(origin))) {
        check_origin(&app.hosts, &peer, request.headers(), authority(request)).map_err(unknown("wrong_origin"))?;
    }
    if is_open(request.uri().path()) {
        return Ok(None);
    }
    if let Peer::Local { uid } = peer {
        return Ok(Some(Caller {
            actor: format!("uid:{uid}"),
            scope: Scope::Admin,
            token: None,
            limits: Limits::default(),
        }));
    }
    let token = bearer(request.headers()).ok_or_else(|| {
        Error::new(Code::Unauthorized, "this request needs a token")
            .hint("send Authorization: Bearer TOKEN")
            .or_hint(Hint::host("create a token: nido token create"))
    });
    let token = token.map_err(unknown("no_token"))?;
    let info = app.nido.token_check(&token).map_err(unknown("bad_token"))?;
    // A name can be given again: the id is whose it was.
    let actor = format!("token:{}#{}", info.name, info.id);
    if let Err(error) = check_restriction(info.only, request.uri().path()) {
        return Err(Refusal { error: Box::new(error), reason: "wrong_door", actor });
    }
    Ok(Some(Caller { actor, scope: info.scope, token: Some(info.id), limits: info.limits }))
}

/// Rejects a token that is restricted to another part of this server.
fn check_restriction(only: Option<TokenAudience>, path: &str) -> Result<(), Error> {
    match only {
        Some(door) if door.path() != path.trim_end_matches('/') => {
            let words = format!("this token is restricted to {}", door.path());
            Err(Error::new(Code::Denied, words)
                .hint(Hint::host("create one for the REST API with nido token create, without --only")))
        }
        _ => Ok(()),
    }
}

/// Whether a path needs no token: it reveals nothing about VMs.
fn is_open(path: &str) -> bool {
    matches!(path, "/" | "/healthz" | "/openapi.json" | "/favicon.ico")
        || path.starts_with("/page/")
        // Clients look there for metadata of a server: there is none, and the 404 needs no token.
        || path.starts_with("/.well-known/")
}

/// What a request calls this server: the target counts if it names a host (RFC 9112, 3.2.2).
fn named<'a>(headers: &'a HeaderMap, of_uri: Option<&'a str>) -> &'a str {
    of_uri.or_else(|| headers.get(header::HOST)?.to_str().ok()).unwrap_or_default()
}

/// Refuses a request with two `Host`, `Authorization` or `Origin` headers: a proxy may have checked the other one.
fn check_head(request: &Request) -> Result<(), Error> {
    let headers = request.headers();
    let bad = |words: &str| Err(Error::new(Code::RequestInvalid, words.to_owned()));
    if let Some(twice) = [header::HOST, header::AUTHORIZATION, header::ORIGIN]
        .iter()
        .find(|name| headers.get_all(*name).iter().count() > 1)
    {
        return bad(&format!("the header {twice} is given more than once"));
    }
    let host = headers.get(header::HOST);
    if request.version() == Version::HTTP_11 && host.is_none() {
        return bad("the header Host is missing");
    }
    match host.map(|host| host.to_str().unwrap_or("@")) {
        // An empty one is allowed where the target names nothing.
        None | Some("") => Ok(()),
        Some(host) if host.contains('@') || host.parse::<Authority>().is_err() => {
            bad("the header Host is not a host and port")
        }
        Some(_) => Ok(()),
    }
}

fn check_host(hosts: &Hosts, peer: &Peer, headers: &HeaderMap, of_uri: Option<&str>) -> Result<(), Error> {
    let named = named(headers, of_uri);
    if matches!(peer, Peer::Network { .. }) && !hosts.is_ours(named) {
        let words = format!("this server does not accept requests for the host '{}'", named.escape_debug());
        return Err(
            Error::new(Code::Denied, words).hint(Hint::host("start it with --allow-host NAME, which accepts them"))
        );
    }
    Ok(())
}

fn check_origin(hosts: &Hosts, peer: &Peer, headers: &HeaderMap, of_uri: Option<&str>) -> Result<(), Error> {
    let Peer::Network { tls } = peer else { return Ok(()) };
    let named = named(headers, of_uri);
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let own = format!("{}://{named}", if *tls { "https" } else { "http" });
    if origin.to_str().is_ok_and(|origin| origin.eq_ignore_ascii_case(&own)) || hosts.is_public_origin(origin) {
        return Ok(());
    }
    Err(Error::new(Code::Denied, "pages of other origins may not use this server")
        .hint(Hint::host("start it with --public-url URL, the address that browsers use, if it is behind a proxy")))
}

/// The token of a request. A browser cannot give a WebSocket a header, but a protocol: `nido.token.TOKEN`.
fn bearer(headers: &HeaderMap) -> Option<String> {
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
        return scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned());
    }
    let offered = headers.get(header::SEC_WEBSOCKET_PROTOCOL)?.to_str().ok()?;
    offered.split(',').find_map(|protocol| protocol.trim().strip_prefix("nido.token.").map(str::to_owned))
}

/// Limits the rate of requests of each caller.
#[derive(Debug)]
pub struct RateLimiter {
    per_second: f64,
    buckets: Mutex<HashMap<String, (f64, Instant)>>,
}

impl RateLimiter {
    /// A limiter for an average rate, with bursts of twice as many requests.
    pub fn new(per_second: u32) -> Self {
        Self { per_second: f64::from(per_second), buckets: Mutex::default() }
    }

    fn take(&self, caller: &str) -> Result<(), Error> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let (room, now) = (self.per_second * 2.0, Instant::now());
        let (left, at) = buckets.entry(caller.to_owned()).or_insert((room, now));
        *left = (*left + now.duration_since(*at).as_secs_f64() * self.per_second).min(room);
        *at = now;
        if *left < 1.0 {
            return Err(Error::new(Code::RateLimited, "too many requests").hint("wait a second"));
        }
        *left -= 1.0;
        Ok(())
    }
}

/// Extractor: the owner of a new VM, and the limits of the caller's token.
#[derive(Debug)]
pub struct CallerGrant(pub Grant);

impl<S: Send + Sync> FromRequestParts<S> for CallerGrant {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let caller = parts.extensions.get::<Caller>();
        let caller = caller.ok_or_else(|| Error::new(Code::Unauthorized, "this request needs a token"))?;
        let who = AuditCaller { face: FrontEnd::Api, actor: caller.actor.clone(), agent: None };
        Ok(Self(Grant::within(&who, caller.limits.clone())))
    }
}

/// Admits callers with the scope of the route's operation. It runs for every route, so none is left out.
pub async fn require_scope(request: Request, next: Next) -> Result<Response, Problem> {
    let route = request.extensions().get::<MatchedPath>();
    let needed = route.map_or(Ok(None), |route| access::required_scope(request.method(), route.as_str()))?;
    let Some(needed) = needed else { return Ok(next.run(request).await) };
    let caller = request.extensions().get::<Caller>();
    let caller = caller.ok_or_else(|| Error::new(Code::Unauthorized, "this request needs a token"))?;
    if caller.scope < needed {
        let words = format!("this request needs a token with the scope {}", needed.word());
        return Err(Error::new(Code::Denied, words)
            .hint(Hint::host("create a token: nido token create --name NAME --scope SCOPE"))
            .into());
    }
    Ok(next.run(request).await)
}

#[cfg(test)]
mod tests;
