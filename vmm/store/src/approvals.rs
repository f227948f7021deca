//! The table `approvals`: which operations wait for a person's approval, and the decisions.
//!
//! Invariant: an approval is used at most once, by one `UPDATE` that compares everything it is bound to; a process that is killed
//! behind it has used it.

use jiff::Timestamp;
use nido_api::error::{Code, Error, Hint, Result};
use nido_api::sanitize::head;
use nido_api::{APPROVAL_LIFETIME, APPROVALS_PENDING_MAX, Approval, ApprovalRequest, ApprovalState, redact};
use rusqlite::{OptionalExtension, Row, params};

use super::{Store, decode, fault, readable_rows};

/// How long one is remembered after it is over, in milliseconds: an hour.
const RETENTION_MS: i64 = 3600 * 1000;
/// How much is kept of what a client calls itself, in bytes.
const AGENT_MAX: usize = 256;
const COLUMNS: &str = "id, tool, vm_id, vm_name, actor, agent, arguments, state, created_ms, expires_ms, \
                       decided_ms, decided_by, digest";

/// One approval, and the digest of the arguments it is for.
#[derive(Debug, Clone, PartialEq)]
pub struct ApprovalRow {
    /// The approval as the API describes it, with its state at the time of the read.
    pub approval: Approval,
    /// Of the arguments.
    pub digest: String,
}

impl Store {
    /// The pending approval for exactly this, or a new one with this id. Deletes old ones.
    ///
    /// # Errors
    /// `limit_exceeded` if the caller waits for too many.
    pub fn request_approval(&self, id: &str, ask: &ApprovalRequest) -> Result<Approval> {
        self.request_approval_again(id, ask, 0)
    }

    /// The same, where a no that a person has given in a form is not the end until there were so many.
    ///
    /// # Errors
    /// `limit_exceeded` if the caller waits for too many.
    pub fn request_approval_again(&self, id: &str, ask: &ApprovalRequest, noes: i64) -> Result<Approval> {
        let (now, digest) = (now_ms(), ask.digest());
        let open = format!(
            "SELECT {COLUMNS} FROM approvals WHERE vm_id = ?1 AND actor = ?2 AND tool = ?3 AND digest = ?4 \
             AND state <> 'used' AND expires_ms > ?5 AND NOT (state = 'denied' AND decided_by LIKE '% through %' \
             AND (SELECT count(*) FROM approvals WHERE vm_id = ?1 AND actor = ?2 AND tool = ?3 AND digest = ?4 \
             AND state = 'denied' AND expires_ms > ?5) < ?6) ORDER BY created_ms DESC, rowid DESC LIMIT 1"
        );
        self.in_transaction(|| {
            self.connection.execute("DELETE FROM approvals WHERE expires_ms < ?1", [now - RETENTION_MS]).map_err(fault)?;
            let same = params![ask.vm_id, ask.actor, ask.tool, digest, now, noes];
            if let Some(row) = self.connection.query_row(&open, same, raw).optional().map_err(fault)? {
                return Ok(row.decode(now)?.approval);
            }
            let waiting =
                "SELECT count(*) FROM approvals WHERE actor = ?1 AND state = 'pending' AND expires_ms > ?2";
            let waiting: i64 =
                self.connection.query_row(waiting, params![ask.actor, now], |row| row.get(0)).map_err(fault)?;
            if usize::try_from(waiting).unwrap_or(usize::MAX) >= APPROVALS_PENDING_MAX {
                let words = format!("{waiting} approvals are pending, which is the limit");
                return Err(Error::new(Code::LimitExceeded, words).hint(Hint::host("answer some: nido approvals lists them")));
            }
            let insert = "INSERT INTO approvals (id, tool, vm_id, vm_name, actor, agent, arguments, digest, created_ms, \
                          expires_ms) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)";
            let expires = now + i64::try_from(APPROVAL_LIFETIME.as_millis()).unwrap_or(0);
            let arguments = redact::params(&ask.arguments);
            let (name, agent) = (ask.vm_name.as_str(), ask.agent.as_deref().map(|agent| head(agent, AGENT_MAX)));
            let row =
                params![id, ask.tool, ask.vm_id, name, ask.actor, agent, arguments, digest, now, expires];
            self.connection.execute(insert, row).map_err(fault)?;
            self.approval(id)?.map(|row| row.approval).ok_or_else(|| Error::internal("an approval was not kept"))
        })
    }

    /// The approval of that id.
    ///
    /// # Errors
    /// Of the store.
    pub fn approval(&self, id: &str) -> Result<Option<ApprovalRow>> {
        let query = format!("SELECT {COLUMNS} FROM approvals WHERE id = ?1");
        let row = self.connection.query_row(&query, [id], raw).optional().map_err(fault)?;
        row.map(|row| row.decode(now_ms())).transpose()
    }

