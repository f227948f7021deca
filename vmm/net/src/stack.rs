//! TCP towards the guest for one connection: smoltcp with one address, one route and one socket. A stack for each connection costs
//! less than one for all: smoltcp looks through all its sockets for each packet.

use std::collections::VecDeque;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{RecvError, SendError, Socket, SocketBuffer, State};
use smoltcp::wire::{HardwareAddress, IpCidr};

use crate::frame::{IPV4, IPV6};
use crate::subnet::{ETHERNET_HEADER, GATEWAY_MAC, GATEWAY_V6, GUEST_MAC, GUEST_V4, MTU};

/// Buffer of each direction, in bytes. Smaller ones slow transfers down; larger ones do as well. The kernel provides a page of it
/// when it is used.
pub const BUFFER: usize = 256 * 1024;

/// One connection's TCP.
pub struct Stack {
    interface: Interface,
    queues: Queues,
    sockets: SocketSet<'static>,
    socket: SocketHandle,
    started: Instant,
}

impl Stack {
    /// The end that the guest connects to.
    #[must_use]
    pub fn new(remote: SocketAddr) -> Self {
        let mut queues = Queues { received: VecDeque::new(), frames: Vec::new(), is_v4: remote.is_ipv4() };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = RandomState::new().hash_one(remote);
        let mut interface = Interface::new(config, &mut queues, time(Duration::ZERO));
        let width = if remote.is_ipv4() { 32 } else { 128 };
        interface.update_ip_addrs(|addresses| {
            let _ = addresses.push(IpCidr::new(remote.ip().into(), width));
        });
        let _ = match remote.ip() {
            IpAddr::V4(_) => interface.routes_mut().add_default_ipv4_route(GUEST_V4).map(drop),
            IpAddr::V6(_) => interface.routes_mut().add_default_ipv6_route(GATEWAY_V6).map(drop),
        };
        let buffer = || SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        let _ = socket.listen((smoltcp::wire::IpAddress::from(remote.ip()), remote.port()));
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let socket = sockets.add(socket);
        Self { interface, queues, sockets, socket, started: Instant::now() }
    }

    /// Takes a packet of the guest's.
    pub fn receive(&mut self, packet: Vec<u8>) {
        self.queues.received.push_back(packet);
    }

    /// Does what packets and time require. Frames for the guest may be there afterwards.
    pub fn poll(&mut self) {
        let now = self.now();
        self.interface.poll(now, &mut self.queues, &mut self.sockets);
    }

    /// When it has to be polled at the latest.
    pub fn poll_at(&mut self) -> Option<Instant> {
        let now = self.now();
        let delay = self.interface.poll_delay(now, &self.sockets)?;
        Some(Instant::now() + Duration::from_micros(delay.total_micros()))
    }

    /// The frames for the guest.
    pub fn take_frames(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.queues.frames)
    }

    /// The state of the connection.
    pub fn state(&self) -> State {
        self.socket().state()
    }

    /// Whether the guest has sent what was not taken yet.
    pub fn can_receive(&self) -> bool {
        self.socket().can_recv()
    }

    /// Whether the guest has sent everything, and all of it was taken.
    pub fn is_received(&self) -> bool {
        !self.socket().may_recv() && !matches!(self.state(), State::Listen | State::SynReceived)
    }

    /// Whether there is room for data to the guest.
    pub fn can_send(&self) -> bool {
        self.socket().can_send()
    }

    /// Bytes that wait in both directions.
    pub fn queued(&self) -> usize {
        self.socket().recv_queue() + self.socket().send_queue()
    }

    /// Passes what the guest has sent to `take`, which returns how much of it it has taken.
    ///
    /// # Errors
    /// The connection is over.
    pub fn take<R>(&mut self, take: impl FnOnce(&mut [u8]) -> (usize, R)) -> Result<R, RecvError> {
        self.sockets.get_mut::<Socket<'_>>(self.socket).recv(take)
    }

    /// Lets `fill` write data for the guest, which returns how much it has written.
    ///
    /// # Errors
    /// The connection is over.
    pub fn fill<R>(&mut self, fill: impl FnOnce(&mut [u8]) -> (usize, R)) -> Result<R, SendError> {
        self.sockets.get_mut::<Socket<'_>>(self.socket).send(fill)
    }

    /// Everything was sent to the guest.
    pub fn close(&mut self) {
        self.sockets.get_mut::<Socket<'_>>(self.socket).close();
    }

    /// Resets the connection.
    pub fn abort(&mut self) {
        self.sockets.get_mut::<Socket<'_>>(self.socket).abort();
    }

    fn socket(&self) -> &Socket<'static> {
        self.sockets.get(self.socket)
    }

    fn now(&self) -> smoltcp::time::Instant {
        time(self.started.elapsed())
    }
}

fn time(elapsed: Duration) -> smoltcp::time::Instant {
    smoltcp::time::Instant::from_micros(i64::try_from(elapsed.as_micros()).unwrap_or(i64::MAX))
}

/// Packets of the guest's, and frames for it.
struct Queues {
    received: VecDeque<Vec<u8>>,
    frames: Vec<Vec<u8>>,
    is_v4: bool,
}

struct Received(Vec<u8>);

struct Frames<'a> {
    frames: &'a mut Vec<Vec<u8>>,
    is_v4: bool,
}

impl phy::Device for Queues {
    type RxToken<'a> = Received;
    type TxToken<'a> = Frames<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Frames<'_>)> {
        let packet = self.received.pop_front()?;
        Some((Received(packet), Frames { frames: &mut self.frames, is_v4: self.is_v4 }))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Frames<'_>> {
        Some(Frames { frames: &mut self.frames, is_v4: self.is_v4 })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // The link loses frames, and does not damage them. A guest that sends wrong sums deceives itself.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

impl phy::TxToken for Frames<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, write: F) -> R {
        let mut frame = vec![0; ETHERNET_HEADER + length];
        frame[..6].copy_from_slice(&GUEST_MAC);
        frame[6..12].copy_from_slice(&GATEWAY_MAC);
        frame[12..14].copy_from_slice(&if self.is_v4 { IPV4 } else { IPV6 }.to_be_bytes());
        let result = write(&mut frame[ETHERNET_HEADER..]);
        self.frames.push(frame);
        result
    }
}
