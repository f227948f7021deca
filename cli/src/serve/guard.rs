//! Who asks, from where, and how often: decided before anything else is looked at.
//!
//! A browser sends whatever page it shows, so a page of somebody else's must not reach this API: the `Host` must be one of
//! ours (a name that was made to point here is not), and an `Origin` must be this server itself.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use nido_vmm::api::{Door, Scope};
use nido_vmm::error::{Code, Error};

use super::App;
use super::answer::Problem;

/// Which hosts this server answers to.
#[derive(Debug, Clone, Default)]
pub struct Hosts {
    /// Names, beside `localhost` and addresses.
    pub names: Vec<String>,
}

impl Hosts {
    /// Whether `Host: VALUE` means this server. An address cannot be made to point elsewhere; a name can.
    fn is_ours(&self, value: &str) -> bool {
        let host = match value.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => value.rsplit_once(':').map_or(value, |(host, _)| host),
        };
        host.eq_ignore_ascii_case("localhost")
            || host.parse::<IpAddr>().is_ok()
            || self.names.iter().any(|name| name.eq_ignore_ascii_case(host))
    }
}

/// How a connection came in.
#[derive(Debug, Clone)]
pub enum Peer {
    /// Over TCP: whoever it is needs a token.
    Network {
        /// The connection is encrypted.
        tls: bool,
    },
    /// Over the unix socket: the kernel says who it is.
    Local {
        /// Their user id.
        uid: u32,
    },
}

/// Who asks.
#[derive(Debug, Clone)]
pub struct Caller {
    /// For the audit log: `token:NAME`, `uid:N`, or `anybody` where no token is needed.
    pub actor: String,
    /// What they may do.
    pub scope: Scope,
    /// The id of their token, if they have one.
    pub token: Option<String>,
}

/// Lets through who may ask.
pub async fn guard(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Result<Response, Problem> {
    let peer = request.extensions().get::<Peer>().cloned().unwrap_or(Peer::Network { tls: false });
    check_origin(&app.hosts, &peer, request.headers(), request.uri().host())?;
    if is_open(request.uri().path()) {
        return Ok(next.run(request).await);
    }
    let caller = match peer {
        Peer::Local { uid } => Caller { actor: format!("uid:{uid}"), scope: Scope::Admin, token: None },
        Peer::Network { .. } if app.no_token => Caller { actor: "anybody".into(), scope: Scope::Admin, token: None },
        Peer::Network { .. } => {
            let token = bearer(request.headers()).ok_or_else(|| {
                Error::new(Code::Unauthorized, "a token is needed")
                    .hint("Authorization: Bearer TOKEN; nido token create makes one")
            })?;
            let info = app.nido.token_check(&token)?;
            check_door(info.only, request.uri().path())?;
            Caller { actor: format!("token:{}", info.name), scope: info.scope, token: Some(info.id) }
        }
    };
    app.rates.take(&caller.actor)?;
    request.extensions_mut().insert(caller);
    Ok(next.run(request).await)
}

/// A token may be good for one part of this server, and for no other.
fn check_door(only: Option<Door>, path: &str) -> Result<(), Error> {
    match only {
        Some(door) if door.path() != path => {
            let words = format!("this token is good for {} only", door.path());
            Err(Error::new(Code::Denied, words).hint("nido token create without --only makes one for the REST API"))
        }
        _ => Ok(()),
    }
}

/// What tells nothing about VMs, and everybody may see.
fn is_open(path: &str) -> bool {
    matches!(path, "/" | "/healthz" | "/openapi.json") || path.starts_with("/page/")
}

fn check_origin(hosts: &Hosts, peer: &Peer, headers: &HeaderMap, of_uri: Option<&str>) -> Result<(), Error> {
    let Peer::Network { tls } = peer else { return Ok(()) };
    let named = headers.get(header::HOST).and_then(|host| host.to_str().ok()).or(of_uri).unwrap_or_default();
    if !hosts.is_ours(named) {
        let words = format!("this server does not answer to the name '{}'", named.escape_debug());
        return Err(Error::new(Code::Denied, words).hint("--allow-host NAME makes it"));
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let own = format!("{}://{named}", if *tls { "https" } else { "http" });
    if origin.to_str().is_ok_and(|origin| origin.eq_ignore_ascii_case(&own)) {
        return Ok(());
    }
    Err(Error::new(Code::Denied, "a page of another origin may not use this server"))
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

/// How often each caller may ask.
#[derive(Debug)]
pub struct Rates {
    per_second: f64,
    buckets: Mutex<HashMap<String, (f64, Instant)>>,
}

impl Rates {
    /// So many requests a second on average; a burst of twice as many at once.
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

macro_rules! scoped {
    ($(#[$doc:meta])* $name:ident, $scope:expr) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name;

        impl<S: Send + Sync> FromRequestParts<S> for $name {
            type Rejection = Problem;

            async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
                let caller = parts.extensions.get::<Caller>();
                let caller = caller.ok_or_else(|| Error::new(Code::Unauthorized, "a token is needed"))?;
                if caller.scope >= $scope {
                    return Ok(Self);
                }
                let words = format!("this takes a token of the scope {}", $scope.word());
                Err(Error::new(Code::Denied, words).hint("nido token create --scope").into())
            }
        }
    };
}

scoped!(
    /// A caller who may look.
    Looks,
    Scope::Read
);
scoped!(
    /// A caller who may make and use VMs.
    Uses,
    Scope::Run
);
scoped!(
    /// A caller who may do everything.
    Rules,
    Scope::Admin
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_were_made_to_point_here_are_refused() {
        let hosts = Hosts { names: vec!["ci.example".into()] };
        for ours in ["localhost", "localhost:8080", "127.0.0.1:8080", "[::1]:8080", "10.1.2.3", "CI.example:80"] {
            assert!(hosts.is_ours(ours), "{ours}");
        }
        for not in ["", "evil.example", "localhost.evil.example:8080", "127.0.0.1.evil.example", "[evil]:1", ":8080"] {
            assert!(!hosts.is_ours(not), "{not}");
        }
    }

    #[test]
    fn pages_of_others_are_refused() {
        let check = |origin: &'static str, tls| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, "localhost:8080".parse().unwrap());
            headers.insert(header::ORIGIN, origin.parse().unwrap());
            check_origin(&Hosts::default(), &Peer::Network { tls }, &headers, None).is_ok()
        };
        assert!(check("http://localhost:8080", false) && check("https://localhost:8080", true));
        for not in ["null", "http://localhost", "http://localhost:8081", "https://localhost:8080", "http://evil"] {
            assert!(!check(not, false), "{not}");
        }
    }

    #[test]
    fn a_burst_is_let_through_and_then_it_is_enough() {
        let rates = Rates::new(5);
        assert!((0..10).all(|_| rates.take("a").is_ok()));
        assert_eq!(rates.take("a").unwrap_err().code(), Code::RateLimited);
        assert!(rates.take("b").is_ok());
    }
}
