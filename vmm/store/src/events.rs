//! The table `events`: everything that happened, one row each, written in the transaction that made it happen.
//!
//! ```text
//!  transition ─ insert_vm ─ claim_vm ─ remove_vm ─ announce ──> what of it is an event [pure] ──> append ──> queue
//! ```
//!
//! Invariant: SQLite lets one writer in at a time, so a reader that has seen a cursor will never see a smaller one appear.

use jiff::Timestamp;
use nido_api::error::{Error, Result};
use nido_api::name::{SnapshotName, TemplateName, VmName};
use nido_api::{Event, EventDetails, EventKind, EventsRequest, VmSource};
use rusqlite::{Connection, OptionalExtension, params};

use super::{Store, VmRow, decode, encode, fault, readable};

/// Events older than this are deleted, in milliseconds: 30 days.
const RETENTION_MS: i64 = 30 * 24 * 3600 * 1000;
/// So many of the last events are kept at most.
const EVENTS_MAX: i64 = 100_000;
/// How often old ones are looked for, in events.
const PRUNE_INTERVAL: i64 = 256;
/// How many rows are read at once.
const PAGE: i64 = 1000;

/// The details of every event of a VM.
pub(super) fn of_vm(row: &VmRow) -> EventDetails {
    EventDetails {
        vm_id: Some(row.id.clone()),
        template: Some(row.spec.template.clone()),
        ip_address: row.ip_address.clone(),
        ..EventDetails::default()
    }
}

/// The details of a VM's creation.
pub(super) fn of_creation(row: &VmRow) -> EventDetails {
    let (allow, presets) = (row.spec.allow.clone(), row.spec.presets.clone());
    let (parts, secrets) = (row.named_parts(), row.spec.secrets.clone());
    let source = VmSource { parts, net: row.spec.net, allow, presets, secrets };
    EventDetails { source: Some(source), ..of_vm(row) }
}

impl Store {
    /// Writes an event, and a delivery for every endpoint that selects it, in the open transaction.
    pub(super) fn append(&self, kind: EventKind, vm: Option<&VmName>, details: &EventDetails) -> Result<()> {
        let now = Timestamp::now().as_millisecond();
        self.connection
            .prepare_cached("INSERT INTO events (at_ms, event, vm_name, details) VALUES (?1, ?2, ?3, ?4)")
            .and_then(|mut insert| {
                insert.execute(params![now, kind.word(), vm.map(VmName::as_str), encode_details(details)])
            })
            .map_err(fault)?;
        let cursor = self.connection.last_insert_rowid();
        let event = Event {
            cursor: cursor.unsigned_abs(),
            event: kind,
            timestamp: Timestamp::from_millisecond(now).map_err(|e| Error::internal(e.to_string()))?,
            vm_name: vm.cloned(),
            details: details.clone(),
        };
        self.queue(&event)?;
        if cursor % PRUNE_INTERVAL == 0 { prune(&self.connection, cursor, now) } else { Ok(()) }
    }

    /// The events behind a cursor, the oldest first, and the cursor to continue from. Not all at once: a caller that gets the same
    /// cursor back has them all.
    ///
    /// # Errors
    /// Of the store.
    pub fn events(&self, request: &EventsRequest) -> Result<(Vec<Event>, u64)> {
        let query =
            "SELECT cursor, at_ms, event, vm_name, details FROM events WHERE cursor > ?1 ORDER BY cursor LIMIT ?2";
        let mut statement = self.connection.prepare_cached(query).map_err(fault)?;
        let rows = statement.query_map(params![i64::try_from(request.since).unwrap_or(i64::MAX), PAGE], |row| {
            let texts = (row.get::<_, String>(2)?, row.get::<_, Option<String>>(3)?, row.get::<_, String>(4)?);
            Ok((row.get::<_, i64>(0)?.unsigned_abs(), row.get::<_, i64>(1)?, texts))
        });
        let mut cursor = request.since;
        let mut events = Vec::new();
        for row in rows.map_err(fault)? {
            let (at, ms, (kind, vm, details)) = row.map_err(fault)?;
            cursor = at;
            let event = || -> Result<Event> {
                Ok(Event {
                    cursor,
                    event: kind.parse()?,
                    timestamp: Timestamp::from_millisecond(ms).map_err(|e| Error::internal(e.to_string()))?,
                    vm_name: vm.map(|name| name.parse()).transpose()?,
                    details: decode("details", &details)?,
                })
            };
            events.extend(readable("events", event()).filter(|event| request.wants(event)));
        }
        Ok((events, cursor))
    }

