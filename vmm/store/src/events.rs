//! The table `events`: everything that happened, one row each, written in the transaction that made it happen.
//!
//! ```text
//!  update_vm ─ insert_vm ─ claim_vm ─ remove_vm ─ announce ──> what of it is an event [pure] ──> append ──> queue
//! ```
//!
//! Invariant: SQLite lets one writer in at a time, so a reader that has seen a cursor will never see a smaller one appear.

use jiff::Timestamp;
use nido_api::error::{Error, Result};
use nido_api::name::{SnapshotName, TemplateName, VmName};
use nido_api::state::{StateCause, VmState};
use nido_api::{Event, EventDetails, EventKind, EventsRequest};
use rusqlite::{Connection, OptionalExtension, params};

use super::{Origin, Purpose, Store, VmRow, VmUpdate, decode, encode, fault};

/// Events older than this are forgotten, in milliseconds: 30 days.
const KEPT_MS: i64 = 30 * 24 * 3600 * 1000;
/// So many of the last events are kept at most.
const KEPT: i64 = 100_000;
/// How often old ones are looked for, in events.
const PRUNED_EVERY: i64 = 256;
/// How many rows are read at once.
const PAGE: i64 = 1000;

/// What of a change of a VM's row is an event.
#[must_use]
pub(super) fn events_of(before: &VmRow, update: &VmUpdate) -> Vec<(EventKind, EventDetails)> {
    if before.purpose != Purpose::Use {
        return Vec::new();
    }
    let now = Timestamp::now();
    let about = || EventDetails {
        ip_address: update.ip_address.clone().flatten().or_else(|| before.ip_address.clone()),
        ..of_vm(before)
    };
    let ran = || {
        let since = before.started_at.map(|started| now.duration_since(started).as_millis());
        since.map(|ms| u64::try_from(ms).unwrap_or(0))
    };
    let mut events = Vec::new();
    if let Some(limit) = update.expired {
        events.push((EventKind::VmExpired, EventDetails { limit: Some(limit), ..about() }));
    }
    let after = update.state.unwrap_or(before.state);
    let ended = after.at_rest() && !before.state.at_rest();
    match (before.state, after) {
        (VmState::Starting | VmState::Running, VmState::Paused) => {
            let cause = update.cause.flatten();
            events.push((EventKind::VmPaused, EventDetails { status_cause: cause, message: told(cause), ..about() }));
        }
        (VmState::Paused, VmState::Running) => events.push((EventKind::VmResumed, about())),
        (_, VmState::Failed) if ended => {
            let failure = update.failure.clone().flatten();
            let details = EventDetails {
                cause: failure.as_ref().map(|failure| failure.cause),
                message: failure.as_ref().map(|failure| failure.message.clone()),
                last_log_entries: failure.map(|failure| failure.log_tail).unwrap_or_default(),
                ran_ms: ran(),
                ..about()
            };
            events.push((EventKind::VmCrashed, details));
        }
        // A start that was called off before anything ran is none.
        (VmState::Starting, VmState::Created | VmState::Stopped) => {}
        (_, VmState::Stopped) if ended => {
            let cause = update.cause.flatten();
            let details = EventDetails {
                ran_ms: ran(),
                status_cause: cause,
                message: told(cause),
                last_log_entries: update.last_log_entries.clone().unwrap_or_default(),
                ..about()
            };
            events.push((EventKind::VmStopped, details));
        }
        _ => {}
    }
    if let Some(snapshot) = &update.restored {
        events.push((EventKind::SnapshotRestored, EventDetails { snapshot: Some(snapshot.clone()), ..about() }));
    }
    if update.agent.as_ref().is_some_and(|agent| agent.ready) && !before.agent.ready && !after.at_rest() {
        if let Origin::Restore { snapshot, .. } = &before.origin {
            let details = EventDetails { snapshot: Some(snapshot.clone()), ..about() };
            events.push((EventKind::SnapshotRestored, details));
        }
        let details = EventDetails { timings: update.timings.flatten(), ..about() };
        events.push((EventKind::VmStarted, details));
    }
    events
}

/// A cause in a sentence, unless a user asked for what happened.
fn told(cause: Option<StateCause>) -> Option<String> {
    cause.filter(|cause| *cause != StateCause::User).map(|cause| cause.detail().into())
}

/// What every event of a VM tells.
pub(super) fn of_vm(row: &VmRow) -> EventDetails {
    EventDetails {
        vm_id: Some(row.id.clone()),
        template: Some(row.spec.template.clone()),
        ip_address: row.ip_address.clone(),
        ..EventDetails::default()
    }
}

