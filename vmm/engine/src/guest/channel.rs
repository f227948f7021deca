//! What a supervisor runs for a VM with virtio-serial: QEMU dials `channel.sock`, clients connect to `agent.sock`, and
//! each client gets a stream of its own to the agent.
//!
//! ```text
//!  channel.sock <- QEMU        Waiting --dial--> [bootstrap_requests] Agreeing --ACK--> Up --end--> Waiting ...
//!  agent.sock   <- clients     each waits until the channel is up, then is spliced
//! ```
//!
//! Invariant: one connection from QEMU at a time; when it ends, every splice ends, and the next dial starts afresh.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nido_guest_agent::wire::{self, MAX_SESSIONS, Refusal, Refused, ToHost};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::deadline::in_time;
use super::error::GuestError;
use super::mux::{self, HangUp, Mux};
use super::transport::Stream;

/// How many clients are served at once. Further ones get the reply that the agent is busy. The agent distinguishes their requests:
/// idle connections to its ports take no places of commands.
const MAX_CLIENTS: usize = MAX_SESSIONS;
/// How long a client may wait for the channel to come up.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(120);
/// After so long without an agreement the connection is dropped, and QEMU dials again.
const AGREEMENT_LIMIT: Duration = Duration::from_secs(3600);
/// How long after the last bootstrap request the multiplexer may be delayed while no client needs it: guests that were
/// loaded together need their first moments for the identity reset.
const MUX_LATEST: Duration = Duration::from_secs(1);
/// Pause after a listener could not accept (out of descriptors, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is known of the channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// QEMU is not connected.
    Waiting,
    /// QEMU is connected; the agent has not replied yet.
    Agreeing,
    /// The agent replies.
    Up,
}

/// How busy the clients keep a guest: what the idle limit goes by.
#[derive(Debug, Clone)]
pub struct Activity {
    open: Arc<watch::Sender<usize>>,
    bytes: Arc<(AtomicU64, AtomicU64)>,
}

impl Activity {
    fn new() -> Self {
        Self { open: Arc::new(watch::channel(0).0), bytes: Arc::default() }
    }

    /// How many clients are active, as it changes. One that has sent nothing is not.
    #[must_use]
    pub fn open(&self) -> watch::Receiver<usize> {
        self.open.subscribe()
    }

    /// Bytes carried so far, into the guest and out of it.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        (self.bytes.0.load(Ordering::Relaxed), self.bytes.1.load(Ordering::Relaxed))
    }

    fn count(&self, inward: usize, outward: usize) {
        self.bytes.0.fetch_add(inward as u64, Ordering::Relaxed);
        self.bytes.1.fetch_add(outward as u64, Ordering::Relaxed);
    }

    fn enter(&self) -> ActiveSession {
        self.open.send_modify(|open| *open += 1);
        ActiveSession(self.clone())
    }
}

/// One active client session.
struct ActiveSession(Activity);

impl Drop for ActiveSession {
    fn drop(&mut self) {
        self.0.open.send_modify(|open| *open -= 1);
    }
}

/// The running channel of one VM. Dropping it ends it.
#[derive(Debug)]
pub struct Channel {
    activity: Activity,
    link: watch::Receiver<Link>,
    mux: watch::Receiver<Option<Mux>>,
    open: watch::Sender<bool>,
    close: mpsc::Sender<CloseRequest>,
    /// A client waits for the multiplexer.
    wanted: Arc<Notify>,
    /// Dropped when no more bootstrap requests are accepted.
    bootstrap_requests: Mutex<Option<mpsc::Sender<BootstrapRequest>>>,
    tasks: [AbortHandle; 2],
}

impl Channel {
    /// Starts serving: `channel` is where QEMU dials, `clients` is `agent.sock`. Clients wait for [`Self::open`]. Needs a
    /// running tokio runtime.
    ///
    /// With `bootstrap` the agent is one that was saved while it waited for its host. It gets only
    /// [`Self::bootstrap_request`]s until [`Self::end_bootstrap`] starts the multiplexer.
    #[must_use]
    pub fn start(channel: UnixListener, clients: UnixListener, bootstrap: bool) -> Self {
        let activity = Activity::new();
        let (link_now, link) = watch::channel(Link::Waiting);
        let (mux_now, mux) = watch::channel(None);
        let (open, opened) = watch::channel(false);
        let (close, close_requests) = mpsc::channel(1);
        let (bootstrap_request, bootstrap_queue) = mpsc::channel(1);
        let wanted = Arc::new(Notify::new());
        let connections = ConnectionServer {
            link: link_now,
            current: mux_now,
            close_requests,
            bootstrap_queue,
            wanted: wanted.clone(),
        };
        let connections = tokio::spawn(connections.serve(channel)).abort_handle();
        let gate = ClientGate { opened, mux: mux.clone(), wanted: wanted.clone() };
        let sessions = tokio::spawn(serve_clients(clients, gate, activity.clone())).abort_handle();
        let bootstrap_requests = Mutex::new(bootstrap.then_some(bootstrap_request));
        Self { activity, link, mux, open, close, wanted, bootstrap_requests, tasks: [connections, sessions] }
    }

