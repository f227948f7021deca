//! Jobs of the core as operations of the REST API.
//!
//! A caller sees the jobs that it has begun, on whatever front end; an admin sees those of all callers. Ended ones are shown for an
//! hour, cancelled ones not at all.

use nido_api::FrontEnd;
use std::time::Duration;

use jiff::Timestamp;
use nido_api::error::{Code, Error, Problem, Result};
use nido_api::{Job, JobState, Scope, Viewer, moment, operation};
use nido_core::Nido;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::auth::Caller;

/// How long an ended operation can be queried.
const ENDED_RETENTION: Duration = Duration::from_secs(3600);

/// An operation that is running, or has ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = Operation)]
pub struct ApiOperation {
    /// Its id.
    pub id: String,
    /// The request that it carries out.
    pub kind: String,
    /// Its state.
    pub status: OperationStatus,
    /// The current stage.
    pub stage: Option<String>,
    /// When it started.
    pub created_at: Timestamp,
    /// When it ended, or was found to be lost.
    pub ended_at: Option<Timestamp>,
    /// The body that the request's response would have had. The output of commands is included only for tokens that may
    /// run commands.
    pub result: Option<Value>,
    /// Why it failed.
    pub error: Option<Problem>,
}

/// State of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OperationStatus {
    /// Running.
    Running,
    /// Succeeded.
    Succeeded,
    /// Failed.
    Failed,
    /// Cancelled.
    Cancelled,
    /// Lost: the server that carried it out was killed. What it had done so far was kept or undone as after any crash.
    Lost,
}

impl From<JobState> for OperationStatus {
    fn from(state: JobState) -> Self {
        match state {
            JobState::Running => Self::Running,
            JobState::Done => Self::Succeeded,
            JobState::Failed => Self::Failed,
            JobState::Cancelled => Self::Cancelled,
            JobState::Lost => Self::Lost,
        }
    }
}

impl From<Job> for ApiOperation {
    fn from(job: Job) -> Self {
        Self {
            id: job.id,
            kind: operation::find(&job.tool).map_or(job.tool, |known| known.kind().to_owned()),
            status: job.state.into(),
            stage: job.progress.map(|progress| progress.stage),
            created_at: job.started_at,
            ended_at: job.ended_at,
            result: job.result,
            error: job.error.map(|error| error.problem_for(FrontEnd::Api)),
        }
    }
}

/// The caller's operations, without their results; for an admin those of all callers.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct OperationList {
    /// The oldest first.
    pub operations: Vec<ApiOperation>,
}

/// Whether a job is shown as an operation.
fn is_shown(job: &Job, now: Timestamp) -> bool {
    let is_recent = |end: Timestamp| now.duration_since(end).as_secs() <= ENDED_RETENTION.as_secs().cast_signed();
    !job.cancel_asked && job.state != JobState::Cancelled && job.ended_at.is_none_or(is_recent)
}

fn viewer(caller: &Caller) -> Viewer<'_> {
    if caller.scope == Scope::Admin { Viewer::Everyone } else { Viewer::Actor(&caller.actor) }
}

/// Those that are the caller's, without their results.
pub fn list(nido: &Nido, caller: &Caller) -> Result<OperationList> {
    let now = Timestamp::now();
    let jobs = nido.jobs(viewer(caller))?.jobs;
    let shown = jobs.into_iter().rev().filter(|job| is_shown(job, now));
    Ok(OperationList { operations: shown.map(ApiOperation::from).collect() })
}

/// One of them.
pub fn get(nido: &Nido, id: &str, caller: &Caller) -> Result<ApiOperation> {
    find(nido, id, caller).map(|job| job.shown_to(caller.scope).into())
}

/// Deletes one, and stops it if it is running. Its effects so far are undone as if its caller had been killed.
pub fn cancel(nido: &Nido, id: &str, caller: &Caller) -> Result<ApiOperation> {
    let mut job = find(nido, id, caller)?;
    if job.state == JobState::Running {
        job = nido.job_cancel(id, viewer(caller)).map_err(not_found)?;
    }
    let mut operation = ApiOperation::from(job);
    if operation.status == OperationStatus::Running {
        operation.status = OperationStatus::Cancelled;
        operation.ended_at = Some(moment::now());
    } else {
        nido.job_delete(id)?;
    }
    Ok(operation)
}

fn find(nido: &Nido, id: &str, caller: &Caller) -> Result<Job> {
    let job = nido.job_get(id, viewer(caller)).map_err(not_found)?;
    if is_shown(&job, Timestamp::now()) { Ok(job) } else { Err(unknown()) }
}

fn not_found(error: Error) -> Error {
    if error.code() == Code::JobNotFound { unknown() } else { error }
}

fn unknown() -> Error {
    Error::new(Code::OperationNotFound, "the caller has no such operation").hint(
        "only their caller and admins see operations; they are kept for an hour after their end (64 MiB of results for each \
         caller), cancelled ones not at all",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(state: JobState, ended: Option<i64>) -> Job {
        Job {
            id: "job_0123456789abcdef".into(),
            tool: "vm_run".into(),
            vm_name: None,
            actor: "token:ci#1".into(),
            state,
            started_at: Timestamp::UNIX_EPOCH,
            ended_at: ended.map(|at| Timestamp::from_second(at).unwrap()),
            progress: None,
            cancel_asked: false,
            result: Some(Value::Null),
            error: None,
        }
    }

    #[test]
    fn ended_operations_are_shown_for_an_hour_and_cancelled_ones_not_at_all() {
        let now = Timestamp::from_second(10_000).unwrap();
        for state in [JobState::Done, JobState::Failed, JobState::Lost] {
            assert!(is_shown(&job(state, Some(6_400)), now) && !is_shown(&job(state, Some(6_399)), now), "{state:?}");
        }
        assert!(is_shown(&job(JobState::Running, None), now));
        assert!(!is_shown(&job(JobState::Cancelled, Some(10_000)), now));
        assert!(!is_shown(&Job { cancel_asked: true, ..job(JobState::Running, None) }, now));
    }

    #[test]
    fn a_job_is_an_operation_of_the_kind_that_was_released() {
        assert_eq!(ApiOperation::from(job(JobState::Lost, None)).kind, "run");
        assert_eq!(
            ApiOperation::from(Job { tool: "vm_snapshot".into(), ..job(JobState::Lost, None) }).kind,
            "vm_snapshot"
        );
        assert_eq!(serde_json::to_value(OperationStatus::Lost).unwrap(), "lost");
    }
}
