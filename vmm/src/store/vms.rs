//! The tables `vms` and `forwards`.

use jiff::Timestamp;
use rusqlite::{OptionalExtension, Row, params};
use serde::{Deserialize, Serialize};

use super::{Store, decode, encode, fault};
use crate::api::{AgentInfo, Failure, ForwardSpec, Timings, VmSpec};
use crate::error::{Code, Error, Result};
use crate::machine::Machine;
use crate::name::{SnapshotName, VmName};
use crate::state::VmState;

/// What of its template a VM uses. The parts are content-addressed, so a newer template of the same name changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootParts {
    /// Hash of the kernel.
    pub vmlinux: String,
    /// Hash of the initial file system.
    pub initramfs: String,
    /// Hash of the disk the overlay stands on.
    pub root: String,
    /// Virtual size of that disk.
    pub root_bytes: u64,
    /// Hash of the list of packages.
    pub packages: String,
    /// Who is process 1.
    pub init: nido_images::Init,
    /// Kernel command line of the template.
    pub append: String,
    /// What the guests that it was forked from had written to their disks: layers on `root`, the lowest first.
    #[serde(default)]
    pub frozen: Vec<Frozen>,
}

/// The disk of a bake: a layer between another disk and its forks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// Its hash.
    pub sha256: String,
    /// Its virtual size: that of the disk the baked guest saw.
    pub virtual_bytes: u64,
}

/// What a VM is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// For its user.
    Use,
    /// To be saved once it is ready, and to vanish then.
    Bake,
    /// To wait, paused, for somebody to claim it.
    Pool,
}

impl Purpose {
    const ALL: [Self; 3] = [Self::Use, Self::Bake, Self::Pool];

    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Use => "use",
            Self::Bake => "bake",
            Self::Pool => "pool",
        }
    }
}

/// How a start brings the guest to life.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Origin {
    /// Its kernel boots.
    #[default]
    Boot,
    /// It goes on from a bake.
    Fork(Saved),
    /// It goes on from a snapshot of its own.
    Restore {
        /// Its name.
        snapshot: SnapshotName,
        /// The token the saved agent expects, in hexadecimal.
        token: String,
    },
}

/// A bake as a start needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Hash of the memory image.
    pub memory: String,
    /// Hash of the device state.
    pub state: String,
    /// The token the saved agent expects, in hexadecimal.
    pub token: String,
}

/// One VM as the store knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct VmRow {
    /// Its id.
    pub id: String,
    /// What was asked for. Its `forwards` are those asked for at creation; [`VmRow::forwards`] counts.
    pub spec: VmSpec,
    /// Its state.
    pub state: VmState,
    /// What of its template it uses.
    pub parts: BootParts,
    /// Virtual size of its disk.
    pub disk_bytes: u64,
    /// Its vsock address.
    pub cid: Option<u32>,
    /// When it was created.
    pub created_at: Timestamp,
    /// The machine of its last start.
    pub machine: Option<Machine>,
    /// When it was last started.
    pub started_at: Option<Timestamp>,
    /// When its life ends.
    pub expires_at: Option<Timestamp>,
    /// The agent since the last start.
    pub agent: AgentInfo,
    /// The guest's address.
    pub ip_address: Option<String>,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// How long its last start took.
    pub timings: Option<Timings>,
    /// Its files are being removed.
    pub deleting: bool,
    /// Published ports.
    pub forwards: Vec<ForwardSpec>,
    /// What it is there for.
    pub purpose: Purpose,
    /// How its last start brought it to life.
    pub origin: Origin,
}

impl VmRow {
    /// The token of the saved guest that it goes on from, if it is made a machine of its own then. Who is loaded only to
    /// be saved again is not.
    #[must_use]
    pub fn renewed_from(&self) -> Option<&str> {
        match &self.origin {
            Origin::Fork(Saved { token, .. }) | Origin::Restore { token, .. } => {
                (self.purpose != Purpose::Bake).then_some(token)
            }
            Origin::Boot => None,
        }
    }

    /// A VM as it is created.
    #[must_use]
    pub fn new(id: String, spec: VmSpec, purpose: Purpose, state: VmState, parts: BootParts, disk_bytes: u64) -> Self {
        Self {
            purpose,
            origin: Origin::Boot,
            id,
            forwards: spec.forwards.clone(),
            spec,
            state,
            parts,
            disk_bytes,
            cid: None,
            created_at: Timestamp::now(),
            machine: None,
            started_at: None,
            expires_at: None,
            agent: AgentInfo::default(),
            ip_address: None,
            failure: None,
            timings: None,
            deleting: false,
        }
    }
}

