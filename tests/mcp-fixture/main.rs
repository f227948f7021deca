//! What the protocol's conformance suite wants to find on a server, served by nido's own HTTP stack: sockets and their limits, the
//! guard, hosts and origins, sessions, both eras of the protocol.
//!
//! ```text
//!  conformance suite ──> nido_server::serve ──> nido_mcp::http ──> server.rs   what the protocol asks
//!                        (all of it nido's, as it is shipped)        tools.rs  reads.rs  prompts.rs   what there is
//!                                                                    asks.rs   what has to ask its client first
//! ```
//!
//! It is never shipped: an example target, which only the tests build. `scripts/mcp` starts it with a home of its own in
//! `NIDO_HOME`; the first line on standard output is its address.

#![allow(missing_docs)]

mod asks;
mod prompts;
mod reads;
mod server;
mod tools;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use nido_server::serve::{Hosts, Listen, Options, Patience, serve};
use nido_vmm::error::Result;
use nido_vmm::nido::{Nido, OpenOptions};

use crate::server::Fixture;

/// How many requests a caller may make in a second: one suite, as quickly as it can.
const RATE: u32 = 100_000;

#[tokio::main]
async fn main() -> Result<()> {
    let home = std::env::var_os("NIDO_HOME").map(PathBuf::from);
    let nido = Arc::new(Nido::open(OpenOptions { home, qemu: None, supervisor: None }).await?);
    let listen = Listen::Tcp { address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), tls: None };
    // The suite knows no tokens.
    let (hosts, patience) = (Hosts::default(), Patience::default());
    let options = Options { listen, hosts, rate: RATE, no_token: true, rest: false, patience };
    serve(nido, Some(Arc::new(Fixture::new())), options, |address| println!("{address}")).await
}
