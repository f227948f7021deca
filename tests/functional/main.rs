//! The real `nido` against a fake QEMU, with the real guest agent as an ordinary process of the host.
//!
//! What needs a real guest is in `tests/boot`.

#![allow(missing_docs, clippy::unwrap_used)]

mod api;
mod api_access;
mod api_audit;
mod api_contract;
mod api_events;
mod api_exec;
mod api_files;
mod approvals;
mod audit;
mod audit_receipt;
mod audit_verbs;
mod clock;
mod control;
mod copies;
mod daemons;
mod damaged;
mod description;
mod exec;
mod exec_socket;
mod failures;
mod files;
mod forwards;
mod guardian;
mod hints;
mod host_errors;
mod jobs;
mod killed;
mod leases;
mod lifecycle;
mod limits;
mod logs;
mod lost_store;
mod mcp;
mod mcp_confirm;
mod mcp_files;
mod mcp_http;
mod mcp_jobs;
mod mcp_leases;
mod mcp_lists;
mod mcp_messages;
mod mcp_protocol;
mod mcp_spec;
mod mcp_tools;
mod net_limits;
mod network;
mod network_rules;
mod paused;
mod pool;
mod presets;
mod rebuild;
mod reconcile;
mod restart;
mod run;
mod secrets;
mod startup;
mod structure;
mod template_rules;
mod template_transfer;
mod terminal;
mod tls;
mod undo;
mod unreadable;
mod usage;
mod webhook_endpoints;
mod webhook_routes;
mod webhooks;
mod words;

#[path = "../support/mod.rs"]
mod support;
