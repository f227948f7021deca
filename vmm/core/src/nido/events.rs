//! Reads events: the existing ones, and new ones.
//!
//! Writers do not notify readers, because a writer may be killed before it could. Instead, readers watch the store's
//! file, which the kernel does for them, and look by themselves now and then.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nido_api::error::{Code, Error, Result};
use nido_api::{Event, EventList, EventsRequest};
use nido_engine::home::SNAPSHOTS;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Nido;

/// How often a reader polls.
const POLL_INTERVAL: Duration = Duration::from_secs(2);
/// The same without notifications of the kernel.
const POLL_INTERVAL_WITHOUT_INOTIFY: Duration = Duration::from_secs(1);
/// When a reader polls again after a write, the last first: what is written counts only a moment later.
const ECHOES: [Duration; 3] = [Duration::from_millis(100), Duration::from_millis(20), Duration::from_millis(3)];
/// The most events that [`Nido::events`] gives at once.
const PAGE: usize = 1000;

impl Nido {
    /// The events behind a cursor, the oldest first; at most a thousand of them. Continue after the cursor of the result.
    ///
    /// # Errors
    /// `cursor_expired` if events behind the cursor are not kept any more, or the cursor is ahead of them all; of the store.
    pub fn events(&self, request: &EventsRequest) -> Result<EventList> {
        self.announce_found();
        let (oldest, last) = self.event_range()?;
        if request.gap(oldest, last) {
            let since = request.since;
            let words =
                format!("since: events after the cursor {since} are not kept; the store has {oldest} to {last}");
            return Err(Error::new(Code::CursorExpired, words)
                .hint("events were missed: list the current VMs, then continue from 0 or from a current cursor"));
        }
        let mut request = request.clone();
        let mut events = Vec::new();
        loop {
            let (more, cursor) = self.store().events(&request)?;
            let done = cursor == request.since;
            request.since = cursor;
            events.extend(more);
            if done || events.len() >= PAGE {
                break;
            }
        }
        events.truncate(PAGE);
        let cursor = match events.last() {
            Some(last) if events.len() == PAGE => last.cursor,
            _ => request.since,
        };
        Ok(EventList { events, cursor, oldest })
    }

    /// The same as stored, for callers that poll. The same cursor back means that there are no more.
    ///
    /// # Errors
    /// Of the store.
    pub fn events_behind(&self, request: &EventsRequest) -> Result<(Vec<Event>, u64)> {
        self.store().events(request)
    }

    /// The cursors of the first event that is kept and of the last one.
    ///
    /// # Errors
    /// Of the store.
    pub fn event_range(&self) -> Result<(u64, u64)> {
        self.store().event_range()
    }

    /// The cursor behind the last event: from there on only what is new is seen.
    ///
    /// # Errors
    /// Of the store.
    pub fn last_event(&self) -> Result<u64> {
        self.store().last_cursor()
    }

    /// The events behind a cursor, and all that come.
    #[must_use]
    pub fn follow_events(&self, request: EventsRequest) -> EventFeed<'_> {
        EventFeed { watch: Watch::new(self), nido: self, request, ready: Vec::new().into_iter() }
    }

    /// A reader of events also writes the event for a file whose creator was killed before it could do so.
    pub(super) fn announce_found(&self) {
        if let Err(error) = self.template_list() {
            tracing::warn!("cannot read the templates: {error}");
        }
        let rows = self.store().vms().unwrap_or_default();
        for row in rows.iter().filter(|row| row.purpose == nido_store::Purpose::Use) {
            if self.vm_dir(&row.id).file(SNAPSHOTS).exists()
                && let Err(error) = self.snapshot_list(&row.spec.name)
            {
                tracing::warn!("cannot read the snapshots of VM {}: {error}", row.spec.name);
            }
        }
    }
}

/// Events, one after the other, as they come. Dropping it ends it.
#[derive(Debug)]
pub struct EventFeed<'a> {
    nido: &'a Nido,
    watch: Watch,
    request: EventsRequest,
    ready: std::vec::IntoIter<Event>,
}

