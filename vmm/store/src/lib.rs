//! The store: facts that several processes must agree on, in one SQLite file in WAL mode.
//!
//! Every method is one transaction. Uniqueness is a constraint, a change of state a conditional `UPDATE`. Whoever
//! changes a VM's row beyond its forwards holds the VM's `supervisor.lock`. What happens to VMs becomes an event in the
//! same transaction (`events.rs`).

mod approvals;
mod audit;
mod backup;
mod events;
mod idempotency;
mod jobs;
mod outbox;
mod parts;
mod pools;
mod row;
mod row_facts;
mod tokens;
mod vms;
mod webhooks;

use std::cell::Cell;
use std::fs::{OpenOptions, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};

pub use approvals::ApprovalRow;
pub use idempotency::KeyState;
pub use outbox::{Attempt, Due, Outcome};
pub use pools::{Claim, PoolRow};
pub use row::{BootParts, Frozen, Origin, Purpose, Saved, VmRow, VmUpdate};
pub use row_facts::RowFacts;
pub use tokens::TokenRow;
pub use webhooks::WebhookRow;

use nido_api::error::{Code, Error, Result};

/// How long to wait for another process that is writing.
const BUSY_FOR: Duration = Duration::from_secs(10);
/// What takes a store from one version to the next, from an empty file on; `user_version` counts how many were taken.
const STEPS: [&str; 16] = [
    "CREATE TABLE vms (
        id            TEXT PRIMARY KEY,
        name          TEXT NOT NULL UNIQUE,
        spec          TEXT NOT NULL,             -- VmSpec, as asked
        state         TEXT NOT NULL,             -- VmState
        parts         TEXT NOT NULL,             -- BootParts: what of the template it uses
        disk_bytes    INTEGER NOT NULL,
        cid           INTEGER UNIQUE,            -- vsock address, while it has one
        created_ms    INTEGER NOT NULL,
        machine       TEXT,                      -- Machine, as decided at the last start
        started_ms    INTEGER,
        expires_ms    INTEGER,
        agent         TEXT,                      -- AgentInfo of the last start
        ip_address    TEXT,
        failure       TEXT,                      -- Failure
        timings       TEXT,                      -- Timings
        deleting      INTEGER NOT NULL DEFAULT 0 -- its files are being removed; the row goes last
    ) STRICT;
    CREATE TABLE forwards (
        vm_id      TEXT NOT NULL REFERENCES vms(id) ON DELETE CASCADE,
        host       TEXT NOT NULL,
        host_port  INTEGER NOT NULL,
        guest_port INTEGER NOT NULL,
        PRIMARY KEY (vm_id, host, host_port, guest_port)
    ) STRICT, WITHOUT ROWID;",
    "ALTER TABLE vms ADD COLUMN purpose TEXT NOT NULL DEFAULT 'use'; -- Purpose
     ALTER TABLE vms ADD COLUMN origin TEXT;                         -- Origin: how its last start brought it to life",
    "CREATE TABLE pools (
        template   TEXT NOT NULL,
        kind       TEXT NOT NULL,                -- PoolKind: the machine of its clones
        wanted     INTEGER NOT NULL,             -- how many shall wait; at least 1
        PRIMARY KEY (template, kind)
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE events (
        cursor     INTEGER PRIMARY KEY AUTOINCREMENT, -- never used twice
        at_ms      INTEGER NOT NULL,
        event      TEXT NOT NULL,                -- EventKind
        vm_name    TEXT,
        details    TEXT NOT NULL                 -- EventDetails
    ) STRICT;
    CREATE TABLE announced (                     -- of what lies in files: about which of them there was an event
        event      TEXT NOT NULL,
        owner      TEXT NOT NULL,                -- a VM's id, or nothing
        name       TEXT NOT NULL,
        stamp      TEXT NOT NULL,                -- when it was made
        PRIMARY KEY (event, owner, name)
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE tokens (
        id         TEXT PRIMARY KEY,
        name       TEXT NOT NULL UNIQUE,
        sha256     TEXT NOT NULL,                -- of the secret, in hexadecimal
        scope      TEXT NOT NULL,                -- Scope
        created_ms INTEGER NOT NULL,
        expires_ms INTEGER
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE webhooks (
        id            TEXT PRIMARY KEY,
        url           TEXT NOT NULL,
        events        TEXT NOT NULL,             -- EventKinds; none is all
        format        TEXT NOT NULL,             -- WebhookFormat
        secret        TEXT NOT NULL,             -- whsec_…
        allow_private INTEGER NOT NULL,
        created_ms    INTEGER NOT NULL,
        disabled      TEXT                       -- why it is sent nothing any more
    ) STRICT;
    CREATE TABLE deliveries (
        id            INTEGER PRIMARY KEY AUTOINCREMENT,
        webhook_id    TEXT NOT NULL REFERENCES webhooks(id) ON DELETE CASCADE,
        lane          TEXT NOT NULL,             -- of one lane one at a time is sent, in order: a VM's id, a template
        event         TEXT NOT NULL,             -- EventKind
        cursor        INTEGER NOT NULL,          -- of the event, which may be forgotten before it is delivered
        body          TEXT NOT NULL,             -- Body
        state         TEXT NOT NULL DEFAULT 'pending', -- DeliveryState
        attempts      INTEGER NOT NULL DEFAULT 0,
        due_ms        INTEGER,                   -- of the first pending one of each lane, and of no other
        last_status   INTEGER,
        last_error    TEXT,
        created_ms    INTEGER NOT NULL,
        queued_ms     INTEGER NOT NULL,          -- when it was queued for the last time
        done_ms       INTEGER
    ) STRICT;
    CREATE INDEX deliveries_of ON deliveries (webhook_id, id);
    CREATE INDEX deliveries_pending ON deliveries (webhook_id, lane, id) WHERE state = 'pending';
    CREATE INDEX deliveries_due ON deliveries (webhook_id, due_ms) WHERE due_ms IS NOT NULL;
    CREATE INDEX deliveries_done ON deliveries (webhook_id, done_ms) WHERE done_ms IS NOT NULL;",
    "CREATE TABLE answers (
        caller     TEXT NOT NULL,
        key        TEXT NOT NULL,                -- the caller's, for one request
        request    TEXT NOT NULL,                -- hash of it
        run        TEXT NOT NULL,                -- of the server that carries it out
        answer     TEXT,                         -- as the server keeps it; absent while it is carried out
        at_ms      INTEGER NOT NULL,
        PRIMARY KEY (caller, key)
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE approvals (
        id         TEXT PRIMARY KEY,
        tool       TEXT NOT NULL,
        vm_id      TEXT NOT NULL,                -- not a reference: what was asked about a VM outlives it for an hour
        vm_name    TEXT NOT NULL,
        actor      TEXT NOT NULL,
        agent      TEXT,
        arguments  TEXT NOT NULL,                -- redacted, for people
        digest     TEXT NOT NULL,                -- of all of them: Ask::digest
        state      TEXT NOT NULL DEFAULT 'pending', -- ApprovalState; that time ran out is never written
        created_ms INTEGER NOT NULL,
        expires_ms INTEGER NOT NULL,
        decided_ms INTEGER,
        decided_by TEXT
    ) STRICT;",
    "CREATE TABLE jobs (
        id           TEXT PRIMARY KEY,
        tool         TEXT NOT NULL,
        vm_name      TEXT,
        actor        TEXT NOT NULL,
        holder       TEXT NOT NULL,              -- who carries it out: a file below present/
        state        TEXT NOT NULL DEFAULT 'running', -- JobState
        started_ms   INTEGER NOT NULL,
        ended_ms     INTEGER,
        stage        TEXT,                       -- JobProgress
        percent      INTEGER,
        cancel_asked INTEGER NOT NULL DEFAULT 0,
        result       TEXT,                       -- JSON
        error        TEXT                        -- Problem
    ) STRICT;",
    "ALTER TABLE webhooks ADD COLUMN rests_until_ms INTEGER;", // it asked to be left alone until then
    "ALTER TABLE tokens ADD COLUMN only_for TEXT;                    -- Door; all of a server if absent",
    "ALTER TABLE vms ADD COLUMN state_cause TEXT;                    -- StateCause: why it is paused or stopped",
    "ALTER TABLE vms ADD COLUMN made_by TEXT;   -- LeaseId of the operation that makes it, until that has ended well
     CREATE TABLE claims (
        ticket     TEXT PRIMARY KEY,             -- of one attempt to claim a clone of a pool
        vm_id      TEXT,                         -- the clone that was claimed; absent: the attempt was given up
        at_ms      INTEGER NOT NULL
     ) STRICT, WITHOUT ROWID;
     CREATE TABLE unused_parts (due INTEGER NOT NULL) STRICT; -- one row; not 0: there may be parts that no VM uses any more
     INSERT INTO unused_parts (due) VALUES (1);",
    "ALTER TABLE vms ADD COLUMN owner TEXT;                          -- Caller::owner of who made it
     ALTER TABLE tokens ADD COLUMN limits TEXT;                      -- Limits; none if absent
     CREATE TABLE audit_heads (
        log        TEXT PRIMARY KEY,
        seq        INTEGER NOT NULL,             -- of a line that was written
        chain      TEXT NOT NULL                 -- up to and with it
     ) STRICT, WITHOUT ROWID;",
    "ALTER TABLE vms ADD COLUMN last_ip_address TEXT;                -- the last that was not absent",
    // Of rows whose JSON is damaged nothing is known: they own no part, and while there is one, no part is removed.
    "ALTER TABLE vms ADD COLUMN ephemeral INTEGER GENERATED ALWAYS AS (
        CASE WHEN json_valid(spec) THEN json_extract(spec, '$.ephemeral') END) VIRTUAL;
     ALTER TABLE vms ADD COLUMN lease TEXT GENERATED ALWAYS AS (
        CASE WHEN json_valid(spec) THEN json_extract(spec, '$.lease') END) VIRTUAL;
     CREATE INDEX vms_to_reconcile ON vms (id) WHERE
        deleting = 1 OR state NOT IN ('created', 'stopped', 'failed')
        OR (state IN ('stopped', 'failed') AND ephemeral = 1) OR lease IS NOT NULL OR made_by IS NOT NULL;
     CREATE TABLE part_owners (
        vm_id      TEXT NOT NULL REFERENCES vms(id) ON DELETE CASCADE,
        part       TEXT NOT NULL,                -- hash of a template part that the VM uses
        in_memory  INTEGER NOT NULL,             -- 1: only while it runs (the memory image that it was forked from)
        PRIMARY KEY (vm_id, part)
     ) STRICT, WITHOUT ROWID;
     CREATE INDEX part_owners_by_part ON part_owners (part);
     INSERT INTO part_owners SELECT DISTINCT vms.id, leaf.value, 0
        FROM vms, json_tree(CASE WHEN json_valid(vms.parts) THEN vms.parts ELSE '{}' END) AS leaf
        WHERE leaf.type = 'text' AND length(leaf.value) = 64 AND leaf.value NOT GLOB '*[^0-9a-f]*';
     INSERT OR IGNORE INTO part_owners SELECT DISTINCT vms.id, leaf.value, 1
        FROM vms, json_tree(CASE WHEN json_valid(vms.origin) THEN vms.origin ELSE '{}' END) AS leaf
        WHERE vms.state NOT IN ('created', 'stopped', 'failed') AND leaf.key IN ('memory', 'state');",
];
/// What this build writes into `user_version`.
const SCHEMA_VERSION: i64 = STEPS.len() as i64;

