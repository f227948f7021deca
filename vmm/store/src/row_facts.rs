//! What reconciliation needs to know about rows. Nothing of a row is decoded for it: a row that cannot be read is counted, and
//! reading a thousand rows of stopped VMs costs nothing.

use std::collections::HashSet;

use nido_api::error::Result;
use nido_api::state::VmState;
use rusqlite::{OptionalExtension as _, Row};

use super::{Store, fault};

/// A row, as far as reconciliation is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowFacts {
    /// The VM's id.
    pub id: String,
    /// Its state; `None` if this version of nido does not know it.
    pub state: Option<VmState>,
    /// Its files are being removed.
    pub deleting: bool,
    /// It is deleted when it stops.
    pub ephemeral: bool,
    /// The session that it belongs to.
    pub lease: Option<String>,
    /// The operation that makes it.
    pub made_by: Option<String>,
    /// When its time to live is over, in milliseconds since 1970.
    pub expires_ms: Option<i64>,
}

const COLUMNS: &str = "id, state, deleting, coalesce(ephemeral, 0), lease, made_by, expires_ms";

/// The condition of the index `vms_to_reconcile`, word for word: otherwise SQLite does not use it.
const TO_RECONCILE: &str = "deleting = 1 OR state NOT IN ('created', 'stopped', 'failed')
        OR (state IN ('stopped', 'failed') AND ephemeral = 1) OR lease IS NOT NULL OR made_by IS NOT NULL";

impl RowFacts {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        let state: String = row.get(1)?;
        Ok(Self {
            id: row.get(0)?,
            state: VmState::from_word(&state),
            deleting: row.get(2)?,
            ephemeral: row.get(3)?,
            lease: row.get(4)?,
            made_by: row.get(5)?,
            expires_ms: row.get(6)?,
        })
    }
}

impl Store {
    /// The rows whose state claims that a process takes care of their VM, those that are being deleted or are ephemeral and
    /// stopped, and those of sessions and operations. An index leads to them.
    ///
    /// # Errors
    /// Of the store.
    pub fn rows_to_reconcile(&self) -> Result<Vec<RowFacts>> {
        self.row_facts(&format!("WHERE {TO_RECONCILE}"))
    }

    /// All rows.
    ///
    /// # Errors
    /// Of the store.
    pub fn all_row_facts(&self) -> Result<Vec<RowFacts>> {
        self.row_facts("")
    }

    fn row_facts(&self, clause: &str) -> Result<Vec<RowFacts>> {
        let query = format!("SELECT {COLUMNS} FROM vms {clause} ORDER BY id");
        let mut statement = self.connection.prepare_cached(&query).map_err(fault)?;
        let rows = statement.query_map([], RowFacts::read).map_err(fault)?;
        rows.collect::<rusqlite::Result<_>>().map_err(fault)
    }

    /// One row, if it is there.
    ///
    /// # Errors
    /// Of the store.
    pub fn row_facts_of(&self, id: &str) -> Result<Option<RowFacts>> {
        let query = format!("SELECT {COLUMNS} FROM vms WHERE id = ?1");
        self.connection.query_row(&query, [id], RowFacts::read).optional().map_err(fault)
    }

    /// The ids of all VMs.
    ///
    /// # Errors
    /// Of the store.
    pub fn vm_ids(&self) -> Result<HashSet<String>> {
        let mut statement = self.connection.prepare_cached("SELECT id FROM vms").map_err(fault)?;
        let ids = statement.query_map([], |row| row.get(0)).map_err(fault)?;
        ids.collect::<rusqlite::Result<_>>().map_err(fault)
    }
}

#[cfg(test)]
mod tests {
    use nido_api::VmSpec;

    use super::*;
    use crate::{Purpose, VmRow, parts::tests::parts_with_root};

    fn insert(store: &Store, id: &str, state: VmState, change: impl FnOnce(&mut VmRow)) {
        let spec = VmSpec::named(format!("vm-{id}").parse().unwrap());
        let mut row = VmRow::new(id.into(), spec, Purpose::Use, state, parts_with_root("c"), 1);
        change(&mut row);
        store.insert_vm(&row).unwrap();
    }

    #[test]
    fn stopped_vms_are_not_read_unless_they_are_to_be_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        let none = |_: &mut VmRow| ();
        insert(&store, "created", VmState::Created, none);
        insert(&store, "stopped", VmState::Stopped, none);
        insert(&store, "failed", VmState::Failed, none);
        insert(&store, "running", VmState::Running, none);
        insert(&store, "ephemeral", VmState::Stopped, |row| row.spec.ephemeral = true);
        insert(&store, "deleting", VmState::Stopped, none);
        store.mark_deleting("deleting").unwrap();
        insert(&store, "lease", VmState::Created, |row| {
            row.spec.lease = Some("0123456789abcdef".to_owned().try_into().unwrap());
        });
        insert(&store, "copy", VmState::Created, |row| {
            row.made_by = Some("0123456789abcdef".to_owned().try_into().unwrap());
        });
        let found: Vec<_> = store.rows_to_reconcile().unwrap().into_iter().map(|row| row.id).collect();
        assert_eq!(found, ["copy", "deleting", "ephemeral", "lease", "running"]);
        assert_eq!(store.all_row_facts().unwrap().len(), 8);
        let plan: String = store
            .connection
            .query_row(
                &format!("EXPLAIN QUERY PLAN SELECT {COLUMNS} FROM vms WHERE {TO_RECONCILE} ORDER BY id"),
                [],
                |row| row.get(3),
            )
            .unwrap();
        assert!(plan.contains("vms_to_reconcile"), "{plan}");
    }

    #[test]
    fn a_row_that_cannot_be_decoded_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        insert(&store, "1", VmState::Running, |_| ());
        store.connection.execute("UPDATE vms SET spec = '{', state = 'flying'", []).unwrap();
        let facts = store.row_facts_of("1").unwrap().unwrap();
        assert_eq!((facts.state, facts.ephemeral, facts.lease), (None, false, None));
        assert_eq!(store.rows_to_reconcile().unwrap().len(), 1);
        assert!(store.row_facts_of("2").unwrap().is_none());
    }
}
