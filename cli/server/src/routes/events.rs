//! Events: the existing ones as JSON, new ones as a stream.

use nido_api::FrontEnd;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::IntoResponse;
use axum::response::sse::{self, KeepAlive, Sse};
use futures::stream;
use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::{Event, EventKind, EventList, EventsRequest};
use nido_core::Nido;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::watch;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::App;
use crate::media_type::prefers;
use crate::query::{QueryParams, number_if_given};
use crate::response::{self, HandlerResult};

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(events))
}

/// How long a listener waits before it connects again.
const RETRY: Duration = Duration::from_secs(2);
/// The most events of one response.
const LIMIT_MAX: usize = 1000;

/// Filters for events.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct EventQuery {
    /// Events after this cursor; 0 is the beginning.
    #[serde(deserialize_with = "number_if_given")]
    since: Option<u64>,
    /// Events of these types, separated by commas.
    #[param(example = "vm.crashed,vm.stopped")]
    event: Option<String>,
    /// Events of this VM.
    vm: Option<VmName>,
    /// At most this many, the first ones; 1000 if absent.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<usize>,
    /// At most this many, the last ones. Not with `limit`.
    #[param(minimum = 1, maximum = 1000)]
    tail: Option<usize>,
}

/// Lists events, the oldest first, at most a thousand; continue with `since` set to the cursor of the response. A
/// cursor whose next events are no longer kept, or that is ahead of all events, is 410 `cursor_expired`. With `Accept:
/// text/event-stream` the response streams all events after the cursor (without one, from now on) as they happen; the
/// header `Last-Event-ID` resumes a stream that was interrupted. Where events are missing the stream contains the event
/// `gap`; before it ends with an error, the event `error`.
#[utoipa::path(get, path = "/v1/events", operation_id = "events", tag = "events",
    params(EventQuery, ("Last-Event-ID" = Option<String>, Header, description = "Cursor of the last event received.")),
    responses((status = 200, description = "Events.", content(
        (EventList = "application/json"),
        (String = "text/event-stream")))))]
async fn events(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    QueryParams(which): QueryParams<EventQuery>,
) -> HandlerResult {
    let kinds =
        which.event.as_deref().map(|words| words.split(',').map(str::parse).collect::<Result<Vec<EventKind>>>());
    let kinds = kinds.transpose()?.unwrap_or_default();
    let streams = prefers(&headers, "text/event-stream", "application/json");
    check_counts(&which, streams)?;
    let nido = app.nido().await?;
    if !streams {
        let request = EventsRequest { since: which.since.unwrap_or(0), kinds, vm: which.vm };
        let list = match (which.limit, which.tail) {
            (_, Some(tail)) => last(nido, request, tail)?,
            (limit, None) => first(nido.events(&request)?, limit.unwrap_or(LIMIT_MAX)),
        };
        return response::ok(&list);
    }
    let last = headers.get("last-event-id").map(|id| {
        let cursor = id.to_str().ok().and_then(|id| id.parse::<u64>().ok());
        cursor.ok_or_else(|| Error::new(Code::SpecInvalid, "Last-Event-ID is not the cursor of an event"))
    });
    let since = match (last.transpose()?, which.since) {
        (Some(cursor), _) | (None, Some(cursor)) => cursor,
        (None, None) => nido.last_event()?,
    };
    let feed = Feed {
        changes: app.changes.subscribe(),
        request: EventsRequest { since, kinds, vm: which.vm },
        ready: VecDeque::new(),
        app: Arc::clone(&app),
    };
    let frames = stream::unfold(Some(feed), |feed| async move {
        let mut feed = feed?;
        match feed.next().await {
            Ok(next) => Some((Ok::<_, Infallible>(frame(&next)), Some(feed))),
            // An orderly end: the client connects to the next server.
            Err(error) if error.code() == Code::Interrupted => None,
            Err(error) => Some((Ok(error_frame(&error)), None)),
        }
    });
    // At once: a client that gets no event still knows how long to wait before it reconnects.
    let hello = stream::once(async { Ok(sse::Event::default().retry(RETRY).comment("connected")) });
    let frames = futures::StreamExt::chain(hello, frames);
    Ok(Sse::new(frames).keep_alive(KeepAlive::default()).into_response())
}

fn check_counts(which: &EventQuery, streams: bool) -> Result<()> {
    let bad = |words: String| Err(Error::new(Code::SpecInvalid, words));
    match (which.limit, which.tail) {
        (Some(_), Some(_)) => bad("tail: not together with limit".into()),
        (None, None) => Ok(()),
        _ if streams => bad("limit, tail: not for a stream of events".into()),
        (Some(count), None) | (None, Some(count)) if (1..=LIMIT_MAX).contains(&count) => Ok(()),
        _ => bad(format!("limit, tail: it is 1 to {LIMIT_MAX}")),
    }
}

/// The first so many.
fn first(mut list: EventList, limit: usize) -> EventList {
    if list.events.len() > limit {
        list.events.truncate(limit);
        list.cursor = list.events.last().map_or(list.cursor, |event| event.cursor);
    }
    list
}

/// The last so many.
fn last(nido: &Nido, mut request: EventsRequest, tail: usize) -> Result<EventList> {
    let mut all = VecDeque::new();
    loop {
        let page = nido.events(&request)?;
        let is_last = page.events.is_empty();
        all.extend(page.events);
        all.drain(..all.len().saturating_sub(tail));
        if is_last {
            return Ok(EventList { events: all.into(), ..page });
        }
        request.since = page.cursor;
    }
}

/// What a stream has next.
enum FeedItem {
    Event(Box<Event>),
    /// Events after `since` are missing: the stream continues after `cursor`.
    Gap {
        since: u64,
        cursor: u64,
    },
}

fn frame(next: &FeedItem) -> sse::Event {
    match next {
        FeedItem::Event(event) => {
            let data = serde_json::to_string(event).unwrap_or_default();
            sse::Event::default().id(event.cursor.to_string()).event(event.event.word()).data(data)
        }
        FeedItem::Gap { since, cursor } => {
            let data = json!({ "since": since, "cursor": cursor, "oldest": cursor + 1 }).to_string();
            sse::Event::default().id(cursor.to_string()).event("gap").data(data)
        }
    }
}

fn error_frame(error: &Error) -> sse::Event {
    sse::Event::default().event("error").data(json!(error.problem_for(FrontEnd::Api)).to_string())
}

/// One listener. All share one watch of the store.
struct Feed {
    app: Arc<App>,
    changes: watch::Receiver<u64>,
    request: EventsRequest,
    ready: VecDeque<Event>,
}

impl Feed {
    async fn next(&mut self) -> Result<FeedItem> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(FeedItem::Event(Box::new(event)));
            }
            let (oldest, last) = self.app.nido.event_range()?;
            if self.request.gap(oldest, last) {
                let since = std::mem::replace(&mut self.request.since, oldest - 1);
                return Ok(FeedItem::Gap { since, cursor: oldest - 1 });
            }
            // Seen before looking: what comes meanwhile wakes again.
            self.changes.mark_unchanged();
            let (events, cursor) = self.app.nido.events_behind(&self.request)?;
            if cursor == self.request.since {
                tokio::select! {
                    _ = self.changes.changed() => continue,
                    () = self.app.shutting_down.cancelled() => return Err(Error::new(Code::Interrupted, "the server shuts down")),
                }
            }
            self.request.since = cursor;
            self.ready = events.into();
        }
    }
}
