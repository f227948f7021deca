//! What all connections of a VM share: the way to the guest, the rules, the names, the counters and the limits.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nido_api::egress::{Denial, DenialReason, DeniedProtocol, DomainName, EgressRule, Protocol};
use tokio::sync::{Notify, mpsc};
use tokio::time::sleep;

use crate::credentials::Credentials;
use crate::denials::{Denials, Refused};
use crate::names::{NameBudget, PinRecord, Pins};
use crate::packet;
use crate::policy::{Mode, Policy, Verdict};
use crate::port::Port;
use crate::resources::{Memory, Rate};
use crate::tasks::{FlowKey, Tasks};
use crate::traffic::{ByteLimit, Count, Traffic, TrafficFile};

/// How long after a change what the guest has resolved is sent.
const PINS_DELAY: Duration = Duration::from_secs(1);
/// The port of HTTP over TLS.
const HTTPS_PORT: u16 = 443;

/// What the guest may use at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections of TCP.
    pub tcp_flows: usize,
    /// Pairs of ends of UDP.
    pub udp_flows: usize,
    /// New connections and pairs in a second.
    pub new_flows_per_second: u32,
    /// Questions to the name server in a second.
    pub questions_per_second: u32,
    /// Bytes that it may send; no limit if absent.
    pub sent_bytes: Option<u64>,
    /// Bytes that it may receive; no limit if absent.
    pub received_bytes: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            tcp_flows: 512,
            udp_flows: 128,
            new_flows_per_second: 200,
            questions_per_second: 50,
            sent_bytes: None,
            received_bytes: None,
        }
    }
}

/// What a network starts with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What the guest may reach.
    pub policy: Policy,
    /// What it may use.
    pub limits: Limits,
    /// The host's own file of names.
    pub hosts: PathBuf,
    /// What the guest has resolved before, and how long ago that was exported.
    pub pins: (Vec<PinRecord>, Duration),
    /// The secrets that requests get.
    pub credentials: Option<Credentials>,
    /// What has passed before, and where the count is kept, if it is.
    pub traffic: (Count, Option<TrafficFile>),
}

impl Settings {
    /// The usual limits, the host's usual file, and a guest that has resolved nothing.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        let (pins, hosts) = (Default::default(), "/etc/hosts".into());
        Self { policy, limits: Limits::default(), hosts, pins, credentials: None, traffic: Default::default() }
    }
}

/// To whom the network reports.
#[derive(Debug, Clone)]
pub struct Reports {
    /// What it refuses.
    pub denials: mpsc::Sender<Denial>,
    /// What the guest has resolved, after it has changed.
    pub pins: mpsc::Sender<Vec<PinRecord>>,
    /// A limit of bytes that was reached: when it is, and then once a minute at most, while the guest tries to use the network.
    pub byte_limits: mpsc::Sender<ByteLimit>,
}

/// What has happened.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections that were begun.
    connections: Cell<u64>,
    /// Frames that were dropped.
    dropped: Cell<u64>,
}

impl Counters {
    /// A connection was begun.
    pub fn add_connection(&self) {
        self.connections.set(self.connections.get() + 1);
    }

    /// A frame was dropped.
    pub fn add_dropped(&self) {
        self.dropped.set(self.dropped.get() + 1);
    }
}

/// What a VM's network did: bytes since its start, the rest since its supervisor started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Bytes that the guest has sent.
    pub sent_bytes: u64,
    /// Bytes that it has got.
    pub received_bytes: u64,
    /// Connections that were begun.
    pub connections: u64,
    /// Connections and pairs of ends of UDP that are open.
    pub open: usize,
    /// Frames that were dropped: malformed, with another source, or fragments; and those that QEMU did not take.
    pub dropped_frames: u64,
    /// How often something was refused.
    pub denied: u64,
    /// What was refused.
    pub denials: Vec<Denial>,
    /// Refusals that are not among `denials`.
    pub other_denials: u64,
}

