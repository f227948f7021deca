//! Rebuilding a store: what a file that should be one is, and what can still be read of it.
//!
//! Invariant: the file that is read from is never changed.

use std::collections::HashSet;
use std::path::Path;

use nido_api::error::{Code, Error, Hint, Result};
use rusqlite::{Connection, OpenFlags, params_from_iter, types::Value};

use super::{SCHEMA_VERSION, Store, fault};

/// What a file that should be a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// A store without a fault.
    Sound,
    /// There is no file, or it is empty.
    Missing,
    /// It cannot be used: why.
    Damaged(String),
}

/// What was copied of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SalvageReport {
    /// The table.
    pub table: String,
    /// So many rows that were not there yet.
    pub rows: usize,
    /// All of it could be read.
    pub is_complete: bool,
}

/// Checks a file that should be a store: whether it is there, is a database, and all its pages and indexes are right.
///
/// # Errors
/// `internal` for a store without a fault that a newer nido wrote.
pub fn health(path: &Path) -> Result<Health> {
    if std::fs::metadata(path).map_or(0, |meta| meta.len()) == 0 {
        return Ok(Health::Missing);
    }
    let check = |connection: &Connection| -> rusqlite::Result<(String, i64)> {
        let found = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
        Ok((found, connection.query_row("PRAGMA user_version", [], |row| row.get(0))?))
    };
    match open(path).and_then(|connection| check(&connection)) {
        Ok((found, _)) if found != "ok" => Ok(Health::Damaged(found)),
        Ok((_, version)) if version > SCHEMA_VERSION => {
            let words = format!("the store has version {version}; this nido supports {SCHEMA_VERSION}");
            Err(Error::new(Code::Internal, words).hint(Hint::host("use the nido version that wrote it")))
        }
        Ok((_, version)) if version < 1 => Ok(Health::Damaged("it is a database without nido's tables".into())),
        Ok(_) => Ok(Health::Sound),
        Err(error) => Ok(Health::Damaged(error.to_string())),
    }
}

fn open(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(super::BUSY_TIMEOUT)?;
    connection.execute_batch("PRAGMA cell_size_check=ON; PRAGMA trusted_schema=OFF;")?;
    Ok(connection)
}

impl Store {
    /// Copies what can be read of these tables from another store, which may be damaged or of an older version. Rows that are
    /// here already stay.
    ///
    /// # Errors
    /// Of this store.
    pub fn salvage(&self, from: &Path, tables: &[&str]) -> Result<Vec<SalvageReport>> {
        let from = open(from).ok();
        self.in_transaction(|| {
            tables
                .iter()
                .map(|table| {
                    let (rows, is_complete) = match &from {
                        Some(from) => self.salvage_table(from, table)?,
                        None => (0, false),
                    };
                    Ok(SalvageReport { table: (*table).to_owned(), rows, is_complete })
                })
                .collect()
        })
    }

    fn salvage_table(&self, from: &Connection, table: &str) -> Result<(usize, bool)> {
        let own: HashSet<_> = columns(&self.connection, table).map_err(fault)?.into_iter().collect();
        let Ok(theirs) = columns(from, table) else { return Ok((0, false)) };
        let shared: Vec<_> = theirs.into_iter().filter(|name| own.contains(name)).collect();
        if shared.is_empty() {
            return Ok((0, false));
        }
        let (names, places) = (shared.join(", "), vec!["?"; shared.len()].join(", "));
        let insert = format!("INSERT OR IGNORE INTO {table} ({names}) VALUES ({places})");
        let mut insert = self.connection.prepare(&insert).map_err(fault)?;
        let (mut count, mut is_complete) = (0, false);
        // A damaged page ends a scan; what is behind it may be reached from the other end.
        for order in ["", "ORDER BY 1 DESC"] {
            let Ok(mut select) = from.prepare(&format!("SELECT {names} FROM {table} {order}")) else { continue };
            let Ok(mut rows) = select.query([]) else { continue };
            let ended_well = loop {
                match rows.next() {
                    Ok(None) => break true,
                    Err(_) => break false,
                    Ok(Some(row)) => {
                        let values: rusqlite::Result<Vec<Value>> = (0..shared.len()).map(|at| row.get(at)).collect();
                        // A row that does not fit (a wrong type, no such VM) is left out.
                        count += values.and_then(|values| insert.execute(params_from_iter(values))).unwrap_or(0);
                    }
                }
            };
            is_complete |= ended_well;
            if is_complete {
                break;
            }
        }
        Ok((count, is_complete))
    }

