//! The table `jobs`: work that continues after its first response, and its result.
//!
//! Invariant: a job leaves `running` once, and is never changed after that.

use jiff::Timestamp;
use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;
use nido_api::{JOBS_MAX, Job, JobOutcome, JobProgress, JobRequest, JobState, Viewer};
use rusqlite::{OptionalExtension, Row, params};

use super::{Store, decode, encode, fault, readable_rows};

/// How long a job is known after its end, in milliseconds: a day.
const RETENTION_MS: i64 = 24 * 3600 * 1000;
const COLUMNS: &str =
    "id, tool, vm_name, actor, state, started_ms, ended_ms, stage, percent, cancel_asked, result, error";
/// The same without results, which may be long.
const BRIEF_COLUMNS: &str =
    "id, tool, vm_name, actor, state, started_ms, ended_ms, stage, percent, cancel_asked, NULL, error";

impl Store {
    /// Records the start of a job; `holder` is the server that carries it out. Deletes old ones.
    ///
    /// # Errors
    /// `limit_exceeded` if too many are running.
    pub fn insert_job(&self, id: &str, request: &JobRequest, holder: &str) -> Result<Job> {
        let now = now_ms();
        self.in_transaction(|| {
            let old = "DELETE FROM jobs WHERE state <> 'running' AND ended_ms < ?1";
            self.connection.execute(old, [now - RETENTION_MS]).map_err(fault)?;
            let room = "DELETE FROM jobs WHERE id IN (SELECT id FROM jobs WHERE state <> 'running' ORDER BY ended_ms \
                        LIMIT max(0, (SELECT count(*) FROM jobs) + 1 - ?1))";
            let most = i64::try_from(JOBS_MAX).unwrap_or(i64::MAX);
            self.connection.execute(room, [most]).map_err(fault)?;
            let known: i64 =
                self.connection.query_row("SELECT count(*) FROM jobs", [], |row| row.get(0)).map_err(fault)?;
            if known >= most {
                return Err(Error::new(Code::LimitExceeded, format!("{known} jobs are running, which is the limit"))
                    .hint("wait until some have ended, or cancel them"));
            }
            let insert =
                "INSERT INTO jobs (id, tool, vm_name, actor, holder, started_ms) VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
            let name = request.vm_name.as_ref().map(VmName::as_str);
            let row = params![id, request.tool, name, request.actor, holder, now];
            self.connection.execute(insert, row).map_err(fault)?;
            self.job(id, Viewer::Everyone)
        })
    }

    /// The job of that id, if it may be seen.
    ///
    /// # Errors
    /// `job_not_found`.
    pub fn job(&self, id: &str, viewer: Viewer<'_>) -> Result<Job> {
        let query = format!("SELECT {COLUMNS} FROM jobs WHERE id = ?1 AND (?2 IS NULL OR actor = ?2)");
        let row = self.connection.query_row(&query, params![id, actor(viewer)], read).optional().map_err(fault)?;
        row.ok_or_else(|| no_such_job(id))?
    }

    /// All jobs that may be seen, the newest first, without their results.
    ///
    /// # Errors
    /// Of the store.
    pub fn jobs(&self, viewer: Viewer<'_>) -> Result<Vec<Job>> {
        let query = format!(
            "SELECT {BRIEF_COLUMNS} FROM jobs WHERE ?1 IS NULL OR actor = ?1 ORDER BY started_ms DESC, rowid DESC"
        );
        let mut statement = self.connection.prepare(&query).map_err(fault)?;
        let rows = statement.query_map([actor(viewer)], read).map_err(fault)?;
        readable_rows("jobs", rows)
    }

    /// Who carries out jobs, as far as is recorded.
    ///
    /// # Errors
    /// Of the store.
    pub fn job_holders(&self) -> Result<Vec<String>> {
        let query = "SELECT DISTINCT holder FROM jobs WHERE state = 'running'";
        let mut statement = self.connection.prepare_cached(query).map_err(fault)?;
        let rows = statement.query_map([], |row| row.get(0)).map_err(fault)?;
        rows.collect::<Result<_, _>>().map_err(fault)
    }

    /// Records that the server of these jobs is gone.
    ///
    /// # Errors
    /// Of the store.
    pub fn lose_jobs(&self, holder: &str) -> Result<()> {
        let lose = "UPDATE jobs SET state = 'lost', ended_ms = ?2 WHERE state = 'running' AND holder = ?1";
        self.connection.execute(lose, params![holder, now_ms()]).map_err(fault).map(drop)
    }

    /// Records the progress of a running job.
    ///
    /// # Errors
    /// Of the store.
    pub fn progress_job(&self, id: &str, progress: &JobProgress) -> Result<()> {
        let update = "UPDATE jobs SET stage = ?2, percent = ?3 WHERE id = ?1 AND state = 'running'";
        self.connection.execute(update, params![id, progress.stage, progress.percent]).map_err(fault).map(drop)
    }

