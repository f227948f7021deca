//! The table `answers`: what requests with a key of their caller's were answered, so that the same request is not carried out
//! twice.

use nido_api::error::{Code, Error, Result};
use rusqlite::{OptionalExtension, params};

use super::{Store, fault};

/// How long an answer is kept, in milliseconds: a day.
const RETENTION_MS: i64 = 24 * 3600 * 1000;
/// How many keys of one caller are known at most.
const KEYS_MAX: i64 = 100_000;
/// How many bytes of answers are kept for one caller.
const BYTES_MAX: i64 = 128 << 20;
/// An answer of so many bytes is kept in any case.
const SHORT: i64 = 4096;

/// What is known about a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyState {
    /// Nothing: the request is the caller's to carry out, and marked so.
    Nothing,
    /// Another request had this key.
    Another,
    /// The same request is being carried out.
    Running,
    /// The same request was started, and the server that carried it out ended without storing a response.
    Unknown,
    /// The caller has used too many keys.
    Full,
    /// It was answered like this.
    Answered(String),
}

impl Store {
    /// Marks a request as being carried out by a server's run, if nothing is known of its key. What a run that is gone has
    /// left unanswered is never carried out again: its effect is unknown.
    ///
    /// # Errors
    /// Of the store.
    pub fn begin_answer(
        &self,
        (caller, key): (&str, &str),
        request: &str,
        run: &str,
        is_gone: impl Fn(&str) -> bool,
    ) -> Result<KeyState> {
        let now = jiff::Timestamp::now().as_millisecond();
        self.in_transaction(|| {
            let forget = "DELETE FROM answers WHERE at_ms < ?1";
            self.connection.execute(forget, [now - RETENTION_MS]).map_err(fault)?;
            let known = "SELECT request, answer, run FROM answers WHERE caller = ?1 AND key = ?2";
            let read = |row: &rusqlite::Row<'_>| {
                Ok((row.get::<_, String>(0)?, row.get::<_, Option<String>>(1)?, row.get::<_, String>(2)?))
            };
            match self.connection.query_row(known, [caller, key], read).optional().map_err(fault)? {
                Some((other, ..)) if other != request => Ok(KeyState::Another),
                Some((_, Some(answer), _)) => Ok(KeyState::Answered(answer)),
                Some((.., by)) if by != run && is_gone(&by) => Ok(KeyState::Unknown),
                Some(_) => Ok(KeyState::Running),
                None => {
                    let count = "SELECT COUNT(*) FROM answers WHERE caller = ?1";
                    let keys: i64 = self.connection.query_row(count, [caller], |row| row.get(0)).map_err(fault)?;
                    if keys >= KEYS_MAX {
                        return Ok(KeyState::Full);
                    }
                    let insert = "INSERT INTO answers (caller, key, request, run, at_ms) VALUES (?1, ?2, ?3, ?4, ?5)";
                    self.connection.execute(insert, params![caller, key, request, run, now]).map_err(fault)?;
                    Ok(KeyState::Nothing)
                }
            }
        })
    }

    /// Keeps the answer; without one the request may be made again.
    ///
    /// # Errors
    /// `limit_exceeded` if the caller's answers would be too many bytes: then nothing was changed, and a short one is in order.
    pub fn end_answer(&self, caller: &str, key: &str, answer: Option<&str>) -> Result<()> {
        let long = answer.map_or(0, |answer| i64::try_from(answer.len()).unwrap_or(i64::MAX));
        if long > SHORT {
            let sum = "SELECT COALESCE(SUM(OCTET_LENGTH(answer)), 0) FROM answers WHERE caller = ?1";
            let kept: i64 = self.connection.query_row(sum, [caller], |row| row.get(0)).map_err(fault)?;
            if kept.saturating_add(long) > BYTES_MAX {
                return Err(Error::new(Code::LimitExceeded, "the stored responses of this caller are too large"));
            }
        }
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
        let is_gone = |run: &str| run == "gone";
        let begin = |caller, request, run| store.begin_answer((caller, "k"), request, run, is_gone).unwrap();
        assert_eq!(begin("ci", "a", "1"), KeyState::Nothing);
        assert_eq!((begin("ci", "a", "1"), begin("ci", "b", "1")), (KeyState::Running, KeyState::Another));
        assert_eq!(begin("other", "b", "1"), KeyState::Nothing, "keys are each caller's own");
        assert_eq!(begin("ci", "a", "2"), KeyState::Running, "by another server, which lives");
        store.end_answer("ci", "k", Some("done")).unwrap();
        assert_eq!(begin("ci", "a", "3"), KeyState::Answered("done".into()));
        store.end_answer("other", "k", None).unwrap();
        assert_eq!(begin("other", "c", "gone"), KeyState::Nothing);
        // The server was killed while it carried it out.
        assert_eq!((begin("other", "c", "2"), begin("other", "c", "2")), (KeyState::Unknown, KeyState::Unknown));
        assert_eq!(begin("other", "d", "2"), KeyState::Another);
        store.connection.execute("UPDATE answers SET at_ms = 0", []).unwrap();
        assert_eq!(begin("ci", "b", "1"), KeyState::Nothing, "after a day it is forgotten");
    }
}
