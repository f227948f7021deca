//! The guest side of nido. The library is the wire protocol, shared with the host; the binary is the agent.

pub mod config;
pub mod wire;
