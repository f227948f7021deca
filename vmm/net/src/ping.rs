//! Echo requests of ICMP to other hosts, by the kernel's socket for unprivileged ones. The host may forbid that.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto};
use tokio::net::UdpSocket;
use tokio::time::timeout;

use crate::frame::parse_packet;
use crate::packet::{self, Unreachable};
use crate::subnet::router;

/// How long a reply is awaited.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether a message is an echo request.
#[must_use]
pub fn is_echo_request(is_v4: bool, message: &[u8]) -> bool {
    message.len() >= 8 && message[..2] == [if is_v4 { 8 } else { 128 }, 0]
}

/// Sends an echo request on. The frame for the guest, if there is a reply.
pub async fn run(request: &[u8]) -> Option<Vec<u8>> {
    let packet = parse_packet(request).ok()?;
    match timeout(REPLY_TIMEOUT, exchange(packet.destination, packet.payload)).await {
        Ok(Ok(mut reply)) if reply.len() >= 8 => {
            // The kernel has put its own number of the socket there.
            reply[4..6].copy_from_slice(&packet.payload[4..6]);
            Some(packet::icmp(packet.destination, packet.source, packet::HOPS, reply))
        }
        Ok(Ok(_)) | Err(_) => None,
        Ok(Err(error)) => {
            let why = match error.kind() {
                std::io::ErrorKind::PermissionDenied => Unreachable::Prohibited,
                std::io::ErrorKind::NetworkUnreachable => Unreachable::Network,
                _ => Unreachable::Host,
            };
            Some(packet::unreachable(&packet, router(packet.source), why))
        }
    }
}

async fn exchange(to: IpAddr, message: &[u8]) -> std::io::Result<Vec<u8>> {
    let (family, protocol) = match to {
        IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
        IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, Some(protocol))?;
    rustix::net::connect(&socket, &SocketAddr::new(to, 0))?;
    // The kernel's socket for echo requests is used like one of UDP.
    let socket = UdpSocket::from_std(socket.into())?;
    socket.send(message).await?;
    let mut buffer = vec![0; message.len().max(64)];
    let length = socket.recv(&mut buffer).await?;
    buffer.truncate(length);
    Ok(buffer)
}
