//! Audit entries of requests that are refused before they reach a route: a wrong host or origin, a missing or invalid token, a token
//! for another part of the server.
//!
//! Invariant: clients without a valid token cannot fill the log. A burst of [`BURST`] is recorded, then one in each
//! [`REFILL_INTERVAL`]; the next entry has the number of those that were left out.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::Request;
use nido_api::operation::REFUSED_REQUEST;
use nido_api::sanitize::head;
use nido_api::{Caller as AuditCaller, FrontEnd};
use serde_json::{Value, json};

use super::App;
use super::audit_entry::user_agent;

/// How many are recorded in a burst.
const BURST: f64 = 32.0;
/// After a burst, one is recorded in each interval.
const REFILL_INTERVAL: Duration = Duration::from_secs(5);
/// How much of a path is kept, in bytes.
const PATH_MAX: usize = 128;

/// How many may be recorded now.
#[derive(Debug)]
pub struct Refusals(Mutex<State>);

#[derive(Debug)]
struct State {
    left: f64,
    at: Instant,
    not_written: u64,
}

impl Default for Refusals {
    fn default() -> Self {
        Self(Mutex::new(State { left: BURST, at: Instant::now(), not_written: 0 }))
    }
}

impl Refusals {
    /// Whether this one is recorded, and how many before it were not.
    fn take(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let more = now.duration_since(state.at).as_secs_f64() / REFILL_INTERVAL.as_secs_f64();
        state.left = (state.left + more).min(BURST);
        state.at = now;
        if state.left < 1.0 {
            state.not_written += 1;
            return None;
        }
        state.left -= 1.0;
        Some(std::mem::take(&mut state.not_written))
    }
}

/// Records a refused request. It changed nothing, so a failure to write goes to the server's own log only.
pub fn write(
    app: &Arc<App>,
    request: &Request,
    actor: String,
    reason: &'static str,
) -> impl Future<Output = ()> + Send + use<> {
    let line = app.refusals.take(Instant::now()).map(|not_written| line(request, actor, not_written));
    let owner = Arc::clone(app);
    async move {
        let Some((who, arguments)) = line else { return };
        let written = owner.nido.refuse(who, REFUSED_REQUEST.into(), arguments, reason).await;
        if let Err(error) = written {
            tracing::error!("{error}");
        }
    }
}

/// The caller of a refused request, and what it requested.
fn line(request: &Request, actor: String, not_written: u64) -> (AuditCaller, Value) {
    let path = head(request.uri().path(), PATH_MAX);
    let mut arguments = json!({ "method": head(request.method().as_str(), 16), "path": path });
    if not_written > 0 {
        arguments["not_written"] = not_written.into();
    }
    let face = if path == "/mcp" { FrontEnd::Mcp } else { FrontEnd::Api };
    (AuditCaller { face, actor, agent: user_agent(request.headers()) }, arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unauthenticated_clients_cannot_fill_the_log() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        assert_eq!((0..1000).filter(|_| refusals.take(now).is_some()).count(), 32);
        assert_eq!(refusals.take(now + REFILL_INTERVAL), Some(968));
        assert_eq!(refusals.take(now + REFILL_INTERVAL), None);
    }
}
