//! The guest's client and the channel: against the real agent, and against scripted peers that lie.

#![allow(clippy::unwrap_used)]

mod bootstrap;
mod channel;
mod exec;
mod fake_agent;
mod files;
mod forward;
mod hostile_channel;
mod hostile_files;
mod hostile_session;
mod rig;
