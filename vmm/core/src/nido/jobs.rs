//! Jobs: work that continues after its first response. A server carries it out in memory, and records it in the store.
//!
//! ```text
//!  job_begin --> running --job_end--> done, failed, cancelled
//!                   |
//!                   +--- its server was killed ---> lost
//! ```
//!
//! Invariant: a job with the state `running` is carried out by a running process; a reader corrects all others.

use std::sync::PoisonError;

use nido_api::error::{Code, Error, Result};
use nido_api::sanitize::head;
use nido_api::{JOB_RESULT_MAX, Job, JobList, JobOutcome, JobProgress, JobRequest, Viewer};
use nido_engine::liveness::{Presence, is_gone};
use nido_files::random;
use serde_json::Value;

use super::Nido;

/// The longest word about how far a job has come, in bytes.
const STAGE_MAX: usize = 200;

impl Nido {
    /// Begins a job that this process carries out.
    ///
    /// # Errors
    /// `limit_exceeded` if too many are running.
    pub fn job_begin(&self, request: &JobRequest) -> Result<Job> {
        self.settle_jobs()?;
        let holder = self.presence()?;
        let id = format!("job_{}", random::id()?);
        self.store().insert_job(&id, request, &holder)
    }

    /// Says how far it has come. Each time the store is written to: some times a second is enough.
    ///
    /// # Errors
    /// Of the store.
    pub fn job_progress(&self, id: &str, progress: &JobProgress) -> Result<()> {
        let stage = head(&progress.stage, STAGE_MAX).to_owned();
        let percent = progress.percent.map(|percent| percent.min(100));
        self.store().progress_job(id, &JobProgress { stage, percent })
    }

    /// Says how it ended. Of what has ended already nothing changes.
    ///
    /// # Errors
    /// `limit_exceeded` if its result is longer than [`JOB_RESULT_MAX`]; the job has failed with that then.
    pub fn job_end(&self, id: &str, outcome: JobOutcome) -> Result<()> {
        let length = |value: &Value| value.to_string().len();
        let (outcome, too_long) = match outcome {
            JobOutcome::Done(value) if length(&value) > JOB_RESULT_MAX => {
                let words = format!("the result has {} bytes; the limit is {JOB_RESULT_MAX}", length(&value));
                let error = Error::new(Code::LimitExceeded, words).hint("request less, or write it to a file");
                (JobOutcome::Failed(error.problem()), Err(error))
            }
            kept => (kept, Ok(())),
        };
        self.store().end_job(id, &outcome)?;
        too_long
    }

    /// One job, if it may be seen.
    ///
    /// # Errors
    /// `job_not_found`.
    pub fn job_get(&self, id: &str, viewer: Viewer<'_>) -> Result<Job> {
        self.settle_jobs()?;
        self.store().job(id, viewer)
    }

    /// All jobs that may be seen, the newest first.
    ///
    /// # Errors
    /// Of the store.
    pub fn jobs(&self, viewer: Viewer<'_>) -> Result<JobList> {
        self.settle_jobs()?;
        Ok(JobList { jobs: self.store().jobs(viewer)? })
    }

    /// Requests cancellation of a job. Its server polls the request; a job that has ended stays as it is.
    ///
    /// # Errors
    /// `job_not_found`.
    pub fn job_cancel(&self, id: &str, viewer: Viewer<'_>) -> Result<Job> {
        self.settle_jobs()?;
        self.store().cancel_job(id, viewer)
    }

    /// Whether a job is to be cancelled: for who carries it out.
    ///
    /// # Errors
    /// `job_not_found`.
    pub fn job_is_cancelled(&self, id: &str) -> Result<bool> {
        self.store().is_job_cancelled(id)
    }

    /// Writes down which jobs are lost.
    fn settle_jobs(&self) -> Result<()> {
        let holders = self.store().job_holders()?;
        let directory = self.home().present();
        for holder in holders.iter().filter(|holder| is_gone(&directory, holder)) {
            self.store().lose_jobs(holder)?;
        }
        Ok(())
    }

    /// What this process is known by, for as long as it lives.
    pub(super) fn presence(&self) -> Result<String> {
        let mut presence = self.presence.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = &*presence {
            return Ok(there.id().to_owned());
        }
        let begun = Presence::begin(&self.home().present())?;
        Ok(presence.insert(begun).id().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::nido::OpenOptions;
    use nido_api::JobState;

    fn open(dir: &tempfile::TempDir) -> Nido {
        let home = Some(dir.path().join("home"));
        Nido::open_unreconciled(OpenOptions { home, ..OpenOptions::default() }).unwrap()
    }

    fn request() -> JobRequest {
        JobRequest { tool: "vm_exec".into(), vm_name: None, actor: "uid:1".into() }
    }

    #[test]
    fn a_job_is_lost_with_whoever_carried_it_out_and_what_it_did_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (server, other) = (open(&dir), open(&dir));
        let (ended, running) = (server.job_begin(&request()).unwrap(), server.job_begin(&request()).unwrap());
        let others = other.job_begin(&request()).unwrap();
        server.job_end(&ended.id, JobOutcome::Done(json!(7))).unwrap();
        let state = |id: &str| other.job_get(id, Viewer::Everyone).unwrap().state;
        assert_eq!((state(&ended.id), state(&running.id)), (JobState::Done, JobState::Running));
        drop(server);
        assert_eq!(
            (state(&ended.id), state(&running.id), state(&others.id)),
            (JobState::Done, JobState::Lost, JobState::Running)
        );
        assert!(other.job_get(&running.id, Viewer::Everyone).unwrap().ended_at.is_some());
        assert_eq!(other.jobs(Viewer::Actor("uid:1")).unwrap().jobs.len(), 3);
    }

    #[test]
    fn a_cancelled_job_is_one_once_its_holder_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let nido = open(&dir);
        let id = nido.job_begin(&request()).unwrap().id;
        assert!(!nido.job_is_cancelled(&id).unwrap());
        let asked = nido.job_cancel(&id, Viewer::Actor("uid:1")).unwrap();
        assert_eq!((asked.state, asked.cancel_asked), (JobState::Running, true));
        assert!(nido.job_is_cancelled(&id).unwrap());
        nido.job_end(&id, JobOutcome::Cancelled).unwrap();
        assert_eq!(nido.job_get(&id, Viewer::Actor("uid:1")).unwrap().state, JobState::Cancelled);
    }

    #[test]
    fn what_is_too_much_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let nido = open(&dir);
        let id = nido.job_begin(&request()).unwrap().id;
        nido.job_progress(&id, &JobProgress { stage: "é".repeat(500), percent: Some(200) }).unwrap();
        let progress = nido.job_get(&id, Viewer::Everyone).unwrap().progress.unwrap();
        assert_eq!((progress.stage, progress.percent), ("é".repeat(100), Some(100)));
        let error = nido.job_end(&id, JobOutcome::Done("x".repeat(JOB_RESULT_MAX).into())).unwrap_err();
        assert_eq!(error.code(), Code::LimitExceeded);
        let job = nido.job_get(&id, Viewer::Everyone).unwrap();
        assert_eq!((job.state, job.result), (JobState::Failed, None));
        let id = nido.job_begin(&request()).unwrap().id;
        nido.job_end(&id, JobOutcome::Done("x".repeat(JOB_RESULT_MAX - 2).into())).unwrap();
    }
}
