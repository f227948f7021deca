//! The table `audit_heads`: how far the audit log is, so that a log that was emptied is noticed.

use nido_api::error::Result;
use nido_api::{Event, EventsRequest};
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

    /// Copies the events that were not copied yet to the audit log, in their order; `write` appends one, and is given the number of the
    /// last known line of `acts`, and whether it is the last event. No other process copies meanwhile. If the process is killed, the next one copies the same events again:
    /// each carries its cursor.
    ///
    /// # Errors
    /// Of the store, and those of `write`.
    pub fn copy_events(&self, acts: &str, mut write: impl FnMut(&Event, u64, bool) -> Result<()>) -> Result<()> {
        // Almost always so, and then no lock is needed.
        if !self.has_uncopied_events()? {
            return Ok(());
        }
        self.in_transaction(|| {
            let last = self.last_cursor()?;
            // A store that was replaced by an older one has fewer.
            let since = Some(self.events_copied()?).filter(|copied| *copied <= last).unwrap_or(0);
            let acts = self.audit_head(acts)?.map_or(0, |(seq, _)| seq);
            let mut request = EventsRequest { since, ..EventsRequest::default() };
            loop {
                let (events, cursor) = self.events(&request)?;
                events.iter().try_for_each(|event| write(event, acts, event.cursor == last))?;
                if cursor == request.since {
                    break;
                }
                request.since = cursor;
            }
            let copied = "INSERT OR REPLACE INTO audit_heads (log, seq, chain) VALUES (?1, ?2, '')";
            let last = i64::try_from(last).unwrap_or(i64::MAX);
            self.connection.execute(copied, params![EVENTS_COPIED, last]).map(drop).map_err(fault)
        })
    }

    /// Whether there are events that were not copied to the audit log.
    ///
    /// # Errors
    /// Of the store.
    pub fn has_uncopied_events(&self) -> Result<bool> {
        Ok(self.last_cursor()? != self.events_copied()?)
    }

    /// The cursor of the last event that was copied to the audit log.
    fn events_copied(&self) -> Result<u64> {
        Ok(self.audit_head(EVENTS_COPIED)?.map_or(0, |(cursor, _)| cursor))
    }
}

/// The row that counts events, not lines.
const EVENTS_COPIED: &str = "events_copied";
