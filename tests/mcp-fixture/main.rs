//! What the protocol's conformance suite wants to find on a server, served by nido's own HTTP stack: sockets and their limits, the
//! guard, hosts and origins, sessions, both eras of the protocol.
//!
//! ```text
//!  conformance suite ──> nido_server::serve ──> nido_mcp::http ──> server.rs   what the protocol asks
//!                        (all of it nido's, as it is shipped)        tools.rs  reads.rs  prompts.rs   the contents
//!                                                                    asks.rs   what has to ask its client first
//! ```
//!
//! It is never shipped: an example target, which only the tests build. `scripts/mcp` starts it with a home of its own in
//! `NIDO_HOME`; the first line on standard output is its address, and `token` in that home the token it wants.

#![allow(missing_docs)]

mod asks;
mod prompts;
mod reads;
mod server;
mod tools;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use nido_api::error::{Error, Result};
use nido_api::{Limits, Scope, TokenRequest};
use nido_core::{Nido, OpenOptions};
use nido_server::{Hosts, ListenAddress, Options, Timeouts, serve};

use crate::server::Fixture;

/// How many requests a caller may make in a second: one suite, as quickly as it can.
const RATE: u32 = 100_000;

#[tokio::main]
async fn main() -> Result<()> {
    let home = std::env::var_os("NIDO_HOME").map(PathBuf::from);
    let nido = Arc::new(Nido::open(OpenOptions { home, qemu: None, ..OpenOptions::default() }).await?);
    let listen = ListenAddress::Tcp { address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), tls: None };
    // The suite knows no tokens: a proxy adds it.
    let request = TokenRequest {
        name: "suite".into(),
        scope: Scope::Admin,
        only: None,
        expires_in_ms: None,
        limits: Limits::default(),
    };
    let made = nido.token_create(&request)?;
    std::fs::write(nido.home().root().join("token"), made.token).map_err(|e| Error::io("cannot write the token", e))?;
    let (hosts, timeouts) = (Hosts::default(), Timeouts::default());
    let options = Options { listen, hosts, rate: RATE, rest: false, timeouts };
    serve(nido, Some(Arc::new(Fixture::new())), options, |listening| println!("{}", listening.address)).await
}
