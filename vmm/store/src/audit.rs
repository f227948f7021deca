//! The table `audit_heads`: how far the audit log is, so that a log that was emptied is noticed.

use nido_api::error::Result;
use rusqlite::{OptionalExtension, params};

use super::{Store, fault};

impl Store {
    /// A line of that log has been written. Several processes write: the highest number stays.
    ///
    /// # Errors
    /// Of the store.
    pub fn audit_head_written(&self, log: &str, seq: u64, chain: &str) -> Result<()> {
        let upsert = "INSERT INTO audit_heads (log, seq, chain) VALUES (?1, ?2, ?3) \
                      ON CONFLICT (log) DO UPDATE SET seq = excluded.seq, chain = excluded.chain WHERE excluded.seq > seq";
        let seq = i64::try_from(seq).unwrap_or(i64::MAX);
        self.connection.execute(upsert, params![log, seq, chain]).map(drop).map_err(fault)
    }

    /// The last line of that log that is known: its number and chain.
    ///
    /// # Errors
    /// Of the store.
    pub fn audit_head(&self, log: &str) -> Result<Option<(u64, String)>> {
        let query = "SELECT seq, chain FROM audit_heads WHERE log = ?1";
        let read = |row: &rusqlite::Row<'_>| Ok((row.get::<_, i64>(0)?.unsigned_abs(), row.get(1)?));
        self.connection.query_row(query, [log], read).optional().map_err(fault)
    }
}
