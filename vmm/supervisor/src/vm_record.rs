//! `vm.json`: what a VM's row needs, kept beside its disk, so that rows can be rebuilt when the store is lost, damaged or older
//! than the VM; and what a VM's directory holds.
//!
//! Invariant: a directory that holds a disk, a snapshot or anything that this file does not know is never taken for an orphan
//! that may be removed.

use std::collections::HashSet;
use std::{fs, io};

use jiff::Timestamp;
use nido_api::error::{Code, Error, Result};
use nido_api::state::VmState;
use nido_engine::home::{
    AGENT_SOCKET, AUTHORITY, CONSOLE_LOG, CONTROL_GROUP, CONTROL_SOCKET, EARLIER_SOCKETS, GUEST_CONFIG, NAME_PINS,
    QEMU_DIRECTORY, QEMU_LOG, SUPERVISOR_LOCK, SUPERVISOR_LOG, TRAFFIC, UNWRITTEN, VM_LOCK, VM_RECORD, VmDir,
};
use nido_files::atomic_file::{Durability, is_temporary, write_private};
use nido_store::{Purpose, VmRow, spec_of_stored, stored_spec};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Version of [`VmRecord`].
const FORMAT: u32 = 1;
/// The longest record that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// Files that hold nothing of a guest: locks, sockets, logs, configuration.
const DISPOSABLE_FILES: [&str; 15] = [
    SUPERVISOR_LOCK,
    VM_LOCK,
    VM_RECORD,
    GUEST_CONFIG,
    AGENT_SOCKET,
    CONTROL_SOCKET,
    CONSOLE_LOG,
    QEMU_LOG,
    SUPERVISOR_LOG,
    UNWRITTEN,
    NAME_PINS,
    TRAFFIC,
    AUTHORITY,
    CONTROL_GROUP,
    "guest.new",
];

/// A VM's row as its directory holds it. What the parts of the program that change between versions wrote is kept as JSON, and
/// decoded only when a row is rebuilt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmRecord {
    /// The version of this record.
    pub format: u32,
    /// The VM's id.
    pub id: String,
    /// What it is there for: `use`, `bake`, `pool`.
    pub purpose: String,
    /// When it was created, in milliseconds since 1970.
    pub created_ms: i64,
    /// Virtual size of its disk.
    pub disk_bytes: u64,
    /// The VM's specification, its name included.
    pub spec: Value,
    /// The template parts that it uses.
    pub parts: Value,
    /// Published ports.
    #[serde(default)]
    pub forwards: Value,
    /// The machine of its last start.
    #[serde(default)]
    pub machine: Value,
    /// How its last start began.
    #[serde(default)]
    pub origin: Value,
    /// Its vsock address at the last start.
    #[serde(default)]
    pub cid: Option<u32>,
    /// Who made it: [`nido_api::Caller::owner`].
    #[serde(default)]
    pub owner: Option<String>,
    /// When it was last started, in milliseconds since 1970.
    #[serde(default)]
    pub started_ms: Option<i64>,
    /// When the time to live of its last start is over, in milliseconds since 1970.
    #[serde(default)]
    pub expires_ms: Option<i64>,
}

impl VmRecord {
    /// The record of a row.
    ///
    /// # Errors
    /// `internal`.
    pub fn of(row: &VmRow) -> Result<Self> {
        Ok(Self {
            format: FORMAT,
            id: row.id.clone(),
            purpose: row.purpose.word().into(),
            created_ms: row.created_at.as_millisecond(),
            disk_bytes: row.disk_bytes,
            spec: stored_spec(&row.spec).map_err(|e| unwritable(&e))?,
            parts: json(&row.parts)?,
            forwards: json(&row.forwards)?,
            machine: json(&row.machine)?,
            origin: json(&row.origin)?,
            cid: row.cid,
            owner: row.owner.clone(),
            started_ms: row.started_at.map(Timestamp::as_millisecond),
            expires_ms: row.expires_at.map(Timestamp::as_millisecond),
        })
    }