/// What all tasks share.
pub struct Shared {
    /// The way to the guest.
    pub port: Port,
    /// What has happened.
    pub counters: Counters,
    /// The bytes that have passed, and may.
    pub traffic: Traffic,
    /// What connections hold.
    pub memory: Memory,
    /// Connections of TCP.
    pub tcp: Rc<Tasks>,
    /// Pairs of ends of UDP.
    pub udp: Rc<Tasks>,
    /// Other exchanges that are under way: echo requests and questions.
    pub exchanges: Cell<usize>,
    /// What the guest may use.
    pub limits: Limits,
    /// New connections and pairs.
    pub new_flows: Rate,
    /// Questions to the name server.
    pub questions: Rate,
    /// The host's own file of names.
    pub hosts: PathBuf,
    /// The secrets that requests get.
    pub credentials: Option<Rc<Credentials>>,
    policy: RefCell<Policy>,
    pins: RefCell<Pins>,
    pins_changed: Notify,
    budget: RefCell<NameBudget<EgressRule>>,
    denials: RefCell<Denials>,
    reports: mpsc::Sender<Denial>,
    /// To whom a limit of bytes that was reached is reported.
    pub byte_limits: mpsc::Sender<ByteLimit>,
    /// When a limit of bytes was last reported.
    pub byte_limit_reported: Cell<Option<Instant>>,
}

impl Shared {
    /// A network without connections.
    pub fn new(
        port: Port,
        settings: Settings,
        reports: mpsc::Sender<Denial>,
        byte_limits: mpsc::Sender<ByteLimit>,
    ) -> Rc<Self> {
        let (limits, now) = (settings.limits, Instant::now());
        let mut pins = Pins::default();
        pins.import(&settings.pins.0, settings.pins.1, now);
        Rc::new(Self {
            port,
            counters: Counters::default(),
            traffic: Traffic::new(settings.traffic.0, limits.sent_bytes, limits.received_bytes, settings.traffic.1),
            memory: Memory::default(),
            tcp: Rc::default(),
            udp: Rc::default(),
            exchanges: Cell::new(0),
            limits,
            new_flows: Rate::new(limits.new_flows_per_second, now),
            questions: Rate::new(limits.questions_per_second, now),
            hosts: settings.hosts,
            credentials: settings.credentials.map(Rc::new),
            policy: RefCell::new(settings.policy),
            pins: RefCell::new(pins),
            pins_changed: Notify::new(),
            budget: RefCell::default(),
            denials: RefCell::default(),
            reports,
            byte_limits,
            byte_limit_reported: Cell::new(None),
        })
    }

    /// Whether the first bytes of a connection that needs no name are looked at all the same, because it may get a secret.
    pub fn watches(&self, remote: SocketAddr) -> bool {
        remote.port() == HTTPS_PORT && self.credentials.is_some()
    }

    /// Counts a refusal, and reports it if that is due.
    pub fn deny(&self, refused: Refused) {
        if let Some(denial) = self.denials.borrow_mut().count(refused, Instant::now()) {
            // One that finds no room is in the list all the same.
            let _ = self.reports.try_send(denial);
        }
    }

    /// A connection was refused, or ended, after it had begun.
    pub fn deny_connection(&self, remote: SocketAddr, reason: DenialReason, name: Option<String>) {
        let (address, port) = (Some(remote.ip()), Some(remote.port()));
        self.deny(Refused { protocol: DeniedProtocol::Tcp, name, address, port, reason });
    }

    /// A datagram was refused after others had passed.
    pub fn deny_datagram(&self, remote: SocketAddr, reason: DenialReason) {
        let (address, port) = (Some(remote.ip()), Some(remote.port()));
        self.deny(Refused { protocol: DeniedProtocol::Udp, name: None, address, port, reason });
    }

    /// What holds without a rule.
    pub fn mode(&self) -> Mode {
        self.policy.borrow().mode
    }

    /// Decides about a destination. The names whose addresses are too old to count have to be resolved again first.
    pub fn decide(&self, destination: SocketAddr, protocol: Protocol) -> (Verdict, Vec<DomainName>) {
        let now = Instant::now();
        let (mut fresh, mut stale) = (Vec::new(), Vec::new());
        for (name, is_fresh) in self.pins.borrow().names_of(destination.ip(), now) {
            let Ok(name) = name.parse() else { continue };
            if is_fresh { fresh.push(name) } else { stale.push(name) }
        }
        let policy = self.policy.borrow();
        let verdict = policy.decide(destination, protocol, &fresh);
        stale.retain(|name| {
            let again = policy.decide(destination, protocol, std::slice::from_ref(name));
            matches!((&verdict, again), (Verdict::Denied(..), Verdict::ByName(..)))
        });
        if matches!(verdict, Verdict::ByName(..)) {
            self.pins.borrow_mut().touch(destination.ip(), now);
        }
        (verdict, stale)
    }

