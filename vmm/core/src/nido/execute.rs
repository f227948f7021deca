//! How an operation is carried out: the same for every front end.
//!
//! ```text
//!  refused by scope or policy ──────────────────────────> Nido::refuse: one line, nothing begins
//!  Nido::attempt: the attempt is on the disk ── cannot be written ──> audit_failed, nothing begins
//!      │            (a read owes one line instead, and is not shown without it)
//!  Attempt::confirmed: the front end asks ── no, or it cannot be asked ──> outcome
//!      │
//!  Attempt::carry_out: the work ──> outcome ──> result
//!  Attempt::detach: the same in a task of its own, which no caller interrupts by going away
//! ```
//!
//! [`Nido::execute`] does all of it in one call. A server whose request passes through several hands (middleware, confirmation, a job)
//! passes the [`Attempt`] on. How a person is asked is the front end's: the command line asks on the terminal before it calls this, an
//! MCP client shows a form, the REST API does not ask.
//!
//! Invariants: neither the confirmation nor the work is polled before the attempt is written. An attempt that is dropped, with its
//! process or its task, has the outcome `unknown`.

use nido_api::error::{Error, Result};
use nido_api::operation::Operation;
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use super::Nido;
use crate::audit::{AuditOutcome, Audited, Caller};

/// What is to be done, and for whom.
#[derive(Debug, Clone)]
pub struct Request {
    /// The operation.
    pub operation: &'static Operation,
    /// The authenticated caller.
    pub caller: Caller,
    /// Its arguments, for the audit log, which redacts them.
    pub arguments: Value,
}

/// The outcome of an operation, for the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// What became of it.
    pub ending: AuditOutcome,
    /// A word that explains it; may be empty.
    pub reason: String,
}

impl Verdict {
    /// It was done; `reason` is a word about how.
    #[must_use]
    pub fn success(reason: impl Into<String>) -> Self {
        Self { ending: AuditOutcome::Success, reason: reason.into() }
    }

    /// It failed: the code is the reason.
    #[must_use]
    pub fn failure(error: &Error) -> Self {
        Self { ending: AuditOutcome::from(error), reason: error.code().slug().into() }
    }

    /// Of a result that needs no word.
    pub fn of<T>(outcome: &Result<T>) -> Self {
        outcome.as_ref().map_or_else(Self::failure, |_| Self::success(""))
    }
}

/// An operation that was requested and has no outcome yet.
#[derive(Debug)]
#[must_use = "dropping it records that its outcome is unknown"]
pub struct Attempt {
    nido: Nido,
    entry: Entry,
}

#[derive(Debug)]
enum Entry {
    /// The attempt is on the disk.
    Written(Box<Audited>),
    /// It only reads: one line is written with its outcome.
    Owed(Request),
}

/// What an operation gave, and whether its outcome could be recorded.
#[derive(Debug)]
pub struct AuditedOutcome<T, E = Error> {
    /// The result.
    pub outcome: Result<T, E>,
    /// Why the outcome of something that has been done is not in the audit log.
    pub unrecorded: Option<Error>,
}

impl<T, E> AuditedOutcome<T, E> {
    /// The result. An outcome that could not be recorded goes to the process's own log.
    ///
    /// # Errors
    /// Those of the work.
    pub fn or_log(self) -> Result<T, E> {
        if let Some(error) = self.unrecorded {
            tracing::error!("{error}");
        }
        self.outcome
    }
}

impl Nido {
    /// Carries an operation out: attempt, confirmation, work, outcome. `confirm` and `work` begin only when the attempt is written.
    pub async fn execute<C, T, E: From<Error>>(
        &self,
        request: Request,
        confirm: impl Future<Output = Result<C, E>>,
        work: impl AsyncFnOnce(C) -> Result<T, E>,
        verdict: impl Fn(&Result<T, E>) -> Verdict,
    ) -> AuditedOutcome<T, E> {
        let failed = |error: E| AuditedOutcome { outcome: Err(error), unrecorded: None };
        let attempt = match self.attempt(request).await {
            Ok(attempt) => attempt,
            Err(error) => return failed(error.into()),
        };
        match confirm.await {
            Ok(confirmed) => attempt.carry_out(work(confirmed), verdict).await,
            Err(error) => attempt.carry_out(async { Err(error) }, verdict).await,
        }
    }

    /// Records an attempt, and waits until it is on the disk. Of a read nothing is written yet.
    ///
    /// # Errors
    /// `audit_failed`: the operation must not begin.
    pub async fn attempt(&self, request: Request) -> Result<Attempt> {
        if request.operation.is_read() {
            return Ok(self.owe(request));
        }
        let nido = self.clone();
        let begun = blocking(move || {
            let Request { operation, caller, arguments } = request;
            nido.audit_begin(&caller, operation.id, &arguments)
        });
        let entry = Entry::Written(Box::new(begun.await?));
        Ok(Attempt { nido: self.clone(), entry })
    }

