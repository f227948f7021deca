//! What a supervisor runs for a VM with virtio-serial: QEMU dials `channel.sock`, clients connect to `agent.sock`, and
//! each client gets a stream of its own to the agent.
//!
//! ```text
//!  channel.sock <- QEMU        Waiting --dial--> Agreeing --ACK--> Up --end--> Waiting ...
//!  agent.sock   <- clients     each waits until the channel is up, then is spliced
//! ```
//!
//! Invariant: one connection from QEMU at a time; when it ends, every splice ends, and the next dial starts afresh.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nido_guest_agent::wire::{self, Refusal, Refused, ToHost};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::error::GuestError;
use super::mux::{HangUp, Mux};
use super::session::Session;
use super::transport::Stream;

/// How many clients are served at once. Further ones are told that the agent is busy.
const MAX_CLIENTS: usize = 64;
/// How long a client may wait for the channel to come up.
const CLIENT_PATIENCE: Duration = Duration::from_secs(120);
/// After so long without an agreement the connection is dropped, and QEMU dials again.
const AGREEMENT_LIMIT: Duration = Duration::from_secs(3600);
/// Pause after a listener could not accept (out of descriptors, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is known of the channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// QEMU is not connected.
    Waiting,
    /// QEMU is; the agent has not answered yet.
    Agreeing,
    /// The agent answers.
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

    /// How many clients are at work, as it changes. One that has connected and said nothing is not.
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

    fn enter(&self) -> Visit {
        self.open.send_modify(|open| *open += 1);
        Visit(self.clone())
    }
}

/// One client's stay.
struct Visit(Activity);

impl Drop for Visit {
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
    tasks: [AbortHandle; 2],
}

impl Channel {
    /// Starts serving: `channel` is where QEMU dials, `clients` is `agent.sock`. Needs a running tokio runtime.
    #[must_use]
    pub fn start(channel: UnixListener, clients: UnixListener) -> Self {
        let activity = Activity::new();
        let (link_now, link) = watch::channel(Link::Waiting);
        let (mux_now, mux) = watch::channel(None);
        let dials = tokio::spawn(serve_channel(channel, link_now, mux_now)).abort_handle();
        let visits = tokio::spawn(serve_clients(clients, mux.clone(), activity.clone())).abort_handle();
        Self { activity, link, mux, tasks: [dials, visits] }
    }

    /// The state of the channel, as it changes.
    #[must_use]
    pub fn link(&self) -> watch::Receiver<Link> {
        self.link.clone()
    }

    /// How busy its clients are. What [`Self::session`] does is not counted.
    #[must_use]
    pub fn activity(&self) -> &Activity {
        &self.activity
    }

    /// Opens a session for the supervisor itself, once the channel is up.
    ///
    /// # Errors
    /// [`GuestError::Unreachable`] if the channel does not come up in time; the errors of [`Session::open`].
    pub async fn session(&self, token: &[u8], deadline: Instant) -> Result<Session, GuestError> {
        let mut mux = self.mux.clone();
        let mux = match timeout_at(deadline, mux.wait_for(Option::is_some)).await {
            Ok(Ok(mux)) => mux.clone(),
            _ => None,
        };
        let Some(mux) = mux else { return Err(GuestError::Unreachable("its channel is not up".into())) };
        let (ours, theirs) = UnixStream::pair().map_err(|e| GuestError::stream(&e))?;
        tokio::spawn(async move { mux.serve(theirs, |_, _| ()).await });
        let ours = ours.into_std().and_then(|ours| Stream::new(ours.into())).map_err(|e| GuestError::stream(&e))?;
        Session::open(ours, token, deadline).await
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

async fn serve_channel(channel: UnixListener, link: watch::Sender<Link>, current: watch::Sender<Option<Mux>>) {
    loop {
        let socket = match channel.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!("cannot accept QEMU's connection: {error}");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        link.send_replace(Link::Agreeing);
        match Mux::start(socket, Instant::now() + AGREEMENT_LIMIT).await {
            Ok(mux) => {
                current.send_replace(Some(mux.clone()));
                link.send_replace(Link::Up);
                let reason = mux.ended().await;
                tracing::info!("the agent's channel ended: {reason}");
            }
            Err(error) => tracing::info!("no agreement on the agent's channel: {error}"),
        }
        current.send_replace(None);
        link.send_replace(Link::Waiting);
    }
}

async fn serve_clients(clients: UnixListener, mux: watch::Receiver<Option<Mux>>, activity: Activity) {
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    let mut visits = JoinSet::new();
    loop {
        while visits.try_join_next().is_some() {}
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
        let (mux, activity) = (mux.clone(), activity.clone());
        visits.spawn(async move {
            if let Err(error) = serve_client(client, mux, &activity).await {
                tracing::debug!("a client's session ended: {error}");
            }
            drop(place);
        });
    }
}

async fn serve_client(
    client: UnixStream,
    mut mux: watch::Receiver<Option<Mux>>,
    activity: &Activity,
) -> Result<(), GuestError> {
    let gone = HangUp::of(&client).map_err(|e| GuestError::stream(&e))?;
    // A connection that says nothing is no use of the guest: it may only look whether someone listens.
    client.readable().await.map_err(|e| GuestError::stream(&e))?;
    if gone.is_now() {
        return Ok(());
    }
    let _visit = activity.enter();
    let up = tokio::select! {
        up = timeout(CLIENT_PATIENCE, mux.wait_for(Option::is_some)) => match up {
            Ok(Ok(mux)) => mux.clone(),
            _ => None,
        },
        () = gone.wait() => None,
    };
    drop(gone);
    let Some(mux) = up else { return Err(GuestError::Gone) };
    mux.serve(client, |inward, outward| activity.count(inward, outward)).await
}

/// Says what the agent would say. A client that cannot take these few bytes at once sees its connection end instead.
fn refuse(client: &UnixStream) {
    let refused = Refused { reason: Refusal::Busy, oldest: wire::VERSION, newest: wire::VERSION };
    if let Ok(frame) = wire::encode(&ToHost::Refused(refused)) {
        let _ = rustix::net::send(client, &frame, rustix::net::SendFlags::NOSIGNAL);
    }
}
