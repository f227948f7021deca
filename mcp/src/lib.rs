//! The MCP server: the core for agents, over stdio and over Streamable HTTP.
//!
//! ```text
//!  stdio.rs  http.rs  startup.rs   transports; opening a server         messages.rs
//!        |
//!  server.rs                       the protocol's methods: lists, calls, reading, listening      invalid_params.rs
//!        |
//!  tool_call.rs  prompts.rs        one call: admission, attempt, progress, cancellation, outcome  call_audit.rs call_failure.rs
//!        |
//!  prompt_access.rs                what of a prompt the caller can do
//!        |
//!  confirmation.rs  resources.rs   approvals; what can be read without a tool
//!        |
//!  tools/*.rs                      one file per noun: parse, call the core, return a result       schema.rs [pure]
//!        |
//!  call_context.rs                 what a tool knows of its call
//!        |
//!  app.rs                          the state that sessions share        session_leases.rs subscriptions.rs open_forms.rs output_store.rs
//!        |
//!  log_text.rs                     a VM's logs as text
//!        |
//!  answer.rs argument_reader.rs prompt_text.rs resource_uri.rs [pure]  principal.rs progress.rs
//! ```
//!
//! A module uses those below it, never those above.
//!
//! The only crate that knows the protocol's library. Both revisions of the protocol, the one with `initialize` and the one
//! without, come through the same code.
//!
//! Invariant: no data of a VM or a guest is ever part of a tool's name, title, description or schema.

mod answer;
mod app;
mod argument_reader;
mod call_audit;
mod call_context;
mod call_failure;
mod confirmation;
pub mod http;
mod invalid_params;
mod log_text;
mod messages;
mod open_forms;
mod output_store;
mod principal;
mod progress;
mod prompt_access;
mod prompt_text;
mod prompts;
mod resource_uri;
mod resources;
pub mod schema;
mod server;
mod session_leases;
mod startup;
pub mod stdio;
mod subscriptions;
mod tool_call;
pub mod tools;

pub use self::app::{App, CALL_TIMEOUT, SESSION_GRACE, SESSION_IDLE, Settings};
pub use self::principal::Principal;
