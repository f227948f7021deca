//! The REST API: the core over HTTP, for scripts, services and the page for people.
//!
//! ```text
//!  listen.rs   sockets, TLS, limits of connections ──> guard.rs  who asks, from where, how often
//!       pace.rs  how slow a client may be                │
//!                                                        │
//!                      audit.rs  what changes something is written down before it begins
//!                                                        │
//!                      routes/*.rs  parse, call one method of the core, render      answer.rs  problem+json
//!                                                        │
//!                      lasting.rs  what lasts ends with its token, and with the server
//!                      operations.rs  what changes something goes to its end, whoever hangs up
//!                                                        │
//!                      mcp.rs  agents, behind the same guard
//! ```
//!
//! Invariant: VMs do not depend on this server. It may be killed at any time, and nothing that it was asked for is left
//! half-done but what the core would leave itself.

mod answer;
mod ask;
mod audit;
mod budget;
mod certificate;
mod condition;
mod guard;
mod lasting;
mod links;
mod listen;
mod mcp;
mod metrics;
mod once;
mod openapi;
mod operations;
mod pace;
mod public_url;
mod query;
mod refusals;
mod routes;
pub mod sanitize;
pub mod signals;

use std::sync::Arc;
use std::time::{Duration, Instant};

use nido_mcp::http::{Agents, Http};
use nido_vmm::error::Result;
use nido_vmm::nido::{Nido, Watch};
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;

use self::budget::Budget;
pub use self::guard::Hosts;
pub use self::listen::{Listen, Listening, Tls, TlsFiles};
use self::metrics::Metrics;
use self::operations::Operations;
pub use self::pace::Patience;
pub use self::public_url::PublicUrl;
use crate::signals::Signals;

/// How often is looked whether somebody delivers what is to be delivered.
const DELIVERING_EVERY: Duration = Duration::from_secs(2);
/// How long the last look for VMs without a supervisor counts.
const SETTLED_FOR: Duration = Duration::from_millis(100);

/// How a server is started.
#[derive(Debug)]
pub struct Options {
    /// Where it listens.
    pub listen: Listen,
    /// Which names it answers to.
    pub hosts: Hosts,
    /// How many requests a caller may make in a second, on average.
    pub rate: u32,
    /// Whether the REST API and the page for people are served.
    pub rest: bool,
    /// How long clients are waited for.
    pub patience: Patience,
}

/// What every request needs.
#[derive(Debug)]
pub struct App {
    nido: Arc<Nido>,
    hosts: Hosts,
    rates: guard::Rates,
    refusals: refusals::Refusals,
    patience: Patience,
    operations: Operations,
    /// The memory that answers may take.
    output: Budget,
    metrics: Metrics,
    settled: Mutex<Option<Instant>>,
    /// The last event's cursor: whoever listens is woken by it.
    changes: watch::Sender<u64>,
    /// Done when the server begins to end: what would go on for ever ends with it.
    ending: CancellationToken,
    /// Done when whatever still goes on then has had its time.
    over: CancellationToken,
}

impl App {
    /// The core. What a crash has left since the last request is settled first, as every command does.
    async fn nido(&self) -> Result<&Nido> {
        let mut settled = self.settled.lock().await;
        if settled.is_none_or(|at| at.elapsed() > SETTLED_FOR) {
            self.nido.settle_all().await?;
            *settled = Some(Instant::now());
        }
        Ok(&self.nido)
    }
}

/// Serves until a signal ends it, with these agents at `/mcp`; `ready` is told where.
///
/// # Errors
/// `port_in_use`, `denied`, those of the core.
pub async fn serve<A: Agents>(
    nido: Arc<Nido>,
    agents: Option<Arc<A>>,
    options: Options,
    ready: impl FnOnce(&Listening),
) -> Result<()> {
    let bound = listen::bind(&options.listen, &nido.home().root().join("tls"), &options.hosts).await?;
    let app = Arc::new(App {
        nido,
        hosts: options.hosts,
        rates: guard::Rates::new(options.rate),
        refusals: refusals::Refusals::default(),
        patience: options.patience,
        operations: Operations::default(),
        output: Budget::default(),
        metrics: Metrics::default(),
        settled: Mutex::new(None),
        changes: watch::channel(0).0,
        ending: CancellationToken::new(),
        over: CancellationToken::new(),
    });
    let watching = tokio::spawn(watch_events(Arc::clone(&app)));
    let mut router = if options.rest { routes::router(&app) } else { routes::nothing(&app) };
    if let Some(agents) = &agents {
        let http = Http::new(agents, &app.hosts.all_names(), &app.hosts.all_origins(), bound.is_remote());
        router = router.merge(mcp::router(&app, &http));
    }
    let ending = tokio::spawn(end_with(agents, app.ending.clone()));
    // From here on a signal is an orderly end; whoever hears that we listen may send one at once.
    let signals = Signals::listen()?;
    ready(&bound.listening());
    bound.run(router, Arc::clone(&app), signals).await;
    watching.abort();
    app.operations.finish().await;
    app.nido.audit_flush();
    let _ = ending.await;
    Ok(())
}

/// What agents have begun ends when the server begins to end: their streams would last for ever.
async fn end_with<A: Agents>(agents: Option<Arc<A>>, ending: CancellationToken) {
    ending.cancelled().await;
    if let Some(agents) = agents {
        agents.finish().await;
    }
}

/// Wakes the listeners when something happens: one watch of the store for all of them. A deliverer that was killed is replaced.
async fn watch_events(app: Arc<App>) {
    let mut store = Watch::new(&app.nido);
    let mut looked = Instant::now();
    loop {
        if looked.elapsed() >= DELIVERING_EVERY {
            app.nido.go_on_delivering();
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
