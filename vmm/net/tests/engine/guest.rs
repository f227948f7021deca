//! A guest: smoltcp at the other end of the link, driven by the test's own thread.

use std::net::SocketAddr;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nido_api::egress::Denial;
use nido_net::subnet::{GATEWAY_MAC, GATEWAY_V4, GUEST_MAC, GUEST_V4, MTU};
use nido_net::{ByteLimit, Limits, Mode, Network, Policy, Report, Reports, Settings};
use rustix::event::{PollFd, PollFlags, Timespec};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};
use tokio::sync::mpsc;

/// How long a test waits for anything.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// A guest with its network.
pub struct Guest {
    directory: PathBuf,
    interface: Interface,
    link: Link,
    sockets: SocketSet<'static>,
    started: Instant,
    next_port: u16,
    network: Network,
    /// What was refused, as it is reported.
    pub denials: mpsc::Receiver<Denial>,
    /// Limits of bytes that were reached, as they are reported.
    pub byte_limits: mpsc::Receiver<ByteLimit>,
}

impl Guest {
    /// A guest with these rules.
    pub fn new(mode: Mode, rules: &[&str]) -> Self {
        Self::with_limits(mode, rules, Limits::default())
    }

    /// The same with other limits.
    pub fn with_limits(mode: Mode, rules: &[&str], limits: Limits) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("nido-net-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        let (ours, theirs) = (directory.join("q"), directory.join("s"));
        let engine = UnixDatagram::bind(&theirs).unwrap();
        let policy = Policy { mode, rules: rules.iter().map(|rule| rule.parse().unwrap()).collect() };
        let (denied, denials) = mpsc::channel(64);
        let (reached, byte_limits) = mpsc::channel(4);
        let reports = Reports { denials: denied, pins: mpsc::channel(1).0, byte_limits: reached };
        let hosts = directory.join("hosts");
        let settings = Settings { limits, hosts, ..Settings::new(policy) };
        let network = Network::start(engine, ours.clone(), settings, reports).unwrap();
        let socket = UnixDatagram::bind(&ours).unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut link = Link { socket, peer: theirs };
        let mut interface = Interface::new(Config::new(HardwareAddress::Ip), &mut link, time(Duration::ZERO));
        interface.update_ip_addrs(|addresses| addresses.push(IpCidr::new(IpAddress::from(GUEST_V4), 24)).unwrap());
        interface.routes_mut().add_default_ipv4_route(GATEWAY_V4).unwrap();
        let started = Instant::now();
        let sockets = SocketSet::new(Vec::new());
        Self { directory, interface, link, sockets, started, next_port: 20_000, network, denials, byte_limits }
    }

