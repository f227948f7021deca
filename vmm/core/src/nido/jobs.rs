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
use std::time::Duration;

use nido_api::error::{Code, Error, Result};
use nido_api::sanitize::head;
use nido_api::{JOB_RESULT_MAX, Job, JobList, JobOutcome, JobProgress, JobRequest, OPERATION_RESULTS_MAX, Viewer};
use nido_engine::liveness::{LivenessLock, is_gone};
use nido_files::random;
use serde_json::Value;

use super::Nido;

/// How often the process that carries a job out checks whether its cancellation was requested.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// The longest word about how far a job has come, in bytes.
const STAGE_MAX: usize = 200;

impl Nido {
    /// Begins a job that this process carries out.
    ///
    /// # Errors
    /// `limit_exceeded` if too many are running.
    pub fn job_begin(&self, request: &JobRequest) -> Result<Job> {
        self.reconcile_jobs()?;
        let holder = self.liveness_lock()?;
        let id = format!("job_{}", random::id()?);
        self.store().insert_job(&id, request, &holder)
    }

    /// Records its progress. Each time the store is written to: some times a second is enough.
    ///
    /// # Errors
    /// Of the store.
    pub fn job_progress(&self, id: &str, progress: &JobProgress) -> Result<()> {
        let stage = head(&progress.stage, STAGE_MAX).to_owned();
        let percent = progress.percent.map(|percent| percent.min(100));
        self.store().progress_job(id, &JobProgress { stage, percent })
    }

    /// Records how it ended. Of what has ended already nothing changes.
    ///
    /// # Errors
    /// `limit_exceeded` if its result is longer than [`JOB_RESULT_MAX`]; the job has failed with that then.
    pub fn job_end(&self, id: &str, outcome: JobOutcome) -> Result<()> {
        self.job_end_within(id, outcome, JOB_RESULT_MAX)
    }

    /// The same with another limit. It also limits the results of all jobs of the caller, if it is larger than that of one job.
    fn job_end_within(&self, id: &str, outcome: JobOutcome, result_max: usize) -> Result<()> {
        let length = |value: &Value| value.to_string().len();
        let (outcome, too_long) = match outcome {
            JobOutcome::Done(value) if length(&value) > result_max => {
                let words = format!("the result has {} bytes; the limit is {result_max}", length(&value));
                let error = Error::new(Code::LimitExceeded, words).hint("request less, or write it to a file");
                (JobOutcome::Failed(error.record()), Err(error))
            }
            kept => (kept, Ok(())),
        };
        self.store().end_job(id, &outcome)?;
        self.store().limit_job_results(id, result_max.max(OPERATION_RESULTS_MAX))?;
        too_long
    }

    /// Carries a job to its end and records it. `cancel` is called when its cancellation is requested, by whatever process; then the
    /// work ends soon. `progress` is what the work reports, if it does not record that itself.
    pub async fn carry_job(
        &self,
        id: &str,
        result_max: usize,
        work: impl Future<Output = JobOutcome>,
        cancel: impl Fn(),
        progress: impl Fn() -> Option<JobProgress>,
    ) {
        let mut work = std::pin::pin!(work);
        let mut look = tokio::time::interval(POLL_INTERVAL);
        let mut recorded = None;
        let outcome = loop {
            tokio::select! {
                outcome = &mut work => break outcome,
                _ = look.tick() => {}
                () = self.job_cancelled.notified() => {}
            }
            if self.job_is_cancelled(id).unwrap_or(false) {
                cancel();
            }
            let now = progress();
            if now != recorded {
                recorded.clone_from(&now);
                if let Some(Err(error)) = now.map(|now| self.job_progress(id, &now)) {
                    tracing::warn!("the progress of job {id} cannot be recorded: {error}");
                }
            }
        };
        if let Err(error) = self.job_end_within(id, outcome, result_max) {
            tracing::error!("the end of job {id} cannot be recorded: {error}");
        }
    }

    /// One job, if it may be seen.
    ///
    /// # Errors
    /// `job_not_found`.
    pub fn job_get(&self, id: &str, viewer: Viewer<'_>) -> Result<Job> {
        self.reconcile_jobs()?;
        self.store().job(id, viewer)
    }

    /// All jobs that may be seen, the newest first, without their results.
    ///
    /// # Errors
    /// Of the store.
    pub fn jobs(&self, viewer: Viewer<'_>) -> Result<JobList> {
        self.reconcile_jobs()?;
        Ok(JobList { jobs: self.store().jobs(viewer)? })
    }

    /// Requests cancellation of a job. Its server polls the request; a job that has ended stays as it is.
    ///
    /// # Errors
    /// `job_not_found`.
    pub fn job_cancel(&self, id: &str, viewer: Viewer<'_>) -> Result<Job> {
        self.reconcile_jobs()?;
        let job = self.store().cancel_job(id, viewer)?;
        // Those that this process carries out need not wait until they are looked at.
        self.job_cancelled.notify_waiters();
        Ok(job)
    }

    /// Deletes the record of a job that has ended.
    ///
    /// # Errors
    /// Of the store.
    pub fn job_delete(&self, id: &str) -> Result<()> {
        self.store().delete_job(id)
    }

    /// Whether a job is to be cancelled: for who carries it out.
    ///
    /// # Errors
    /// `job_not_found`.
    pub fn job_is_cancelled(&self, id: &str) -> Result<bool> {
        self.store().is_job_cancelled(id)
    }

    /// Records which jobs are lost.
    fn reconcile_jobs(&self) -> Result<()> {
        let holders = self.store().job_holders()?;
        let directory = self.home().present();
        for holder in holders.iter().filter(|holder| is_gone(&directory, holder)) {
            self.store().lose_jobs(holder)?;
        }
        Ok(())
    }

    /// What this process is known by, for as long as it lives.
    pub(super) fn liveness_lock(&self) -> Result<String> {
        let mut liveness_lock = self.liveness_lock.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = &*liveness_lock {
            return Ok(there.id().to_owned());
        }
        let begun = LivenessLock::begin(&self.home().present())?;
        Ok(liveness_lock.insert(begun).id().to_owned())
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
    fn a_job_is_lost_with_its_process_and_its_effects_stay() {
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
    fn a_job_is_cancelled_when_its_process_confirms_it() {
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
    fn oversized_results_are_not_stored() {
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

    #[tokio::test(start_paused = true)]
    async fn a_job_that_is_cancelled_from_another_process_stops() {
        let dir = tempfile::tempdir().unwrap();
        let (server, other) = (open(&dir), open(&dir));
        let id = server.job_begin(&request()).unwrap().id;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let stop = std::cell::RefCell::new(Some(stop));
        let work = async {
            stopped.await.unwrap();
            JobOutcome::Cancelled
        };
        let cancel = || {
            if let Some(stop) = stop.borrow_mut().take() {
                let _ = stop.send(());
            }
        };
        let progress = || Some(JobProgress { stage: "running".into(), percent: None });
        let carried = server.carry_job(&id, JOB_RESULT_MAX, work, cancel, progress);
        let asked = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert_eq!(other.job_get(&id, Viewer::Everyone).unwrap().progress.unwrap().stage, "running");
            other.job_cancel(&id, Viewer::Everyone).unwrap();
        };
        tokio::time::timeout(Duration::from_secs(60), async { tokio::join!(carried, asked) }).await.unwrap();
        assert_eq!(other.job_get(&id, Viewer::Everyone).unwrap().state, JobState::Cancelled);
    }
}
