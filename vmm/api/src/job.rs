//! Jobs: work that continues after its first response, and is polled later.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{FrontEnd, Scope};
use crate::error::{ErrorRecord, Problem};
use crate::name::VmName;
use crate::operation;

/// The longest result that is kept, as JSON, in bytes.
pub const JOB_RESULT_MAX: usize = 256 << 10;
/// The most bytes of results that the REST API keeps for one caller; the oldest jobs with a result are deleted first.
pub const OPERATION_RESULTS_MAX: usize = 64 << 20;
/// How many jobs are known at most. Those that ended first go first.
pub const JOBS_MAX: usize = 1000;

/// A job that is to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobRequest {
    /// The operation, for example `vm_create`.
    pub tool: String,
    /// The VM it is about.
    pub vm_name: Option<VmName>,
    /// Whose it is, as in the audit log: `uid:1000`, `token:ci`.
    pub actor: String,
}

/// State of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Running.
    Running,
    /// Succeeded.
    Done,
    /// Failed.
    Failed,
    /// Cancelled.
    Cancelled,
    /// Lost: the server that carried it out was killed.
    Lost,
}

impl JobState {
    /// Every state.
    pub const ALL: [Self; 5] = [Self::Running, Self::Done, Self::Failed, Self::Cancelled, Self::Lost];

    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Lost => "lost",
        }
    }
}

/// Progress of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct JobProgress {
    /// The current stage.
    pub stage: String,
    /// Percentage done.
    pub percent: Option<u8>,
}

/// A job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Job {
    /// Its id: `job_` and 16 hexadecimal digits.
    pub id: String,
    /// The operation.
    pub tool: String,
    /// The VM that the operation is about.
    pub vm_name: Option<VmName>,
    /// The caller who started it.
    pub actor: String,
    /// Its state.
    pub state: JobState,
    /// When it started.
    pub started_at: Timestamp,
    /// When it ended, or was found to be lost.
    pub ended_at: Option<Timestamp>,
    /// Its progress, if the operation reports any.
    pub progress: Option<JobProgress>,
    /// Whether cancellation was requested.
    pub cancel_asked: bool,
    /// Its result.
    #[schema(value_type = Option<Object>)]
    pub result: Option<Value>,
    /// Why it failed.
    #[schema(value_type = Option<Problem>)]
    pub error: Option<ErrorRecord>,
}

impl Job {
    /// With an error in the words of a front end, to be serialized for its user.
    #[must_use]
    pub fn worded_for(mut self, front_end: FrontEnd) -> Self {
        self.error = self.error.map(|error| error.worded_for(front_end));
        self
    }

    /// As a caller of this scope sees it: without the output of commands, unless it may run commands.
    #[must_use]
    pub fn shown_to(mut self, scope: Scope) -> Self {
        if operation::find(&self.tool).is_some_and(|known| known.has_output && !known.admits(scope)) {
            self.result = None;
        }
        self
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq)]
pub enum JobOutcome {
    /// Well, and with this.
    Done(Value),
    /// It failed.
    Failed(ErrorRecord),
    /// It was cancelled.
    Cancelled,
}

/// The jobs that a caller may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Viewer<'a> {
    /// Everybody's: for whom the home belongs to.
    Everyone,
    /// Those of this caller.
    Actor(&'a str),
}

/// A list of jobs, without their results.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct JobList {
    /// The newest first.
    pub jobs: Vec<Job>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_of_commands_is_for_tokens_that_may_run_commands() {
        let job = |tool: &str| Job {
            id: "job_1".into(),
            tool: tool.into(),
            vm_name: None,
            actor: "uid:1".into(),
            state: JobState::Done,
            started_at: Timestamp::UNIX_EPOCH,
            ended_at: None,
            progress: None,
            cancel_asked: false,
            result: Some(Value::Null),
            error: None,
        };
        let shown = |tool: &str, scope| job(tool).shown_to(scope).result.is_some();
        for tool in ["vm_exec", "vm_run"] {
            assert!(!shown(tool, Scope::Read) && shown(tool, Scope::Run) && shown(tool, Scope::Admin), "{tool}");
        }
        assert!(shown("vm_spawn", Scope::Read));
    }
}
