//! The host's side of the guest agent.
//!
//! ```text
//!  Guest (client.rs)      one method per thing an agent can do; each call is a connection and a session of its own
//!    exec.rs  files/  forward.rs
//!    session.rs           greeting, requests, replies            frames.rs: bytes -> frames [pure]
//!    transport.rs         vsock | agent.sock -> one stream type
//!  Channel (channel.rs)   what a supervisor runs for virtio-serial: agent.sock <-> streams of the one port
//!    mux/                 resync, yamux, splices
//! ```
//!
//! Invariant: the guest is hostile. Every length is checked before memory is taken, every wait has a deadline or ends
//! with the stream, and nothing a guest names is used as a path of the host.

mod channel;
mod client;
mod deadline;
mod error;
mod exec;
mod files;
mod forward;
mod frames;
mod mux;
mod session;
mod transport;

pub use channel::{Activity, Channel, Link};
pub use client::Guest;
pub use error::GuestError;
pub use exec::{Control, Event, Events, RunningCommand};
pub use files::{CopyTotals, Download, Form, Limits, Progress, SkippedEntry, Source, Upload};
pub use forward::{Connections, Tunnel, proxy};
pub use session::Session;
pub use transport::{AgentAddress, Stream, connect};
