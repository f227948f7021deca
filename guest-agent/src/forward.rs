//! Connections from the host to a TCP port as seen from inside the guest.
//!
//! Invariant: `Connected` is sent to the host only when the guest's program has accepted, and each direction is closed
//! on its own.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nido_guest_agent::wire::{Connect, Fault};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::agent::TunnelPlace;
use crate::framing::{FrameReader, FrameWriter};
use crate::refusal::Refusal;

/// How long a connection may take to stand.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Buffer per direction, in bytes.
const BUFFER: usize = 64 * 1024;

/// Connects to the address that the host requests.
///
/// # Errors
/// An invalid address, or no reply from it in time.
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

/// Copies both ways until both ends have closed, or another connection needs the place of this one.
pub async fn copy(input: FrameReader, output: FrameWriter, target: TcpStream, place: &TunnelPlace) {
    let (from_target, to_target) = target.into_split();
    let is_half_closed = AtomicBool::new(false);
    let copied = async {
        tokio::try_join!(
            pass(input, to_target, &is_half_closed, place),
            pass(from_target, output.into_stream(), &is_half_closed, place)
        )
    };
    tokio::select! {
        // Whichever end broke, both are closed by being dropped.
        _ended = copied => {}
        () = place.taken_away() => {}
    }
}

/// Carries one direction to its end, and passes that on.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    is_half_closed: &AtomicBool,
    place: &TunnelPlace,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        if is_half_closed.load(Ordering::Relaxed) {
            place.half_closed();
        }
        to.write_all(&buffer[..count]).await?;
        to.flush().await?;
    }
    to.shutdown().await?;
    is_half_closed.store(true, Ordering::Relaxed);
    place.half_closed();
    Ok(())
}