/// An open store.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    /// Whether a delivery was queued since the last call.
    queued: Cell<bool>,
    is_new: bool,
}

impl Store {
    /// Opens the store; makes it if it is not there.
    ///
    /// # Errors
    /// `disk_full`, `internal` (also for a store written by a newer nido).
    pub fn open(path: &Path) -> Result<Self> {
        keep_private(path).map_err(|e| Error::io_at("open the store", path, e))?;
        Self::open_file(path).map_err(|error| match error.code() {
            Code::StoreDamaged => damaged(&path.display().to_string(), error.message()),
            _ => error,
        })
    }

    fn open_file(path: &Path) -> Result<Self> {
        let connection = Connection::open(path).map_err(fault)?;
        connection.busy_timeout(BUSY_FOR).map_err(fault)?;
        // WAL: readers never wait. NORMAL: a killed process loses nothing; a power cut at most the last changes.
        let settings =
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA foreign_keys=ON; PRAGMA cache_size=-256;";
        let deadline = Instant::now() + BUSY_FOR;
        // Where two processes make the store at the same moment, SQLite does not wait for the other by itself.
        while let Err(error) = connection.execute_batch(settings) {
            if error.sqlite_error_code() != Some(rusqlite::ErrorCode::DatabaseBusy) || Instant::now() > deadline {
                return Err(fault(error));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut store = Self { connection, queued: Cell::new(false), is_new: false };
        store.is_new = store.migrate()? == 0;
        Ok(store)
    }

    /// Opens a store that cannot be written, to read it: on a read-only mount, say. Every write fails as `read_only`.
    ///
    /// # Errors
    /// `path_not_found`, `permission_denied`, `read_only` if there are changes in its write-ahead log that cannot be
    /// read without writing, `internal`.
    pub fn open_to_read(path: &Path) -> Result<Self> {
        std::fs::File::open(path).map_err(|e| Error::io_at("open the store", path, e))?;
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let readable = |connection: Connection| {
            connection.busy_timeout(BUSY_FOR)?;
            connection
                .query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0))
                .map(|version| (connection, version))
        };
        let opened = Connection::open_with_flags(path, flags).and_then(readable);
        // Without a log beside it nothing is missing in the file itself, and SQLite need not make an index of the log.
        let log_bytes = std::fs::metadata(beside(path, "-wal")).map_or(0, |log| log.len());
        let (connection, version) = match opened {
            Ok(opened) => opened,
            Err(_) if log_bytes == 0 => {
                let uri = format!("file:{}?immutable=1", as_uri(path));
                Connection::open_with_flags(uri, flags).and_then(readable).map_err(fault)?
            }
            Err(error) => return Err(fault(error)),
        };
        if version != SCHEMA_VERSION {
            let what = format!("the store has version {version}; this nido reads {SCHEMA_VERSION}");
            return Err(Error::new(Code::ReadOnly, what)
                .hint("it is read-only: make it writable once, or use the nido that wrote it"));
        }
        Ok(Self { connection, queued: Cell::new(false), is_new: false })
    }

