//! The routes, one file per noun. A handler parses, calls one method of the core, and renders.

#![allow(unused_qualifications, reason = "the macros that describe routes write them")]

mod audit;
mod events;
mod examples;
mod exec;
mod files;
mod forwards;
mod host;
mod logs;
mod network;
mod operations;
mod page;
mod pools;
mod snapshots;
mod socket;
mod templates;
mod vms;
mod webhooks;

use std::sync::Arc;

use utoipa_axum::router::OpenApiRouter;

use super::App;

/// Examples of requests and responses.
pub fn examples() -> Vec<examples::Example> {
    examples::all()
}

/// Every route with its description.
pub fn described() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .merge(vms::routes())
        .merge(exec::routes())
        .merge(socket::routes())
        .merge(files::routes())
        .merge(snapshots::routes())
        .merge(forwards::routes())
        .merge(network::routes())
        .merge(templates::routes())
        .merge(pools::routes())
        .merge(webhooks::routes())
        .merge(logs::routes())
        .merge(events::routes())
        .merge(audit::routes())
        .merge(operations::routes())
        .merge(host::routes())
        .merge(page::routes())
}
