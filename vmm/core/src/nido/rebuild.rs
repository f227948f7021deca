//! `doctor --rebuild`: a new store in the place of one that is missing or damaged.
//!
//! ```text
//!  end supervisors and other background processes (QEMUs keep running); lock every VM
//!  nido.db.rebuilt   rows that can be read of nido.db, else of its backups; VMs without one from their directories
//!  publish           nido.db -> nido.db.damaged-DATE, nido.db.rebuilt -> nido.db
//!  reconcile         supervisors for the QEMUs that run
//! ```
//!
//! Invariants: the damaged file is kept. Until the new store has its name nothing that a user could want has changed, so a rebuild
//! that is killed is repeated. No process writes into the old file afterwards without the result naming it.

mod vms;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nido_api::error::{Code, Error, Hint, Result};
use nido_engine::home::{Home, SUPERVISOR_LOCK};
use nido_engine::host::daemon::raise_open_files;
use nido_engine::host::vm_processes::{FileUser, kill_lock_holders, kill_user, users_of};
use nido_files::atomic_file::{Durability, rename_synced};
use nido_files::layout::DATABASE;
use nido_files::lock::{HeldLock, is_held};
use nido_store::{Health, SalvageReport, Store, health};
use nido_supervisor::context::open_home;
use serde::Serialize;

use super::{Nido, OpenOptions};

/// Tables whose rows are taken from a backup where the store itself does not have them any more.
const BACKUP_TABLES: [&str; 4] = ["tokens", "webhooks", "audit_heads", "pools"];
/// Tables whose rows count only as they were last.
const STORE_TABLES: [&str; 7] = ["events", "announced", "vms", "forwards", "part_owners", "restarts", "deliveries"];
/// Verbs of background processes: killed at any moment, each is replaced by another that continues its work.
const BACKGROUND: [&str; 4] = ["supervise", "watch", "deliver", "pool-fill"];
/// How long a process that was killed may take to end, and a lock to be released.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// What a rebuild has done.
#[derive(Debug, Default, Serialize)]
pub struct RebuildReport {
    /// Why there is a new store. Absent: the store is sound and knows every VM, and nothing was changed.
    pub reason: Option<String>,
    /// Where the file that was replaced is kept.
    pub kept: Option<PathBuf>,
    /// The VMs that the new store knows, by name.
    pub vms: Vec<RestoredVm>,
    /// Directories that got no row, each with the reason.
    pub skipped: Vec<SkippedDirectory>,
    /// Rows of other tables that were taken over.
    pub restored: Vec<RestoredRows>,
    /// What is lost, or may be, a sentence each.
    pub lost: Vec<String>,
}

/// A VM that has its row again.
#[derive(Debug, Serialize)]
pub struct RestoredVm {
    /// Its name.
    pub name: String,
    /// Its row comes from its directory, not from a store that was readable.
    pub from_directory: bool,
    /// The name that it had, if that one is taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renamed_from: Option<String>,
}

/// A directory without a row.
#[derive(Debug, Serialize)]
pub struct SkippedDirectory {
    /// Its name below `vms/`.
    pub id: String,
    /// Why it has none.
    pub reason: String,
}

/// Rows that were taken over.
#[derive(Debug, Serialize)]
pub struct RestoredRows {
    /// What they are.
    pub what: String,
    /// How many.
    pub count: usize,
    /// The file that they come from.
    pub from: String,
}

impl Nido {
    /// Makes a new store if the home's is missing, damaged, or knows none of its VMs; gives VMs without a row theirs again.
    ///
    /// # Errors
    /// `vm_busy` if a process uses the home that cannot be ended without a loss, `path_not_found` without a home, those of the disk.
    pub async fn rebuild(options: OpenOptions) -> Result<RebuildReport> {
        let home = open_home(&options)?.ok_or_else(|| Error::new(Code::PathNotFound, "there is no home to rebuild"))?;
        let lock = HeldLock::try_take(&home.rebuild_lock()).map_err(|e| Error::io("cannot lock the rebuild", e))?;
        let Some(_only_one) = lock else {
            return Err(Error::new(Code::VmBusy, "another process is rebuilding this home"));
        };
        match reason(&home)? {
            None => Self::adopt_all(options).await,
            Some(reason) => Box::pin(Self::rebuild_store(options, &home, reason)).await,
        }
    }

    /// The store is sound: what it does not know gets a row, and nothing else changes.
    async fn adopt_all(options: OpenOptions) -> Result<RebuildReport> {
        let nido = Self::open(options).await?;
        let adoption = nido.adopt_unknown_vms().await?;
        let vm = |(name, before): (nido_api::name::VmName, Option<nido_api::name::VmName>)| RestoredVm {
            name: name.to_string(),
            from_directory: true,
            renamed_from: before.map(|before| before.to_string()),
        };
        let skipped = adoption.skipped.into_iter().map(|(id, reason)| SkippedDirectory { id, reason });
        Ok(RebuildReport {
            vms: adoption.adopted.into_iter().map(vm).collect(),
            skipped: skipped.collect(),
            ..RebuildReport::default()
        })
    }

