//! One call of a tool, from being asked to being answered.
//!
//! ```text
//!  may it be? ── no ──> denied, written down
//!      │ yes
//!  attempt, on the disk ──> a person's word, where one is needed (confirm.rs)
//!      │
//!  the work, a task of its own ──> outcome, on the disk ──> answer
//!      │ cancelled, or the server ends: it stops and clears up
//!      │ too long for a client to wait: a job, answered at once and asked for later; where there can be none, it is cancelled
//! ```
//!
//! Invariant: where the attempt cannot be written, nothing is done; where a look cannot be written down, nothing is shown.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nido_vmm::api::{
    EventKind, EventsRequest, Grant, JobOutcome, JobProgress, JobRequest, LeaseId, Limit, Limits, Which,
};
use nido_vmm::audit::{Audited, Caller, Ending};
use nido_vmm::error::{Code, Error, Result};
use nido_vmm::name::VmName;
use nido_vmm::nido::Nido;
use rmcp::RoleServer;
use rmcp::model::{CallToolResponse, ErrorData};
use rmcp::service::RequestContext;
use serde_json::Value;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::answer::{Done, Failed, JobBegun, plain, result};
use crate::app::{App, Principal};
use crate::argument_reader;
use crate::confirm::{Leave, Retry, Word, confirm};
use crate::leases::Key;
use crate::progress::Progress;
use crate::tools::Tool;

/// How often whoever carries a job out looks whether it is to be cancelled.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How long work that is cancelled may take to stop before its caller is answered: some clients give up soon.
const STOP_WITHIN: Duration = Duration::from_secs(10);

/// How many of the last events are looked at for what has become of a VM.
const EVENTS_LOOKED_AT: u64 = 2000;

/// What became of work.
type Ended = std::result::Result<Result<Done>, JoinError>;

/// What a tool knows of the call that it serves.
#[derive(Debug, Clone)]
pub struct Call {
    pub app: Arc<App>,
    pub who: Caller,
    pub progress: Progress,
    /// Nobody wants the answer any more.
    pub cancelled: CancellationToken,
    /// What throw-away VMs belong to that it makes.
    pub session: Key,
    /// What VMs may be that it makes.
    limits: Limits,
    /// The id of the only VM that it may be done to, where that was decided (confirm.rs).
    vm: Option<String>,
    notes: Arc<Mutex<Notes>>,
}

/// What is known of a refusal beside its error.
#[derive(Debug, Default)]
struct Notes {
    /// Why, in a word for the audit log.
    reason: Option<&'static str>,
    /// What would make it possible.
    approval: Option<String>,
    /// What to do next, if not what the error's code says.
    next_step: Option<&'static str>,
    /// What was not as it should be with the arguments, and did no harm.
    arguments: Vec<String>,
}

impl Call {
    pub async fn nido(&self) -> Result<&Nido> {
        self.app.nido().await
    }

    /// The VM of that name, if it is the one that was decided about.
    pub fn which<'a>(&'a self, name: &'a VmName) -> Which<'a> {
        Which { name, id: self.vm.as_deref() }
    }

    /// Does `work` unless nobody wants it any more; then it is dropped where it is.
    pub async fn unless_cancelled<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            outcome = work => outcome,
            () = self.cancelled.cancelled() => Err(Error::new(Code::Interrupted, "the call was cancelled")),
        }
    }

    /// Why it will be refused, in a word for the audit log.
    pub fn refused_because(&self, reason: &'static str) {
        self.notes().reason = Some(reason);
    }

    /// Which approval would make it possible.
    pub fn needs_approval(&self, id: &str) {
        self.notes().approval = Some(id.into());
    }

    fn notes(&self) -> std::sync::MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to do next, where the error's code alone does not tell.
    pub fn next_step(&self, words: &'static str) {
        self.notes().next_step = Some(words);
    }

    /// On whose behalf a VM is made.
    pub fn grant(&self) -> Grant {
        Grant::within(&self.who, self.limits.clone())
    }

    /// From now on it is done to the VM of this id, or not at all.
    pub fn decided_about(&mut self, vm: Option<String>) {
        self.vm = vm;
    }

    /// The lease that a throw-away VM gets.
    pub fn lease(&self) -> Result<LeaseId> {
        self.app.leases().of(&self.app, self.session, &self.who)
    }

    /// How an error is told.
    async fn failed(&self, error: &Error, name: Option<VmName>) -> Failed {
        let gone = name.as_ref().filter(|_| error.code() == Code::VmNotFound).and_then(|name| gone(self, name));
        let state = state(self, error, name).await;
        let mut failed = Failed::new(error, state);
        let mut notes = self.notes();
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
}