    /// A request that changes nothing, also if its operation would (a replayed response): one line, with its outcome.
    pub fn owe(&self, request: Request) -> Attempt {
        Attempt { nido: self.clone(), entry: Entry::Owed(request) }
    }

    /// Records that a request was refused before it began. `tool` is what was requested, which may be no operation.
    ///
    /// # Errors
    /// `audit_failed`.
    pub async fn refuse(&self, caller: Caller, tool: String, arguments: Value, reason: &'static str) -> Result<()> {
        let nido = self.clone();
        blocking(move || nido.audit_denied(&caller, &tool, &arguments, reason)).await
    }
}

impl Attempt {
    /// Waits for a confirmation. Without one the outcome is recorded, and the attempt is over.
    ///
    /// # Errors
    /// Those of `confirm`; `audit_failed` of a read.
    pub async fn confirmed<C, E: From<Error>>(
        self,
        confirm: impl Future<Output = Result<C, E>>,
        verdict: impl FnOnce(&E) -> Verdict,
    ) -> Result<(Self, C), E> {
        let error = match confirm.await {
            Ok(confirmed) => return Ok((self, confirmed)),
            Err(error) => error,
        };
        let verdict = verdict(&error);
        let AuditedOutcome { outcome, unrecorded } = self.ended(Ok::<_, E>(error), verdict).await;
        if let Some(unrecorded) = unrecorded {
            tracing::error!("{unrecorded}");
        }
        // A read that could not be recorded fails with that instead.
        Err(outcome.unwrap_or_else(std::convert::identity))
    }

    /// Does the work and records its outcome. What only reads fails where that cannot be recorded.
    pub async fn carry_out<T, E: From<Error>>(
        self,
        work: impl Future<Output = Result<T, E>>,
        verdict: impl FnOnce(&Result<T, E>) -> Verdict,
    ) -> AuditedOutcome<T, E> {
        let outcome = work.await;
        let verdict = verdict(&outcome);
        self.ended(outcome, verdict).await
    }

    /// The same in a task of its own: it runs to its end even if the caller goes away.
    pub fn detach<T: Send + 'static, E: From<Error> + Send + 'static>(
        self,
        tasks: &TaskTracker,
        work: impl Future<Output = Result<T, E>> + Send + 'static,
        verdict: impl FnOnce(&Result<T, E>) -> Verdict + Send + 'static,
    ) -> JoinHandle<Result<T, E>> {
        tasks.spawn(async move { self.carry_out(work, verdict).await.or_log() })
    }

    async fn ended<T, E: From<Error>>(self, outcome: Result<T, E>, verdict: Verdict) -> AuditedOutcome<T, E> {
        let is_read = matches!(self.entry, Entry::Owed(_));
        match self.end(verdict).await {
            Ok(()) => AuditedOutcome { outcome, unrecorded: None },
            Err(error) if is_read => AuditedOutcome { outcome: Err(error.into()), unrecorded: None },
            Err(error) => AuditedOutcome { outcome, unrecorded: Some(error) },
        }
    }

    /// Records an outcome that is known otherwise. Writing may wait for the disk or for another process, so a blocking thread does it.
    ///
    /// # Errors
    /// `audit_failed`; what was done has been done nevertheless.
    pub async fn end(self, verdict: Verdict) -> Result<()> {
        blocking(move || self.end_now(&verdict)).await
    }

    /// The same on this thread.
    ///
    /// # Errors
    /// As [`Self::end`].
    pub fn end_now(self, Verdict { ending, reason }: &Verdict) -> Result<()> {
        match self.entry {
            Entry::Written(audited) => audited.end_as(*ending, reason),
            Entry::Owed(Request { operation, caller, arguments }) => {
                self.nido.audit_read_access(&caller, operation.id, &arguments, *ending, reason)
            }
        }
    }

