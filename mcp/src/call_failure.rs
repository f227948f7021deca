//! What a failed call returns in addition to the error: the VM's state, what became of it, and the next step.

use std::time::{SystemTime, UNIX_EPOCH};

use nido_api::error::{Code, Error};
use nido_api::name::VmName;
use nido_api::{EventKind, EventsRequest, Limit};

use crate::answer::ErrorResult;
use crate::call_context::CallContext;

/// How many of the last events are looked at for what has become of a VM.
const EVENTS_SCANNED_MAX: u64 = 2000;

/// What a failed call is answered: the error, with what the caller can do about it. `name` is the VM that it was about.
pub async fn failed(call: &CallContext, error: &Error, name: Option<VmName>) -> ErrorResult {
    let gone = name.as_ref().filter(|_| error.code() == Code::VmNotFound).and_then(|name| gone(call, name));
    let state = state(call, error, name).await;
    let mut failed = ErrorResult::new(error, state);
    let mut notes = call.notes();
    failed.error.approval_id = notes.approval.take();
    failed.error.notes.clone_from(&notes.arguments);
    if let Some(words) = notes.next_step {
        failed.error.next_step = words.into();
    }
    if let Some(words) = gone {
        failed.error.next_step = words;
    }
    failed
}

/// What has become of a VM of this name that was there a while ago, if its time was up.
fn gone(call: &CallContext, name: &VmName) -> Option<String> {
    let nido = call.app.unreconciled();
    let since = nido.last_event().ok()?.saturating_sub(EVENTS_SCANNED_MAX);
    let mut request = EventsRequest { since, vm: Some(name.clone()), ..EventsRequest::default() };
    let mut last = None;
    loop {
        let (events, cursor) = nido.events_behind(&request).ok()?;
        last =
            events.into_iter().rfind(|one| matches!(one.event, EventKind::VmExpired | EventKind::VmCreated)).or(last);
        if cursor == request.since {
            break;
        }
        request.since = cursor;
    }
    let expired = last.filter(|event| event.event == EventKind::VmExpired)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
    let ago = now.saturating_sub(u64::try_from(expired.timestamp.as_second()).ok()?);
    let keep = "keep one session open for all calls, or pass outlives_session with ttl_seconds to vm_spawn";
    Some(match expired.details.limit? {
        Limit::Session => {
            format!(
                "a VM of that name was ephemeral and went with its session {ago} s ago: vm_spawn makes it again; {keep}"
            )
        }
        Limit::Ttl | Limit::Idle => {
            format!(
                "the time of a VM of that name was up {ago} s ago: vm_spawn makes it again, with a longer limit if needed"
            )
        }
    })
}

/// The state of the VM that a call was about, if it explains why it failed.
async fn state(call: &CallContext, error: &Error, name: Option<VmName>) -> Option<String> {
    let explains = matches!(
        error.code(),
        Code::VmNotRunning | Code::VmBusy | Code::VmExists | Code::AgentUnreachable | Code::GuestFailed | Code::Timeout
    );
    let info = call.app.unreconciled().info(&name.filter(|_| explains)?).await.ok()?;
    Some(info.status.word().into())
}