/// What changes in a row. `None` leaves a column as it is; `Some(None)` empties it.
#[derive(Debug, Clone, Default)]
pub struct VmUpdate {
    /// The state.
    pub state: Option<VmState>,
    /// The machine.
    pub machine: Option<Machine>,
    /// The vsock address.
    pub cid: Option<Option<u32>>,
    /// When it was started.
    pub started_at: Option<Timestamp>,
    /// When its life ends.
    pub expires_at: Option<Option<Timestamp>>,
    /// The agent.
    pub agent: Option<AgentInfo>,
    /// The guest's address.
    pub ip_address: Option<Option<String>>,
    /// Why it failed.
    pub failure: Option<Option<Failure>>,
    /// How long the start took.
    pub timings: Option<Option<Timings>>,
    /// What of its template it uses.
    pub parts: Option<BootParts>,
    /// How it comes to life.
    pub origin: Option<Origin>,
}

const COLUMNS: &str = "id, spec, state, parts, disk_bytes, cid, created_ms, machine, started_ms, expires_ms, agent, \
                       ip_address, failure, timings, deleting, purpose, origin";

struct Raw {
    id: String,
    spec: String,
    state: String,
    parts: String,
    disk_bytes: i64,
    cid: Option<u32>,
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
}

impl Raw {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            spec: row.get(1)?,
            state: row.get(2)?,
            parts: row.get(3)?,
            disk_bytes: row.get(4)?,
            cid: row.get(5)?,
            created_ms: row.get(6)?,
            machine: row.get(7)?,
            started_ms: row.get(8)?,
            expires_ms: row.get(9)?,
            agent: row.get(10)?,
            ip_address: row.get(11)?,
            failure: row.get(12)?,
            timings: row.get(13)?,
            deleting: row.get(14)?,
            purpose: row.get(15)?,
            origin: row.get(16)?,
        })
    }

    fn decode(self, forwards: Vec<ForwardSpec>) -> Result<VmRow> {
        let time = |ms: i64| {
            Timestamp::from_millisecond(ms).map_err(|e| Error::internal(format!("a time in the store is wrong: {e}")))
        };
        fn optional<T: serde::de::DeserializeOwned>(column: &str, text: Option<&str>) -> Result<Option<T>> {
            text.map(|text| decode(column, text)).transpose()
        }
        let state = VmState::from_word(&self.state).ok_or_else(|| {
            Error::internal(format!("the store knows a state '{}' that nido does not", self.state.escape_debug()))
        })?;
        let purpose = Purpose::ALL.into_iter().find(|p| p.word() == self.purpose).ok_or_else(|| {
            Error::internal(format!("the store knows a purpose '{}' that nido does not", self.purpose.escape_debug()))
        })?;
        Ok(VmRow {
            purpose,
            origin: optional("origin", self.origin.as_deref())?.unwrap_or_default(),
            spec: decode("spec", &self.spec)?,
            state,
            parts: decode("parts", &self.parts)?,
            disk_bytes: u64::try_from(self.disk_bytes).unwrap_or(0),
            cid: self.cid,
            created_at: time(self.created_ms)?,
            machine: optional("machine", self.machine.as_deref())?,
            started_at: self.started_ms.map(time).transpose()?,
            expires_at: self.expires_ms.map(time).transpose()?,
            agent: optional("agent", self.agent.as_deref())?.unwrap_or_default(),
            ip_address: self.ip_address,
            failure: optional("failure", self.failure.as_deref())?,
            timings: optional("timings", self.timings.as_deref())?,
            deleting: self.deleting,
            id: self.id,
            forwards,
        })
    }
}

