//! The REST API, the web page and MCP over HTTP: the core for scripts, services, people and agents.
//!
//! ```text
//!  listen.rs       sockets, TLS, limits of connections
//!    router.rs     the middleware, in its order
//!      auth.rs         host, origin, token, scope, rate limit
//!      streams.rs      ends long-running requests with their token and with the server
//!      timeouts.rs     slow clients
//!      idempotency.rs  replays responses of requests that are retried
//!      audit.rs        records each request before it runs
//!      routes/*.rs     parse, call one method of the core, render
//!        operations.rs   runs changes to their end, also if the client disconnects; as jobs if that is preferred
//!        operation_view.rs  shows jobs as operations
//!    mcp.rs        the MCP server, behind the same authentication
//!  openapi.rs      the description of the API, made of the routes
//! ```
//!
//! Modules depend on each other in one direction: media types, responses, audit entries and connections at the bottom, then `auth`,
//! `extract` and `timeouts`, then `streams`, `operations`, `idempotency` and `audit`, then `routes`, then `openapi` and `router`.
//! What lower modules need to know of the routes is the table `App::description`.
//!
//! Invariants: VMs do not depend on this server. It may be killed at any time, and no request leaves more half-done than the core
//! itself would. Nothing here knows of arguments, terminals or exit codes.

mod access;
mod api_description;
mod audit;
mod audit_entry;
mod auth;
mod budget;
mod certificate;
mod connections;
mod extract;
mod idempotency;
mod listen;
mod mcp;
mod media_type;
mod metrics;
mod openapi;
mod openapi_links;
mod operation_view;
mod operations;
mod precondition;
mod public_url;
mod query;
mod refusals;
mod response;
mod router;
mod routes;
pub mod sanitize;
pub mod signals;
mod streams;
mod timeouts;

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use nido_api::error::Result;
use nido_core::{Nido, Watch};
use nido_mcp::http::{Agents, Http};
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;

use self::api_description::ApiDescription;
pub use self::auth::Hosts;
use self::budget::Budget;
pub use self::certificate::TlsFiles;
pub use self::listen::{ListenAddress, ServerAddress, Tls};
use self::metrics::Metrics;
use self::operations::Operations;
pub use self::public_url::PublicUrl;
use self::signals::Signals;
pub use self::timeouts::Timeouts;

/// How often the server checks that a delivery worker runs when deliveries are due.
const DELIVERY_CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// The least time between two checks for VMs without a supervisor.
const RECONCILE_INTERVAL: Duration = Duration::from_millis(100);

/// The options of a server.
#[derive(Debug)]
pub struct Options {
    /// Where it listens.
    pub listen: ListenAddress,
    /// The names of the server.
    pub hosts: Hosts,
    /// Average rate limit of a caller, in requests per second.
    pub rate: u32,
    /// Whether the REST API and the page for people are served.
    pub rest: bool,
    /// How long the server waits for clients.
    pub timeouts: Timeouts,
}

/// What every request needs.
#[derive(Debug)]
pub struct App {
    nido: Arc<Nido>,
    hosts: Hosts,
    rate_limiter: auth::RateLimiter,
    refusals: refusals::Refusals,
    timeouts: Timeouts,
    /// The OpenAPI document and the inputs of each route, made when it is first needed.
    description: LazyLock<ApiDescription>,
    operations: Operations,
    /// The memory that responses may take.
    output: Budget,
    metrics: Metrics,
    reconciled_at: Mutex<Option<Instant>>,
    /// The cursor of the last event; a change wakes the event streams.
    changes: watch::Sender<u64>,
    /// Cancelled when the server begins to shut down: endless streams end with it.
    shutting_down: CancellationToken,
    /// Cancelled when open requests have had [`Timeouts::shutdown`] to end.
    shutdown_deadline: CancellationToken,
}

impl App {
    /// The core, after the orphans of crashes have been reconciled, as every command does.
    async fn nido(&self) -> Result<&Nido> {
        let mut reconciled_at = self.reconciled_at.lock().await;
        if reconciled_at.is_none_or(|at| at.elapsed() > RECONCILE_INTERVAL) {
            self.nido.reconcile().await?;
            *reconciled_at = Some(Instant::now());
        }
        Ok(&self.nido)
    }
}

/// Serves until a signal ends it, with MCP for these agents at `/mcp`; calls `ready` with the address.
///
/// # Errors
/// `port_in_use`, `denied`, those of the core.
pub async fn serve<A: Agents>(
    nido: Arc<Nido>,
    agents: Option<Arc<A>>,
    options: Options,
    ready: impl FnOnce(&ServerAddress),
) -> Result<()> {
    let bound = listen::bind(&options.listen, &nido.home().tls(), &options.hosts).await?;
    let app = Arc::new(App {
        nido,
        hosts: options.hosts,
        rate_limiter: auth::RateLimiter::new(options.rate),
        refusals: refusals::Refusals::default(),
        timeouts: options.timeouts,
        description: LazyLock::new(openapi::api_description),
        operations: Operations::default(),
        output: Budget::default(),
        metrics: Metrics::default(),
        reconciled_at: Mutex::new(None),
        changes: watch::channel(0).0,
        shutting_down: CancellationToken::new(),
        shutdown_deadline: CancellationToken::new(),
    });
    let watching = tokio::spawn(watch_events(Arc::clone(&app)));
    let mut router = if options.rest { router::rest(&app) } else { router::without_rest(&app) };
    if let Some(agents) = &agents {
        let http = Http::new(agents, &app.hosts.all_names(), &app.hosts.all_origins(), bound.is_remote());
        router = router.merge(mcp::router(&app, &http));
    }
    let ending = tokio::spawn(end_with(agents, app.shutting_down.clone()));
    // From here on a signal shuts the server down in order. Before `ready`, which may cause a signal at once.
    let signals = Signals::listen()?;
    ready(&bound.listening());
    bound.run(router, Arc::clone(&app), signals).await;
    watching.abort();
    app.operations.finish().await;
    app.nido.audit_flush();
    let _ = ending.await;
    Ok(())
}

/// Ends the sessions of agents when the server begins to shut down: their streams have no end of their own.
async fn end_with<A: Agents>(agents: Option<Arc<A>>, ending: CancellationToken) {
    ending.cancelled().await;
    if let Some(agents) = agents {
        agents.finish().await;
    }
}

/// Wakes event streams when an event is written: one watch of the store for all of them. Restarts a delivery worker that was killed.
async fn watch_events(app: Arc<App>) {
    let mut store = Watch::new(&app.nido);
    let mut looked = Instant::now();
    loop {
        if looked.elapsed() >= DELIVERY_CHECK_INTERVAL {
            app.nido.resume_deliveries();
            looked = Instant::now();
        }
        if let Ok(cursor) = app.nido.last_event() {
            app.changes.send_if_modified(|last| std::mem::replace(last, cursor) != cursor);
        }
        store.changed().await;
    }
}

/// The description of the API.
pub fn openapi() -> String {
    openapi::text()
}
