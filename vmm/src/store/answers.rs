//! The table `answers`: what requests with a key of their caller's were answered, so that the same request is not carried out
//! twice.

use rusqlite::{OptionalExtension, params};

use super::{Store, fault};
use crate::error::Result;

/// How long an answer is kept, in milliseconds: a day.
const KEPT_MS: i64 = 24 * 3600 * 1000;

/// What is known about a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// Nothing: the request is the caller's to carry out, and marked so.
    Nothing,
    /// Another request had this key.
    Another,
    /// The same request is being carried out.
    Running,
    /// It was answered like this.
    Answered(String),
}

impl Store {
    /// Marks a request as being carried out by a server's run, if nothing is known of its key. What a run that is over has
    /// left unanswered is carried out again.
    ///
    /// # Errors
    /// Of the store.
    pub fn begin_answer(&self, caller: &str, key: &str, request: &str, run: &str) -> Result<Known> {
        let now = jiff::Timestamp::now().as_millisecond();
        self.in_transaction(|| {
            let forget = "DELETE FROM answers WHERE at_ms < ?1 \
                          OR (caller = ?2 AND key = ?3 AND answer IS NULL AND run <> ?4)";
            self.connection.execute(forget, params![now - KEPT_MS, caller, key, run]).map_err(fault)?;
            let known = "SELECT request, answer FROM answers WHERE caller = ?1 AND key = ?2";
            let read = |row: &rusqlite::Row<'_>| Ok((row.get::<_, String>(0)?, row.get::<_, Option<String>>(1)?));
            match self.connection.query_row(known, [caller, key], read).optional().map_err(fault)? {
                Some((other, _)) if other != request => Ok(Known::Another),
                Some((_, Some(answer))) => Ok(Known::Answered(answer)),
                Some((_, None)) => Ok(Known::Running),
                None => {
                    let insert = "INSERT INTO answers (caller, key, request, run, at_ms) VALUES (?1, ?2, ?3, ?4, ?5)";
                    self.connection.execute(insert, params![caller, key, request, run, now]).map_err(fault)?;
                    Ok(Known::Nothing)
                }
            }
        })
    }

    /// Keeps the answer; without one the request may be made again.
    ///
    /// # Errors
    /// Of the store.
    pub fn end_answer(&self, caller: &str, key: &str, answer: Option<&str>) -> Result<()> {
        let statement = match answer {
            Some(_) => "UPDATE answers SET answer = ?3 WHERE caller = ?1 AND key = ?2",
            None => "DELETE FROM answers WHERE caller = ?1 AND key = ?2 AND ?3 IS NULL",
        };
        self.connection.execute(statement, params![caller, key, answer]).map_err(fault).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_carried_out_once() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        let begin = |caller, request, run| store.begin_answer(caller, "k", request, run).unwrap();
        assert_eq!(begin("ci", "a", "1"), Known::Nothing);
        assert_eq!((begin("ci", "a", "1"), begin("ci", "b", "1")), (Known::Running, Known::Another));
        assert_eq!(begin("other", "b", "1"), Known::Nothing, "keys are each caller's own");
        // The server was killed while it carried it out.
        assert_eq!(begin("ci", "a", "2"), Known::Nothing);
        store.end_answer("ci", "k", Some("done")).unwrap();
        assert_eq!(begin("ci", "a", "3"), Known::Answered("done".into()));
        store.end_answer("other", "k", None).unwrap();
        assert_eq!(begin("other", "c", "1"), Known::Nothing);
        store.connection.execute("UPDATE answers SET at_ms = 0", []).unwrap();
        assert_eq!(begin("ci", "b", "1"), Known::Nothing, "after a day it is forgotten");
    }
}
