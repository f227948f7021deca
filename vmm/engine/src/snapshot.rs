//! Snapshots on the disk: one directory each, below the VM's own.
//!
//! ```text
//!  snapshots/.new-NAME/   while it is taken   -- rename -->   snapshots/NAME/   -- rename -->   snapshots/.gone-NAME/
//!     disk.qcow2   a copy of the VM's own layer        state.bin   memory and devices (of a running VM)
//!     snapshot.json   what is in it, and what it takes to load it: 0600, it holds a token
//! ```
//!
//! Each snapshot has a copy of the VM's layer (where the file system can, the blocks are shared), so chains of layers never
//! grow, deleting frees space at once, and nothing depends on anything but the template's parts.
//!
//! Invariant: a directory under a snapshot's name is complete. The process that creates one holds the VM's `supervisor.lock`.

mod layer;
mod restore;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use nido_api::error::{Code, Error, Hint, Result};
use nido_api::name::{SnapshotName, VmName};
use nido_api::operation as op;
use nido_api::{SnapshotInfo, moment};
use nido_files::atomic_file::{Durability, publish_directory, sync_parent, write_private};
use nido_files::private_dir::{give_owner_rights, make_private_dir, make_private_dir_in_place};
use nido_images::{BakedMachine, QemuId};
use serde::{Deserialize, Serialize};

use crate::home::{DEVICE_STATE, DISK, NAME_PINS, REMOVED_PREFIX, SNAPSHOTS, VmDir};

pub use self::layer::{LayerCopy, copy_bytes};
pub use self::restore::{DiskCopy, PreviousDisk, has_restore_files, remove_restore_files};

const UNFINISHED: &str = ".new-";
const RECORD: &str = "snapshot.json";
/// Version of [`Record`].
const FORMAT: u32 = 1;

/// What is recorded about a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The version of this record.
    pub format: u32,
    /// When it was taken.
    pub created_at: Timestamp,
    /// What it takes to load it, if the VM ran.
    pub running: Option<RunningState>,
    /// For how long the VM's CPUs were paused for it, in milliseconds, if they ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_ms: Option<u64>,
}

/// A running VM's part of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningState {
    /// The machine it ran on.
    pub machine: BakedMachine,
    /// The QEMU that saved it.
    pub qemu: QemuId,
    /// The token the saved agent expects, in hexadecimal.
    pub token: String,
}

impl Record {
    /// A record of now.
    #[must_use]
    pub fn now(running: Option<RunningState>) -> Self {
        Self { format: FORMAT, created_at: moment::now(), running, paused_ms: None }
    }
}

/// The directory of a snapshot.
#[must_use]
pub fn dir(vm: &VmDir, name: &SnapshotName) -> PathBuf {
    directory(vm).join(name.as_str())
}

/// The directory of all snapshots of a VM, which may not exist. Supervisors of earlier versions made one that ordinary users
/// could not enter.
fn directory(vm: &VmDir) -> PathBuf {
    let path = vm.file(SNAPSHOTS);
    if let Err(error) = give_owner_rights(&path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!("{} cannot be made usable: {error}", path.display());
    }
    path
}

/// A snapshot that is being taken. Dropped before it is published, it is removed.
#[derive(Debug)]
pub struct PendingSnapshot {
    path: PathBuf,
    target: PathBuf,
    published: bool,
}

impl PendingSnapshot {
    /// Begins one of a VM; `into` is the VM that gets it, mostly the same.
    ///
    /// # Errors
    /// `snapshot_exists`, `disk_full`, `internal`.
    pub fn begin(vm: &VmDir, into: &VmDir, name: &SnapshotName) -> Result<Self> {
        let target = dir(into, name);
        if target.exists() {
            return Err(Error::new(Code::SnapshotExists, format!("there is a snapshot named '{name}' already"))
                .hint("choose another name")
                .or_hint(Hint::command_line("delete it: nido snapshot delete")));
        }
        remove_unfinished(vm);
        let path = directory(vm).join(format!("{UNFINISHED}{name}"));
        make_private_dir(&path).map_err(failed)?;
        Ok(Self { path, target, published: false })
    }

