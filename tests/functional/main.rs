//! The real `nido` against a QEMU that is none, with the real guest agent as an ordinary process of the host.
//!
//! What needs a real guest is in `tests/boot`.

#![allow(missing_docs, clippy::unwrap_used)]

mod api;
mod api_access;
mod api_audit;
mod api_events;
mod api_exec;
mod api_files;
mod approvals;
mod audit;
mod audit_verbs;
mod description;
mod exec;
mod exec_socket;
mod failures;
mod files;
mod forwards;
mod killed;
mod leases;
mod lifecycle;
mod logs;
mod mcp;
mod mcp_confirm;
mod mcp_files;
mod mcp_http;
mod mcp_jobs;
mod mcp_leases;
mod mcp_lists;
mod mcp_protocol;
mod pool;
mod run;
mod terminal;
mod tls;
mod travel;
mod usage;
mod webhook_endpoints;
mod webhook_routes;
mod webhooks;

#[path = "../support/mod.rs"]
mod support;
