//! Notifies subscribed sessions of changes of VMs and templates: one reader of the event log for all of them. Logs that grow are
//! looked at for those who subscribed to them, every [`LOG_POLL_INTERVAL`].
//!
//! Invariant: the log is read once, however many sessions listen.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nido_api::name::VmName;
use nido_api::{Event, EventKind, EventsRequest};
use nido_core::{Nido, Watch};
use rmcp::model::{ResourceUpdatedNotificationParam, SubscriptionFilter};
use rmcp::service::SubscriptionContext;
use rmcp::{Peer, RoleServer};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::resource_uri::{TEMPLATES, VMS, logs_uri, vm_of};

/// How many events a slow session may be behind.
const CHANGES_BUFFERED_MAX: usize = 1024;
/// How often logs are checked, and how often a session is notified of one at most.
const LOG_POLL_INTERVAL: Duration = Duration::from_secs(2);

/// What has changed.
#[derive(Debug, Clone)]
pub enum Change {
    /// Of a VM, or of the templates.
    Event { kind: EventKind, vm: Option<VmName> },
    /// A stream of a command was kept.
    Output,
}

impl Change {
    /// Which resources are not what they were.
    fn touches(&self, uri: &str) -> bool {
        match self {
            Self::Event { vm: Some(vm), .. } => uri == VMS || uri == logs_uri(vm),
            Self::Event { vm: None, .. } => uri == TEMPLATES,
            Self::Output => false,
        }
    }

    /// Whether there are others than before.
    fn lists(&self) -> bool {
        matches!(self, Self::Output | Self::Event { kind: EventKind::VmCreated | EventKind::VmDeleted, .. })
    }
}

/// Notifies listeners of changes. The event log is not read before the first subscription.
#[derive(Debug)]
pub struct ChangeFeed {
    nido: Arc<Nido>,
    /// The server's background work.
    tasks: TaskTracker,
    /// Completes when no listener remains.
    quiet: CancellationToken,
    sender: broadcast::Sender<Change>,
    started: Mutex<bool>,
}

impl ChangeFeed {
    /// A feed without listeners. The task that reads the event log is one of `tasks`, and runs until `quiet` is done.
    pub fn new(nido: Arc<Nido>, tasks: TaskTracker, quiet: CancellationToken) -> Arc<Self> {
        let sender = broadcast::channel(CHANGES_BUFFERED_MAX).0;
        Arc::new(Self { nido, tasks, quiet, sender, started: Mutex::new(false) })
    }

    /// The list of resources has one more.
    pub fn output_kept(&self) {
        // There may be no listener at the moment.
        let _ = self.sender.send(Change::Output);
    }

    /// What changes from now on.
    fn listen(self: &Arc<Self>) -> broadcast::Receiver<Change> {
        let receiver = self.sender.subscribe();
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut *started, true) {
            match self.nido.last_event() {
                Ok(since) => {
                    let (feed, store) = (Arc::clone(self), Watch::new(&self.nido));
                    drop(self.tasks.spawn(async move { feed.read_events(since, store).await }));
                }
                Err(error) => {
                    *started = false;
                    tracing::error!("changes will not be notified: {error}");
                }
            }
        }
        receiver
    }

    /// Reads the event log until the server ends.
    async fn read_events(&self, since: u64, mut store: Watch) {
        let mut request = EventsRequest { since, ..EventsRequest::default() };
        loop {
            match self.nido.events_behind(&request) {
                Ok((events, cursor)) if cursor != request.since => {
                    request.since = cursor;
                    for Event { event: kind, vm_name: vm, .. } in events {
                        // There may be no listener at the moment.
                        let _ = self.sender.send(Change::Event { kind, vm });
                    }
                    continue;
                }
                Ok(_) => {}
                Err(error) => tracing::warn!("events cannot be read: {error}"),
            }
            tokio::select! {
                () = store.changed() => {}
                () = self.quiet.cancelled() => return,
            }
        }
    }
}

/// What a session with `initialize` has subscribed to.
#[derive(Debug, Default)]
pub struct SubscribedUris(Mutex<HashSet<String>>);

/// How many resources one session may subscribe to.
const SUBSCRIPTIONS: usize = 256;

