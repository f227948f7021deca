//! The real agent, run as an ordinary process, against a host that follows the protocol and hosts that do not.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on shall stop")]

#[path = "support/mod.rs"]
mod support;

#[path = "agent/bootstrap.rs"]
mod bootstrap;
#[path = "agent/channel.rs"]
mod channel;
#[path = "agent/exec.rs"]
mod exec;
#[path = "agent/files.rs"]
mod files;
#[path = "agent/forward.rs"]
mod forward;
#[path = "agent/saving.rs"]
mod saving;
