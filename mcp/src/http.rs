//! Streamable HTTP: a service to be mounted at `/mcp`, behind whoever decides who may ask.
//!
//! Whoever that is leaves a [`Principal`](crate::Principal) with each request; one without is refused. Requests of the protocol without
//! `initialize` stand for themselves; those with it have sessions, which nobody but this file counts.

use std::sync::Arc;

use http::HeaderMap;
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};

use crate::app::App;
use crate::server::Server;

/// How many sessions may be open at once. One that nobody uses ends after a while: `Settings::session_idle`.
const SESSIONS: usize = 256;
/// The longest message, in bytes: a file of 1 MiB as base64, and some.
const MESSAGE_MAX: usize = 4 << 20;

/// What is mounted.
pub type Service = StreamableHttpService<Server, LocalSessionManager>;

/// The service and its sessions.
#[derive(Clone)]
pub struct Http {
    service: Service,
    sessions: Arc<LocalSessionManager>,
}

impl std::fmt::Debug for Http {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Http").finish_non_exhaustive()
    }
}

impl Http {
    /// For requests that name one of these hosts, beside those of this machine; for any host if other machines are let in:
    /// then it has been checked before.
    #[must_use]
    pub fn new(app: &Arc<App>, names: &[String], remote: bool) -> Self {
        let own = ["localhost", "127.0.0.1", "[::1]"].map(str::to_owned);
        let hosts: Vec<String> = own.iter().chain(names).cloned().collect();
        let origins = hosts.iter().flat_map(|host| [format!("http://{host}:*"), format!("https://{host}:*")]);
        let config = StreamableHttpServerConfig::default()
            .with_allowed_origins(origins)
            .enforce_origin_validation()
            .with_max_request_body_bytes(MESSAGE_MAX)
            .with_cancellation_token(app.ending().child_token());
        let config = if remote {
            config.disable_allowed_hosts()
        } else {
            config.with_allowed_hosts(hosts.into_iter().chain(["::1".to_owned()]))
        };
        let mut sessions = LocalSessionManager::default();
        sessions.session_config.keep_alive = Some(app.settings().session_idle);
        let sessions = Arc::new(sessions);
        let owner = Arc::clone(app);
        let service = Service::new(move || Ok(Server::of_requests(&owner)), Arc::clone(&sessions), config);
        Self { service, sessions }
    }

    /// What is to be mounted.
    #[must_use]
    pub fn service(&self) -> Service {
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