    /// Removes the row of a VM without an event: it came from a damaged store, and nothing else of the VM is there.
    ///
    /// # Errors
    /// Of the store.
    pub fn discard_vm(&self, id: &str) -> Result<()> {
        self.connection.execute("DELETE FROM vms WHERE id = ?1", [id]).map(drop).map_err(fault)
    }

    /// Gives the next event a number above `floor`, so that no number is used twice.
    ///
    /// # Errors
    /// Of the store.
    pub fn continue_events_after(&self, floor: i64) -> Result<()> {
        self.in_transaction(|| {
            let update = "UPDATE sqlite_sequence SET seq = max(seq, ?1) WHERE name = 'events'";
            if self.connection.execute(update, [floor]).map_err(fault)? == 0 {
                let insert = "INSERT INTO sqlite_sequence (name, seq) VALUES ('events', ?1)";
                self.connection.execute(insert, [floor]).map_err(fault)?;
            }
            Ok(())
        })
    }
}

/// The columns of a table that can be written.
fn columns(connection: &Connection, table: &str) -> rusqlite::Result<Vec<String>> {
    let mut statement = connection.prepare("SELECT name FROM pragma_table_info(?1)")?;
    statement.query_map([table], |row| row.get(0))?.collect()
}

#[cfg(test)]
mod tests {
    use nido_api::VmSpec;
    use nido_api::state::VmState;

    use super::*;
    use crate::{Purpose, VmRow, parts::tests::parts_with_root};

    fn filled(path: &Path, count: usize) -> Store {
        let store = Store::open(path).unwrap();
        for number in 0..count {
            let spec = VmSpec::named(format!("vm-{number}").parse().unwrap());
            let id = format!("{number:016}");
            let row = VmRow::new(id, spec, Purpose::Use, VmState::Stopped, parts_with_root("c"), 1);
            store.insert_vm(&row).unwrap();
        }
        store
    }

    #[test]
    fn a_sound_a_missing_and_a_damaged_store_are_distinguished() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nido.db");
        assert_eq!(health(&path).unwrap(), Health::Missing);
        std::fs::write(&path, "").unwrap();
        assert_eq!(health(&path).unwrap(), Health::Missing);
        drop(filled(&path, 200));
        assert_eq!(health(&path).unwrap(), Health::Sound);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        assert!(matches!(health(&path).unwrap(), Health::Damaged(_)));
        std::fs::write(&path, [7; 8192]).unwrap();
        assert!(matches!(health(&path).unwrap(), Health::Damaged(_)));
    }

    #[test]
    fn readable_rows_of_a_damaged_store_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nido.db");
        drop(filled(&path, 200));
        let tables = ["vms", "events", "tokens"];
        let copied = |name: &str| {
            let new = Store::open(&dir.path().join(name)).unwrap();
            let salvaged = new.salvage(&path, &tables).unwrap();
            (new.vms().unwrap().len(), salvaged)
        };
        let (vms, all) = copied("whole");
        assert_eq!((vms, all.iter().all(|table| table.is_complete)), (200, true));
        // A damaged page in the middle.
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 4096 / 2 * 4096;
        bytes[middle..middle + 4096].fill(0xff);
        std::fs::write(&path, bytes).unwrap();
        assert!(matches!(health(&path).unwrap(), Health::Damaged(_)));
        let (_, part) = copied("part");
        assert!(part.iter().any(|table| !table.is_complete), "{part:?}");
        assert!(part.iter().any(|table| table.rows > 0), "{part:?}");
        let (none, nothing) = {
            std::fs::write(&path, [7; 8192]).unwrap();
            copied("nothing")
        };
        assert_eq!((none, nothing.iter().any(|table| table.is_complete)), (0, false));
    }

    #[test]
    fn the_number_of_an_event_is_never_used_twice() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("nido.db")).unwrap();
        store.continue_events_after(500).unwrap();
        drop(store);
        let store = filled(&dir.path().join("nido.db"), 1);
        let cursor: i64 = store.connection.query_row("SELECT max(cursor) FROM events", [], |row| row.get(0)).unwrap();
        assert_eq!(cursor, 501);
    }
}
