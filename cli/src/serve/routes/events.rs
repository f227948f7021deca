//! Events: those there are as JSON, those that come as a stream.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::IntoResponse;
use axum::response::sse::{self, KeepAlive, Sse};
use futures::stream;
use nido_vmm::api::{Event, EventKind, EventList, EventsRequest};
use nido_vmm::error::{Code, Error, Result};
use nido_vmm::name::VmName;
use serde::Deserialize;
use tokio::sync::watch;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::serve::App;
use crate::serve::answer::{self, Answer};
use crate::serve::ask::{Query, accepts};
use crate::serve::guard::Looks;

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(events))
}

/// Which events are wanted.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Which {
    /// Only those behind this cursor.
    since: Option<u64>,
    /// Only these kinds, separated by commas.
    #[param(example = "vm.crashed,vm.stopped")]
    event: Option<String>,
    /// Only those of this VM.
    vm: Option<VmName>,
}

/// What happened, the oldest first, at most a thousand events; go on with `since` set to the answer's cursor. With
/// `Accept: text/event-stream` everything behind the cursor (or from now on, if none is named) and whatever comes; the header
/// `Last-Event-ID` goes on where a stream broke off.
#[utoipa::path(get, path = "/v1/events", operation_id = "events", tag = "events",
    params(Which, ("Last-Event-ID" = Option<String>, Header, description = "Cursor of the last event that was seen.")),
    responses((status = 200, description = "Events.", content(
        (EventList = "application/json"),
        (String = "text/event-stream")))))]
async fn events(State(app): State<Arc<App>>, _: Looks, headers: HeaderMap, Query(which): Query<Which>) -> Answer {
    let kinds =
        which.event.as_deref().map(|words| words.split(',').map(str::parse).collect::<Result<Vec<EventKind>>>());
    let kinds = kinds.transpose()?.unwrap_or_default();
    let nido = app.nido().await?;
    if !accepts(&headers, "text/event-stream") {
        let request = EventsRequest { since: which.since.unwrap_or(0), kinds, vm: which.vm };
        return answer::ok(&nido.events(&request)?);
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
    let events = stream::unfold(feed, |mut feed| async move { Some((feed.next().await.ok()?, feed)) });
    let frames = futures::StreamExt::map(events, |event: Event| Ok::<_, Infallible>(frame(&event)));
    Ok(Sse::new(frames).keep_alive(KeepAlive::default()).into_response())
}

fn frame(event: &Event) -> sse::Event {
    let data = serde_json::to_string(event).unwrap_or_default();
    sse::Event::default().id(event.cursor.to_string()).event(event.event.word()).data(data)
}

/// One listener. All share one watch of the store.
struct Feed {
    app: Arc<App>,
    changes: watch::Receiver<u64>,
    request: EventsRequest,
    ready: VecDeque<Event>,
}

impl Feed {
    async fn next(&mut self) -> Result<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            // Seen before looking: what comes meanwhile wakes again.
            self.changes.mark_unchanged();
            let (events, cursor) = self.app.nido.events_behind(&self.request)?;
            if cursor == self.request.since {
                tokio::select! {
                    _ = self.changes.changed() => continue,
                    () = self.app.ending.cancelled() => return Err(Error::new(Code::Interrupted, "the server ends")),
                }
            }
            self.request.since = cursor;
            self.ready = events.into();
        }
    }
}