    /// Records the end of a running job.
    ///
    /// # Errors
    /// Of the store.
    pub fn end_job(&self, id: &str, outcome: &JobOutcome) -> Result<()> {
        let (state, result, error) = match outcome {
            JobOutcome::Done(value) => (JobState::Done, Some(value.to_string()), None),
            JobOutcome::Failed(problem) => (JobState::Failed, None, Some(encode(problem)?)),
            JobOutcome::Cancelled => (JobState::Cancelled, None, None),
        };
        let update =
            "UPDATE jobs SET state = ?2, result = ?3, error = ?4, ended_ms = ?5 WHERE id = ?1 AND state = 'running'";
        let row = params![id, state.word(), result, error, now_ms()];
        self.connection.execute(update, row).map_err(fault).map(drop)
    }

    /// Deletes the oldest jobs of a job's caller that have a result, until the results of the rest have at most `most` bytes.
    ///
    /// # Errors
    /// Of the store.
    pub fn limit_job_results(&self, id: &str, most: usize) -> Result<()> {
        let delete = "DELETE FROM jobs WHERE id IN (SELECT id FROM (
                          SELECT id, sum(octet_length(result)) OVER (ORDER BY started_ms DESC, rowid DESC) AS bytes FROM jobs
                          WHERE result IS NOT NULL AND actor = (SELECT actor FROM jobs WHERE id = ?1)) WHERE bytes > ?2)";
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        self.connection.execute(delete, params![id, most]).map_err(fault).map(drop)
    }

    /// Deletes a job that has ended.
    ///
    /// # Errors
    /// Of the store.
    pub fn delete_job(&self, id: &str) -> Result<()> {
        let delete = "DELETE FROM jobs WHERE id = ?1 AND state <> 'running'";
        self.connection.execute(delete, [id]).map_err(fault).map(drop)
    }

    /// Requests cancellation of a running job that the caller may see.
    ///
    /// # Errors
    /// `job_not_found`.
    pub fn cancel_job(&self, id: &str, viewer: Viewer<'_>) -> Result<Job> {
        let ask = "UPDATE jobs SET cancel_asked = 1 WHERE id = ?1 AND state = 'running' AND (?2 IS NULL OR actor = ?2)";
        self.connection.execute(ask, params![id, actor(viewer)]).map_err(fault)?;
        self.job(id, viewer)
    }

    /// Whether a job is to be cancelled.
    ///
    /// # Errors
    /// `job_not_found`.
    pub fn is_job_cancelled(&self, id: &str) -> Result<bool> {
        let query = "SELECT cancel_asked FROM jobs WHERE id = ?1";
        let asked = self.connection.query_row(query, [id], |row| row.get(0)).optional().map_err(fault)?;
        asked.ok_or_else(|| no_such_job(id))
    }
}

const fn actor(viewer: Viewer<'_>) -> Option<&str> {
    match viewer {
        Viewer::Everyone => None,
        Viewer::Actor(actor) => Some(actor),
    }
}

fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

fn no_such_job(id: &str) -> Error {
    Error::new(Code::JobNotFound, format!("there is no job '{}'", id.escape_debug()))
        .hint("jobs are kept for a day after their end, and only their caller sees them")
}