/// What is asked of the server.
#[derive(Debug)]
pub struct Asked {
    pub tool: &'static Tool,
    pub arguments: Value,
    pub retry: Retry,
    pub session: Key,
}

/// What VMs may be that this caller makes. Where nobody says otherwise, no other machine reaches them.
fn limits(app: &App, principal: &Principal) -> Limits {
    let mut limits = app.settings().policy.limits.and(&principal.limits);
    limits.publish.get_or_insert_with(Limits::loopback);
    limits
}

/// Carries a call out.
pub async fn carry_out(
    app: &Arc<App>,
    principal: &Principal,
    Asked { tool, arguments, retry, session }: Asked,
    context: RequestContext<RoleServer>,
) -> Result<CallToolResponse, ErrorData> {
    let who = crate::server::caller(principal, &context);
    let given = argument_reader::read(&(tool.takes)(), tool.explains(), arguments);
    let arguments = given.value;
    if let Some((reason, words)) = tool.refused(app.settings(), principal) {
        let denied = denied(app, &who, tool.name, arguments, reason).await;
        let error = denied.err().unwrap_or_else(|| Error::new(Code::Denied, words));
        return Ok(result(Err(Failed::new(&error, None))).into());
    }
    let cancelled = app.ending().child_token();
    let notes = Arc::new(Mutex::new(Notes { arguments: given.notes, ..Notes::default() }));
    let (progress, vm) = (Progress::new(), None);
    let limits = limits(app, principal);
    let mut call =
        Call { app: Arc::clone(app), who, progress, cancelled: cancelled.clone(), session, limits, vm, notes };
    let name = arguments.get("name").and_then(Value::as_str).and_then(|name| name.parse::<VmName>().ok());
    let line = match begin(&call, tool, arguments.clone()).await {
        Ok(line) => line,
        Err(error) => return Ok(result(Err(Failed::new(&error, None))).into()),
    };
    if let Some(error) = given.wrong {
        let _ = end_with(line, &call, &Err::<&Done, _>(&error), "").await;
        return Ok(result(Err(call.failed(&error, None).await)).into());
    }
    // Asked here and not in the task: what a client is asked belongs to its request.
    let (steps, token, peer) = (call.progress.clone(), context.meta.get_progress_token(), context.peer.clone());
    let telling = async {
        if let Some(token) = token {
            steps.pass_on(peer, token).await;
        }
        std::future::pending::<()>().await;
    };
    let word = tokio::select! {
        word = confirm(&mut call, tool, &arguments, retry, &context) => word,
        () = telling => Err(Error::internal("progress ended")),
        () = context.ct.cancelled() => Err(Error::new(Code::Interrupted, "the call was cancelled")),
    };
    let word = match word {
        Ok(Word::Go(Leave { word, vm })) => {
            call.vm = vm;
            word
        }
        Ok(Word::Ask(question)) => {
            let _ = end(&call, line, Ending::Denied, Code::ApprovalRequired.slug().into()).await;
            return Ok((*question).into());
        }
        Err(error) => {
            let _ = end_with(line, &call, &Err::<&Done, _>(&error), "").await;
            return Ok(result(Err(call.failed(&error, name).await)).into());
        }
    };
    // Whoever drops this call does not want its work any more.
    let unwanted = cancelled.clone().drop_guard();
    let work = app.tasks().spawn(work(call.clone(), tool, arguments, line, word));
    awaited(call, tool, name, (work, unwanted), &context).await
}