    /// Sends a hello and a request in one message, and returns the reply. `None` after [`Self::end_bootstrap`]: then there are streams.
    ///
    /// # Errors
    /// [`GuestError::Gone`], [`GuestError::Timeout`].
    pub async fn bootstrap_request(&self, words: Vec<u8>, deadline: Instant) -> Option<Result<Vec<u8>, GuestError>> {
        let bootstrap_requests = self.bootstrap_requests.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            bootstrap_requests.send(BootstrapRequest { words, deadline, reply }).await.map_err(|_| GuestError::Gone)?;
            answer.await.map_err(|_| GuestError::Gone)?
        };
        Some(in_time(exchange, deadline, "to reply to a bootstrap request").await)
    }

    /// Lets the multiplexer start, as soon as a client needs it, at the latest after a delay.
    pub fn end_bootstrap(&self) {
        self.bootstrap_requests.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Admits clients, or makes new ones wait until the identity of a loaded guest was reset.
    pub fn open(&self, open: bool) {
        self.open.send_replace(open);
    }

    /// Whether sessions can be opened.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.mux.borrow().is_some()
    }

    /// Ends every session and synchronizes with the agent again, because it was restarted.
    pub fn reset(&self) {
        let mux = self.mux.borrow().clone();
        tokio::spawn(async move {
            if let Some(mux) = mux {
                mux.end().await;
            }
        });
    }

    /// Ends every session and lets the agent wait for the host's next message, so that the machine can be saved. The
    /// connection stays; nothing goes over it any more.
    ///
    /// # Errors
    /// [`GuestError::Gone`], [`GuestError::Timeout`].
    pub async fn close_for_save(&self, deadline: Instant) -> Result<(), GuestError> {
        self.wanted.notify_one();
        let (reply, answer) = oneshot::channel();
        self.close.send(CloseRequest { deadline, reply }).await.map_err(|_| GuestError::Gone)?;
        match timeout_at(deadline, answer).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(GuestError::Gone),
            Err(_) => Err(GuestError::Timeout { what: "to close its channel" }),
        }
    }

    /// The state of the channel, as it changes.
    #[must_use]
    pub fn link(&self) -> watch::Receiver<Link> {
        self.link.clone()
    }

    /// How busy its clients are. What goes over [`Self::stream`] is not counted.
    #[must_use]
    pub fn activity(&self) -> &Activity {
        &self.activity
    }

    /// A stream for the supervisor itself, once the channel is up, whether or not it is open for others.
    ///
    /// # Errors
    /// [`GuestError::Unreachable`] if the channel does not come up in time.
    pub async fn stream(&self, deadline: Instant) -> Result<Stream, GuestError> {
        self.wanted.notify_one();
        let mut mux = self.mux.clone();
        let mux = match timeout_at(deadline, mux.wait_for(Option::is_some)).await {
            Ok(Ok(mux)) => mux.clone(),
            _ => None,
        };
        let Some(mux) = mux else { return Err(GuestError::Unreachable("its channel is not open".into())) };
        let (ours, theirs) = UnixStream::pair().map_err(|e| GuestError::stream(&e))?;
        tokio::spawn(async move { mux.serve(theirs, |_, _| ()).await });
        ours.into_std().and_then(|ours| Stream::new(ours.into())).map_err(|e| GuestError::stream(&e))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// A request to close all sessions.
#[derive(Debug)]
struct CloseRequest {
    deadline: Instant,
    reply: oneshot::Sender<Result<(), GuestError>>,
}

/// A hello and a request in one message.
#[derive(Debug)]
struct BootstrapRequest {
    words: Vec<u8>,
    deadline: Instant,
    reply: oneshot::Sender<Result<Vec<u8>, GuestError>>,
}

/// Serves QEMU's connections, one after the other.
struct ConnectionServer {
    link: watch::Sender<Link>,
    current: watch::Sender<Option<Mux>>,
    close_requests: mpsc::Receiver<CloseRequest>,
    bootstrap_queue: mpsc::Receiver<BootstrapRequest>,
    wanted: Arc<Notify>,
}

impl ConnectionServer {
    async fn serve(mut self, channel: UnixListener) {
        loop {
            let socket = match channel.accept().await {
                Ok((socket, _)) => socket,
                Err(error) => {
                    tracing::warn!("cannot accept QEMU's connection: {error}");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            self.serve_bootstrap_requests(&socket).await;
            self.link.send_replace(Link::Agreeing);
            // A second way to the same connection: it outlives the multiplexer when that is ended for a save.
            let kept = duplicate(&socket);
            match Mux::start(socket, Instant::now() + AGREEMENT_LIMIT).await {
                Ok(mux) => self.serve_mux(mux, kept).await,
                Err(error) => tracing::info!("no agreement on the agent's channel: {error}"),
            }
            self.current.send_replace(None);
            self.link.send_replace(Link::Waiting);
        }
    }

    async fn serve_bootstrap_requests(&mut self, socket: &UnixStream) {
        let mut had_any = false;
        // Ends when all senders are dropped.
        while let Some(request) = self.bootstrap_queue.recv().await {
            let _ = request.reply.send(mux::bootstrap_request(socket, &request.words, request.deadline).await);
            had_any = true;
        }
        if had_any {
            // Late or not, it is time.
            let _ = timeout(MUX_LATEST, self.wanted.notified()).await;
        }
    }

    async fn serve_mux(&mut self, mux: Mux, kept: std::io::Result<UnixStream>) {
        self.current.send_replace(Some(mux.clone()));
        self.link.send_replace(Link::Up);
        tokio::select! {
            reason = mux.ended() => tracing::info!("the agent's channel ended: {reason}"),
            Some(close) = self.close_requests.recv() => {
                self.current.send_replace(None);
                mux.end().await;
                hold_closed(kept, close).await;
            }
        }
    }
}

fn duplicate(socket: &UnixStream) -> std::io::Result<UnixStream> {
    let again = rustix::io::fcntl_dupfd_cloexec(socket, 0)?;
    UnixStream::from_std(again.into())
}

/// Closes the agent's channel, then holds the connection until QEMU closes it.
async fn hold_closed(socket: std::io::Result<UnixStream>, close: CloseRequest) {
    let outcome = async {
        let socket = socket.map_err(|e| GuestError::stream(&e))?;
        mux::close_for_save(&socket, close.deadline).await.map(|()| socket)
    };
    match outcome.await {
        Ok(socket) => {
            let _ = close.reply.send(Ok(()));
            // Whatever the guest still sends is not a reply to anything.
            let mut bin = [0; 4096];
            while socket.readable().await.is_ok() {
                match socket.try_read(&mut bin) {
                    Ok(1..) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Ok(0) | Err(_) => return,
                }
            }
        }
        Err(error) => drop(close.reply.send(Err(error))),
    }
}

/// What clients have to wait for.
#[derive(Debug, Clone)]
struct ClientGate {
    opened: watch::Receiver<bool>,
    mux: watch::Receiver<Option<Mux>>,
    wanted: Arc<Notify>,
}

impl ClientGate {
    /// Waits until the channel is up and open for clients.
    async fn pass(mut self) -> Option<Mux> {
        self.wanted.notify_one();
        self.opened.wait_for(|open| *open).await.ok()?;
        self.mux.wait_for(Option::is_some).await.ok()?.clone()
    }
}

async fn serve_clients(clients: UnixListener, gate: ClientGate, activity: Activity) {
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    let mut sessions = JoinSet::new();
    loop {
        while sessions.try_join_next().is_some() {}
        let client = match clients.accept().await {
            Ok((client, _)) => client,
            Err(error) => {
                tracing::warn!("cannot accept a client: {error}");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            refuse(&client);
            continue;
        };
        let (gate, activity) = (gate.clone(), activity.clone());
        sessions.spawn(async move {
            if let Err(error) = serve_client(client, gate, &activity).await {
                tracing::debug!("a client's session ended: {error}");
            }
            drop(place);
        });
    }
}

async fn serve_client(client: UnixStream, gate: ClientGate, activity: &Activity) -> Result<(), GuestError> {
    let gone = HangUp::of(&client).map_err(|e| GuestError::stream(&e))?;
    // A connection that sends nothing does not count as use of the guest: it may only check for a listener.
    client.readable().await.map_err(|e| GuestError::stream(&e))?;
    if gone.is_now() {
        return Ok(());
    }
    let _session = activity.enter();
    let up = tokio::select! {
        up = timeout(CLIENT_TIMEOUT, gate.pass()) => up.ok().flatten(),
        () = gone.wait() => None,
    };
    drop(gone);
    let Some(mux) = up else { return Err(GuestError::Gone) };
    mux.serve(client, |inward, outward| activity.count(inward, outward)).await
}

/// Sends the agent's reply. A client that cannot receive these few bytes at once is disconnected instead.
fn refuse(client: &UnixStream) {
    let refused = Refused { reason: Refusal::Busy, oldest: wire::VERSION_OLDEST, newest: wire::VERSION };
    if let Ok(frame) = wire::encode(&ToHost::Refused(refused)) {
        let _ = rustix::net::send(client, &frame, rustix::net::SendFlags::NOSIGNAL);
    }
}