    /// Where the machine's state goes; empty.
    ///
    /// # Errors
    /// `disk_full`, `internal`.
    pub fn state(&self) -> Result<File> {
        let file =
            File::options().write(true).create(true).truncate(true).mode(0o600).open(self.path.join(DEVICE_STATE));
        file.map_err(failed)
    }

    /// Copies the VM's layer, which does not change meanwhile.
    ///
    /// # Errors
    /// `disk_full`, `internal`.
    pub fn copy_disk(&self, vm: &VmDir) -> Result<()> {
        layer::copy_layer(&vm.file(DISK), &self.path.join(DISK))
    }

    /// Begins a copy of the VM's layer, which may change until the copy's last refresh.
    ///
    /// # Errors
    /// `disk_full`, `internal`.
    pub fn begin_disk(&self, vm: &VmDir) -> Result<LayerCopy> {
        LayerCopy::begin(&vm.file(DISK), &self.path.join(DISK))
    }

    /// Keeps what the guest has resolved.
    ///
    /// # Errors
    /// `disk_full`, `internal`.
    pub fn keep_pins(&self, pins: &[u8]) -> Result<()> {
        let path = self.path.join(NAME_PINS);
        write_private(&path, pins, Durability::Kill).map_err(failed)
    }

    /// Gives it its name. Everything is on the disk before.
    ///
    /// # Errors
    /// `disk_full`, `internal`.
    pub fn publish(mut self, record: &Record) -> Result<()> {
        let text = serde_json::to_vec(record).map_err(|e| Error::internal(e.to_string()))?;
        let written = || -> io::Result<()> {
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(self.path.join(RECORD))?;
            io::Write::write_all(&mut file, &text)?;
            nido_files::failpoint!("snapshot.record");
            if let Some(parent) = self.target.parent() {
                // The VM that it is for may be deleted: then this fails.
                make_private_dir_in_place(parent)?;
                sync_parent(parent)?;
            }
            publish_directory(&self.path, &self.target, Durability::PowerCut)
        };
        written().map_err(failed)?;
        self.published = true;
        Ok(())
    }
}

impl Drop for PendingSnapshot {
    fn drop(&mut self) {
        if !self.published {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn failed(error: io::Error) -> Error {
    Error::io("cannot take the snapshot", error)
}

/// Whether taking or deleting one was interrupted, or is in progress.
#[must_use]
pub fn has_unfinished(vm: &VmDir) -> bool {
    let entries = fs::read_dir(vm.file(SNAPSHOTS)).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name()).any(|name| {
        let name = name.to_string_lossy();
        name.starts_with(UNFINISHED) || name.starts_with(REMOVED_PREFIX)
    })
}

/// Removes the files of a process that was killed while it took or deleted a snapshot. Returns whether one was being taken.
pub fn remove_unfinished(vm: &VmDir) -> bool {
    let Ok(entries) = fs::read_dir(directory(vm)) else { return false };
    let mut found = false;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let (taken, doomed) =
            [UNFINISHED, REMOVED_PREFIX].map(|prefix| name.to_string_lossy().starts_with(prefix)).into();
        if !taken && !doomed {
            continue;
        }
        found |= taken;
        if let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::warn!("an unfinished snapshot cannot be removed: {error}");
        }
    }
    found
}

/// Removes snapshots whose deletion was interrupted, also of a VM that runs: nothing refers to them any more.
pub fn remove_deleted(vm: &VmDir) {
    let entries = fs::read_dir(directory(vm)).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(REMOVED_PREFIX)) {
        match fs::remove_dir_all(entry.path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("a deleted snapshot cannot be removed: {error}");
            }
            _ => {}
        }
    }
}

