//! The table `restarts`: how often a VM was started by its restart policy, and whether a user keeps it stopped.
//!
//! Invariant: a row is written under the VM's `supervisor.lock`, so a stop by a user and a restart exclude each other.

use nido_api::error::Result;
use nido_api::restart::{ExitFacts, RestartPolicy};
use nido_api::state::{FailureCause, StateCause, VmState};
use rusqlite::{OptionalExtension as _, Row, params};

use super::{Store, fault};

/// A stopped or failed VM that has a restart policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestartFacts {
    /// Its id.
    pub id: String,
    /// Its policy.
    pub policy: RestartPolicy,
    /// How it ended.
    pub ended: ExitFacts,
    /// So many restarts in a row did not work.
    pub in_row: u32,
    /// When it was last started, in milliseconds since 1970.
    pub started_ms: Option<i64>,
    /// Its guest became ready then.
    pub was_ready: bool,
}

/// The condition of the index `vms_to_restart`, word for word.
const TO_RESTART: &str = "restart IS NOT NULL AND state IN ('stopped', 'failed')";

impl RestartFacts {
    /// `None`: of another version of nido.
    fn read(row: &Row<'_>) -> rusqlite::Result<Option<Self>> {
        let (policy, state): (String, String) = (row.get(1)?, row.get(2)?);
        let (cause, failure): (Option<String>, Option<String>) = (row.get(3)?, row.get(4)?);
        let (Some(policy), Some(state)) = (RestartPolicy::from_word(&policy), VmState::from_word(&state)) else {
            return Ok(None);
        };
        let cause = StateCause::ALL.into_iter().find(|known| cause.as_deref() == Some(known.word()));
        let failure = failure.and_then(|word| serde_json::from_value::<FailureCause>(word.into()).ok());
        Ok(Some(Self {
            id: row.get(0)?,
            policy,
            ended: ExitFacts { state, cause, failure, held: row.get(5)?, restarting: row.get::<_, u32>(6)? > 0 },
            in_row: row.get(6)?,
            started_ms: row.get(7)?,
            was_ready: row.get(8)?,
        }))
    }
}

impl Store {
    /// The stopped and failed VMs that have a restart policy. An index leads to them.
    ///
    /// # Errors
    /// Of the store.
    pub fn vms_to_restart(&self) -> Result<Vec<RestartFacts>> {
        let query = format!(
            "SELECT vms.id, vms.restart, vms.state, vms.state_cause, \
                    CASE WHEN json_valid(vms.failure) THEN json_extract(vms.failure, '$.cause') END, \
                    coalesce(restarts.held, 0), coalesce(restarts.in_row, 0), vms.started_ms, \
                    coalesce(CASE WHEN json_valid(vms.timings) THEN json_extract(vms.timings, '$.total_ms') END, 0) > 0 \
             FROM vms LEFT JOIN restarts ON restarts.vm_id = vms.id \
             WHERE {TO_RESTART} AND deleting = 0 AND purpose = 'use' ORDER BY vms.id"
        );
        let mut statement = self.connection.prepare_cached(&query).map_err(fault)?;
        let rows = statement.query_map([], RestartFacts::read).map_err(fault)?;
        rows.filter_map(rusqlite::Result::transpose).collect::<rusqlite::Result<_>>().map_err(fault)
    }

    /// Counts a restart, `in_row` after so many that did not work, unless a user keeps the VM stopped. Whether it may begin.
    ///
    /// # Errors
    /// Of the store.
    pub fn count_restart(&self, id: &str, in_row: u32) -> Result<bool> {
        let upsert = "INSERT INTO restarts (vm_id, count, in_row, held) VALUES (?1, 1, ?2, 0) ON CONFLICT (vm_id) \
                      DO UPDATE SET count = count + 1, in_row = excluded.in_row WHERE held = 0";
        Ok(self.connection.execute(upsert, params![id, in_row]).map_err(fault)? > 0)
    }

    /// A user keeps the VM stopped.
    ///
    /// # Errors
    /// Of the store.
    pub fn hold_restarts(&self, id: &str) -> Result<()> {
        let upsert = "INSERT INTO restarts (vm_id, count, in_row, held) VALUES (?1, 0, 0, 1) ON CONFLICT (vm_id) \
                      DO UPDATE SET held = 1";
        self.connection.execute(upsert, [id]).map(drop).map_err(fault)
    }

    /// A user starts the VM: its restart count begins again.
    ///
    /// # Errors
    /// Of the store.
    pub fn allow_restarts(&self, id: &str) -> Result<()> {
        self.connection.execute("DELETE FROM restarts WHERE vm_id = ?1", [id]).map(drop).map_err(fault)
    }

    /// How often the VM was restarted since a user started it.
    ///
    /// # Errors
    /// Of the store.
    pub fn restart_count(&self, id: &str) -> Result<u32> {
        let query = "SELECT count FROM restarts WHERE vm_id = ?1";
        let count = self.connection.query_row(query, [id], |row| row.get(0)).optional().map_err(fault)?;
        Ok(count.unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use nido_api::{Failure, VmSpec};

    use super::*;
    use crate::{Purpose, Transition, TransitionOutcome, VmRow, parts::tests::parts_with_root};

    #[test]
    fn restarts_are_counted_unless_a_user_keeps_the_vm_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        for (name, restart) in [("plain", RestartPolicy::No), ("kept", RestartPolicy::Always)] {
            let spec = VmSpec { restart, ..VmSpec::named(name.parse().unwrap()) };
            let row = VmRow::new(name.into(), spec, Purpose::Use, VmState::Running, parts_with_root("c"), 1);
            store.insert_vm(&row).unwrap();
            assert_eq!(store.vms_to_restart().unwrap(), []);
            let failure = Failure { cause: FailureCause::GuestPanic, message: "x".into(), log_tail: Vec::new() };
            let failed = Transition::ended(VmState::Failed, Some(failure));
            assert_eq!(store.transition(name, &failed).unwrap(), TransitionOutcome::Yes);
        }
        let one = || <[RestartFacts; 1]>::try_from(store.vms_to_restart().unwrap()).unwrap()[0].clone();
        let ended = ExitFacts {
            state: VmState::Failed,
            cause: None,
            failure: Some(FailureCause::GuestPanic),
            held: false,
            restarting: false,
        };
        assert_eq!((one().id.as_str(), one().ended, one().in_row), ("kept", ended, 0));
        assert!(store.count_restart("kept", 1).unwrap() && store.count_restart("kept", 2).unwrap());
        assert_eq!((one().in_row, store.restart_count("kept").unwrap()), (2, 2));
        store.hold_restarts("kept").unwrap();
        assert!(one().ended.held && !store.count_restart("kept", 3).unwrap());
        store.allow_restarts("kept").unwrap();
        assert_eq!((one().ended, store.restart_count("kept").unwrap()), (ended, 0));
        let plan: String = store
            .connection
            .query_row(&format!("EXPLAIN QUERY PLAN SELECT id FROM vms WHERE {TO_RESTART}"), [], |row| row.get(3))
            .unwrap();
        assert!(plan.contains("vms_to_restart"), "{plan}");
        store.remove_vm("kept", Vec::new()).unwrap();
        assert_eq!(store.restart_count("kept").unwrap(), 0);
    }
}