    /// Reads the record in a VM's directory.
    ///
    /// # Errors
    /// One sentence: there is none, it cannot be read, or it is of another VM or a newer format.
    pub fn read(dir: &VmDir, id: &str) -> std::result::Result<Self, String> {
        use io::Read as _;
        let file = fs::File::open(dir.file(VM_RECORD)).map_err(|e| format!("its {VM_RECORD} cannot be read: {e}"))?;
        let mut text = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut text).map_err(|e| format!("its {VM_RECORD} cannot be read: {e}"))?;
        let record: Self =
            serde_json::from_slice(&text).map_err(|e| format!("its {VM_RECORD} is damaged or of another nido: {e}"))?;
        if record.id != id {
            return Err(format!("its {VM_RECORD} is that of another VM ({})", record.id.escape_debug()));
        }
        Ok(record)
    }

    /// Writes the record into the VM's directory, unless it is there already.
    ///
    /// # Errors
    /// `disk_full`, `internal`.
    pub fn write(&self, dir: &VmDir, durability: Durability) -> Result<()> {
        let text = serde_json::to_vec(self).map_err(|e| Error::internal(e.to_string()))?;
        let path = dir.file(VM_RECORD);
        if fs::read(&path).is_ok_and(|there| there == text) {
            return Ok(());
        }
        write_private(&path, &text, durability).map_err(|e| Error::io("cannot write the VM's record", e))
    }

    /// When it was last started.
    #[must_use]
    pub fn started_at(&self) -> Option<Timestamp> {
        self.started_ms.and_then(|at| Timestamp::from_millisecond(at).ok())
    }

    /// When the time to live of its last start is over.
    #[must_use]
    pub fn expires_at(&self) -> Option<Timestamp> {
        self.expires_ms.and_then(|at| Timestamp::from_millisecond(at).ok())
    }

    /// Whether the VM is there for its user, and not for nido itself.
    #[must_use]
    pub fn is_of_user(&self) -> bool {
        self.purpose == Purpose::Use.word()
    }

    /// The row that this record describes, stopped. Fields of the specification that this nido does not know are left out.
    ///
    /// # Errors
    /// `internal` if it was written by a nido that is too different.
    pub fn row(&self) -> Result<VmRow> {
        let spec = spec_of_stored(self.spec.clone()).map_err(|why| unusable("spec", &why))?;
        let purpose = Purpose::from_word(&self.purpose).ok_or_else(|| unusable("purpose", "unknown"))?;
        let parts = decode("parts", self.parts.clone())?;
        let mut row = VmRow::new(self.id.clone(), spec, purpose, VmState::Stopped, parts, self.disk_bytes);
        row.created_at = Timestamp::from_millisecond(self.created_ms).unwrap_or_else(|_| Timestamp::now());
        row.forwards = decode("forwards", self.forwards.clone()).unwrap_or_default();
        row.machine = decode("machine", self.machine.clone()).unwrap_or_default();
        row.origin = decode("origin", self.origin.clone()).unwrap_or_default();
        row.cid = self.cid;
        row.owner.clone_from(&self.owner);
        Ok(row)
    }

    /// Hashes of all template parts that the record names, whatever version of nido wrote it.
    #[must_use]
    pub fn hashes(&self) -> HashSet<String> {
        let mut found = HashSet::new();
        collect_hashes(&self.parts, &mut found);
        collect_hashes(&self.origin, &mut found);
        found
    }
}

fn json<T: Serialize>(value: &T) -> Result<Value> {
    serde_json::to_value(value).map_err(|e| unwritable(&e))
}

fn unwritable(error: &serde_json::Error) -> Error {
    Error::internal(format!("cannot write the VM's record: {error}"))
}

fn decode<T: serde::de::DeserializeOwned>(field: &str, value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|e| unusable(field, &e.to_string()))
}

fn unusable(field: &str, why: &str) -> Error {
    Error::new(Code::Internal, format!("field '{field}' of the VM's {VM_RECORD} cannot be used: {why}"))
}

fn collect_hashes(value: &Value, found: &mut HashSet<String>) {
    match value {
        Value::String(text) if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            found.insert(text.clone());
        }
        Value::Array(values) => values.iter().for_each(|value| collect_hashes(value, found)),
        Value::Object(fields) => fields.values().for_each(|value| collect_hashes(value, found)),
        _ => {}
    }
}

/// Whether a VM's directory holds anything but locks, sockets, logs and configuration. One that cannot be read counts as if it
/// did; one that is not there does not.
#[must_use]
pub fn holds_data(dir: &VmDir) -> bool {
    match fs::read_dir(dir.path()) {
        Err(error) => error.kind() != io::ErrorKind::NotFound,
        Ok(mut entries) => entries.any(|entry| {
            let name = entry.map(|entry| entry.file_name());
            !name.is_ok_and(|name| name.to_str().is_some_and(is_without_data))
        }),
    }
}

/// Whether a file of that name holds nothing of a guest.
fn is_without_data(name: &str) -> bool {
    let rotated = name.strip_suffix(".1").filter(|log| log.ends_with(".log"));
    let is_known = |names: &[&str]| names.contains(&rotated.unwrap_or(name));
    is_known(&DISPOSABLE_FILES) || is_known(&EARLIER_SOCKETS) || name == QEMU_DIRECTORY || is_temporary(name)
}