fn read(row: &Row<'_>) -> rusqlite::Result<Result<Job>> {
    let (started, ended): (i64, Option<i64>) = (row.get(5)?, row.get(6)?);
    let (state, name): (String, Option<String>) = (row.get(4)?, row.get(2)?);
    let (stage, percent): (Option<String>, Option<i64>) = (row.get(7)?, row.get(8)?);
    let (result, error): (Option<String>, Option<String>) = (row.get(10)?, row.get(11)?);
    let (id, tool, actor, cancel_asked) = (row.get(0)?, row.get(1)?, row.get(3)?, row.get(9)?);
    let time = |ms| Timestamp::from_millisecond(ms).map_err(|e| Error::internal(e.to_string()));
    let decoded = || -> Result<Job> {
        let unknown = || Error::internal(format!("the store has the unknown job state '{}'", state.escape_debug()));
        Ok(Job {
            id,
            tool,
            vm_name: name.map(|name| name.parse()).transpose()?,
            actor,
            state: JobState::ALL.into_iter().find(|known| known.word() == state).ok_or_else(unknown)?,
            started_at: time(started)?,
            ended_at: ended.map(time).transpose()?,
            progress: stage
                .map(|stage| JobProgress { stage, percent: percent.and_then(|percent| percent.try_into().ok()) }),
            cancel_asked,
            result: result.map(|text| decode("result", &text)).transpose()?,
            error: error.map(|text| decode("error", &text)).transpose()?,
        })
    };
    Ok(decoded())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn open() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        (dir, store)
    }

    fn request(actor: &str) -> JobRequest {
        JobRequest { tool: "vm_create".into(), vm_name: Some("web".parse().unwrap()), actor: actor.into() }
    }

    #[test]
    fn a_job_ends_once() {
        let (_dir, store) = open();
        let begun = store.insert_job("job_1", &request("uid:1"), "h").unwrap();
        assert_eq!((begun.state, begun.ended_at, begun.progress), (JobState::Running, None, None));
        store.progress_job("job_1", &JobProgress { stage: "booting".into(), percent: Some(40) }).unwrap();
        store.end_job("job_1", &JobOutcome::Done(json!({ "a": [1] }))).unwrap();
        let ended = store.job("job_1", Viewer::Everyone).unwrap();
        assert_eq!((ended.state, &ended.result), (JobState::Done, &Some(json!({ "a": [1] }))));
        assert_eq!(ended.progress.as_ref().unwrap().percent, Some(40));
        store.end_job("job_1", &JobOutcome::Failed(Error::internal("x").record())).unwrap();
        store.lose_jobs("h").unwrap();
        store.progress_job("job_1", &JobProgress { stage: "late".into(), percent: None }).unwrap();
        assert!(!store.cancel_job("job_1", Viewer::Everyone).unwrap().cancel_asked);
        assert_eq!(store.job("job_1", Viewer::Everyone).unwrap(), ended);
    }

    #[test]
    fn a_failure_comes_back_as_it_was() {
        let (_dir, store) = open();
        let problem = Error::new(Code::DiskFull, "full").hint("free some").record();
        store.insert_job("job_1", &request("uid:1"), "h").unwrap();
        store.end_job("job_1", &JobOutcome::Failed(problem.clone())).unwrap();
        assert_eq!(store.job("job_1", Viewer::Everyone).unwrap().error, Some(problem));
    }

    #[test]
    fn jobs_of_others_are_not_there() {
        let (_dir, store) = open();
        store.insert_job("job_1", &request("uid:1"), "h").unwrap();
        store.insert_job("job_2", &request("token:ci"), "h").unwrap();
        let mine = Viewer::Actor("uid:1");
        assert_eq!(store.job("job_2", mine).unwrap_err().code(), Code::JobNotFound);
        assert_eq!(store.cancel_job("job_2", mine).unwrap_err().code(), Code::JobNotFound);
        assert!(!store.is_job_cancelled("job_2").unwrap());
        let ids = |viewer| store.jobs(viewer).unwrap().into_iter().map(|job| job.id).collect::<Vec<_>>();
        assert_eq!((ids(mine), ids(Viewer::Everyone)), (vec!["job_1".into()], vec!["job_2".into(), "job_1".into()]));
        assert!(store.cancel_job("job_1", mine).unwrap().cancel_asked);
        assert!(store.is_job_cancelled("job_1").unwrap());
        assert_eq!(store.is_job_cancelled("job_3").unwrap_err().code(), Code::JobNotFound);
    }

    // A thousand results of many MiB each were kept for an hour.
    #[test]
    fn results_stay_within_a_budget_and_running_jobs_are_never_deleted() {
        let (_dir, store) = open();
        for (id, actor, bytes) in [("job_1", "a", 40), ("job_2", "b", 90), ("job_3", "a", 0), ("job_4", "a", 40)] {
            store.insert_job(id, &request(actor), "h").unwrap();
            if bytes > 0 {
                store.end_job(id, &JobOutcome::Done("x".repeat(bytes - 2).into())).unwrap();
            }
        }
        store.limit_job_results("job_4", 50).unwrap();
        let ids = || store.jobs(Viewer::Everyone).unwrap().into_iter().map(|job| job.id).collect::<Vec<_>>();
        assert_eq!(ids(), ["job_4", "job_3", "job_2"]);
        assert!(store.jobs(Viewer::Everyone).unwrap().iter().all(|job| job.result.is_none()), "lists have no results");
        assert!(store.job("job_4", Viewer::Everyone).unwrap().result.is_some());
        store.delete_job("job_3").unwrap();
        store.delete_job("job_4").unwrap();
        assert_eq!(ids(), ["job_3", "job_2"]);
    }

    #[test]
    fn ended_jobs_free_slots_and_running_ones_do_not() {
        let (_dir, store) = open();
        store
            .in_transaction(|| {
                for n in 0..JOBS_MAX {
                    let insert = "INSERT INTO jobs (id, tool, actor, holder, state, started_ms, ended_ms) \
                                  VALUES (?1, 't', 'a', 'h', 'done', 1, ?2)";
                    let at = now_ms() + i64::try_from(n).unwrap();
                    store.connection.execute(insert, params![format!("job_{n}"), at]).unwrap();
                }
                Ok(())
            })
            .unwrap();
        store.insert_job("job_x", &request("a"), "h").unwrap();
        assert_eq!(store.jobs(Viewer::Everyone).unwrap().len(), JOBS_MAX);
        assert!(store.job("job_0", Viewer::Everyone).is_err() && store.job("job_1", Viewer::Everyone).is_ok());
        store.connection.execute("UPDATE jobs SET state = 'running'", []).unwrap();
        assert_eq!(store.insert_job("job_y", &request("a"), "h").unwrap_err().code(), Code::LimitExceeded);
        store.connection.execute("UPDATE jobs SET state = 'failed', ended_ms = 1", []).unwrap();
        store.insert_job("job_z", &request("a"), "h").unwrap();
        assert_eq!(store.jobs(Viewer::Everyone).unwrap().len(), 1, "after a day they are forgotten");
    }
}