/// The record of a snapshot.
///
/// # Errors
/// `snapshot_not_found`, `snapshot_damaged`, `template_mismatch` if it was written by another nido.
pub fn open(vm: &VmDir, of: &VmName, name: &SnapshotName) -> Result<Record> {
    let damaged = |why: String| {
        Error::new(Code::SnapshotDamaged, format!("snapshot '{name}' of VM '{of}' is damaged: {why}"))
            .hint(Hint::run_on(op::VM_SNAPSHOT_DELETE, of).with("snapshot", name))
    };
    let text = match fs::read(dir(vm, name).join(RECORD)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !dir(vm, name).exists() => {
            return Err(Error::new(Code::SnapshotNotFound, format!("VM '{of}' has no snapshot named '{name}'"))
                .hint(Hint::run_on(op::SNAPSHOT_LIST, of)));
        }
        Err(error) => return Err(damaged(format!("its record cannot be read: {error}"))),
    };
    let record: Record =
        serde_json::from_slice(&text).map_err(|e| damaged(format!("its record cannot be read: {e}")))?;
    if record.format != FORMAT {
        let words = format!("snapshot '{name}' has format {}, this nido reads {FORMAT}", record.format);
        return Err(Error::new(Code::TemplateMismatch, words));
    }
    let needed = [Some(DISK), record.running.as_ref().map(|_| DEVICE_STATE)];
    match needed.into_iter().flatten().find(|file| !holds_bytes(&dir(vm, name).join(file))) {
        Some(file) => Err(damaged(format!("its {file} is missing or empty"))),
        None => Ok(record),
    }
}

/// What the guest of a snapshot has resolved, as it is stored. Snapshots of earlier versions have none.
#[must_use]
pub fn kept_pins(vm: &VmDir, name: &SnapshotName) -> Option<Vec<u8>> {
    fs::read(dir(vm, name).join(NAME_PINS)).ok()
}

fn holds_bytes(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|facts| facts.len() > 0)
}

/// All snapshots of a VM, the oldest first.
///
/// # Errors
/// `internal`.
pub fn list(vm: &VmDir, of: &VmName) -> Result<Vec<SnapshotInfo>> {
    let entries = match fs::read_dir(directory(vm)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|e| Error::io("cannot list the snapshots", e))?,
    };
    let names = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<SnapshotName>().ok());
    let mut all: Vec<_> = names.map(|name| describe(vm, of, &name, open(vm, of, &name))).collect();
    all.sort_by(|a, b| (a.created_at, a.name.as_str()).cmp(&(b.created_at, b.name.as_str())));
    Ok(all)
}

/// One snapshot that is whole.
///
/// # Errors
/// Those of [`open`].
pub fn info(vm: &VmDir, of: &VmName, name: &SnapshotName) -> Result<SnapshotInfo> {
    Ok(describe(vm, of, name, Ok(open(vm, of, name)?)))
}

/// A snapshot of which a directory is there; a damaged one is marked.
fn describe(vm: &VmDir, of: &VmName, name: &SnapshotName, record: Result<Record>) -> SnapshotInfo {
    let blocks = |file: &str| fs::metadata(dir(vm, name).join(file)).map_or(0, |facts| facts.blocks() * 512);
    let made = || {
        let made = fs::metadata(dir(vm, name)).and_then(|facts| facts.modified()).ok();
        made.and_then(|made| Timestamp::try_from(made).ok()).unwrap_or(Timestamp::UNIX_EPOCH)
    };
    SnapshotInfo {
        vm: of.clone(),
        name: name.clone(),
        created_at: record.as_ref().map_or_else(|_| made(), |record| moment::in_ms(record.created_at)),
        running: record.as_ref().is_ok_and(|record| record.running.is_some()),
        paused_ms: record.as_ref().ok().and_then(|record| record.paused_ms),
        size_bytes: blocks(DISK) + blocks(DEVICE_STATE),
        damaged: record.err().map(|error| error.message().to_owned()),
    }
}

/// Deletes a snapshot: its name is free after the first step.
///
/// # Errors
/// `snapshot_not_found`, `internal`.
pub fn delete(vm: &VmDir, of: &VmName, name: &SnapshotName) -> Result<()> {
    let broken = |e| Error::io("cannot delete the snapshot", e);
    let doomed = vm.file(SNAPSHOTS).join(format!("{REMOVED_PREFIX}{name}"));
    remove_deleted(vm);
    match fs::rename(dir(vm, name), &doomed) {
        // Reports that it does not exist.
        Err(error) if error.kind() == io::ErrorKind::NotFound => open(vm, of, name).map(drop),
        renamed => {
            nido_files::failpoint!("snapshot.moved-aside");
            renamed.and_then(|()| fs::remove_dir_all(&doomed)).map_err(broken)
        }
    }
}

#[cfg(test)]
mod tests;
