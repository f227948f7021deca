//! Connections from the host to a TCP port as seen from inside the guest.
//!
//! Invariant: the host is told `Connected` only when the guest's program has accepted, and each direction is closed
//! on its own.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use nido_guest_agent::wire::{Connect, Fault};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::agent::Refusal;
use crate::framing::{FrameReader, FrameWriter};

/// How long a connection may take to stand.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Buffer per direction, in bytes.
const BUFFER: usize = 64 * 1024;

/// Connects to what the host asks for.
///
/// # Errors
/// A host that is no address, or nothing that answers there in time.
pub async fn connect(request: &Connect) -> Result<TcpStream, Refusal> {
    let hosts = match &request.host {
        None => vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)],
        Some(text) => {
            vec![text.parse().map_err(|_| Refusal::new(Fault::Invalid, format!("{text:?} is not a numeric address")))?]
        }
    };
    let mut reason = String::new();
    for host in hosts {
        let address = SocketAddr::new(host, request.port);
        match timeout(CONNECT_DEADLINE, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                // Costs latency only if it fails.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => reason = format!("{address}: {error}"),
            Err(_late) => reason = format!("{address}: no answer within {CONNECT_DEADLINE:?}"),
        }
    }
    Err(Refusal::new(Fault::Unreachable, reason))
}

/// Copies both ways until both ends have closed.
pub async fn copy(input: FrameReader, output: FrameWriter, mut target: TcpStream) {
    let mut host = tokio::io::join(input, output.into_stream());
    // Whichever end broke, both are closed by being dropped.
    let _: io::Result<_> = tokio::io::copy_bidirectional_with_sizes(&mut host, &mut target, BUFFER, BUFFER).await;
}
