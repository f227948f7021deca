//! The audit log, read.

use std::sync::Arc;

use axum::extract::State;
use nido_vmm::api::{AuditFilter, AuditList};
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::serve::App;
use crate::serve::answer::{self, Answer};
use crate::serve::ask::Query;
use crate::serve::guard::Rules;

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(show))
}

/// Which lines are wanted.
#[derive(Debug, Default, serde::Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Which {
    /// Those of this time and later.
    since: Option<jiff::Timestamp>,
    /// Of this operation, for example `vm_exec`.
    tool: Option<String>,
    /// Of this caller, for example `token:ci`.
    actor: Option<String>,
    /// With this result: `pending`, `success`, `error`, `denied`, `unknown`.
    result: Option<String>,
    /// About the VM of this name.
    vm: Option<nido_vmm::name::VmName>,
    /// Only so many, the last ones; 1000 if absent.
    tail: Option<u32>,
}

/// Lines of the audit log, the oldest first. To check them: `nido audit verify`.
#[utoipa::path(get, path = "/v1/audit", operation_id = "audit_show", tag = "audit", params(Which),
    responses((status = 200, body = AuditList)))]
async fn show(State(app): State<Arc<App>>, _: Rules, Query(which): Query<Which>) -> Answer {
    let Which { since, tool, actor, result, vm, tail } = which;
    let tail = usize::try_from(tail.unwrap_or(1000)).ok();
    answer::ok(&app.nido().await?.audit_show(&AuditFilter { since, tool, actor, result, vm, tail })?)
}