/// Waits for the work, for as long as a client does. Then it is a job, or given up.
async fn awaited(
    call: Call,
    tool: &Tool,
    name: Option<VmName>,
    (mut work, unwanted): (JoinHandle<Result<Done>>, DropGuard),
    context: &RequestContext<RoleServer>,
) -> Result<CallToolResponse, ErrorData> {
    let (app, cancelled) = (Arc::clone(&call.app), call.cancelled.clone());
    let progress = call.progress.clone();
    let mut telling = std::pin::pin!(async {
        if let Some(token) = context.meta.get_progress_token() {
            progress.pass_on(context.peer.clone(), token).await;
        }
        std::future::pending::<()>().await;
    });
    let mut patience = std::pin::pin!(tokio::time::sleep(app.settings().answer_within));
    loop {
        tokio::select! {
            // What was told before the end goes out before the answer.
            biased;
            () = &mut telling => {}
            done = &mut work => return answered(&call, name, done).await,
            () = context.ct.cancelled(), if !cancelled.is_cancelled() => cancelled.cancel(),
            () = &mut patience, if !tool.hints.read_only && !cancelled.is_cancelled() => break,
        }
    }
    let request = JobRequest { tool: tool.name.into(), vm_name: name.clone(), actor: call.who.actor.clone() };
    match app.unsettled().job_begin(&request) {
        Ok(job) => {
            unwanted.disarm();
            app.tasks().spawn(job_of(call, job.id.clone(), work));
            Ok(result(Done::new(&JobBegun::new(&job)).map_err(|e| Failed::new(&e, None))).into())
        }
        Err(error) => given_up(&call, name, work, &error).await,
    }
}

/// The answer of work that has ended.
async fn answered(call: &Call, name: Option<VmName>, done: Ended) -> Result<CallToolResponse, ErrorData> {
    match done {
        Ok(Ok(done)) => Ok(result(Ok(done)).into()),
        Ok(Err(error)) => Ok(result(Err(call.failed(&error, name).await)).into()),
        Err(broken) => Err(ErrorData::internal_error(broken.to_string(), None)),
    }
}

/// Work that takes too long and cannot become a job: nobody would hear of its end, so it is stopped before that is said.
async fn given_up(
    call: &Call,
    name: Option<VmName>,
    mut work: JoinHandle<Result<Done>>,
    why: &Error,
) -> Result<CallToolResponse, ErrorData> {
    tracing::warn!("a call that lasts cannot become a job: {}", plain(why.message()));
    call.cancelled.cancel();
    let stopped = match tokio::time::timeout(STOP_WITHIN, &mut work).await {
        Ok(Ok(Err(error))) if error.code() == Code::Interrupted => "so it was cancelled",
        // It has ended in this very moment, one way or the other.
        Ok(done) => return answered(call, name, done).await,
        Err(_) => "and it cannot be cancelled: it goes on, and nobody is told how it ends",
    };
    let words = format!("the call takes long and cannot go on as a job, {stopped}: {}", why.message());
    if why.code() == Code::LimitExceeded {
        call.next_step(
            "end other jobs: job_get with wait_seconds waits for one, job_cancel stops one; vm_info tells what became of the \
             VM; then call again",
        );
    }
    Ok(result(Err(call.failed(&Error::new(why.code(), words), name).await)).into())
}

/// The work and its outcome.
async fn work(call: Call, tool: &'static Tool, arguments: Value, line: Line, word: &'static str) -> Result<Done> {
    let outcome = (tool.run)(call.clone(), arguments).await;
    let written = end_with(line, &call, &outcome.as_ref(), word).await;
    let notes = call.notes().arguments.clone();
    outcome.and_then(|done| written.map(|()| done.noted(&notes)))
}