impl Store {
    /// Writes an event, and a delivery for every endpoint that is told of it, into the transaction that is open.
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
        if cursor % PRUNED_EVERY == 0 { prune(&self.connection, cursor, now) } else { Ok(()) }
    }

    /// The events behind a cursor, the oldest first, and the cursor to go on from. Not all at once: whoever gets the same
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
            let event = Event {
                cursor,
                event: kind.parse()?,
                timestamp: Timestamp::from_millisecond(ms).map_err(|e| Error::internal(e.to_string()))?,
                vm_name: vm.map(|name| name.parse()).transpose()?,
                details: decode("details", &details)?,
            };
            if request.wants(&event) {
                events.push(event);
            }
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
        // Not of the rows: those may all have been forgotten.
        let query = "SELECT seq FROM sqlite_sequence WHERE name = 'events'";
        let last: Option<i64> = self.connection.query_row(query, [], |row| row.get(0)).optional().map_err(fault)?;
        Ok(last.unwrap_or(0).unsigned_abs())
    }

    /// Says that a template is there, once for each time it was made: `stamp` tells those apart.
    ///
    /// # Errors
    /// Of the store.
    pub fn announce_template(&self, template: &TemplateName, stamp: &str) -> Result<()> {
        let details = EventDetails { template: Some(template.clone()), ..EventDetails::default() };
        self.announce((EventKind::TemplateCreated, "", template.as_str(), stamp), None, &details)
    }

    /// Says that a template is gone, once for each time it was announced: what comes under its name is another.
    ///
    /// # Errors
    /// Of the store.
    pub fn forget_template(&self, template: &TemplateName) -> Result<()> {
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

    /// The templates that were announced and not forgotten.
    ///
    /// # Errors
    /// Of the store.
    pub fn announced_templates(&self) -> Result<Vec<TemplateName>> {
        let query = "SELECT DISTINCT name FROM announced WHERE event = ?1";
        let mut statement = self.connection.prepare_cached(query).map_err(fault)?;
        let names = statement.query_map([EventKind::TemplateCreated.word()], |row| row.get::<_, String>(0));
        names.map_err(fault)?.map(|name| name.map_err(fault)?.parse()).collect()
    }

    /// Says that a snapshot is there, once for each time it was taken.
    ///
    /// # Errors
    /// Of the store.
    pub fn announce_snapshot(&self, row: &VmRow, snapshot: &SnapshotName, taken_at: Timestamp) -> Result<()> {
        let details = EventDetails { snapshot: Some(snapshot.clone()), ..of_vm(row) };
        let what = (EventKind::SnapshotCreated, &*row.id, snapshot.as_str(), &*taken_at.to_string());
        self.announce(what, Some(&row.spec.name), &details)
    }

    /// An event about something that lies in files. Whoever finds it may announce it: the first one's word counts, so
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
        // Almost always so, and then nobody has to wait.
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
    connection.execute(old, params![now - KEPT_MS, cursor - KEPT]).map_err(fault).map(drop)
}

#[cfg(test)]
mod tests {
    use super::super::BootParts;
    use super::*;
    use nido_api::state::FailureCause;
    use nido_api::{AgentInfo, Failure, Limit, VmSpec};

    fn row(id: &str, purpose: Purpose) -> VmRow {
        let parts = BootParts {
            vmlinux: "a".into(),
            initramfs: "b".into(),
            initramfs_base: None,
            agent: None,
            root: "c".into(),
            root_bytes: 1,
            packages: "d".into(),
            init: nido_images::Init::Agent,
            append: String::new(),
            frozen: Vec::new(),
        };
        let spec = VmSpec::named(format!("vm-{id}").parse().unwrap());
        VmRow::new(id.into(), spec, purpose, VmState::Starting, parts, 1 << 30)
    }

