//! UDP: one socket of the host for each pair of ends, until it is idle.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use nido_api::egress::DenialReason;
use tokio::net::UdpSocket;
use tokio::time::timeout;

use crate::frame::{datagram, parse_packet};
use crate::packet::{self, Unreachable};
use crate::shared::Shared;
use crate::subnet::{MTU, router};
use crate::tasks::{FlowKey, Packets};

/// After how long without a datagram a pair of ends is forgotten.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// The headers of IPv6 and UDP.
const HEADERS: usize = 48;

/// Carries datagrams between the guest and `target`.
pub async fn run(shared: Rc<Shared>, key: FlowKey, target: SocketAddr, mut packets: Packets) {
    let Some(socket) = connect(target).await else { return };
    let mut buffer = vec![0; MTU];
    // What the guest has sent last, for the error that it is answered.
    let mut last = None;
    loop {
        let step = async {
            tokio::select! {
                packet = packets.next() => packet.map(Step::Send),
                received = socket.recv(&mut buffer) => Some(Step::Received(received)),
            }
        };
        match timeout(IDLE_TIMEOUT, step).await {
            Ok(Some(Step::Send(packet))) => {
                let Some(data) = parse_packet(&packet).ok().and_then(|packet| datagram(packet.payload)) else {
                    continue;
                };
                // Packets may have waited when the limit was reached.
                if shared.is_over_byte_limit() {
                    shared.deny_datagram(key.remote, DenialReason::ByteLimit);
                    return report(&shared, Some(&packet)).await;
                }
                shared.count_sent(data.len());
                // An error of a datagram before is reported by the next call.
                if socket.send(data).await.is_err() {
                    report(&shared, Some(&packet)).await;
                }
                last = Some(packet);
            }
            Ok(Some(Step::Received(Ok(length)))) if length <= MTU - HEADERS => {
                shared.count_received(length);
                shared.port.send(&packet::udp(key.remote, key.guest, &buffer[..length])).await;
            }
            Ok(Some(Step::Received(Ok(_)))) => {}
            Ok(Some(Step::Received(Err(_)))) => report(&shared, last.take().as_ref()).await,
            Ok(None) | Err(_) => return,
        }
    }
}

enum Step {
    Send(Vec<u8>),
    Received(std::io::Result<usize>),
}

async fn connect(target: SocketAddr) -> Option<UdpSocket> {
    let any: SocketAddr =
        if target.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(any).await.ok()?;
    socket.connect(target).await.ok()?;
    Some(socket)
}

async fn report(shared: &Shared, packet: Option<&Vec<u8>>) {
    let Some(Ok(packet)) = packet.map(|packet| parse_packet(packet)) else { return };
    shared.port.send(&packet::unreachable(&packet, router(packet.source), Unreachable::Port)).await;
}