/// Carries a job to its end, and writes down how that was.
async fn job_of(call: Call, id: String, mut work: JoinHandle<Result<Done>>) {
    let nido = Arc::clone(call.app.unsettled());
    let mut look = tokio::time::interval(LOOK_EVERY);
    let mut told = String::new();
    let outcome = loop {
        tokio::select! {
            done = &mut work => break done,
            _ = look.tick() => {
                if nido.job_is_cancelled(&id).unwrap_or(false) {
                    call.cancelled.cancel();
                }
                let (stage, percent) = call.progress.now();
                if stage != told {
                    told.clone_from(&stage);
                    let _ = nido.job_progress(&id, &JobProgress { stage, percent });
                }
            }
        }
    };
    let outcome = match outcome {
        Ok(Ok(done)) => JobOutcome::Done(done.value),
        Ok(Err(error)) if error.code() == Code::Interrupted => JobOutcome::Cancelled,
        Ok(Err(error)) => JobOutcome::Failed(error.problem()),
        Err(broken) => JobOutcome::Failed(Error::internal(broken.to_string()).problem()),
    };
    if let Err(error) = nido.job_end(&id, outcome) {
        tracing::error!("the end of job {id} cannot be kept: {error}");
    }
}

/// The line about a call.
#[derive(Debug)]
enum Line {
    /// The attempt stands in the log, and waits for its outcome.
    Open(Box<Audited>),
    /// It only looks: one line is enough, when it has looked.
    Looks(&'static str, Value),
}

/// Writes the attempt down. It is synced to the disk, which may take its time.
async fn begin(call: &Call, tool: &'static Tool, arguments: Value) -> Result<Line> {
    if tool.hints.read_only {
        return Ok(Line::Looks(tool.name, arguments));
    }
    let (nido, who) = (Arc::clone(call.app.unsettled()), call.who.clone());
    let begun = tokio::task::spawn_blocking(move || nido.audit_begin(&who, tool.name, &arguments)).await;
    let begun = begun.map_err(|e| Error::internal(format!("the audit log broke down: {e}")))?;
    begun.map(|audited| Line::Open(Box::new(audited)))
}

/// Writes down that it was not allowed.
pub async fn denied(app: &App, who: &Caller, tool: &str, arguments: Value, reason: &'static str) -> Result<()> {
    let (nido, who, tool) = (Arc::clone(app.unsettled()), who.clone(), tool.to_owned());
    let written = tokio::task::spawn_blocking(move || nido.audit_denied(&who, &tool, &arguments, reason)).await;
    written.map_err(|e| Error::internal(format!("the audit log broke down: {e}")))?
}

/// Writes down how it ended; `word` says why it was done without a person's word, or with it.
async fn end_with(line: Line, call: &Call, outcome: &Result<&Done, &Error>, word: &'static str) -> Result<()> {
    let (ending, reason) = match outcome {
        Ok(done) => {
            let words = [word, done.word.as_str()].into_iter().filter(|word| !word.is_empty());
            (Ending::Success, words.collect::<Vec<_>>().join(","))
        }
        Err(error) => (Ending::from(*error), call.notes().reason.unwrap_or(error.code().slug()).into()),
    };
    end(call, line, ending, reason).await
}

/// What was done has been done: that only the line about it is missing goes to the server's own log. What was only looked at is
/// not shown without its line.
async fn end(call: &Call, line: Line, ending: Ending, reason: String) -> Result<()> {
    let (nido, who) = (Arc::clone(call.app.unsettled()), call.who.clone());
    let ended = tokio::task::spawn_blocking(move || match line {
        Line::Open(audited) => {
            if let Err(error) = audited.end_as(ending, &reason) {
                tracing::error!("{}", plain(error.message()));
            }
            Ok(())
        }
        Line::Looks(tool, arguments) => nido.audit_looked(&who, tool, &arguments, ending, &reason),
    });
    ended.await.map_err(|e| Error::internal(format!("the audit log broke down: {e}")))?
}

/// What has become of a VM of this name that was there a while ago, if its time was up.
fn gone(call: &Call, name: &VmName) -> Option<String> {
    let nido = call.app.unsettled();
    let since = nido.last_event().ok()?.saturating_sub(EVENTS_LOOKED_AT);
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
async fn state(call: &Call, error: &Error, name: Option<VmName>) -> Option<String> {
    let explains = matches!(
        error.code(),
        Code::VmNotRunning | Code::VmBusy | Code::VmExists | Code::AgentUnreachable | Code::GuestFailed | Code::Timeout
    );
    let info = call.app.unsettled().info(&name.filter(|_| explains)?).await.ok()?;
    Some(info.status.word().into())
}
