//! The store: facts that several processes must agree on, in one SQLite file in WAL mode.
//!
//! Every method is one transaction. Uniqueness is a constraint, a change of state a conditional `UPDATE`. A process that
//! changes a VM's row beyond its forwards and rules holds the VM's `supervisor.lock`. What happens to VMs becomes an event in the
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
mod restarts;
mod row;
mod row_decode;
mod row_facts;
mod rules;
mod salvage;
mod schema;
mod stored_spec;
mod tokens;
mod transition;
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
pub use outbox::{Attempt, DueDelivery, Outcome};
pub use pools::{Claim, PoolRow};
pub use restarts::RestartFacts;
pub use row::{BackingLayer, BootParts, Origin, Purpose, StoredBake, VmRow};
pub use row_facts::RowFacts;
pub use salvage::{Health, SalvageReport, health};
pub use stored_spec::{spec_of_stored, stored_spec};
pub use tokens::TokenRow;
pub use transition::{AdoptedStart, AgentReady, LaunchRecord, Transition, TransitionOutcome, VmEnd};
pub use webhooks::WebhookRow;

use nido_api::error::{Code, Error, Hint, Result};

use self::schema::{SCHEMA_VERSION, STEPS};

/// `application_id` of a store that lists all VMs of its home: "nido". 0 in a new one.
const COMPLETE: i32 = 0x6e69_646f;
/// How long to wait for another process that is writing.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// An open store.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    /// Whether a delivery was queued since the last call.
    queued: Cell<bool>,
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
        connection.busy_timeout(BUSY_TIMEOUT).map_err(fault)?;
        // WAL: readers never wait. NORMAL: a killed process loses nothing; a power cut at most the last changes.
        let settings =
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA foreign_keys=ON; PRAGMA cache_size=-256;";
        let deadline = Instant::now() + BUSY_TIMEOUT;
        // Where two processes make the store at the same moment, SQLite does not wait for the other by itself.
        while let Err(error) = connection.execute_batch(settings) {
            if error.sqlite_error_code() != Some(rusqlite::ErrorCode::DatabaseBusy) || Instant::now() > deadline {
                return Err(fault(error));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let store = Self { connection, queued: Cell::new(false) };
        store.migrate()?;
        Ok(store)
    }

    /// Opens a store that cannot be written, to read it: for example, on a read-only mount. Every write fails as `read_only`.
    ///
    /// # Errors
    /// `path_not_found`, `permission_denied`, `read_only` if there are changes in its write-ahead log that cannot be
    /// read without writing, `internal`.
    pub fn open_to_read(path: &Path) -> Result<Self> {
        std::fs::File::open(path).map_err(|e| Error::io_at("open the store", path, e))?;
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let readable = |connection: Connection| {
            connection.busy_timeout(BUSY_TIMEOUT)?;
            connection
                .query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0))
                .map(|version| (connection, version))
        };
        let opened = Connection::open_with_flags(path, flags).and_then(readable);
        // Without a write-ahead log nothing is missing in the file itself, and SQLite need not make an index of the log.
        let log_bytes = std::fs::metadata(sibling_path(path, "-wal")).map_or(0, |log| log.len());
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
                .hint(Hint::host("make it writable once, or use the nido that wrote it")));
        }
        Ok(Self { connection, queued: Cell::new(false) })
    }

    /// Runs a transaction. No other process writes meanwhile.
    fn in_transaction<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let transaction =
            rusqlite::Transaction::new_unchecked(&self.connection, rusqlite::TransactionBehavior::Immediate)
                .map_err(fault)?;
        let done = work()?;
        nido_files::failpoint!("store.committing", io).map_err(|e| Error::io("the store cannot be written", e))?;
        transaction.commit().map_err(fault)?;
        nido_files::failpoint!("store.committed");
        Ok(done)
    }

    /// Whether the store was found to list all VMs of its home since it was made. Any process may have made it: also one in the
    /// background, in place of a store that was lost.
    ///
    /// # Errors
    /// `internal`.
    pub fn is_complete(&self) -> Result<bool> {
        let id = self.connection.query_row("PRAGMA application_id", [], |row| row.get::<_, i32>(0));
        Ok(id.map_err(fault)? == COMPLETE)
    }

    /// Records that the store lists all VMs of its home.
    ///
    /// # Errors
    /// `read_only`, `disk_full`, `internal`.
    pub fn set_complete(&self) -> Result<()> {
        self.connection.pragma_update(None, "application_id", COMPLETE).map_err(fault)
    }

    /// Brings the tables to this nido's version.
    fn migrate(&self) -> Result<()> {
        let version = |c: &Connection| c.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0));
        match version(&self.connection).map_err(fault)? {
            SCHEMA_VERSION => return Ok(()),
            0..SCHEMA_VERSION => {}
            newer => {
                return Err(Error::internal(format!(
                    "the store has version {newer}; this nido supports {SCHEMA_VERSION}"
                ))
                .hint(Hint::host("use the nido version that wrote it, or another home")));
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
        transaction.commit().map_err(fault)
    }
}

/// Makes the store's file if need be; it holds secrets, so only its owner may read it. The files that SQLite creates next to it get the
/// same mode as the file has.
fn keep_private(path: &Path) -> std::io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    if file.metadata()?.permissions().mode() & 0o077 == 0 {
        return Ok(());
    }
    // Of an older nido. The files next to it first: once the file itself is private, the check is skipped.
    for ending in ["-wal", "-shm"] {
        match std::fs::set_permissions(sibling_path(path, ending), Permissions::from_mode(0o600)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    file.set_permissions(Permissions::from_mode(0o600))
}

/// A file of SQLite's beside the store.
fn sibling_path(path: &Path, ending: &str) -> PathBuf {
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
        return Error::new(Code::DiskFull, "the store cannot be written: the disk is full").hint(Hint::home_full());
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
        Code::ReadOnly | Code::PermissionDenied => plain.hint(Hint::host(
            "make nido's home writable (its mount, owner and mode), or choose another with --home or NIDO_HOME",
        )),
        _ => plain,
    }
}

/// The error for a store that SQLite cannot read.
fn damaged(place: &str, why: &str) -> Error {
    let why = why.rsplit_once("is damaged: ").map_or(why, |(_, why)| why);
    Error::new(Code::StoreDamaged, format!("the store {place} is damaged: {why}")).hint(Hint::host(
        "run nido doctor --rebuild, which keeps the damaged file, and makes a new store from what can be read and from the VMs' directories",
    ))
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

fn encode_spec(spec: &nido_api::VmSpec) -> Result<String> {
    stored_spec(spec).and_then(|spec| serde_json::to_string(&spec)).map_err(not_written)
}

fn encode<T: serde::Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(not_written)
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn not_written(error: serde_json::Error) -> Error {
    Error::internal(format!("cannot write to the store: {error}"))
}

#[cfg(test)]
mod tests;
