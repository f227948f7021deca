//! A VM's row as SQLite gives it, and how it is decoded.
//!
//! Invariant: one row that cannot be decoded concerns no other row.

use jiff::Timestamp;
use nido_api::error::Result;
use nido_api::name::VmName;
use nido_api::state::{StateCause, VmState};
use nido_api::{ForwardSpec, LeaseId, VmSpec};
use rusqlite::Row;

use super::row::{BootParts, Purpose, VmRow};
use super::stored_spec::spec_of_text;

impl BootParts {
    /// What stands for parts that cannot be read.
    fn unknown() -> Self {
        Self {
            vmlinux: String::new(),
            initramfs: String::new(),
            initramfs_base: None,
            agent: None,
            root: String::new(),
            root_bytes: 0,
            packages: String::new(),
            init: nido_images::Init::Agent,
            append: String::new(),
            frozen: Vec::new(),
            allow: None,
        }
    }
}

/// The columns in the order in which [`Raw::read`] takes them.
pub(super) const COLUMNS: &str = "id, name, spec, state, parts, disk_bytes, cid, created_ms, machine, started_ms, expires_ms, agent, \
                       ip_address, failure, timings, deleting, purpose, origin, state_cause, made_by, owner, \
                       limits_hit";

/// A row as `SQLite` gives it.
pub(super) struct Raw {
    pub(super) id: String,
    name: String,
    spec: String,
    state: String,
    parts: String,
    disk_bytes: i64,
    cid: Option<i64>,
    created_ms: i64,
    machine: Option<String>,
    started_ms: Option<i64>,
    expires_ms: Option<i64>,
    agent: Option<String>,
    ip_address: Option<String>,
    failure: Option<String>,
    timings: Option<String>,
    deleting: bool,
    purpose: String,
    origin: Option<String>,
    cause: Option<String>,
    made_by: Option<String>,
    owner: Option<String>,
    limits_hit: Option<String>,
}

/// Reads columns one by one, and keeps the first reason why one cannot be read.
#[derive(Default)]
struct Columns {
    unreadable: Option<String>,
}

impl Columns {
    fn or<T>(&mut self, column: &str, value: std::result::Result<T, impl std::fmt::Display>, default: T) -> T {
        value.unwrap_or_else(|why| {
            self.unreadable.get_or_insert_with(|| format!("column {column}: {why}"));
            default
        })
    }

    fn json<T: serde::de::DeserializeOwned>(&mut self, column: &str, text: &str, default: T) -> T {
        self.or(column, serde_json::from_str(text), default)
    }

    fn optional<T: serde::de::DeserializeOwned>(&mut self, column: &str, text: Option<&str>) -> Option<T> {
        text.and_then(|text| self.json(column, text, None))
    }

    fn time(&mut self, column: &str, ms: i64) -> Timestamp {
        self.or(column, Timestamp::from_millisecond(ms), Timestamp::UNIX_EPOCH)
    }
}

impl Raw {
    pub(super) fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            name: row.get(1)?,
            spec: row.get(2)?,
            state: row.get(3)?,
            parts: row.get(4)?,
            disk_bytes: row.get(5)?,
            cid: row.get(6)?,
            created_ms: row.get(7)?,
            machine: row.get(8)?,
            started_ms: row.get(9)?,
            expires_ms: row.get(10)?,
            agent: row.get(11)?,
            ip_address: row.get(12)?,
            failure: row.get(13)?,
            timings: row.get(14)?,
            deleting: row.get(15)?,
            purpose: row.get(16)?,
            origin: row.get(17)?,
            cause: row.get(18)?,
            made_by: row.get(19)?,
            owner: row.get(20)?,
            limits_hit: row.get(21)?,
        })
    }

    /// The row. What cannot be read in it concerns no other row: it is a VM of which little more than the id is known.
    ///
    /// # Errors
    /// `internal` if not even its id could be a name.
    pub(super) fn decode(self, forwards: Vec<ForwardSpec>) -> Result<VmRow> {
        let unknown = |what: &str, word: &str| format!("unknown {what} '{}'", word.escape_debug());
        let mut columns = Columns::default();
        let name = columns.or("name", self.name.parse(), self.id.parse::<VmName>()?);
        let state = VmState::from_word(&self.state).ok_or_else(|| unknown("state", &self.state));
        let state = columns.or("state", state, VmState::Unknown);
        let purpose = Purpose::from_word(&self.purpose).ok_or_else(|| unknown("purpose", &self.purpose));
        let mut row = VmRow {
            purpose: columns.or("purpose", purpose, Purpose::Use),
            origin: columns.optional("origin", self.origin.as_deref()).unwrap_or_default(),
            spec: columns.or("spec", spec_of_text(&self.spec), VmSpec::named(name.clone())),
            state,
            // A cause of a newer version is no reason to refuse the row.
            cause: self.cause.as_deref().and_then(StateCause::from_word),
            parts: columns.json("parts", &self.parts, BootParts::unknown()),
            disk_bytes: u64::try_from(self.disk_bytes).unwrap_or(0),
            cid: self.cid.and_then(|cid| columns.or("cid", u32::try_from(cid).map(Some), None)),
            created_at: columns.time("created_ms", self.created_ms),
            machine: columns.optional("machine", self.machine.as_deref()),
            started_at: self.started_ms.map(|ms| columns.time("started_ms", ms)),
            expires_at: self.expires_ms.map(|ms| columns.time("expires_ms", ms)),
            agent: columns.optional("agent", self.agent.as_deref()).unwrap_or_default(),
            ip_address: self.ip_address,
            failure: columns.optional("failure", self.failure.as_deref()),
            // Of a newer version they are no reason to refuse the row.
            limits_hit: self.limits_hit.and_then(|hits| serde_json::from_str(&hits).ok()).unwrap_or_default(),
            timings: columns.optional("timings", self.timings.as_deref()),
            deleting: self.deleting,
            made_by: self.made_by.and_then(|lease| columns.or("made_by", LeaseId::try_from(lease).map(Some), None)),
            owner: self.owner,
            id: self.id,
            forwards,
            unreadable: None,
        };
        if let Some(why) = columns.unreadable {
            (row.state, row.cause, row.spec.name) = (VmState::Unknown, None, name);
            row.unreadable = Some(why);
        }
        Ok(row)
    }
}
