//! What is there: a home as reconciliation sees it. Nothing here writes.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use nido_api::error::{Error, Result};
use nido_api::state::VmState;
use nido_engine::home::{Home, REMOVED_PREFIX, SUPERVISOR_LOCK, VM_LOCK, VM_RECORD, VmDir};
use nido_engine::temporary_files::{abandoned_files, has_temporary_files};
use nido_engine::{liveness, snapshot};
use nido_files::layout;
use nido_files::lock::is_free;
use nido_store::RowFacts;
use nido_supervisor::vm_record::holds_data;

use super::parts::PartFacts;
use crate::nido::Nido;

/// How much is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::nido) enum Scope {
    /// What a command may run into: rows that claim a process, files of processes that have ended, and template parts if a reason was
    /// recorded. Costs nothing for stopped VMs.
    Open,
    /// Directories without a row, and those whose deletion was interrupted: before a VM is created.
    Create,
    /// All of it, also what only takes space.
    Everything,
}

/// A lock, as another process sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lock {
    /// No process holds it, or its file is missing.
    Free,
    /// A process holds it.
    Held,
    /// It cannot be looked at, or was not.
    Unknown,
}

impl Lock {
    fn of(path: &Path) -> Self {
        match is_free(path) {
            Ok(true) => Self::Free,
            Ok(false) => Self::Held,
            Err(error) => {
                tracing::warn!("cannot look at {}: {error}", path.display());
                Self::Unknown
            }
        }
    }
}

/// A VM's directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Directory {
    /// It is not there.
    Missing,
    /// It holds locks, sockets, logs and configuration, and nothing else.
    WithoutData,
    /// It holds a disk, a snapshot, or something that nido does not know; or it cannot be read; or it has a row.
    WithData,
}

/// What is known about a VM: its row, its directory and the processes that hold its locks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct VmFacts {
    /// Its id.
    pub id: String,
    /// Its row.
    pub row: Option<RowFacts>,
    /// Its session, or the operation that makes it, is over.
    pub abandoned: bool,
    /// Its directory.
    pub directory: Directory,
    /// The lock of its supervisor, or of the command that works on it.
    pub supervisor: Lock,
    /// The lock of its QEMU.
    pub qemu: Lock,
    /// A snapshot or a restore was interrupted in it. Looked for in a stopped VM only.
    pub unfinished: bool,
    /// The copy of its row is missing in its directory.
    pub without_record: bool,
}

impl VmFacts {
    /// Whether no process takes care of it.
    pub fn is_unattended(&self) -> bool {
        self.supervisor == Lock::Free
    }
}

/// What is there.
#[derive(Debug, Clone, Default)]
pub(super) struct Inventory {
    /// VMs, by id.
    pub vms: Vec<VmFacts>,
    /// Names of directories below `vms/` whose deletion was interrupted.
    pub deleted_directories: Vec<String>,
    /// Liveness locks of processes that have ended.
    pub dead_processes: Vec<String>,
    /// Scratch directories of builds that were killed.
    pub orphaned_builds: Vec<PathBuf>,
    /// Temporary files of processes that were killed, outside of VMs' directories.
    pub temporary_files: Vec<PathBuf>,
    /// Template parts and their owners. `None`: there is no reason to look.
    pub parts: Option<PartFacts>,
}

impl Inventory {
    /// Takes the inventory of a home.
    ///
    /// # Errors
    /// Of the store, or the directory of VMs cannot be read.
    pub fn take(nido: &Nido, scope: Scope) -> Result<Self> {
        let everything = scope == Scope::Everything;
        // Before the rows: a directory that gets its row meanwhile is not taken for an orphan.
        let (deleted_directories, without_row) = match scope {
            Scope::Open => (Vec::new(), Vec::new()),
            Scope::Create | Scope::Everything => directories_without_row(nido)?,
        };
        let rows = match scope {
            Scope::Open => nido.store().rows_to_reconcile()?,
            Scope::Create => Vec::new(),
            Scope::Everything => nido.store().all_row_facts()?,
        };
        let with_row = rows.into_iter().map(|row| (row.id.clone(), Some(row)));
        let vms: BTreeMap<_, _> = without_row.into_iter().map(|id| (id, None)).chain(with_row).collect();
        let is_due = || scope == Scope::Open && nido.store().parts_due().is_ok_and(|due| due != 0);
        Ok(Self {
            vms: vms.into_iter().map(|(id, row)| VmFacts::read(nido, id, row, scope)).collect(),
            deleted_directories,
            dead_processes: if scope == Scope::Create {
                Vec::new()
            } else {
                liveness::orphaned_ids(&nido.home().present())
            },
            orphaned_builds: if everything { nido_images::orphaned_builds(nido.home().root()) } else { Vec::new() },
            temporary_files: if everything { abandoned(nido.home()) } else { Vec::new() },
            parts: (everything || is_due()).then(|| PartFacts::read(nido)).transpose()?,
        })
    }
}

