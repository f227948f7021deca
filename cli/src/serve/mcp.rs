//! Agents: the MCP server at `/mcp`, behind the same guard as everything else here.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use nido_mcp::Principal;
use nido_mcp::http::{Agents, Http};
use nido_vmm::error::{Code, Error};

use super::App;
use super::answer::Problem;
use super::guard::{self, Caller};
use super::{lasting, routes};

/// The one route. Audit and answers are the service's own.
pub fn router<A: Agents>(app: &Arc<App>, http: &Http<A>) -> Router {
    Router::new()
        .route_service("/mcp", http.service())
        .layer(middleware::from_fn_with_state(http.clone(), admit::<A>))
        .layer(middleware::from_fn_with_state(Arc::clone(app), lasting::lasting))
        .layer(middleware::from_fn_with_state(Arc::clone(app), guard::guard))
        .layer(middleware::from_fn_with_state(Arc::clone(app), routes::count))
}

/// Tells the service who asks.
async fn admit<A: Agents>(State(http): State<Http<A>>, mut request: Request, next: Next) -> Result<Response, Problem> {
    if http.is_full(request.headers()).await {
        return Err(Error::new(Code::RateLimited, "too many sessions are open").hint("end one, or wait").into());
    }
    let caller = request.extensions().get::<Caller>();
    let caller = caller.ok_or_else(|| Error::new(Code::Unauthorized, "a token is needed"))?;
    let principal = Principal { actor: caller.actor.clone(), scope: caller.scope };
    request.extensions_mut().insert(principal);
    Ok(next.run(request).await)
}
