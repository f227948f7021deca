//! The audit log, read.

use std::sync::Arc;

use axum::extract::State;
use nido_api::error::{Code, Error};
use nido_api::{AuditFilter, AuditList, AuditLog};
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::App;
use crate::query::{QueryParams, number_if_given};
use crate::response::{self, HandlerResult};

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(show))
}

/// Filters for lines of the audit log.
#[derive(Debug, Default, serde::Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct AuditQuery {
    /// The log, `acts` or `reads`; absent: both. A page (`cursor`) is of one log, `acts` if absent.
    log: Option<AuditLog>,
    /// Lines from this time on.
    since: Option<jiff::Timestamp>,
    /// Lines of this operation, for example `vm_exec`.
    tool: Option<String>,
    /// Lines of this caller, for example `token:ci`.
    actor: Option<String>,
    /// Lines with this result: `pending`, `success`, `error`, `denied`, `unknown`.
    result: Option<String>,
    /// Lines about the VM of this name.
    vm: Option<nido_api::name::VmName>,
    /// At most this many, the last ones; 1000 if absent.
    tail: Option<u32>,
    /// The first lines after this sequence number instead of the last ones; 0 is the beginning. The next page starts at
    /// `next_cursor` of a response.
    #[serde(deserialize_with = "number_if_given")]
    cursor: Option<u64>,
    /// With `cursor`: at most this many; 1000 if absent.
    #[param(minimum = 1, maximum = 10000)]
    limit: Option<u32>,
}

/// Lists lines of the audit log, the oldest first. `nido audit verify` verifies them.
#[utoipa::path(get, path = "/v1/audit", operation_id = "audit_show", tag = "audit", params(AuditQuery),
    responses((status = 200, body = AuditList)))]
async fn show(State(app): State<Arc<App>>, QueryParams(which): QueryParams<AuditQuery>) -> HandlerResult {
    let AuditQuery { log, since, tool, actor, result, vm, tail, cursor: after, limit } = which;
    let bad = |words: &str| Err(Error::new(Code::SpecInvalid, words).into());
    if tail.is_some() && (after.is_some() || limit.is_some()) {
        return bad("tail: cursor or limit is given as well; the last lines, or pages from the first");
    }
    if limit.is_some_and(|limit| !(1..=10_000).contains(&limit)) {
        return bad("limit: it is 1 to 10000");
    }
    let after = after.or(limit.map(|_| 0));
    let (tail, limit) = match after {
        None => (usize::try_from(tail.unwrap_or(1000)).ok(), None),
        Some(_) => (None, usize::try_from(limit.unwrap_or(1000)).ok()),
    };
    let filter = AuditFilter { log, since, tool, actor, result, vm, tail, after, limit };
    response::ok(&app.nido().await?.audit_show(&filter)?)
}