    /// Moves packets until something holds.
    pub fn until<T>(&mut self, what: &str, mut holds: impl FnMut(&mut Self) -> Option<T>) -> T {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            self.poll();
            if let Some(value) = holds(self) {
                return value;
            }
            assert!(Instant::now() < deadline, "in vain: {what}");
            wait(&self.link.socket, PollFlags::IN);
        }
    }

    /// Moves the packets that are there.
    pub fn poll(&mut self) {
        let now = time(self.started.elapsed());
        self.interface.poll(now, &mut self.link, &mut self.sockets);
    }

    /// Begins a connection to the gateway.
    pub fn dial(&mut self, port: u16) -> SocketHandle {
        self.dial_to(GATEWAY_V4.into(), port)
    }

    /// Begins a connection.
    pub fn dial_to(&mut self, address: IpAddress, port: u16) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 128 * 1024]);
        let mut socket = Socket::new(buffer(), buffer());
        // Otherwise a socket that is freed leaves the other end's last segment unacknowledged.
        socket.set_ack_delay(None);
        self.next_port += 1;
        socket.connect(self.interface.context(), (address, port), self.next_port).unwrap();
        self.sockets.add(socket)
    }

    /// A connection that is established.
    pub fn connect(&mut self, port: u16) -> SocketHandle {
        let socket = self.dial(port);
        self.until("a connection", |guest| {
            let state = guest.socket(socket).state();
            assert!(state != State::Closed, "the connection was refused: {:?}", guest.denials.try_recv());
            (state == State::Established).then_some(())
        });
        socket
    }

    /// A connection's socket.
    pub fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Sends everything.
    pub fn send_all(&mut self, handle: SocketHandle, mut data: &[u8]) {
        while !data.is_empty() {
            let sent = self.until("room to send", |guest| {
                let socket = guest.socket(handle);
                assert!(socket.may_send(), "the connection is over");
                Some(socket.send_slice(data).unwrap()).filter(|sent| *sent > 0)
            });
            data = &data[sent..];
        }
    }

    /// Receives until the end of the other direction.
    pub fn receive_all(&mut self, handle: SocketHandle) -> Vec<u8> {
        let mut received = Vec::new();
        let mut buffer = vec![0; 128 * 1024];
        loop {
            let more = self.until("data, or its end", |guest| {
                let socket = guest.socket(handle);
                if socket.can_recv() {
                    return Some(socket.recv_slice(&mut buffer).unwrap());
                }
                (!socket.may_recv()).then_some(0)
            });
            if more == 0 {
                return received;
            }
            received.extend(&buffer[..more]);
        }
    }

    /// Waits until a connection is closed or reset.
    pub fn closed(&mut self, handle: SocketHandle) {
        self.until("the end of a connection", |guest| {
            matches!(guest.socket(handle).state(), State::Closed | State::TimeWait).then_some(())
        });
    }

    /// Frees a connection that is closed.
    pub fn release_socket(&mut self, handle: SocketHandle) {
        // Its last acknowledgement is still to be sent.
        self.poll();
        self.sockets.remove(handle);
    }

    /// Sends a frame as it is.
    pub fn send_frame(&mut self, frame: &[u8]) {
        while let Err(error) = self.link.socket.send_to(frame, &self.link.peer) {
            assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{error}");
            wait(&self.link.socket, PollFlags::OUT);
        }
    }

    /// The next frame of the engine's that `wanted` accepts.
    pub fn frame(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        self.frame_within(TIMEOUT, wanted).expect("such a frame")
    }

    /// The same, within a time.
    pub fn frame_within(&mut self, time: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let deadline = Instant::now() + time;
        let mut buffer = vec![0; 1 << 16];
        while Instant::now() < deadline {
            match self.link.socket.recv(&mut buffer) {
                Ok(length) if wanted(&buffer[..length]) => return Some(buffer[..length].to_vec()),
                Ok(_) => {}
                Err(_) => wait(&self.link.socket, PollFlags::IN),
            }
        }
        None
    }

    /// Has the network reset connections that the guest believes in.
    pub fn reset_connections(&self, ends: Vec<(SocketAddr, SocketAddr)>) {
        self.network.reset_connections(ends);
    }

    /// What the network did.
    pub fn report(&self) -> Report {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(self.network.report()).unwrap()
    }

    /// Waits until no connection is open.
    pub fn quiet(&mut self) {
        self.until("that all connections end", |guest| (guest.report().open == 0).then_some(()));
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// An Ethernet header of the guest's, and this packet.
pub fn frame_of(ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(14 + packet.len());
    frame.extend(GATEWAY_MAC);
    frame.extend(GUEST_MAC);
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    frame
}

/// Waits until the socket is ready; for a moment at most, since time alone can be what is waited for.
fn wait(socket: &UnixDatagram, flags: PollFlags) {
    const MOMENT: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
    let _ = rustix::event::poll(&mut [PollFd::new(socket, flags)], Some(&MOMENT));
}

fn time(elapsed: Duration) -> smoltcp::time::Instant {
    smoltcp::time::Instant::from_micros(elapsed.as_micros() as i64)
}

/// Like QEMU's end it sends to the engine's socket by name, and receives from any.
struct Link {
    socket: UnixDatagram,
    peer: PathBuf,
}

struct Received(Vec<u8>);
struct Sender<'a>(&'a Link);

impl phy::Device for Link {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Sender<'_>)> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let length = self.socket.recv(&mut buffer).ok()?;
            if buffer[12..14] == [8, 0] {
                return Some((Received(buffer[14..length].to_vec()), Sender(self)));
            }
        }
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sender<'_>> {
        Some(Sender(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        capabilities
    }
}

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

impl phy::TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, write: F) -> R {
        let mut packet = vec![0; length];
        let result = write(&mut packet);
        // A link that is full loses the frame.
        let _ = self.0.socket.send_to(&frame_of(0x0800, &packet), &self.0.peer);
        result
    }
}
