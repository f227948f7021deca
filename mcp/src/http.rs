//! Streamable HTTP: a service to be mounted at `/mcp`, behind whoever decides who may ask.
//!
//! Whoever that is leaves a [`Principal`](crate::Principal) with each request; one without is refused. Requests of the protocol without
//! `initialize` stand for themselves; those with it have sessions, which nobody but this file counts.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use rmcp::ServerHandler;
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};

use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::server::Server;

/// How many sessions may be open at once. One that nobody uses ends after a while: `Settings::session_idle`.
const SESSIONS: usize = 256;
/// The longest message, in bytes: a file of 1 MiB as base64, and some.
const MESSAGE_MAX: usize = 4 << 20;

/// Who answers: nido's own [`App`], or in a test what a suite wants to find behind the same door.
pub trait Agents: Send + Sync + 'static {
    /// What the protocol's library asks.
    type Handler: ServerHandler;

    /// One for each session, or for each request where there are none.
    fn handler(self: &Arc<Self>) -> Self::Handler;

    /// How long a session may go unused until it ends.
    fn session_idle(&self) -> Duration;

    /// Done when the server ends: what would go on for ever ends with it.
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
}

impl<A: Agents> Clone for Http<A> {
    fn clone(&self) -> Self {
        Self { service: self.service.clone(), sessions: Arc::clone(&self.sessions) }
    }
}

impl<A: Agents> std::fmt::Debug for Http<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Http").finish_non_exhaustive()
    }
}

impl<A: Agents> Http<A> {
    /// For requests that name one of these hosts, beside those of this machine; for any host if other machines are let in:
    /// then it has been checked before.
    #[must_use]
    pub fn new(agents: &Arc<A>, names: &[String], remote: bool) -> Self {
        let own = ["localhost", "127.0.0.1", "[::1]"].map(str::to_owned);
        let hosts: Vec<String> = own.iter().chain(names).cloned().collect();
        let origins = hosts.iter().flat_map(|host| [format!("http://{host}:*"), format!("https://{host}:*")]);
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
        Self { service, sessions }
    }

    /// What is to be mounted.
    #[must_use]
    pub fn service(&self) -> Service<A> {
        self.service.clone()
    }

    /// Whether a request with these headers has to wait, because it may begin a session and there are too many.
    pub async fn is_full(&self, headers: &HeaderMap) -> bool {
        let has_session = headers.contains_key("mcp-session-id");
        let version = headers.get("mcp-protocol-version").and_then(|version| version.to_str().ok());
        let needs_none = version.is_some_and(|version| version >= "2026-07-28");
        !has_session && !needs_none && self.sessions.sessions.read().await.len() >= SESSIONS
    }
}