    async fn rebuild_store(options: OpenOptions, home: &Home, reason: String) -> Result<RebuildReport> {
        raise_open_files();
        let directories = vm_directories(home)?;
        end_background_processes(home, &directories).await?;
        let held = lock_vms(home, &directories).await?;
        let mut done = RebuildReport { reason: Some(reason), ..RebuildReport::default() };
        let temporary = remove_temporary(home)?;
        let store = Store::open(&temporary)?;
        take_rows(&store, home, &mut done)?;
        let adopted = vms::take_vms(&store, home, &directories, &mut done)?;
        drop(store);
        done.kept = publish(home, &temporary)?;
        drop(held);
        // These would write into the file that was replaced.
        for user in users_of(&home.database()) {
            done.lost.push(format!(
                "what process {} writes: it opened the old store during the rebuild; end it",
                shown(&user)
            ));
        }
        let nido = Self::open(options).await?;
        nido.await_agents(&adopted).await?;
        Ok(done)
    }
}

/// Why a new store is needed; `None` if the one that is there is sound.
fn reason(home: &Home) -> Result<Option<String>> {
    Ok(match health(&home.database())? {
        Health::Missing => Some("nido.db is missing".into()),
        Health::Damaged(why) => Some(format!("nido.db is damaged: {}", nido_api::sanitize::on_one_line(&why))),
        Health::Sound => {
            let directories = vm_directories(home)?;
            let known = Store::open(&home.database())?.vm_ids()?;
            let knows_none = !directories.is_empty() && !directories.iter().any(|id| known.contains(id));
            knows_none.then(|| "nido.db knows none of the VMs: it was replaced or emptied".into())
        }
    })
}

/// The ids of the directories of VMs.
fn vm_directories(home: &Home) -> Result<Vec<String>> {
    let failed = |e| Error::io("cannot list the VMs' directories", e);
    let names = fs::read_dir(home.vms()).map_err(failed)?.flatten().filter_map(|e| e.file_name().into_string().ok());
    let mut ids: Vec<_> = names.filter(|name| !name.starts_with('.')).collect();
    ids.sort();
    Ok(ids)
}

/// Ends the guardian, and the background processes that have the store open. Refuses if others do.
async fn end_background_processes(home: &Home, ids: &[String]) -> Result<()> {
    let database = home.database();
    let deadline = Instant::now() + END_TIMEOUT;
    while Instant::now() < deadline {
        let users = users_of(&database);
        let others: Vec<_> = users.iter().filter(|user| !is_background(user)).map(shown).collect();
        if !others.is_empty() {
            let words = format!("processes use this home, and would lose what they write: {}", others.join(", "));
            return Err(
                Error::new(Code::VmBusy, words).hint(Hint::host("end them, then run nido doctor --rebuild again"))
            );
        }
        // First: it starts supervisors.
        kill_lock_holders(&home.guardian_lock(), END_TIMEOUT);
        for user in &users {
            kill_user(user, &database, END_TIMEOUT);
        }
        // One that has just been started has no store open yet.
        if users.is_empty() && !ids.iter().any(|id| is_held(&home.vm(id).file(SUPERVISOR_LOCK))) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(Error::new(Code::VmBusy, "processes of nido are started again and again, or do not end")
        .hint(Hint::host("stop servers first")))
}

/// Whether it is a process of nido that may be killed at any moment: its first argument that is not a global option is its verb.
fn is_background(user: &FileUser) -> bool {
    let mut words = user.command.iter().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--home" | "--qemu" => drop(words.next()),
            word => return BACKGROUND.contains(&word),
        }
    }
    false
}

fn shown(user: &FileUser) -> String {
    let command: String = user.command.join(" ").chars().take(100).collect();
    format!("{} ({})", user.pid, nido_api::sanitize::on_one_line(&command))
}

/// Locks every VM: no command starts, changes or deletes one meanwhile.
async fn lock_vms(home: &Home, ids: &[String]) -> Result<Vec<HeldLock>> {
    let mut all = Vec::new();
    for id in ids {
        let lock = home.vm(id).file(SUPERVISOR_LOCK);
        let held =
            HeldLock::take(&lock, Instant::now() + END_TIMEOUT).await.map_err(|e| Error::io("cannot lock a VM", e))?;
        let busy = || Error::new(Code::VmBusy, format!("a process works on the VM in vms/{id}"));
        all.push(
            held.ok_or_else(|| {
                busy().hint(Hint::host("wait for it, or end it; then run nido doctor --rebuild again"))
            })?,
        );
    }
    Ok(all)
}