    fn open() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        (dir, store)
    }

    fn all(store: &Store) -> Vec<Event> {
        store.events(&EventsRequest::default()).unwrap().0
    }

    fn words(store: &Store) -> Vec<&'static str> {
        all(store).iter().map(|event| event.event.word()).collect()
    }

    fn to(state: VmState) -> VmUpdate {
        VmUpdate { state: Some(state), ..VmUpdate::default() }
    }

    fn answered() -> VmUpdate {
        VmUpdate { agent: Some(AgentInfo { ready: true, ..AgentInfo::default() }), ..to(VmState::Running) }
    }

    #[test]
    fn a_life_is_told_in_order() {
        let (_dir, store) = open();
        store.insert_vm(&row("1", Purpose::Use)).unwrap();
        let address = VmUpdate { ip_address: Some(Some("10.0.2.15".into())), ..answered() };
        let time_is_up = VmUpdate { expired: Some(Limit::Ttl), ..VmUpdate::default() };
        let steps = [
            to(VmState::Running),
            address,
            to(VmState::Paused),
            to(VmState::Running),
            time_is_up,
            to(VmState::Stopping),
        ];
        for update in steps {
            store.update_vm("1", &update).unwrap();
        }
        let last_log_entries = Some(vec!["Power down".to_owned()]);
        store.update_vm("1", &VmUpdate { ip_address: Some(None), last_log_entries, ..to(VmState::Stopped) }).unwrap();
        store.remove_vm("1", vec!["the end".into()]).unwrap();
        store.remove_vm("1", Vec::new()).unwrap();
        let told = ["vm.created", "vm.started", "vm.paused", "vm.resumed", "vm.expired", "vm.stopped", "vm.deleted"];
        assert_eq!(words(&store), told);
        let events = all(&store);
        assert!(events.windows(2).all(|pair| pair[0].cursor < pair[1].cursor));
        assert!(events.iter().all(|event| event.vm_name.as_ref().unwrap().as_str() == "vm-1"));
        assert_eq!(events[5].details.ip_address.as_deref(), Some("10.0.2.15"), "the address it had");
        assert_eq!(events[5].details.last_log_entries, ["Power down"]);
        assert_eq!(store.last_cursor().unwrap(), events[6].cursor);
    }

    #[test]
    fn a_crash_has_a_cause_and_last_words() {
        let (_dir, store) = open();
        store.insert_vm(&row("1", Purpose::Use)).unwrap();
        let started_at = Timestamp::now().checked_sub(std::time::Duration::from_secs(7)).unwrap();
        store.update_vm("1", &VmUpdate { started_at: Some(started_at), ..answered() }).unwrap();
        let (cause, log_tail) = (FailureCause::GuestPanic, vec!["Kernel panic".to_owned()]);
        let failure = Failure { cause, message: "the guest's kernel panicked".into(), log_tail: log_tail.clone() };
        store.update_vm("1", &VmUpdate { failure: Some(Some(failure)), ..to(VmState::Failed) }).unwrap();
        let crash = all(&store).pop().unwrap();
        assert_eq!((crash.event, crash.details.cause), (EventKind::VmCrashed, Some(cause)));
        assert_eq!(crash.details.last_log_entries, log_tail);
        assert!((7000..60_000).contains(&crash.details.ran_ms.unwrap()));
        // Told once.
        store.update_vm("1", &to(VmState::Failed)).unwrap();
        assert_eq!(words(&store).len(), 3);
    }

    #[test]
    fn what_is_nobodys_is_no_event_until_it_is_claimed() {
        let (_dir, store) = open();
        for (id, purpose) in [("1", Purpose::Pool), ("2", Purpose::Bake)] {
            store.insert_vm(&row(id, purpose)).unwrap();
            store.update_vm(id, &answered()).unwrap();
            store.remove_vm(id, Vec::new()).unwrap();
        }
        assert_eq!(words(&store), [""; 0]);
    }

    #[test]
    fn a_start_that_was_called_off_is_no_stop() {
        let (_dir, store) = open();
        store.insert_vm(&row("1", Purpose::Use)).unwrap();
        store.update_vm("1", &to(VmState::Stopped)).unwrap();
        assert_eq!(words(&store), ["vm.created"]);
    }

    #[test]
    fn what_lies_in_files_is_announced_once_for_each_time_it_was_made() {
        let (_dir, store) = open();
        let vm = row("1", Purpose::Use);
        let (template, snapshot) = ("sandbox".parse().unwrap(), "first".parse().unwrap());
        for second in [1, 1, 2] {
            let at = Timestamp::from_second(second).unwrap();
            store.announce_template(&template, &at.to_string()).unwrap();
            store.announce_snapshot(&vm, &snapshot, at).unwrap();
        }
        assert_eq!(words(&store), ["template.created", "snapshot.created", "template.created", "snapshot.created"]);
        assert_eq!(store.announced_templates().unwrap(), std::slice::from_ref(&template));
        for _ in 0..2 {
            store.forget_template(&template).unwrap();
        }
        assert!(store.announced_templates().unwrap().is_empty());
        store.announce_template(&template, &Timestamp::from_second(2).unwrap().to_string()).unwrap();
        assert_eq!(words(&store)[4..], ["template.deleted", "template.created"]);
    }

    #[test]
    fn readers_go_on_where_they_were_and_choose() {
        let (_dir, store) = open();
        for id in ["1", "2", "3"] {
            store.insert_vm(&row(id, Purpose::Use)).unwrap();
            store.update_vm(id, &answered()).unwrap();
        }
        let second = EventsRequest { vm: Some("vm-2".parse().unwrap()), ..EventsRequest::default() };
        let (events, cursor) = store.events(&second).unwrap();
        assert_eq!((events.len(), cursor), (2, 6), "the cursor passes what was not asked for");
        let later = EventsRequest { since: 4, kinds: vec![EventKind::VmStarted], vm: None };
        assert_eq!(store.events(&later).unwrap().0.len(), 1);
        assert_eq!(store.events(&EventsRequest { since: 6, ..later }).unwrap(), (Vec::new(), 6));
    }

    #[test]
    fn old_events_are_forgotten_and_their_cursors_never_come_back() {
        let (_dir, store) = open();
        store.insert_vm(&row("1", Purpose::Use)).unwrap();
        store.connection.execute("UPDATE events SET at_ms = 0", []).unwrap();
        for number in 0..PRUNED_EVERY {
            store.update_vm("1", &to(if number % 2 == 0 { VmState::Running } else { VmState::Paused })).unwrap();
        }
        assert!(all(&store)[0].event != EventKind::VmCreated);
        store.connection.execute("DELETE FROM events", []).unwrap();
        let last = store.last_cursor().unwrap();
        store.remove_vm("1", Vec::new()).unwrap();
        assert_eq!(all(&store)[0].cursor, last + 1);
    }
}
