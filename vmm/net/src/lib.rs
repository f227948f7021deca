//! The network of a VM: the host's end of its Ethernet link. QEMU passes frames as datagrams of a unix socket; an engine on a thread
//! of its own answers them, decides what the guest may reach, and opens the connections of the host.
//!
//! ```text
//!  guest - virtio-net - QEMU -(net.q)- datagrams -(net.s)- engine - sockets of the host
//! ```
//!
//! Invariants: everything that comes from the guest is bounded before it is kept; nothing that it sends can end the process, or
//! keep another VM's network from working; no rule, no connection.

mod authority;
mod byte_limits;
mod copy;
mod credentials;
mod denials;
mod dhcp;
pub mod dns;
mod engine;
mod flow;
pub mod frame;
mod gate;
mod intercept;
mod name_service;
pub mod names;
mod neighbor;
mod network;
mod packet;
pub mod peek;
mod ping;
pub mod policy;
mod port;
mod resolver;
mod resources;
mod shared;
mod stack;
pub mod subnet;
mod tasks;
pub mod traffic;
mod udp;

pub use authority::Authority;
pub use credentials::{Credentials, SecretSource, UseReport};
pub use network::Network;
pub use policy::{Mode, Policy};
pub use shared::{Limits, Report, Reports, Settings};
pub use traffic::{ByteLimit, Count, TrafficFile};