impl EventFeed<'_> {
    /// The next event. Waits for it, without a limit.
    ///
    /// # Errors
    /// Of the store.
    pub async fn next(&mut self) -> Result<Event> {
        loop {
            if let Some(event) = self.ready.next() {
                return Ok(event);
            }
            let (events, cursor) = self.nido.store().events(&self.request)?;
            if cursor == self.request.since {
                self.watch.changed().await;
            }
            self.request.since = cursor;
            self.ready = events.into_iter();
        }
    }
}

/// Waits for writes to the store by any process. If the host has no watches left, it polls.
#[derive(Debug)]
pub struct Watch {
    descriptor: Option<AsyncFd<OwnedFd>>,
    /// How often it still polls soon, because something has been written.
    echoes: usize,
}

impl Watch {
    /// Watches from now on.
    #[must_use]
    pub fn new(nido: &Nido) -> Self {
        Self::with(Self::descriptor(nido))
    }

    fn with(descriptor: Result<AsyncFd<OwnedFd>>) -> Self {
        let descriptor = descriptor.inspect_err(|error| {
            tracing::warn!("{error}; polling every {} s instead", POLL_INTERVAL_WITHOUT_INOTIFY.as_secs());
        });
        Self { descriptor: descriptor.ok(), echoes: 0 }
    }

    fn descriptor(nido: &Nido) -> Result<AsyncFd<OwnedFd>> {
        let broken = |e: std::io::Error| Error::io("cannot watch the store", e);
        let descriptor = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(|e| broken(e.into()))?;
        // The write-ahead log is removed by the last process that has the store open, so its directory is watched.
        inotify::add_watch(&descriptor, nido.home().root(), WatchFlags::MODIFY | WatchFlags::CREATE)
            .map_err(|e| broken(e.into()))?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe for the sake of types that are no descriptors; this is one"
        )]
        AsyncFd::with_interest(descriptor, Interest::READABLE).map_err(broken)
    }

    /// Returns when something may have been written since the last time, at the latest after two seconds.
    pub async fn changed(&mut self) {
        let Some(descriptor) = &self.descriptor else { return tokio::time::sleep(POLL_INTERVAL_WITHOUT_INOTIFY).await };
        let within = self.echoes.checked_sub(1).map_or(POLL_INTERVAL, |left| ECHOES[left]);
        self.echoes = self.echoes.saturating_sub(1);
        let readable = tokio::time::timeout(within, descriptor.readable()).await;
        if let Ok(Ok(mut guard)) = readable {
            self.echoes = ECHOES.len();
            let mut buffer = [0; 4096];
            while rustix::io::read(descriptor.as_fd(), &mut buffer).is_ok_and(|n| n > 0) {}
            guard.clear_ready();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nido::OpenOptions;

    #[tokio::test]
    async fn without_inotify_events_are_polled_completely() {
        let dir = tempfile::tempdir().unwrap();
        let open = || {
            let home = Some(dir.path().join("home"));
            Nido::open_unreconciled(OpenOptions { home, ..OpenOptions::default() }).unwrap()
        };
        let (nido, other) = (open(), open());
        let none = Error::io("cannot watch the store", std::io::Error::from_raw_os_error(libc::EMFILE));
        let (watch, request) = (Watch::with(Err(none)), EventsRequest::default());
        let mut feed = EventFeed { watch, nido: &nido, request, ready: Vec::new().into_iter() };
        for stamp in ["1", "2"] {
            let announce = async { other.store().announce_template(&"t".parse().unwrap(), stamp).unwrap() };
            let told = async { tokio::time::timeout(Duration::from_secs(60), feed.next()).await };
            // In this order: it waits already when that happens.
            let (told, ()) = tokio::join!(biased; told, announce);
            assert!(told.unwrap().unwrap().cursor > 0);
        }
    }
}