    /// The same of an operation that gave this result. What was done has been done: a failure to record it goes to the process's log.
    pub fn end_or_log(self, verdict: &Verdict) {
        if let Err(error) = self.end_now(verdict) {
            tracing::error!("{error}");
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::internal(format!("writing the audit log failed: {error}")))?
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::unix::fs::PermissionsExt as _;
    use std::time::Duration;

    use nido_api::error::Code;
    use nido_api::operation::{VM_DELETE, VM_LS};
    use nido_api::{AuditFilter, AuditLog};
    use serde_json::json;

    use super::*;
    use crate::nido::OpenOptions;

    fn home() -> (tempfile::TempDir, Nido) {
        let dir = tempfile::tempdir().unwrap();
        let home = Some(dir.path().join("home"));
        let nido = Nido::open_unreconciled(OpenOptions { home, ..OpenOptions::default() }).unwrap();
        (dir, nido)
    }

    fn request(operation: &'static Operation) -> Request {
        Request { operation, caller: Caller::command_line(), arguments: json!({ "name": "web" }) }
    }

    /// Stage, result and reason of every line.
    fn lines(nido: &Nido, log: AuditLog) -> Vec<String> {
        let shown = nido.audit_show(&AuditFilter { log: Some(log), ..AuditFilter::default() }).unwrap();
        let line = |one: &nido_api::AuditRecord| {
            format!("{} {} {} {}", one.tool, one.stage, one.result, one.reason.clone().unwrap_or_default())
        };
        shown.records.iter().map(line).collect()
    }

    async fn run(nido: &Nido, operation: &'static Operation, confirm: Result<()>, done: &Cell<bool>) -> Result<u8> {
        let work = async |()| {
            done.set(true);
            Ok(7)
        };
        nido.execute(request(operation), async { confirm }, work, Verdict::of).await.or_log()
    }

    #[tokio::test]
    async fn an_operation_is_recorded_before_and_after() {
        let (_dir, nido) = home();
        let done = Cell::new(false);
        let before = async {
            assert_eq!(lines(&nido, AuditLog::Acts), ["vm_delete attempt pending "]);
            Ok::<_, Error>(())
        };
        let ran = nido.execute(request(VM_DELETE), before, async |()| Ok(7), Verdict::of).await;
        assert_eq!((ran.outcome.unwrap(), ran.unrecorded.is_none()), (7, true));
        assert_eq!(lines(&nido, AuditLog::Acts)[1], "vm_delete outcome success ");
        run(&nido, VM_LS, Ok(()), &done).await.unwrap();
        assert_eq!(lines(&nido, AuditLog::Reads), ["vm_ls outcome success "]);
        assert_eq!(lines(&nido, AuditLog::Acts).len(), 2);
    }

    #[tokio::test]
    async fn an_unconfirmed_operation_is_not_run() {
        let (_dir, nido) = home();
        let done = Cell::new(false);
        let refused = run(&nido, VM_DELETE, Err(Error::new(Code::ApprovalRequired, "ask first")), &done).await;
        assert_eq!((refused.unwrap_err().code(), done.get()), (Code::ApprovalRequired, false));
        assert_eq!(lines(&nido, AuditLog::Acts)[1], "vm_delete outcome denied approval_required");
        let attempt = nido.attempt(request(VM_DELETE)).await.unwrap();
        let refused = attempt.confirmed::<(), Error>(async { Err(Error::new(Code::Denied, "no")) }, Verdict::failure);
        assert_eq!(refused.await.unwrap_err().code(), Code::Denied);
        assert_eq!(lines(&nido, AuditLog::Acts)[3], "vm_delete outcome denied denied");
    }

    #[tokio::test]
    async fn nothing_begins_without_its_attempt_and_no_read_is_shown_without_its_line() {
        let (_dir, nido) = home();
        let place = nido.home().audit();
        std::fs::create_dir_all(&place).unwrap();
        // Others may write there, so nido does not.
        std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o777)).unwrap();
        let done = Cell::new(false);
        let confirmed = async { panic!("asked before the attempt was written") };
        let work = async |()| {
            done.set(true);
            Ok::<_, Error>(())
        };
        let refused = nido.execute(request(VM_DELETE), confirmed, work, Verdict::of).await.outcome.unwrap_err();
        assert_eq!((refused.code(), done.get()), (Code::AuditFailed, false));
        assert_eq!(run(&nido, VM_LS, Ok(()), &done).await.unwrap_err().code(), Code::AuditFailed);
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_does_not_interrupt_detached_work() {
        let (_dir, nido) = home();
        let (tasks, (go, gone)) = (TaskTracker::new(), tokio::sync::oneshot::channel::<()>());
        let attempt = nido.attempt(request(VM_DELETE)).await.unwrap();
        let work = async {
            gone.await.map_err(|_| Error::internal("dropped"))?;
            Ok::<_, Error>(())
        };
        drop(attempt.detach(&tasks, work, Verdict::of));
        go.send(()).unwrap();
        tasks.close();
        tokio::time::timeout(Duration::from_secs(30), tasks.wait()).await.unwrap();
        assert_eq!(lines(&nido, AuditLog::Acts)[1], "vm_delete outcome success ");
        // Work that is dropped has the outcome `unknown`.
        drop(nido.attempt(request(VM_DELETE)).await.unwrap());
        assert_eq!(lines(&nido, AuditLog::Acts)[3], "vm_delete outcome unknown interrupted");
    }
}
