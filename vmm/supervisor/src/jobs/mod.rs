//! Jobs: work that blocks its thread, such as copying, syncing, hashing, reading and deleting files, and testing QEMU. Each runs on
//! a thread of its own.
//!
//! ```text
//!  event loop --Jobs::start(what, work)--> thread: work --outcome--> Report::JobEnded --> the loop, or a task that waits
//!                                            |
//!                                            +- not over at its deadline: an error; the thread continues
//! ```
//!
//! Invariants: the event loop calls what blocks only within a job (held by
//! `tests/functional/structure.rs::the_supervisor_blocks_in_jobs_only`), and never waits for one. A job that may change the VM's
//! directory is counted until its thread has finished, and the VM's lock is held at least as long.

mod host;
mod logs;
mod snapshot;
mod warm_image;

use std::sync::Arc;
use std::time::Duration;

use nido_api::error::{Code, Error, Result};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle, spawn_blocking};
use tokio::time::timeout;

pub(super) use self::host::HostProbe;
pub(super) use self::logs::{Tails, rotate_logs};
pub(super) use self::snapshot::{Preparation, Prepared};
pub(super) use self::warm_image::WarmImage;

/// Runs work to its end.
pub(super) async fn run<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    spawn_blocking(work).await.unwrap_or_else(|error| Err(failed(&error)))
}

/// The same with a deadline. Work that is not over then continues, and its result is lost: it must not change anything.
///
/// # Errors
/// Those of the work; `timeout`.
pub(super) async fn run_within<T: Send + 'static>(
    what: &'static str,
    limit: Duration,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    timeout(limit, run(work)).await.unwrap_or_else(|_| Err(late(what, limit)))
}

fn failed(error: &JoinError) -> Error {
    Error::internal(format!("the work failed: {error}"))
}

fn late(what: &str, limit: Duration) -> Error {
    Error::new(Code::Timeout, format!("{what} takes longer than {} s", limit.as_secs()))
}

/// The jobs that may change the VM's directory, by what they do.
#[derive(Debug, Clone)]
pub(super) struct Jobs(Arc<watch::Sender<Vec<&'static str>>>);

impl Jobs {
    pub(super) fn new() -> Self {
        Self(Arc::new(watch::channel(Vec::new()).0))
    }

    /// Starts a job.
    pub(super) fn start<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Job<T> {
        self.0.send_modify(|running| running.push(what));
        let entry = Entry { what, jobs: self.clone() };
        let thread = spawn_blocking(move || {
            let _entry = entry;
            work()
        });
        Job { what, thread }
    }

    /// Whether a job that does this runs.
    pub(super) fn is_running(&self, what: &str) -> bool {
        self.0.borrow().contains(&what)
    }

    /// Waits until all have finished, for so long at most; whether they have.
    pub(super) async fn finish(&self, limit: Duration) -> bool {
        let mut running = self.0.subscribe();
        let finished = timeout(limit, running.wait_for(Vec::is_empty)).await.is_ok();
        if !finished {
            tracing::warn!("jobs that have not finished: {}", self.0.borrow().join(", "));
        }
        finished
    }
}

/// A job in the list of those that run, until its thread has finished; also if the work panics, or is never begun.
struct Entry {
    what: &'static str,
    jobs: Jobs,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.jobs.0.send_modify(|running| {
            if let Some(at) = running.iter().position(|what| *what == self.what) {
                running.swap_remove(at);
            }
        });
    }
}

/// A job that runs. It continues if this is dropped.
#[derive(Debug)]
pub(super) struct Job<T> {
    what: &'static str,
    thread: JoinHandle<Result<T>>,
}

impl<T> Job<T> {
    /// What it does.
    pub(super) const fn what(&self) -> &'static str {
        self.what
    }

    /// Waits for its outcome, for so long at most. It continues after that.
    ///
    /// # Errors
    /// Those of its work; `timeout`.
    pub(super) async fn outcome_within(mut self, limit: Duration) -> Result<T> {
        self.wait(limit).await.unwrap_or_else(|| Err(late(self.what, limit)))
    }

    /// Waits for its end, for so long at most. `None`: it still runs. To be called until there is an outcome.
    pub(super) async fn wait(&mut self, limit: Duration) -> Option<Result<T>> {
        let ended = timeout(limit, &mut self.thread).await.ok()?;
        Some(ended.unwrap_or_else(|error| Err(failed(&error))))
    }

    /// Waits for its end.
    pub(super) async fn end(self) -> Result<T> {
        self.thread.await.unwrap_or_else(|error| Err(failed(&error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn a_job_that_hangs_is_late_and_counts_until_its_thread_has_finished() {
        let jobs = Jobs::new();
        assert!(jobs.finish(SHORT).await);
        let (release, hang) = std::sync::mpsc::channel::<()>();
        let mut job = jobs.start("copying", move || {
            let _ = hang.recv();
            Ok(7)
        });
        assert!(job.wait(SHORT).await.is_none());
        assert!(jobs.is_running("copying") && !jobs.is_running("deleting"));
        let error = job.outcome_within(SHORT).await.unwrap_err();
        assert_eq!((error.code(), error.message()), (Code::Timeout, "copying takes longer than 0 s"));
        assert!(!jobs.finish(SHORT).await, "nothing waits for its outcome any more, but it runs");
        drop(release);
        assert!(jobs.finish(LONG).await);
        assert!(!jobs.is_running("copying"));
    }

    #[tokio::test]
    async fn outcomes_and_panics_of_work_are_results() {
        let jobs = Jobs::new();
        assert_eq!(jobs.start("adding", || Ok(7)).end().await.unwrap(), 7);
        let refused = || Err::<(), _>(Error::new(Code::DiskFull, "full"));
        assert_eq!(jobs.start("writing", refused).outcome_within(LONG).await.unwrap_err().code(), Code::DiskFull);
        assert_eq!(run_within("writing", LONG, refused).await.unwrap_err().code(), Code::DiskFull);
        let panicking = jobs.start("panicking", || -> Result<()> { std::panic::resume_unwind(Box::new("x")) });
        assert_eq!(panicking.end().await.unwrap_err().code(), Code::Internal);
        assert!(jobs.finish(LONG).await);
    }

    #[tokio::test]
    async fn one_of_two_equal_jobs_still_counts() {
        let jobs = Jobs::new();
        let (release, hang) = std::sync::mpsc::channel::<()>();
        let hanging = jobs.start("copying", move || {
            let _ = hang.recv();
            Ok(())
        });
        jobs.start("copying", || Ok(())).end().await.unwrap();
        assert!(jobs.is_running("copying"));
        drop(release);
        hanging.end().await.unwrap();
        assert!(jobs.finish(LONG).await);
    }
}
