//! Takes the guest's frames, decides, and gives each connection to a task of its own.
//!
//! ```text
//!  QEMU <- frames -> port -> ARP, NDP, DHCP, ICMP  answered here
//!                         -> TCP                   one task for each connection (flow.rs)
//!                         -> UDP                   one task for each pair of ends (udp.rs)
//!                         -> DNS                   relayed (nat), or answered by rules (name_service.rs)
//! ```
//!
//! Invariants: everything is on one thread; a task that waits keeps no other from running; what the guest sends is bounded in
//! number and in bytes before it is kept.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use nido_api::egress::{DenialReason, DeniedProtocol, DomainName, Protocol};
use smoltcp::wire::TcpPacket;
use tokio::sync::mpsc;
use tokio::task::{spawn_local, yield_now};

use crate::denials::Refused;
use crate::dhcp;
use crate::flow::{self, Target};
use crate::frame::{self, Dropped, Frame, Packet, datagram, protocol};
use crate::name_service;
use crate::neighbor;
use crate::packet::{self, Unreachable};
use crate::ping;
use crate::policy::{Mode, Verdict};
use crate::port::FRAME_MAX;
use crate::resolver;
use crate::shared::Shared;
use crate::subnet::{is_gateway, is_name_server, router};
use crate::tasks::FlowKey;
use crate::udp;

/// How many frames are taken before the tasks get their turn.
const FRAME_BURST: usize = 32;
/// How many frames that answer others at once wait for QEMU.
const ANSWERS: usize = 256;
/// The port of name servers.
const DNS_PORT: u16 = 53;

/// How many echo requests and questions are under way.
const EXCHANGES_MAX: usize = 64;

impl Shared {
    /// Takes the guest's frames, and answers them, until the socket fails.
    pub async fn serve(self: Rc<Self>) -> std::io::Result<()> {
        let (answers, mut queue) = mpsc::channel::<Vec<u8>>(ANSWERS);
        let send = async {
            while let Some(frame) = queue.recv().await {
                self.port.send(&frame).await;
            }
        };
        tokio::select! {
            result = self.receive(&answers) => result,
            () = send => Ok(()),
        }
    }

    async fn receive(self: &Rc<Self>, answers: &mpsc::Sender<Vec<u8>>) -> std::io::Result<()> {
        let mut buffer = vec![0; FRAME_MAX + 1];
        loop {
            let length = self.port.receive(&mut buffer).await?;
            self.on_frame(&buffer[..length], answers);
            for _ in 1..FRAME_BURST {
                let Some(length) = self.port.try_receive(&mut buffer) else { break };
                self.on_frame(&buffer[..length], answers);
            }
            yield_now().await;
        }
    }

    fn on_frame(self: &Rc<Self>, frame: &[u8], answers: &mpsc::Sender<Vec<u8>>) {
        let answer = match frame::parse(frame) {
            Ok(Frame::Arp(packet)) => neighbor::arp_reply(packet),
            Ok(Frame::Ip(packet)) => self.on_packet(&packet),
            Err(Dropped::Malformed | Dropped::Spoofed | Dropped::Unsupported) => {
                self.counters.add_dropped();
                None
            }
        };
        if let Some(answer) = answer {
            // A guest that asks faster than it reads gets no more.
            let _ = answers.try_send(answer);
        }
    }

    /// The frame that answers a packet at once, if one does.
    fn on_packet(self: &Rc<Self>, packet: &Packet<'_>) -> Option<Vec<u8>> {
        match (packet.protocol, packet.destination.is_ipv4()) {
            (protocol::TCP, _) => self.on_tcp(packet),
            (protocol::UDP, _) => self.on_udp(packet),
            (protocol::ICMP, true) | (protocol::ICMPV6, false) => self.on_icmp(packet),
            _ if packet.destination.is_multicast() => None,
            _ => {
                self.deny_packet(packet, DeniedProtocol::Other, None, DenialReason::ProtocolNotAllowed, None);
                Some(packet::unreachable(packet, router(packet.destination), Unreachable::Prohibited))
            }
        }
    }

    fn deny_packet(
        &self,
        packet: &Packet<'_>,
        protocol: DeniedProtocol,
        port: Option<u16>,
        reason: DenialReason,
        name: Option<DomainName>,
    ) {
        let name = name.map(|name| name.to_string());
        self.deny(Refused { protocol, name, address: Some(packet.destination), port, reason });
    }

    fn on_tcp(self: &Rc<Self>, packet: &Packet<'_>) -> Option<Vec<u8>> {
        let key = key(packet)?;
        if self.tcp.pass(&key, packet.bytes) {
            return None;
        }
        let segment = TcpPacket::new_checked(packet.payload).ok()?;
        if !segment.syn() || segment.ack() || segment.rst() || segment.fin() {
            return packet::reset(packet);
        }
        let target = match self.tcp_target(key.remote) {
            Ok(target) => target,
            Err((reason, name)) => {
                self.deny_packet(packet, DeniedProtocol::Tcp, Some(key.remote.port()), reason, name);
                return packet::reset(packet);
            }
        };
        self.counters.add_connection();
        let packets = self.tcp.open(key);
        spawn_local(flow::run(Rc::clone(self), key, target, packet.bytes.to_vec(), packets));
        None
    }