    /// The cursors of the first event that is kept and of the last one. Where none is kept, the first is the one that comes next.
    ///
    /// # Errors
    /// Of the store.
    pub fn event_range(&self) -> Result<(u64, u64)> {
        let last = self.last_cursor()?;
        let query = "SELECT MIN(cursor) FROM events";
        let oldest: Option<i64> = self.connection.query_row(query, [], |row| row.get(0)).map_err(fault)?;
        Ok((oldest.map_or(last + 1, i64::unsigned_abs), last))
    }

    /// The last event's cursor; 0 if there never was one.
    ///
    /// # Errors
    /// Of the store.
    pub fn last_cursor(&self) -> Result<u64> {
        // Not from the rows: all of them may have been deleted.
        let query = "SELECT seq FROM sqlite_sequence WHERE name = 'events'";
        let last: Option<i64> = self.connection.query_row(query, [], |row| row.get(0)).optional().map_err(fault)?;
        Ok(last.unwrap_or(0).unsigned_abs())
    }

    /// Records that a template exists, once for each time it was created: `stamp` distinguishes those.
    ///
    /// # Errors
    /// Of the store.
    pub fn announce_template(&self, template: &TemplateName, stamp: &str) -> Result<()> {
        let details = EventDetails { template: Some(template.clone()), ..EventDetails::default() };
        self.announce((EventKind::TemplateCreated, "", template.as_str(), stamp), None, &details)
    }

    /// Records that a template is deleted, once for each time it was announced: a later one of its name is another.
    ///
    /// # Errors
    /// Of the store.
    pub fn record_template_deleted(&self, template: &TemplateName) -> Result<()> {
        let key = params![EventKind::TemplateCreated.word(), template.as_str()];
        let details = EventDetails { template: Some(template.clone()), ..EventDetails::default() };
        self.in_transaction(|| {
            let forget = "DELETE FROM announced WHERE event = ?1 AND name = ?2";
            match self.connection.execute(forget, key).map_err(fault)? {
                0 => Ok(()),
                _ => self.append(EventKind::TemplateDeleted, None, &details),
            }
        })
    }

    /// The templates that were announced and not deleted.
    ///
    /// # Errors
    /// Of the store.
    pub fn announced_templates(&self) -> Result<Vec<TemplateName>> {
        let query = "SELECT DISTINCT name FROM announced WHERE event = ?1";
        let mut statement = self.connection.prepare_cached(query).map_err(fault)?;
        let names = statement.query_map([EventKind::TemplateCreated.word()], |row| row.get::<_, String>(0));
        names.map_err(fault)?.map(|name| name.map_err(fault)?.parse()).collect()
    }

    /// Records that a snapshot exists, once for each time it was taken.
    ///
    /// # Errors
    /// Of the store.
    pub fn announce_snapshot(&self, row: &VmRow, snapshot: &SnapshotName, taken_at: Timestamp) -> Result<()> {
        let details = EventDetails { snapshot: Some(snapshot.clone()), ..of_vm(row) };
        let what = (EventKind::SnapshotCreated, &*row.id, snapshot.as_str(), &*taken_at.to_string());
        self.announce(what, Some(&row.spec.name), &details)
    }

    /// An event about something that lies in files. Any process that finds it may announce it: only the first one counts, so
    /// nothing is lost if its maker is killed behind the last step.
    fn announce(
        &self,
        (kind, owner, name, stamp): (EventKind, &str, &str, &str),
        vm: Option<&VmName>,
        details: &EventDetails,
    ) -> Result<()> {
        let known = "SELECT 1 FROM announced WHERE event = ?1 AND owner = ?2 AND name = ?3 AND stamp = ?4";
        let key = params![kind.word(), owner, name, stamp];
        let is_known = || self.connection.query_row(known, key, |_| Ok(())).optional().map_err(fault);
        // Almost always so, and then no lock is needed.
        if is_known()?.is_some() {
            return Ok(());
        }
        self.in_transaction(|| {
            if is_known()?.is_some() {
                return Ok(());
            }
            self.connection.execute("INSERT OR REPLACE INTO announced VALUES (?1, ?2, ?3, ?4)", key).map_err(fault)?;
            self.append(kind, vm, details)
        })
    }
}

fn encode_details(details: &EventDetails) -> String {
    encode(details).unwrap_or_else(|_| "{}".into())
}

fn prune(connection: &Connection, cursor: i64, now: i64) -> Result<()> {
    let old = "DELETE FROM events WHERE at_ms < ?1 OR cursor <= ?2";
    connection.execute(old, params![now - RETENTION_MS, cursor - EVENTS_MAX]).map_err(fault).map(drop)
}

#[cfg(test)]
mod tests;
