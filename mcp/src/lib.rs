//! The MCP server: the core for agents, over stdio and over Streamable HTTP.
//!
//! ```text
//!  stdio.rs  http.rs        how messages come in
//!        \   /
//!       server.rs           what the protocol asks: lists, calls       resources.rs prompts.rs watch.rs
//!           |
//!       call.rs             one call: may it be, attempt, progress, cancellation, outcome      confirm.rs leases.rs
//!           |
//!       tools/*.rs          one file per noun: parse, call the core, answer       schema.rs answer.rs malformed.rs argument_reader.rs  [pure]
//! ```
//!
//! The only crate that knows the protocol's library. Both revisions of the protocol, the one with `initialize` and the one
//! without, come through the same code.
//!
//! Invariant: no data of a VM or a guest is ever part of a tool's name, title, description or schema.

mod answer;
mod app;
mod argument_reader;
mod call;
mod confirm;
pub mod http;
mod leases;
mod malformed;
mod messages;
mod outputs;
mod pages;
mod progress;
mod prompts;
mod recipes;
mod resources;
pub mod schema;
mod server;
pub mod stdio;
pub mod tools;
mod watch;

pub use self::app::{ANSWER_WITHIN, App, Principal, SESSION_GRACE, SESSION_IDLE, Settings};