    /// Runs a transaction. No other process writes meanwhile.
    fn in_transaction<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let transaction =
            rusqlite::Transaction::new_unchecked(&self.connection, rusqlite::TransactionBehavior::Immediate)
                .map_err(fault)?;
        let done = work()?;
        transaction.commit().map_err(fault)?;
        Ok(done)
    }

    /// Whether there was no store, or an empty file, before it was opened.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Brings the tables to this nido's version; returns the version they had.
    fn migrate(&self) -> Result<i64> {
        let version = |c: &Connection| c.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0));
        match version(&self.connection).map_err(fault)? {
            SCHEMA_VERSION => return Ok(SCHEMA_VERSION),
            0..SCHEMA_VERSION => {}
            newer => {
                return Err(Error::internal(format!(
                    "the store has version {newer}; this nido supports {SCHEMA_VERSION}"
                ))
                .hint("use the nido version that wrote it, or another home"));
            }
        }
        let transaction =
            rusqlite::Transaction::new_unchecked(&self.connection, rusqlite::TransactionBehavior::Immediate)
                .map_err(fault)?;
        // Asked again: another process may have done it meanwhile.
        let from = version(&transaction).map_err(fault)?;
        for step in &STEPS[usize::try_from(from).unwrap_or(0).min(STEPS.len())..] {
            transaction.execute_batch(step).map_err(fault)?;
        }
        transaction.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(fault)?;
        transaction.commit().map_err(fault)?;
        Ok(from)
    }
}