fn abandoned(home: &Home) -> Vec<PathBuf> {
    let directories = [home.root().to_owned(), home.cache(), home.root().join(layout::TEMPLATES)];
    directories.iter().flat_map(|directory| abandoned_files(directory)).collect()
}

impl VmFacts {
    /// Takes the inventory of one VM, whose row has been read.
    fn read(nido: &Nido, id: String, row: Option<RowFacts>, scope: Scope) -> Self {
        let supervisor = Lock::of(&nido.vm_dir(&id).file(SUPERVISOR_LOCK));
        Self::read_unattended(nido, id, row, scope, supervisor)
    }

    /// The same for a VM whose lock this process holds.
    pub fn read_held(nido: &Nido, id: String, row: Option<RowFacts>, scope: Scope) -> Self {
        Self::read_unattended(nido, id, row, scope, Lock::Free)
    }

    /// Nothing but the lock counts of a VM that a process takes care of: then nothing else is looked at.
    fn read_unattended(nido: &Nido, id: String, row: Option<RowFacts>, scope: Scope, supervisor: Lock) -> Self {
        let dir = nido.vm_dir(&id);
        let is_unattended = supervisor == Lock::Free;
        let directory = match std::fs::symlink_metadata(dir.path()) {
            Err(error) if error.kind() == ErrorKind::NotFound => Directory::Missing,
            // Whether a directory with a row holds data makes no difference.
            _ if row.is_some() || holds_data(&dir) => Directory::WithData,
            _ => Directory::WithoutData,
        };
        let is_over =
            |row: &RowFacts| nido.context().is_abandoned_by(&row.id, row.lease.as_deref(), row.made_by.as_deref());
        let is_stopped = row.as_ref().and_then(|row| row.state).is_some_and(VmState::is_inactive);
        let looks_inside = scope == Scope::Everything && is_unattended && is_stopped && directory != Directory::Missing;
        Self {
            abandoned: is_unattended && row.as_ref().is_some_and(is_over),
            directory,
            supervisor,
            qemu: if is_unattended { Lock::of(&dir.file(VM_LOCK)) } else { Lock::Unknown },
            unfinished: looks_inside && has_unfinished(&dir),
            without_record: looks_inside && !dir.file(VM_RECORD).exists(),
            id,
            row,
        }
    }
}

/// The ids of directories that have no row and hold data.
///
/// # Errors
/// Of the store, or the directory of VMs cannot be read.
pub(super) fn unknown_vms(nido: &Nido) -> Result<Vec<String>> {
    let (_, mut unknown) = directories_without_row(nido)?;
    unknown.retain(|id| holds_data(&nido.vm_dir(id)));
    unknown.sort();
    Ok(unknown)
}

/// The names of directories whose deletion was interrupted, and the ids of those that have no row.
fn directories_without_row(nido: &Nido) -> Result<(Vec<String>, Vec<String>)> {
    let directories = directories(&nido.home().vms())?;
    let known = nido.store().vm_ids()?;
    let others = directories.into_iter().filter(|name| !known.contains(name));
    Ok(others.partition(|name| name.starts_with(REMOVED_PREFIX)))
}

fn has_unfinished(dir: &VmDir) -> bool {
    snapshot::has_unfinished(dir) || snapshot::has_restore_files(dir) || has_temporary_files(dir)
}

/// Names of the directories below `vms/`.
fn directories(vms: &Path) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir(vms) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|e| Error::io("cannot list the VMs' directories", e))?,
    };
    Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}