/// The temporary file of a rebuild that was killed.
fn remove_temporary(home: &Home) -> Result<PathBuf> {
    let temporary = home.rebuilt_database();
    for file in with_logs(&temporary) {
        match fs::remove_file(&file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io_at("remove", &file, e)),
            _ => {}
        }
    }
    Ok(temporary)
}

/// A database, and the files that SQLite creates next to it.
fn with_logs(database: &Path) -> [PathBuf; 3] {
    ["", "-wal", "-shm"].map(|ending| {
        let mut path = database.as_os_str().to_owned();
        path.push(ending);
        path.into()
    })
}

/// Takes over what can be read of the store, and of its backups what it has not.
fn take_rows(store: &Store, home: &Home, done: &mut RebuildReport) -> Result<()> {
    let tables: Vec<_> = BACKUP_TABLES.into_iter().chain(STORE_TABLES).collect();
    let first = store.salvage(&home.database(), &tables)?;
    // A table of a store that was emptied is complete, and has no data.
    let is_empty = !first.iter().any(|table| table.rows > 0);
    note(&first, DATABASE, done);
    let missing = |table: &&str| first.iter().any(|one| one.table == **table && (!one.is_complete || is_empty));
    let mut missing: Vec<&str> = BACKUP_TABLES.into_iter().filter(|table| missing(table)).collect();
    for backup in home.database_backups() {
        if missing.is_empty() || !backup.exists() {
            continue;
        }
        let name = backup.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let found = store.salvage(&backup, &missing)?;
        note(&found, &name, done);
        if found.iter().any(|table| table.rows > 0 && table.table == "tokens") {
            let words = "revocations of tokens: those of {name} are valid again; check nido token list";
            done.lost.push(words.replace("{name}", &name));
        }
        missing.retain(|table| !found.iter().any(|one| one.table == **table && one.is_complete));
    }
    for table in missing {
        done.lost.push(format!("{}: no readable copy has all of them", what(table)));
    }
    if is_empty || first.iter().any(|one| one.table == "events" && !one.is_complete) {
        done.lost.push("events before the rebuild, and messages to webhooks that were not delivered".into());
        // Above every number that was given before, at less than one event a second.
        store.continue_events_after(Timestamp::now().as_second())?;
    }
    Ok(())
}

fn note(found: &[SalvageReport], from: &str, done: &mut RebuildReport) {
    let shown = |table: &&SalvageReport| {
        table.rows > 0 && !matches!(&*table.table, "vms" | "forwards" | "part_owners" | "restarts" | "announced")
    };
    let rows = found.iter().filter(shown).map(|table| RestoredRows {
        what: what(&table.table).into(),
        count: table.rows,
        from: from.into(),
    });
    done.restored.extend(rows);
}

fn what(table: &str) -> &str {
    match table {
        "audit_heads" => "audit references",
        "deliveries" => "webhook messages",
        other => other,
    }
}

/// Puts the new store in the place of the old one, which is kept. Returns where.
fn publish(home: &Home, temporary: &Path) -> Result<Option<PathBuf>> {
    let database = home.database();
    let failed = |e| Error::io("cannot put the new store in its place", e);
    if with_logs(temporary)[1].exists() {
        return Err(Error::internal("the new store could not be written whole: its log is still there"));
    }
    let date = Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
    let aside = |ending: &str| database.with_file_name(format!("nido.db.damaged-{date}{ending}"));
    // The log first: it must never lie beside a file that it does not belong to.
    for (file, ending) in with_logs(&database).into_iter().zip(["", "-wal", "-shm"]).skip(1) {
        match rename_synced(&file, &aside(ending), Durability::PowerCut) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
            _ => {}
        }
    }
    // As a second name: at no moment is there no store, in whose place a command would make an empty one.
    let kept = match fs::hard_link(&database, aside("")) {
        Ok(()) => Some(aside("")),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => return Err(failed(e)),
    };
    rename_synced(temporary, &database, Durability::PowerCut).map_err(failed)?;
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_processes_that_may_be_killed_are_background_processes() {
        let user = |line: &str| FileUser { pid: 1, command: line.split(' ').map(str::to_owned).collect() };
        for line in ["/usr/bin/nido --home /h --qemu q supervise 0123", "nido --home /supervise watch", "nido deliver"]
        {
            assert!(is_background(&user(line)), "{line}");
        }
        for line in ["nido api-server", "nido --home supervise exec web -- watch", "sqlite3 /h/nido.db", "nido", ""] {
            assert!(!is_background(&user(line)), "{line}");
        }
    }
}