    /// All that are remembered, the newest first.
    ///
    /// # Errors
    /// Of the store.
    pub fn approvals(&self) -> Result<Vec<Approval>> {
        let now = now_ms();
        let query =
            format!("SELECT {COLUMNS} FROM approvals WHERE expires_ms >= ?1 ORDER BY created_ms DESC, rowid DESC");
        let mut statement = self.connection.prepare(&query).map_err(fault)?;
        let rows = statement.query_map([now - RETENTION_MS], raw).map_err(fault)?;
        readable_rows("approvals", rows.map(|row| row.map(|row| row.decode(now).map(|row| row.approval))))
    }

    /// Records a person's decision, if it is still valid: approval of a pending request, denial also of an approved and unused one.
    /// Whether it did.
    ///
    /// # Errors
    /// Of the store.
    pub fn decide_approval(&self, id: &str, yes: bool, by: &str) -> Result<bool> {
        let update = if yes {
            "UPDATE approvals SET state = 'approved', decided_ms = ?2, decided_by = ?3 \
             WHERE id = ?1 AND state = 'pending' AND expires_ms > ?2"
        } else {
            "UPDATE approvals SET state = 'denied', decided_ms = ?2, decided_by = ?3 \
             WHERE id = ?1 AND state IN ('pending', 'approved') AND expires_ms > ?2"
        };
        self.connection.execute(update, params![id, now_ms(), by]).map(|changed| changed > 0).map_err(fault)
    }

    /// Uses an approval up, if it was given, is not over, and is for exactly this. Whether it was.
    ///
    /// # Errors
    /// Of the store.
    pub fn use_approval(&self, id: &str, ask: &ApprovalRequest) -> Result<bool> {
        let update = "UPDATE approvals SET state = 'used' WHERE id = ?1 AND state = 'approved' AND expires_ms > ?2 \
                      AND vm_id = ?3 AND actor = ?4 AND tool = ?5 AND digest = ?6";
        let values = params![id, now_ms(), ask.vm_id, ask.actor, ask.tool, ask.digest()];
        self.connection.execute(update, values).map(|changed| changed > 0).map_err(fault)
    }
}

fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

/// A row as SQLite gives it.
struct Raw {
    id: String,
    tool: String,
    vm: (String, String),
    actor: String,
    agent: Option<String>,
    arguments: String,
    state: String,
    created_ms: i64,
    expires_ms: i64,
    decided: (Option<i64>, Option<String>),
    digest: String,
}

fn raw(row: &Row<'_>) -> rusqlite::Result<Raw> {
    Ok(Raw {
        id: row.get(0)?,
        tool: row.get(1)?,
        vm: (row.get(2)?, row.get(3)?),
        actor: row.get(4)?,
        agent: row.get(5)?,
        arguments: row.get(6)?,
        state: row.get(7)?,
        created_ms: row.get(8)?,
        expires_ms: row.get(9)?,
        decided: (row.get(10)?, row.get(11)?),
        digest: row.get(12)?,
    })
}

impl Raw {
    fn decode(self, now: i64) -> Result<ApprovalRow> {
        let time = |ms| Timestamp::from_millisecond(ms).map_err(|e| Error::internal(e.to_string()));
        let written = ApprovalState::ALL.into_iter().find(|state| state.word() == self.state).ok_or_else(|| {
            Error::internal(format!("the store has the unknown approval state '{}'", self.state.escape_debug()))
        })?;
        // What was denied stays denied; what could still have happened cannot any more.
        let open = matches!(written, ApprovalState::Pending | ApprovalState::Approved);
        let state = if open && self.expires_ms <= now { ApprovalState::Expired } else { written };
        let approval = Approval {
            id: self.id,
            tool: self.tool,
            vm_id: self.vm.0,
            vm_name: self.vm.1.parse()?,
            actor: self.actor,
            agent: self.agent,
            arguments: decode("arguments", &self.arguments)?,
            state,
            created_at: time(self.created_ms)?,
            expires_at: time(self.expires_ms)?,
            decided_at: self.decided.0.map(time).transpose()?,
            decided_by: self.decided.1,
        };
        Ok(ApprovalRow { approval, digest: self.digest })
    }
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

    fn request_for(vm: &str) -> ApprovalRequest {
        ApprovalRequest {
            tool: "vm_delete".into(),
            vm_id: vm.into(),
            vm_name: "web".parse().unwrap(),
            actor: "token:ci".into(),
            agent: Some("a client".into()),
            arguments: json!({ "name": "web", "token": "s3cret" }),
        }
    }