impl Store {
    /// Inserts a VM with its forwards.
    ///
    /// # Errors
    /// `vm_exists` if the name is taken.
    pub fn insert_vm(&self, row: &VmRow) -> Result<()> {
        let transaction = self.connection.unchecked_transaction().map_err(fault)?;
        transaction
            .execute(
                "INSERT INTO vms (id, name, spec, state, parts, disk_bytes, created_ms, purpose) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
                params![
                    row.id,
                    row.spec.name.as_str(),
                    encode(&row.spec)?,
                    row.state.word(),
                    encode(&row.parts)?,
                    i64::try_from(row.disk_bytes).unwrap_or(i64::MAX),
                    row.created_at.as_millisecond(),
                    row.purpose.word()
                ],
            )
            .map_err(|e| match e.sqlite_error_code() {
                Some(rusqlite::ErrorCode::ConstraintViolation) => name_taken(&row.spec.name),
                _ => fault(e),
            })?;
        for forward in &row.forwards {
            insert_forward(&transaction, &row.id, forward)?;
        }
        transaction.commit().map_err(fault)
    }

    /// The VM of that name that is there for its user.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub fn vm_by_name(&self, name: &VmName) -> Result<VmRow> {
        let row = self.any_vm_by_name(name)?;
        if row.purpose == Purpose::Use { Ok(row) } else { Err(no_such_vm(name)) }
    }

    /// The VM of that name, whatever it is there for.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub fn any_vm_by_name(&self, name: &VmName) -> Result<VmRow> {
        self.one_vm("name", name.as_str())?.ok_or_else(|| no_such_vm(name))
    }

    /// The VM of that id, if it is still there.
    ///
    /// # Errors
    /// Of the store.
    pub fn vm_by_id(&self, id: &str) -> Result<Option<VmRow>> {
        self.one_vm("id", id)
    }

    fn one_vm(&self, column: &str, value: &str) -> Result<Option<VmRow>> {
        let raw = self
            .connection
            .query_row(&format!("SELECT {COLUMNS} FROM vms WHERE {column} = ?1"), [value], Raw::read)
            .optional()
            .map_err(fault)?;
        raw.map(|raw| {
            let forwards = self.forwards(&raw.id)?;
            raw.decode(forwards)
        })
        .transpose()
    }

    /// All VMs in order of creation.
    ///
    /// # Errors
    /// Of the store.
    pub fn vms(&self) -> Result<Vec<VmRow>> {
        self.select("ORDER BY created_ms, name")
    }

    /// VMs whose state claims that somebody takes care of them. Usually few, so every command can afford to check them.
    ///
    /// # Errors
    /// Of the store.
    pub fn vms_in_motion(&self) -> Result<Vec<VmRow>> {
        self.select(
            "WHERE deleting = 1 OR state NOT IN ('created', 'stopped', 'failed') \
             OR (state IN ('stopped', 'failed') AND json_extract(spec, '$.ephemeral') = 1)",
        )
    }

    pub(super) fn select(&self, clause: &str) -> Result<Vec<VmRow>> {
        let mut statement = self.connection.prepare(&format!("SELECT {COLUMNS} FROM vms {clause}")).map_err(fault)?;
        let raws: Vec<Raw> =
            statement.query_map([], Raw::read).map_err(fault)?.collect::<Result<_, _>>().map_err(fault)?;
        let mut forwards = self.all_forwards()?;
        raws.into_iter()
            .map(|raw| {
                let own = forwards.remove(&raw.id).unwrap_or_default();
                raw.decode(own)
            })
            .collect()
    }

    fn all_forwards(&self) -> Result<std::collections::HashMap<String, Vec<ForwardSpec>>> {
        let mut statement =
            self.connection.prepare("SELECT vm_id, host, host_port, guest_port FROM forwards").map_err(fault)?;
        let rows =
            statement.query_map([], |row| Ok((row.get::<_, String>(0)?, read_forward(row, 1)?))).map_err(fault)?;
        let mut all = std::collections::HashMap::<_, Vec<_>>::new();
        for row in rows {
            let (id, forward) = row.map_err(fault)?;
            all.entry(id).or_default().push(forward);
        }
        Ok(all)
    }

    /// Changes a row. The caller holds the VM's `supervisor.lock`.
    ///
    /// # Errors
    /// `vm_busy` if the vsock address is taken, else of the store.
    pub fn update_vm(&self, id: &str, update: &VmUpdate) -> Result<()> {
        let mut sets: Vec<&str> = Vec::new();
        let mut values: Vec<Box<dyn rusqlite::ToSql>> = Vec::new();
        let mut set = |column: &'static str, value: Box<dyn rusqlite::ToSql>| {
            sets.push(column);
            values.push(value);
        };
        if let Some(state) = update.state {
            set("state", Box::new(state.word()));
        }
        if let Some(machine) = &update.machine {
            set("machine", Box::new(encode(machine)?));
        }
        if let Some(cid) = update.cid {
            set("cid", Box::new(cid));
        }
        if let Some(at) = update.started_at {
            set("started_ms", Box::new(at.as_millisecond()));
        }
        if let Some(at) = update.expires_at {
            set("expires_ms", Box::new(at.map(Timestamp::as_millisecond)));
        }
        if let Some(agent) = &update.agent {
            set("agent", Box::new(encode(agent)?));
        }
        if let Some(address) = &update.ip_address {
            set("ip_address", Box::new(address.clone()));
        }
        if let Some(failure) = &update.failure {
            set("failure", Box::new(failure.as_ref().map(encode).transpose()?));
        }
        if let Some(timings) = &update.timings {
            set("timings", Box::new(timings.as_ref().map(encode).transpose()?));
        }
        if let Some(parts) = &update.parts {
            set("parts", Box::new(encode(parts)?));
        }
        if let Some(origin) = &update.origin {
            set("origin", Box::new(encode(origin)?));
        }
        if sets.is_empty() {
            return Ok(());
        }
        let assignments = sets.iter().map(|column| format!("{column} = ?")).collect::<Vec<_>>().join(", ");
        values.push(Box::new(id.to_owned()));
        self.connection
            .execute(&format!("UPDATE vms SET {assignments} WHERE id = ?"), rusqlite::params_from_iter(values))
            .map_err(|e| match e.sqlite_error_code() {
                Some(rusqlite::ErrorCode::ConstraintViolation) => {
                    Error::new(Code::VmBusy, "the vsock address is taken")
                }
                _ => fault(e),
            })?;
        Ok(())
    }

    /// Says that a VM's files are about to be removed.
    ///
    /// # Errors
    /// Of the store.
    pub fn mark_deleting(&self, id: &str) -> Result<()> {
        self.connection.execute("UPDATE vms SET deleting = 1 WHERE id = ?1", [id]).map_err(fault).map(drop)
    }

    /// Removes a VM's row, after its process and its files are gone.
    ///
    /// # Errors
    /// Of the store.
    pub fn remove_vm(&self, id: &str) -> Result<()> {
        self.connection.execute("DELETE FROM vms WHERE id = ?1", [id]).map_err(fault).map(drop)
    }

    /// Hashes of all template parts that VMs use.
    ///
    /// # Errors
    /// Of the store.
    pub fn parts_in_use(&self) -> Result<std::collections::HashSet<String>> {
        let mut used = std::collections::HashSet::new();
        for vm in self.vms()? {
            used.extend([vm.parts.vmlinux, vm.parts.initramfs, vm.parts.root, vm.parts.packages]);
            used.extend(vm.parts.frozen.into_iter().map(|frozen| frozen.sha256));
            // A guest reads its memory image for as long as it runs.
            if let (Origin::Fork(saved), false) = (vm.origin, vm.state.at_rest()) {
                used.extend([saved.memory, saved.state]);
            }
        }
        Ok(used)
    }

    /// A VM's published ports in order.
    ///
    /// # Errors
    /// Of the store.
    pub fn forwards(&self, id: &str) -> Result<Vec<ForwardSpec>> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT host, host_port, guest_port FROM forwards WHERE vm_id = ?1 ORDER BY host_port")
            .map_err(fault)?;
        let rows = statement.query_map([id], |row| read_forward(row, 0)).map_err(fault)?;
        rows.collect::<Result<_, _>>().map_err(fault)
    }

    /// Adds a published port.
    ///
    /// # Errors
    /// Of the store.
    pub fn add_forward(&self, id: &str, forward: &ForwardSpec) -> Result<()> {
        insert_forward(&self.connection, id, forward)
    }

    /// Removes a published port; whether it was there.
    ///
    /// # Errors
    /// Of the store.
    pub fn remove_forward(&self, id: &str, forward: &ForwardSpec) -> Result<bool> {
        self.connection
            .execute(
                "DELETE FROM forwards WHERE vm_id = ?1 AND host = ?2 AND host_port = ?3 AND guest_port = ?4",
                params![id, forward.host.to_string(), forward.host_port, forward.guest_port],
            )
            .map(|n| n > 0)
            .map_err(fault)
    }
}