impl SubscribedUris {
    /// Whether there was room.
    pub fn add(&self, uri: String) -> bool {
        let mut uris = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = uris.len() < SUBSCRIPTIONS || uris.contains(&uri);
        if room {
            uris.insert(uri);
        }
        room
    }

    pub fn remove(&self, uri: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(uri);
    }

    fn all(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    fn affected_uris(&self, change: &Change) -> Vec<String> {
        let uris = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        uris.iter().filter(|uri| change.touches(uri)).cloned().collect()
    }
}

/// How much of each log there was when it was last looked at.
#[derive(Debug, Default)]
struct LogSizes(HashMap<String, u64>);

impl LogSizes {
    /// Which of these have changed since the last look. What is seen for the first time has not.
    fn changed(&mut self, nido: &Nido, uris: &[String]) -> Vec<String> {
        self.0.retain(|uri, _| uris.contains(uri));
        let mut changed = Vec::new();
        for (uri, vm) in uris.iter().filter_map(|uri| Some((uri, vm_of(uri)?))) {
            let Ok(written) = nido.logs_written(&vm) else { continue };
            if self.0.insert(uri.clone(), written).is_some_and(|before| before != written) {
                changed.push(uri.clone());
            }
        }
        changed
    }
}

/// Notifies a session with `initialize` until it ends.
pub async fn notify_session(feed: Arc<ChangeFeed>, peer: Peer<RoleServer>, subscribed: Arc<SubscribedUris>) {
    let mut changes = feed.listen();
    let (mut logs, mut look) = (LogSizes::default(), tokio::time::interval(LOG_POLL_INTERVAL));
    loop {
        let change = tokio::select! {
            change = changes.recv() => change,
            () = feed.quiet.cancelled() => return,
            _ = look.tick() => {
                if peer.is_transport_closed() {
                    return;
                }
                for uri in logs.changed(&feed.nido, &subscribed.all()) {
                    if peer.notify_resource_updated(ResourceUpdatedNotificationParam::new(uri)).await.is_err() {
                        return;
                    }
                }
                continue;
            }
        };
        let sent = match change {
            Ok(change) => {
                let mut sent = Ok(());
                for uri in subscribed.affected_uris(&change) {
                    sent = sent.and(peer.notify_resource_updated(ResourceUpdatedNotificationParam::new(uri)).await);
                }
                if change.lists() { sent.and(peer.notify_resource_list_changed().await) } else { sent }
            }
            // Whatever it missed: the list is worth another look.
            Err(broadcast::error::RecvError::Lagged(_)) => peer.notify_resource_list_changed().await,
            Err(broadcast::error::RecvError::Closed) => return,
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Notifies a request that listens until it is cancelled or the server ends.
pub async fn notify_listener(feed: Arc<ChangeFeed>, context: SubscriptionContext) {
    let mut changes = feed.listen();
    let SubscriptionFilter { resource_subscriptions, resources_list_changed, .. } = context.accepted().clone();
    let (uris, lists) = (resource_subscriptions.unwrap_or_default(), resources_list_changed == Some(true));
    let (mut logs, mut look) = (LogSizes::default(), tokio::time::interval(LOG_POLL_INTERVAL));
    loop {
        let change = tokio::select! {
            _ = look.tick() => {
                for uri in logs.changed(&feed.nido, &uris) {
                    if context.sink().notify_resource_updated(uri).await.is_err() {
                        return;
                    }
                }
                continue;
            }
            change = changes.recv() => change,
            () = context.cancelled() => return,
            () = feed.quiet.cancelled() => return,
        };
        let (touched, listed) = match change {
            Ok(change) => (uris.iter().filter(|uri| change.touches(uri)).cloned().collect(), change.lists()),
            // Whatever it missed.
            Err(broadcast::error::RecvError::Lagged(_)) => (uris.clone(), true),
            Err(broadcast::error::RecvError::Closed) => return,
        };
        for uri in touched {
            if context.sink().notify_resource_updated(uri).await.is_err() {
                return;
            }
        }
        if listed && lists && context.sink().notify_resource_list_changed().await.is_err() {
            return;
        }
    }
}