    /// Where a connection leads.
    fn tcp_target(&self, remote: SocketAddr) -> Result<Target, (DenialReason, Option<DomainName>)> {
        let target = if is_name_server(remote.ip()) && remote.port() == DNS_PORT {
            match self.mode() {
                Mode::Nat => Target::HostNameServer,
                Mode::Restricted => Target::NameService,
            }
        } else {
            match self.decide(remote, Protocol::Tcp) {
                (Verdict::Allowed(target), _) => Target::Address(target),
                (Verdict::ByName(target, _), _) => Target::ByName(target),
                (Verdict::Denied(..), stale) if !stale.is_empty() => Target::Stale(remote, stale),
                (Verdict::Denied(reason, name), _) => return Err((reason, name)),
            }
        };
        self.admit_flow(self.tcp.count(), self.limits.tcp_flows).map_err(|reason| (reason, None))?;
        Ok(target)
    }

    fn on_udp(self: &Rc<Self>, packet: &Packet<'_>) -> Option<Vec<u8>> {
        let key = key(packet)?;
        if packet.destination.is_ipv4() && dhcp::is_server_port(key.remote.port()) {
            return dhcp::reply(datagram(packet.payload)?);
        }
        if packet.destination.is_multicast() || is_broadcast(packet.destination) || packet.source.is_unspecified() {
            return None;
        }
        if self.udp.pass(&key, packet.bytes) {
            return None;
        }
        let is_question = is_name_server(key.remote.ip()) && key.remote.port() == DNS_PORT;
        if is_question {
            if self.is_over_byte_limit() {
                self.deny_packet(packet, DeniedProtocol::Dns, None, DenialReason::ByteLimit, None);
                return Some(packet::unreachable(packet, router(packet.destination), Unreachable::Port));
            }
            let message = datagram(packet.payload)?.to_vec();
            self.exchange(async move |shared| {
                shared.count_sent(message.len());
                let response = match shared.mode() {
                    Mode::Nat => name_service::relay(&message, &resolver::servers_of_host()).await?,
                    Mode::Restricted => name_service::respond(&shared, &message).await?,
                };
                shared.count_received(response.len());
                Some(packet::udp(key.remote, key.guest, &response))
            });
            return None;
        }
        match self.udp_target(key.remote) {
            Ok(target) => {
                let packets = self.udp.open(key);
                self.udp.pass(&key, packet.bytes);
                spawn_local(udp::run(Rc::clone(self), key, target, packets));
                None
            }
            Err((reason, name)) => {
                self.deny_packet(packet, DeniedProtocol::Udp, Some(key.remote.port()), reason, name);
                Some(packet::unreachable(packet, router(packet.destination), Unreachable::Port))
            }
        }
    }

    /// Where datagrams lead.
    fn udp_target(&self, remote: SocketAddr) -> Result<SocketAddr, (DenialReason, Option<DomainName>)> {
        let target = match self.decide(remote, Protocol::Udp).0 {
            Verdict::Allowed(target) | Verdict::ByName(target, _) => target,
            Verdict::Denied(reason, name) => return Err((reason, name)),
        };
        self.admit_flow(self.udp.count(), self.limits.udp_flows).map_err(|reason| (reason, None))?;
        Ok(target)
    }

    fn on_icmp(self: &Rc<Self>, packet: &Packet<'_>) -> Option<Vec<u8>> {
        let is_v4 = packet.source.is_ipv4();
        if !is_v4 && neighbor::is_discovery(packet.payload) {
            return neighbor::discovery_reply(packet, resolver::host_routes_ipv6());
        }
        if packet.destination.is_multicast() || !ping::is_echo_request(is_v4, packet.payload) {
            return None;
        }
        if is_gateway(packet.destination) || is_name_server(packet.destination) {
            return packet::echo_reply(packet);
        }
        let reason = match self.decide((packet.destination, 0).into(), Protocol::Tcp).0 {
            _ if self.mode() == Mode::Restricted => Some(DenialReason::ProtocolNotAllowed),
            Verdict::Denied(reason, _) => Some(reason),
            Verdict::Allowed(_) | Verdict::ByName(..) => self.is_over_byte_limit().then_some(DenialReason::ByteLimit),
        };
        if let Some(reason) = reason {
            self.deny_packet(packet, DeniedProtocol::Icmp, None, reason, None);
            return Some(packet::unreachable(packet, router(packet.destination), Unreachable::Prohibited));
        }
        let (request, length) = (packet.bytes.to_vec(), packet.payload.len());
        self.exchange(async move |shared| {
            shared.count_sent(length);
            let reply = ping::run(&request).await?;
            shared.count_received(length);
            Some(reply)
        });
        None
    }

    /// Does something that ends with at most one frame for the guest, unless too much is under way.
    fn exchange(self: &Rc<Self>, work: impl AsyncFnOnce(Rc<Self>) -> Option<Vec<u8>> + 'static) {
        if self.exchanges.get() >= EXCHANGES_MAX {
            return;
        }
        self.exchanges.set(self.exchanges.get() + 1);
        let shared = Rc::clone(self);
        spawn_local(async move {
            if let Some(frame) = work(Rc::clone(&shared)).await {
                shared.port.send(&frame).await;
            }
            shared.exchanges.set(shared.exchanges.get() - 1);
        });
    }
}

fn is_broadcast(address: IpAddr) -> bool {
    matches!(address, IpAddr::V4(v4) if v4.is_broadcast() || v4.octets() == [10, 0, 2, 255])
}

fn key(packet: &Packet<'_>) -> Option<FlowKey> {
    let (guest, remote) = frame::ports(packet.payload)?;
    if guest == 0 || remote == 0 {
        return None;
    }
    Some(FlowKey { guest: SocketAddr::new(packet.source, guest), remote: SocketAddr::new(packet.destination, remote) })
}
