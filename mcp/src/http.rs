//! Streamable HTTP: a service to be mounted at `/mcp`, behind the authentication of the server.
//!
//! The authentication adds a [`Principal`](crate::Principal) with each request; one without is refused. Requests of the protocol without
//! `initialize` are complete; those with it have sessions, which only this file counts.
//!
//! Invariants: a session is used only by the caller who opened it; no caller can keep others from opening one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::HeaderMap;
use nido_api::error::{Code, Error, Result};
use rmcp::ServerHandler;
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::messages::{self, IdScanner, ParsedMessage, Refusal};
use crate::server::Server;

/// How many sessions may be open at once. An unused one ends after a while: `Settings::session_idle`.
const SESSIONS: usize = 1024;
/// How many of them one caller may have.
const SHARE: usize = 256;
/// The header that names a session.
pub const SESSION: &str = "mcp-session-id";
/// The longest message, in bytes: a file of 1 MiB as base64, and some.
pub const MESSAGE_MAX: usize = 4 << 20;

/// The JSON reply to an invalid message; `None` if the message is valid or needs no reply.
#[must_use]
pub fn refusal(message: &[u8]) -> Option<String> {
    match messages::read(message) {
        ParsedMessage::Refused(refusal) => Some(refusal.json().to_string()),
        ParsedMessage::Message(_) | ParsedMessage::Nothing => None,
    }
}

/// A message that is too long to be kept: what it is answered, when all of it has gone by.
#[derive(Debug, Default)]
pub struct OversizedMessage(IdScanner);

impl OversizedMessage {
    /// More of it.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.0.feed(bytes);
    }

    /// The answer, as JSON.
    #[must_use]
    pub fn refusal(&self) -> String {
        Refusal::invalid(self.0.id(), format!("the message is longer than {MESSAGE_MAX} bytes")).json().to_string()
    }
}

/// What serves requests: nido's own [`App`], or in a test another service behind the same authentication.
pub trait Agents: Send + Sync + 'static {
    /// What the protocol's library asks.
    type Handler: ServerHandler;

    /// One for each session, or for each request where there are none.
    fn handler(self: &Arc<Self>) -> Self::Handler;

    /// How long a session may go unused until it ends.
    fn session_idle(&self) -> Duration;

    /// Done when the server ends: endless streams end with it.
    fn ending(&self) -> &CancellationToken;

    /// Ends what is under way and waits until it has cleared up.
    fn finish(&self) -> impl Future<Output = ()> + Send;
}

impl Agents for App {
    type Handler = Server;

    fn handler(self: &Arc<Self>) -> Server {
        Server::of_requests(self)
    }

    fn session_idle(&self) -> Duration {
        self.settings().session_idle
    }

    fn ending(&self) -> &CancellationToken {
        self.ending()
    }

    async fn finish(&self) {
        self.finish().await;
    }
}

/// What is mounted.
pub type Service<A> = StreamableHttpService<<A as Agents>::Handler, LocalSessionManager>;

/// The service and its sessions.
pub struct Http<A: Agents> {
    service: Service<A>,
    sessions: Arc<LocalSessionManager>,
    /// Who opened which.
    owners: Arc<Mutex<HashMap<String, String>>>,
}

impl<A: Agents> Clone for Http<A> {
    fn clone(&self) -> Self {
        Self { service: self.service.clone(), sessions: Arc::clone(&self.sessions), owners: Arc::clone(&self.owners) }
    }
}

impl<A: Agents> std::fmt::Debug for Http<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Http").finish_non_exhaustive()
    }
}

impl<A: Agents> Http<A> {
    /// For requests that name one of these hosts, in addition to those of this machine; for any host if other machines are accepted:
    /// then it has been checked before. Pages of the origins in `web` may use it too.
    #[must_use]
    pub fn new(agents: &Arc<A>, names: &[String], web: &[String], remote: bool) -> Self {
        let own = ["localhost", "127.0.0.1", "[::1]"].map(str::to_owned);
        let hosts: Vec<String> = own.iter().chain(names).cloned().collect();
        let own = hosts.iter().flat_map(|host| [format!("http://{host}:*"), format!("https://{host}:*")]);
        let origins = own.chain(web.iter().cloned());
        let config = StreamableHttpServerConfig::default()
            .with_allowed_origins(origins)
            .enforce_origin_validation()
            .with_max_request_body_bytes(MESSAGE_MAX)
            .with_cancellation_token(agents.ending().child_token());
        let config = if remote {
            config.disable_allowed_hosts()
        } else {
            config.with_allowed_hosts(hosts.into_iter().chain(["::1".to_owned()]))
        };
        let mut sessions = LocalSessionManager::default();
        sessions.session_config.keep_alive = Some(agents.session_idle());
        let sessions = Arc::new(sessions);
        let owner = Arc::clone(agents);
        let service = Service::<A>::new(move || Ok(owner.handler()), Arc::clone(&sessions), config);
        Self { service, sessions, owners: Arc::default() }
    }

    /// What is to be mounted.
    #[must_use]
    pub fn service(&self) -> Service<A> {
        self.service.clone()
    }

    /// Whether this caller may make a request with these headers: a session is its owner's, and their number is limited.
    ///
    /// # Errors
    /// `route_not_found` of another caller's session, `rate_limited` where a new one would be one too many.
    pub async fn admit(&self, headers: &HeaderMap, actor: &str) -> Result<()> {
        if let Some(session) = headers.get(SESSION) {
            let owner = session.to_str().ok().and_then(|session| self.owners().get(session).cloned());
            return match owner {
                Some(owner) if owner != actor => {
                    Err(Error::new(Code::RouteNotFound, "there is no such session").hint("initialize opens one"))
                }
                _ => Ok(()),
            };
        }
        let version = headers.get("mcp-protocol-version").and_then(|version| version.to_str().ok());
        if version.is_some_and(|version| version >= "2026-07-28") {
            return Ok(());
        }
        let sessions = self.sessions.sessions.read().await;
        let mut owners = self.owners();
        owners.retain(|session, _| sessions.contains_key(session.as_str()));
        let own = owners.values().filter(|owner| *owner == actor).count();
        if sessions.len() >= SESSIONS || own >= SHARE {
            return Err(Error::new(Code::RateLimited, "too many sessions are open").hint("end one, or wait"));
        }
        Ok(())
    }

    /// This caller has opened this session.
    pub fn opened(&self, session: &str, actor: &str) {
        self.owners().entry(session.into()).or_insert_with(|| actor.into());
    }

    fn owners(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