    /// Whether a connection to this address may be for this name.
    pub fn is_allowed(&self, remote: SocketAddr, name: &str) -> bool {
        match self.decide(remote, Protocol::Tcp).0 {
            Verdict::ByName(_, names) => names.iter().any(|allowed| allowed.as_str() == name),
            Verdict::Allowed(_) | Verdict::Denied(..) => false,
        }
    }

    /// Whether a name may be resolved now.
    ///
    /// # Errors
    /// Why not.
    pub fn admit_question(&self, name: &DomainName) -> Result<(), DenialReason> {
        let policy = self.policy.borrow();
        if !policy.allows_question(name) {
            return Err(DenialReason::NameNotAllowed);
        }
        match policy.wildcard(name) {
            Some(rule) => {
                let charged = self.budget.borrow_mut().charge(rule.clone(), name.as_str(), Instant::now());
                charged.map_err(|_| DenialReason::RateLimit)
            }
            None => Ok(()),
        }
    }

    /// Whether an address may be part of an answer.
    pub fn allows_answer(&self, address: IpAddr) -> bool {
        self.policy.borrow().allows_answer(address)
    }

    /// The name server has returned these addresses for a name.
    pub fn remember(&self, name: &DomainName, addresses: &[IpAddr]) {
        self.pins.borrow_mut().insert(name.as_str(), addresses, Instant::now());
        self.pins_changed.notify_one();
    }

    /// What the guest has resolved, as it is stored.
    pub fn export_pins(&self) -> Vec<PinRecord> {
        self.pins.borrow().export(Instant::now())
    }

    /// Sends what the guest has resolved, after it has changed, until nobody wants it any more.
    pub async fn send_pins(&self, to: mpsc::Sender<Vec<PinRecord>>) {
        loop {
            self.pins_changed.notified().await;
            // A page of a browser resolves many names at once.
            sleep(PINS_DELAY).await;
            if to.send(self.export_pins()).await.is_err() {
                return;
            }
        }
    }

    /// Replaces the rules. Connections that they no longer allow are reset.
    pub fn set_policy(&self, policy: Policy) {
        self.budget.borrow_mut().retain(|rule| policy.rules.contains(rule));
        self.policy.replace(policy);
        let stays = |key: &FlowKey, protocol| {
            let (verdict, stale) = self.decide(key.remote, protocol);
            crate::subnet::is_name_server(key.remote.ip())
                || !matches!(verdict, Verdict::Denied(..))
                || !stale.is_empty()
        };
        self.tcp.retain(|key| stays(key, Protocol::Tcp));
        self.udp.retain(|key| stays(key, Protocol::Udp));
    }

    /// Provokes the guest to show the numbers of connections that are not known here: it answers a segment that does not fit with
    /// those that do, and gets a reset.
    pub async fn reset_connections(&self, ends: Vec<(SocketAddr, SocketAddr)>) {
        const ACK: u8 = 0x10;
        for (guest, remote) in ends {
            let is_known = self.tcp.has(&FlowKey { guest, remote });
            if !is_known && guest.is_ipv4() == remote.is_ipv4() {
                self.port.send(&packet::tcp_without_data(remote, guest, 1, 1, ACK)).await;
            }
        }
    }

    /// What the network did.
    pub fn report(&self) -> Report {
        let denials = self.denials.borrow();
        let (listed, other_denials) = denials.list();
        let passed = self.traffic.count();
        Report {
            sent_bytes: passed.sent,
            received_bytes: passed.received,
            connections: self.counters.connections.get(),
            open: self.tcp.count() + self.udp.count(),
            dropped_frames: self.counters.dropped.get() + self.port.lost(),
            denied: denials.total(),
            denials: listed,
            other_denials,
        }
    }
}