    #[test]
    fn the_same_request_has_one_approval() {
        let (_dir, store) = open();
        let first = store.request_approval("apr_1", &request_for("1")).unwrap();
        assert_eq!((first.id.as_str(), first.state), ("apr_1", ApprovalState::Pending));
        assert_eq!(first.arguments, json!({ "name": "web", "token": "[redacted: 6 bytes]" }));
        assert_eq!(store.request_approval("apr_2", &request_for("1")).unwrap(), first);
        assert!(store.decide_approval("apr_1", true, "uid:0").unwrap());
        let again = store.request_approval("apr_3", &request_for("1")).unwrap();
        assert_eq!((again.id.as_str(), again.state), ("apr_1", ApprovalState::Approved));
        assert!(store.use_approval("apr_1", &request_for("1")).unwrap());
        assert_eq!(store.request_approval("apr_4", &request_for("1")).unwrap().id, "apr_4", "what was used is over");
        assert_eq!(store.approvals().unwrap().len(), 2);
    }

    // A dialog that was closed was a denial for two minutes, also against the user who opened it.
    #[test]
    fn a_denial_in_a_form_is_asked_again_a_limited_number_of_times() {
        let (_dir, store) = open();
        for number in 1..=3 {
            let id = format!("apr_{number}");
            assert_eq!(store.request_approval_again(&id, &request_for("1"), 3).unwrap().state, ApprovalState::Pending);
            assert!(store.decide_approval(&id, false, "uid:1 through a client").unwrap());
        }
        assert_eq!(store.request_approval_again("apr_4", &request_for("1"), 3).unwrap().state, ApprovalState::Denied);
        store.request_approval("apr_5", &request_for("2")).unwrap();
        store.decide_approval("apr_5", false, "uid:0").unwrap();
        assert_eq!(
            store.request_approval_again("apr_6", &request_for("2"), 3).unwrap().state,
            ApprovalState::Denied,
            "by hand"
        );
    }

    #[test]
    fn a_denial_is_not_replaced_by_a_new_request() {
        let (_dir, store) = open();
        store.request_approval("apr_1", &request_for("1")).unwrap();
        assert!(store.decide_approval("apr_1", false, "uid:0").unwrap());
        assert_eq!(store.request_approval("apr_2", &request_for("1")).unwrap().state, ApprovalState::Denied);
        assert!(!store.decide_approval("apr_1", true, "uid:0").unwrap());
        assert!(!store.use_approval("apr_1", &request_for("1")).unwrap());
    }

    #[test]
    fn it_is_used_once_however_many_try() {
        let (dir, store) = open();
        store.request_approval("apr_1", &request_for("1")).unwrap();
        store.decide_approval("apr_1", true, "uid:0").unwrap();
        let path = dir.path().join("db");
        let used = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| Store::open(&path).unwrap().use_approval("apr_1", &request_for("1")).unwrap()))
                .collect();
            tries.into_iter().map(|tried| u32::from(tried.join().unwrap())).sum::<u32>()
        });
        assert_eq!(used, 1);
    }

    #[test]
    fn expired_approvals_cannot_be_decided_or_used_and_are_deleted() {
        let (_dir, store) = open();
        store.request_approval("apr_1", &request_for("1")).unwrap();
        store.request_approval("apr_2", &request_for("2")).unwrap();
        store.decide_approval("apr_2", true, "uid:0").unwrap();
        let age = |ms: i64| store.connection.execute("UPDATE approvals SET expires_ms = ?1", [now_ms() - ms]).unwrap();
        age(0);
        for id in ["apr_1", "apr_2"] {
            assert_eq!(store.approval(id).unwrap().unwrap().approval.state, ApprovalState::Expired);
            assert!(!store.decide_approval(id, true, "uid:0").unwrap());
            assert!(!store.decide_approval(id, false, "uid:0").unwrap());
        }
        assert!(!store.use_approval("apr_2", &request_for("2")).unwrap());
        age(RETENTION_MS + 1000);
        assert!(store.approvals().unwrap().is_empty());
        assert_eq!(store.request_approval("apr_3", &request_for("1")).unwrap().id, "apr_3");
        assert!(store.approval("apr_1").unwrap().is_none(), "swept");
    }

    #[test]
    fn pending_approvals_are_limited() {
        let (_dir, store) = open();
        for n in 0..APPROVALS_PENDING_MAX {
            store.request_approval(&format!("apr_{n}"), &request_for(&n.to_string())).unwrap();
        }
        let other = ApprovalRequest { actor: "uid:7".into(), agent: Some("x".repeat(5000)), ..request_for("x") };
        let asked = store.request_approval("apr_o", &other).expect("each caller has its own");
        assert_eq!(asked.agent.map(|agent| agent.len()), Some(AGENT_MAX));
        assert_eq!(store.request_approval("apr_x", &request_for("x")).unwrap_err().code(), Code::LimitExceeded);
    }
}
