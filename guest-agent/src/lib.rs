//! The guest side of nido. The library is what host and guest share: the wire protocol, and (feature `replace`) what both
//! ends of a copy do to files. The binary is the agent.

pub mod config;
pub mod connection_table;
#[cfg(feature = "replace")]
pub mod replace;
pub mod wire;