fn no_such_vm(name: &VmName) -> Error {
    Error::new(Code::VmNotFound, format!("there is no VM named '{name}'")).hint("nido ls shows the VMs there are")
}

pub(super) fn name_taken(name: &VmName) -> Error {
    Error::new(Code::VmExists, format!("a VM named '{name}' exists already"))
        .hint(format!("choose another name, or: nido delete {name}"))
}

pub(super) fn insert_forward(connection: &rusqlite::Connection, id: &str, forward: &ForwardSpec) -> Result<()> {
    connection
        .execute(
            "INSERT OR IGNORE INTO forwards (vm_id, host, host_port, guest_port) VALUES (?1, ?2, ?3, ?4)",
            params![id, forward.host.to_string(), forward.host_port, forward.guest_port],
        )
        .map_err(fault)
        .map(drop)
}

fn read_forward(row: &Row<'_>, first: usize) -> rusqlite::Result<ForwardSpec> {
    let host: String = row.get(first)?;
    let host = host
        .parse()
        .map_err(|e| rusqlite::Error::FromSqlConversionFailure(first, rusqlite::types::Type::Text, Box::new(e)))?;
    Ok(ForwardSpec { host, host_port: row.get(first + 1)?, guest_port: row.get(first + 2)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> BootParts {
        BootParts {
            vmlinux: "a".into(),
            initramfs: "b".into(),
            root: "c".into(),
            root_bytes: 1,
            packages: "d".into(),
            init: nido_images::Init::Agent,
            append: "quiet".into(),
            frozen: Vec::new(),
        }
    }

    fn open() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        (dir, store)
    }

    fn row(id: &str, name: &str) -> VmRow {
        let mut spec = VmSpec::named(name.parse().unwrap());
        spec.forwards = vec!["8080:80".parse().unwrap()];
        VmRow::new(id.into(), spec, Purpose::Use, VmState::Created, parts(), 1 << 30)
    }

    #[test]
    fn a_row_comes_back_as_it_went_in() {
        let (_dir, store) = open();
        let vm = row("1", "web");
        store.insert_vm(&vm).unwrap();
        let mut back = store.vm_by_name(&"web".parse().unwrap()).unwrap();
        back.created_at = vm.created_at; // milliseconds are kept
        assert_eq!(back, vm);
    }

    #[test]
    fn a_name_is_taken_once() {
        let (_dir, store) = open();
        store.insert_vm(&row("1", "web")).unwrap();
        assert_eq!(store.insert_vm(&row("2", "web")).unwrap_err().code(), Code::VmExists);
        assert_eq!(store.vms().unwrap().len(), 1);
    }

    #[test]
    fn a_vsock_address_is_taken_once() {
        let (_dir, store) = open();
        store.insert_vm(&row("1", "a")).unwrap();
        store.insert_vm(&row("2", "b")).unwrap();
        let take = VmUpdate { cid: Some(Some(77)), ..VmUpdate::default() };
        store.update_vm("1", &take).unwrap();
        assert_eq!(store.update_vm("2", &take).unwrap_err().code(), Code::VmBusy);
    }

    #[test]
    fn only_vms_in_motion_are_looked_after() {
        let (_dir, store) = open();
        store.insert_vm(&row("1", "a")).unwrap();
        store.insert_vm(&row("2", "b")).unwrap();
        store.update_vm("2", &VmUpdate { state: Some(VmState::Running), ..VmUpdate::default() }).unwrap();
        let ids: Vec<_> = store.vms_in_motion().unwrap().into_iter().map(|vm| vm.id).collect();
        assert_eq!(ids, ["2"]);
        store.mark_deleting("1").unwrap();
        assert_eq!(store.vms_in_motion().unwrap().len(), 2);
    }

    #[test]
    fn a_store_of_a_newer_nido_is_left_alone() {
        let (dir, store) = open();
        store.connection.pragma_update(None, "user_version", 99).unwrap();
        drop(store);
        assert!(Store::open(&dir.path().join("db")).unwrap_err().message().contains("99"));
    }

    #[test]
    fn forwards_go_with_their_vm() {
        let (_dir, store) = open();
        store.insert_vm(&row("1", "a")).unwrap();
        let extra = "9000:90".parse().unwrap();
        store.add_forward("1", &extra).unwrap();
        assert_eq!(store.forwards("1").unwrap().len(), 2);
        assert!(store.remove_forward("1", &extra).unwrap());
        assert!(!store.remove_forward("1", &extra).unwrap());
        store.remove_vm("1").unwrap();
        assert!(store.forwards("1").unwrap().is_empty());
    }
}