/// Makes the store's file if need be; it holds secrets, so only its owner may read it. What SQLite lays beside it gets the
/// same mode as the file has.
fn keep_private(path: &Path) -> std::io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    if file.metadata()?.permissions().mode() & 0o077 == 0 {
        return Ok(());
    }
    // Of an older nido. The files next to it first: once the file itself is private, the check is skipped.
    for ending in ["-wal", "-shm"] {
        match std::fs::set_permissions(beside(path, ending), Permissions::from_mode(0o600)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    file.set_permissions(Permissions::from_mode(0o600))
}

/// A file of SQLite's beside the store.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// A path as SQLite's URIs want it.
fn as_uri(path: &Path) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-_.~".contains(&byte);
    let bytes = path.as_os_str().as_bytes().iter();
    bytes.map(|&byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// A failure of SQLite as one of ours.
#[allow(clippy::needless_pass_by_value)] // the shape map_err wants
fn fault(error: rusqlite::Error) -> Error {
    let full = match &error {
        // The shared index of the write-ahead log could not grow: SQLite has no other word for a full disk there.
        rusqlite::Error::SqliteFailure(e, _) => {
            e.code == rusqlite::ErrorCode::DiskFull || e.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE
        }
        _ => false,
    };
    if full {
        return Error::new(Code::DiskFull, "the store cannot be written: the disk is full")
            .hint("free some space on the disk that holds nido's home, or use another with --home");
    }
    if let Some(rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt) = error.sqlite_error_code() {
        return damaged("nido.db in nido's home", &error.to_string());
    }
    let code = match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => Code::VmBusy,
        Some(rusqlite::ErrorCode::ReadOnly) => Code::ReadOnly,
        Some(rusqlite::ErrorCode::CannotOpen | rusqlite::ErrorCode::PermissionDenied) => Code::PermissionDenied,
        Some(rusqlite::ErrorCode::SystemIoFailure | rusqlite::ErrorCode::FileLockingProtocolFailed) => Code::HostFailed,
        Some(rusqlite::ErrorCode::OutOfMemory) => Code::LimitExceeded,
        _ => Code::Internal,
    };
    let plain = Error::new(code, format!("the store failed: {error}"));
    match code {
        Code::ReadOnly | Code::PermissionDenied => plain.hint(
            "nido's home must be writable for this: check its mount, owner and mode, or choose another with --home or NIDO_HOME",
        ),
        _ => plain,
    }
}

/// The error for a store that SQLite cannot read.
fn damaged(place: &str, why: &str) -> Error {
    let why = why.rsplit_once("is damaged: ").map_or(why, |(_, why)| why);
    Error::new(Code::StoreDamaged, format!("the store {place} is damaged: {why}")).hint(
        "move nido.db, nido.db-wal and nido.db-shm away and copy nido.db.backup to nido.db; \
         then restore VMs that are newer than the backup with nido doctor --adopt",
    )
}

/// A value of ours that does not decode: the store was written by something else.
fn decode<T: serde::de::DeserializeOwned>(column: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| Error::internal(format!("the store's column {column} cannot be read: {e}")))
}

/// A row of a list, if it can be decoded. One that cannot, of another version of nido for instance, concerns no other row: it
/// is logged and left out.
fn readable<T>(table: &str, row: Result<T>) -> Option<T> {
    row.inspect_err(|error| tracing::warn!("a row of table {table} cannot be read, and is left out: {error}")).ok()
}

/// All rows of a list that can be decoded.
fn readable_rows<T>(table: &str, rows: impl Iterator<Item = rusqlite::Result<Result<T>>>) -> Result<Vec<T>> {
    rows.filter_map(|row| row.map(|row| readable(table, row)).transpose())
        .collect::<rusqlite::Result<_>>()
        .map_err(fault)
}

fn encode<T: serde::Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::internal(format!("cannot write to the store: {e}")))
}

#[cfg(test)]
mod tests;