/// Removes a directory that holds no data. What appears in it meanwhile is kept, and so is the directory then.
///
/// # Errors
/// Of the file system.
pub fn remove_without_data(dir: &VmDir) -> io::Result<()> {
    // The lock last: until then no other process works on the directory.
    let mut names: Vec<_> = fs::read_dir(dir.path())?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
    names.sort_by_key(|name| name == SUPERVISOR_LOCK);
    for name in names {
        if name.to_str().is_some_and(is_without_data) {
            let path = dir.path().join(&name);
            match if name == QEMU_DIRECTORY { fs::remove_dir_all(path) } else { fs::remove_file(path) } {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    fs::remove_dir(dir.path())
}

#[cfg(test)]
mod tests {
    use nido_api::VmSpec;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use nido_store::{BackingLayer, BootParts, Origin, StoredBake};

    fn vm() -> (tempfile::TempDir, VmDir) {
        let root = tempfile::tempdir().unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let vm = nido_engine::home::Home::open(root.path()).unwrap().vm("0123456789abcdef");
        vm.make().unwrap();
        (root, vm)
    }

    fn row() -> VmRow {
        let hash = |digit: &str| digit.repeat(64);
        let parts = BootParts {
            vmlinux: hash("a"),
            initramfs: hash("b"),
            initramfs_base: Some(hash("1")),
            agent: Some(hash("2")),
            root: hash("c"),
            root_bytes: 1,
            packages: hash("d"),
            init: nido_images::Init::Agent,
            append: "quiet".into(),
            frozen: vec![BackingLayer { sha256: hash("e"), virtual_bytes: 1 }],
            allow: Some(vec!["host:8080".parse().unwrap()]),
        };
        let mut spec = VmSpec::named("web".parse().unwrap());
        spec.labels.insert("role".into(), "demo".into());
        spec.forwards = vec!["8080:80".parse().unwrap()];
        spec.allow = vec!["host:8080".parse().unwrap()];
        let mut row = VmRow::new("0123456789abcdef".into(), spec, Purpose::Use, VmState::Stopped, parts, 1 << 30);
        row.origin = Origin::Fork(StoredBake { memory: hash("f"), state: hash("0"), token: "12".into(), live: true });
        row.owner = Some("CLI uid:1000".into());
        row.created_at = Timestamp::from_millisecond(1_700_000_000_123).unwrap();
        row
    }

    #[test]
    fn a_row_is_restored_from_its_record() {
        let (_root, dir) = vm();
        VmRecord::of(&row()).unwrap().write(&dir, Durability::Kill).unwrap();
        let record = VmRecord::read(&dir, &row().id).unwrap();
        assert_eq!(record.row().unwrap(), row());
        assert_eq!(record.hashes().len(), 9);
        assert!(VmRecord::read(&dir, "another").unwrap_err().contains("another VM"));
        assert_eq!(fs::metadata(dir.file(VM_RECORD)).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_record_of_a_newer_nido_can_be_used_and_a_damaged_one_is_named() {
        let (_root, dir) = vm();
        let mut text = serde_json::to_value(VmRecord::of(&row()).unwrap()).unwrap();
        text["spec"]["a_field_of_the_future"] = true.into();
        text["another"] = 7.into();
        fs::write(dir.file(VM_RECORD), text.to_string()).unwrap();
        assert_eq!(VmRecord::read(&dir, &row().id).unwrap().row().unwrap().spec, row().spec);
        for damaged in ["", "{", "[]", "\0\0\0"] {
            fs::write(dir.file(VM_RECORD), damaged).unwrap();
            assert!(VmRecord::read(&dir, &row().id).unwrap_err().contains(VM_RECORD));
        }
    }

    #[test]
    fn only_locks_sockets_logs_and_configuration_are_no_data() {
        let (_root, dir) = vm();
        for name in ["supervisor.lock", "vm.lock", "console.log", "console.log.1", "vm.json", "guest.cbor"] {
            fs::write(dir.file(name), "").unwrap();
        }
        fs::create_dir(dir.file("qemu")).unwrap();
        fs::write(dir.file("qemu/qmp.sock"), "").unwrap();
        assert!(!holds_data(&dir));
        for name in ["disk.qcow2", "disk.qcow2.new", "state.bin", "memory.img", "notes.1", "unknown"] {
            fs::write(dir.file(name), "").unwrap();
            assert!(holds_data(&dir), "{name}");
            remove_without_data(&dir).unwrap_err();
            assert!(dir.file(name).exists(), "{name}");
            fs::remove_file(dir.file(name)).unwrap();
        }
        fs::create_dir(dir.file("snapshots")).unwrap();
        assert!(holds_data(&dir));
        fs::remove_dir(dir.file("snapshots")).unwrap();
        remove_without_data(&dir).unwrap();
        assert!(!dir.path().exists() && !holds_data(&dir));
    }
}
