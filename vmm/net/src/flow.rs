//! One TCP connection of the guest's: connected on the host first, then accepted, then copied in both directions (`copy.rs`).
//!
//! ```text
//!  SYN -> connect on the host -> failed:    reset, or ICMP unreachable
//!                             -> connected: SYN-ACK -> copy -> both directions ended, or one was reset
//! ```
//!
//! Invariant: the guest sees a connection only if there is one.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use nido_api::egress::{DomainName, Protocol};
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tokio::time::timeout;

use crate::copy::{HostEnd, copy};
use crate::frame::parse_packet;
use crate::gate::Gate;
use crate::name_service;
use crate::packet::{self, Unreachable};
use crate::policy::Verdict;
use crate::resolver;
use crate::shared::Shared;
use crate::subnet::router;
use crate::tasks::{FlowKey, Packets};

/// How long the host may take to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// The flag of TCP that resets a connection.
const RST: u8 = 0x04;
/// The buffer between the name server and its client, in bytes.
const NAME_SERVICE_BUFFER: usize = 8 << 10;

/// Where a connection leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// To an address of the host's view.
    Address(SocketAddr),
    /// The same, if its first bytes name an allowed domain, where they name one.
    ByName(SocketAddr),
    /// To an address that these names had: they are resolved again first.
    Stale(SocketAddr, Vec<DomainName>),
    /// To the first of the host's name servers that takes it.
    HostNameServer,
    /// To the guest's name server.
    NameService,
}

/// Carries a connection from its first frame to its end.
pub async fn run(shared: Rc<Shared>, key: FlowKey, target: Target, syn: Vec<u8>, mut packets: Packets) {
    let (addresses, gate) = match target {
        Target::Address(address) if shared.watches(key.remote) => (vec![address], Gate::Watch),
        Target::Address(address) => (vec![address], Gate::Open),
        Target::HostNameServer => (resolver::servers_of_host(), Gate::Open),
        Target::ByName(address) => (vec![address], Gate::Unknown(key.remote.port())),
        Target::Stale(address, names) => {
            if !is_still_allowed(&shared, address, &names).await {
                return answer(&shared, &syn, None).await;
            }
            (vec![address], Gate::Unknown(key.remote.port()))
        }
        Target::NameService => {
            let (ours, theirs) = tokio::io::duplex(NAME_SERVICE_BUFFER);
            spawn_local(name_service::serve(Rc::clone(&shared), theirs));
            return copy(&shared, key, syn, packets, HostEnd::Task(ours), Gate::Open).await;
        }
    };
    let connected = tokio::select! {
        connected = timeout(CONNECT_TIMEOUT, TcpStream::connect(&addresses[..])) => connected,
        () = abandoned(&mut packets) => return,
    };
    match connected {
        Ok(Ok(stream)) => {
            let _ = stream.set_nodelay(true);
            copy(&shared, key, syn, packets, HostEnd::Tcp(stream), gate).await;
        }
        Ok(Err(error)) => answer(&shared, &syn, unreachable(&error)).await,
        Err(_) => answer(&shared, &syn, Some(Unreachable::Host)).await,
    }
}

/// Resolves the names again by which an address was allowed. Programs keep addresses for longer than the name server knows them.
async fn is_still_allowed(shared: &Shared, address: SocketAddr, names: &[DomainName]) -> bool {
    for name in names {
        name_service::resolve(shared, name.as_str()).await;
    }
    match shared.decide(address, Protocol::Tcp).0 {
        Verdict::Allowed(_) | Verdict::ByName(..) => true,
        Verdict::Denied(reason, name) => {
            shared.deny_connection(address, reason, name.map(|name| name.to_string()));
            false
        }
    }
}

/// Returns when the guest gives up a connection that is not there yet, or no rule allows it any more.
async fn abandoned(packets: &mut Packets) {
    while let Some(packet) = packets.next().await {
        let flags = parse_packet(&packet).ok().and_then(|packet| packet.payload.get(13).copied());
        if flags.is_some_and(|flags| flags & RST != 0) {
            return;
        }
    }
}

/// What ICMP reports about an error of the host; `None` for one that is a reset.
fn unreachable(error: &io::Error) -> Option<Unreachable> {
    match error.kind() {
        io::ErrorKind::HostUnreachable | io::ErrorKind::TimedOut => Some(Unreachable::Host),
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::AddrNotAvailable => Some(Unreachable::Network),
        _ => None,
    }
}

/// Answers the first frame of a connection that is not made: with an error of ICMP, or a reset.
async fn answer(shared: &Shared, syn: &[u8], why: Option<Unreachable>) {
    let Ok(packet) = parse_packet(syn) else { return };
    let frame = match why {
        Some(why) => Some(packet::unreachable(&packet, router(packet.source), why)),
        None => packet::reset(&packet),
    };
    if let Some(frame) = frame {
        shared.port.send(&frame).await;
    }
}
