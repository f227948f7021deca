//! The guardian of a home: `nido watch`, one process while any VM runs. It starts a supervisor for a QEMU that has none, records
//! the end of a QEMU that ended without one, kills a QEMU whose supervisor hangs when the time to live is over, and restarts VMs as
//! their restart policies specify.
//!
//! ```text
//!  a supervisor (at its start, and every 3 s), a command ── guardian.lock free? ──> nido watch ── no VM runs: ends
//!  nido watch ── every 2 s: rows, locks ── decide (pure) ── act
//! ```
//!
//! Invariants: at most one guardian stays in a home (it holds `guardian.lock`). Between two scans it has no store open, and no scan
//! creates a file. While a guardian or a supervisor lives, a killed one is replaced; if all of them are killed at the same moment,
//! the next nido command does it.

mod decide;
mod expiry;
mod restarts;

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nido_api::error::{Code, Error, Result};
use nido_api::state::VmState;
use nido_engine::home::{Home, SUPERVISOR_LOCK, VM_LOCK};
use nido_engine::host::{scope, vm_processes};
use nido_files::lock::{HeldLock, is_free, is_held};
use nido_store::{RestartFacts, RowFacts, Store, Transition};
use nido_supervisor::SUPERVISOR_FAILS;
use nido_supervisor::context::{open_home, restart_unawaited, start_supervisor_unawaited};

use self::decide::{GuardianAction, Histories, VmFacts, decide};
use self::expiry::{Expiries, Moment};
use self::restarts::{PendingRestarts, due, waits};
use super::reconcile::Scope;
use super::{Nido, OpenOptions};

/// How often the store is read.
const SCAN_INTERVAL: Duration = Duration::from_secs(2);
/// How often locks are looked at, for each running VM: with many VMs no more often than the store.
const LOCKS_INTERVAL_PER_VM: Duration = Duration::from_millis(20);
/// The same with few VMs.
const LOCKS_INTERVAL_MIN: Duration = Duration::from_millis(200);
/// How long a QEMU that was killed may take to end. It is looked at again.
const KILL_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a guardian ends.
#[derive(Debug, PartialEq, Eq)]
enum EndReason {
    /// No VM runs.
    NothingRuns,
    /// The home was removed or replaced, or its store is of another version of nido.
    NotOurs,
}

impl Nido {
    /// The hidden verb: guards the home until no VM runs or waits for its restart; returns at once if another guardian does. With
    /// `stay` it waits for the other one's end, and stays when nothing runs: for a service manager.
    ///
    /// # Errors
    /// The home cannot be opened or locked.
    pub async fn watch(options: OpenOptions, stay: bool) -> Result<()> {
        let Some(home) = open_home(&options)? else { return Ok(()) };
        let mut guardian = Guardian::new(options, home)?;
        loop {
            let held = HeldLock::try_take(&guardian.home.guardian_lock());
            let Some(held) = held.map_err(|e| Error::io("cannot lock the guardian's lock", e))? else {
                if stay {
                    tokio::time::sleep(SCAN_INTERVAL).await;
                    continue;
                }
                return Ok(());
            };
            if !stay {
                guardian.leave_callers_unit();
            }
            let end = guardian.guard(stay).await;
            drop(held);
            // A process that saw the lock held in between relies on this.
            if end == EndReason::NotOurs || !guardian.scan().is_ok_and(|seen| seen.needs_guardian()) {
                return Ok(());
            }
        }
    }

    /// Whether a VM claims to run, or waits for its restart, so that the home needs a guardian.
    pub(super) fn needs_guardian(&self) -> Result<bool> {
        if self.store().vms_to_restart()?.iter().any(waits) {
            return Ok(true);
        }
        Ok(self.store().rows_to_reconcile()?.iter().any(|row| row.state.is_some_and(|state| !state.is_inactive())))
    }

    /// Adds to a VM's row that no supervisor stays. The next supervisor that works removes it.
    fn warn_of_supervisors(&self, id: &str) -> Result<()> {
        let lock = self.vm_dir(id).file(SUPERVISOR_LOCK);
        let Ok(Some(_held)) = HeldLock::try_take_existing(&lock) else { return Ok(()) };
        let row = self.store().vm_by_id(id)?;
        let Some(mut machine) = row.and_then(|row| row.machine) else { return Ok(()) };
        if !machine.warnings.iter().any(|warning| warning.starts_with(SUPERVISOR_FAILS)) {
            machine.warnings.push(format!("{SUPERVISOR_FAILS}: the supervisor's log has the cause"));
        }
        self.store().transition(id, &Transition::MachineChanged(machine))?.log(id, "what its machine warns of");
        Ok(())
    }
}

/// The result of a scan.
#[derive(Debug, Default)]
struct HomeScan {
    vms: Vec<VmFacts>,
    /// Stopped and failed VMs with a restart policy.
    ended: Vec<RestartFacts>,
    /// Whether the store has events that are not in the audit log.
    has_events: bool,
}

impl HomeScan {
    fn needs_guardian(&self) -> bool {
        self.vms.iter().any(VmFacts::needs_guardian) || self.ended.iter().any(waits)
    }
}

/// A guardian, between two scans.
#[derive(Debug)]
struct Guardian {
    options: OpenOptions,
    home: Home,
    /// Which directory the home is: device and inode.
    identity: (u64, u64),
    /// What was seen last.
    seen: HomeScan,
    expiries: Expiries,
    /// Why the store could not be read the last time.
    trouble: Option<String>,
}

impl Guardian {
    fn new(options: OpenOptions, home: Home) -> Result<Self> {
        let identity = identity(home.root()).ok_or_else(|| Error::internal("nido's home cannot be looked at"))?;
        let (seen, expiries) = (HomeScan::default(), Expiries::default());
        Ok(Self { options, home, identity, seen, expiries, trouble: None })
    }

    /// Where there is systemd: the scope of the VM whose supervisor started this process ends with that VM.
    fn leave_callers_unit(&self) {
        let Some(bus) = scope::bus() else { return };
        let id = format!("guardian-{:x}-{:x}", self.identity.0, self.identity.1);
        let description = format!("nido guardian of {}", self.home.root().display());
        tokio::spawn(async move {
            if let Err(why) = scope::adopt_helper(bus, &id, &description).await {
                tracing::warn!("the guardian stays in the unit that it was started in: {why}");
            }
        });
    }

    async fn guard(&mut self, stay: bool) -> EndReason {
        let (mut histories, mut restarts) = (Histories::default(), PendingRestarts::default());
        loop {
            if identity(self.home.root()) != Some(self.identity) {
                return EndReason::NotOurs;
            }
            match self.scan() {
                Ok(seen) => {
                    self.trouble = None;
                    self.seen = seen;
                    self.copy_events();
                    if !stay && !self.seen.needs_guardian() {
                        return EndReason::NothingRuns;
                    }
                }
                // A nido that can read it starts another guardian.
                Err(error) if error.code() == Code::ReadOnly => {
                    tracing::warn!("{error}");
                    return EndReason::NotOurs;
                }
                Err(error) => {
                    self.note_trouble(&error);
                    self.check_locks();
                    if !stay && !self.seen.vms.iter().any(|vm| vm.runs || vm.supervised) {
                        return EndReason::NothingRuns;
                    }
                }
            }
            for act in decide(&self.seen.vms, &mut histories, Instant::now()) {
                if let Err(error) = self.act(&act).await {
                    tracing::error!("{act:?} failed: {error}");
                }
            }
            for (id, in_row) in due(&self.seen.ended, &mut restarts, Instant::now(), Timestamp::now()) {
                tracing::info!("restarting VM {id} by its policy");
                if let Err(error) = restart_unawaited(&self.options, &self.home, &id, in_row) {
                    tracing::error!("VM {id} cannot be restarted: {error}");
                }
            }
            self.pause().await;
        }
    }

    /// Reads the store, then the locks. Nothing is created, and nothing stays open.
    fn scan(&mut self) -> Result<HomeScan> {
        let store = Store::open_to_read(&self.home.database())?;
        let (rows, ended) = (store.rows_to_reconcile()?, store.vms_to_restart()?);
        let has_events = store.has_uncopied_events()?;
        drop(store);
        let now = Moment::now();
        self.expiries.retain(&rows);
        Ok(HomeScan { vms: rows.iter().map(|row| self.facts(row, now)).collect(), ended, has_events })
    }

    fn facts(&mut self, row: &RowFacts, now: Moment) -> VmFacts {
        let mut vm = VmFacts {
            id: row.id.clone(),
            is_inactive: row.state.is_some_and(VmState::is_inactive),
            readable: row.state.is_some(),
            ttl_over: self.expiries.is_over(&row.id, row.expires_ms, now),
            ..VmFacts::default()
        };
        self.read_locks(&mut vm);
        vm
    }

    /// Checks the VMs of the last scan again: the store cannot be read.
    fn check_locks(&mut self) {
        let mut vms = std::mem::take(&mut self.seen.vms);
        vms.iter_mut().for_each(|vm| self.read_locks(vm));
        self.seen = HomeScan { vms, ..HomeScan::default() };
    }

    fn read_locks(&self, vm: &mut VmFacts) {
        // The supervisor's first: it is released after QEMU's.
        vm.supervised = !is_free(&self.file(&vm.id, SUPERVISOR_LOCK)).unwrap_or(false);
        vm.runs = !is_free(&self.file(&vm.id, VM_LOCK)).unwrap_or(false);
    }

    fn file(&self, id: &str, name: &str) -> PathBuf {
        self.home.vm(id).file(name)
    }

    fn note_trouble(&mut self, error: &Error) {
        let trouble = error.to_string();
        if self.trouble.as_ref() != Some(&trouble) {
            tracing::error!("the store cannot be read; only what was known before is guarded: {trouble}");
        }
        self.trouble = Some(trouble);
    }

    async fn act(&self, act: &GuardianAction) -> Result<()> {
        match act {
            GuardianAction::Supervise(id) => self.supervise(id),
            GuardianAction::KillQemu(id) => {
                tracing::error!("VM {id} does not stop at the end of its time to live; killing its QEMU");
                vm_processes::kill_lock_holders(&self.file(id, VM_LOCK), KILL_TIMEOUT);
                Ok(())
            }
            // Both need the store.
            GuardianAction::RecordEnd(_) | GuardianAction::Warn(_) if self.trouble.is_some() => Ok(()),
            GuardianAction::RecordEnd(id) => self.open()?.repair_vm(id, Scope::Open).await,
            GuardianAction::Warn(id) => self.open()?.warn_of_supervisors(id),
        }
    }

    fn open(&self) -> Result<Nido> {
        Nido::open_unreconciled(self.options.clone())
    }

    fn supervise(&self, id: &str) -> Result<()> {
        let lock = self.file(id, SUPERVISOR_LOCK);
        // Never created: its directory may just be being removed.
        let held = HeldLock::try_take_existing(&lock).map_err(|e| Error::io("cannot lock the VM", e))?;
        let Some(held) = held.filter(|_| is_held(&self.file(id, VM_LOCK))) else { return Ok(()) };
        tracing::info!("VM {id} lost its supervisor; starting another");
        start_supervisor_unawaited(&self.options, &self.home, id, held)
    }

    /// Copies events to the audit log, if there are any that were not copied. The first audited operation makes the log.
    fn copy_events(&self) {
        if self.seen.has_events
            && self.home.audit().exists()
            && let Err(error) = self.open().and_then(|nido| nido.audit_events())
        {
            tracing::warn!("{error}");
        }
    }

    /// Sleeps until the next look, or until a supervisor has ended.
    async fn pause(&self) {
        let count = u32::try_from(self.seen.vms.len()).unwrap_or(u32::MAX);
        let step = LOCKS_INTERVAL_PER_VM.saturating_mul(count).clamp(LOCKS_INTERVAL_MIN, SCAN_INTERVAL);
        let deadline = Instant::now() + SCAN_INTERVAL;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(step.min(left)).await;
            let has_ended = |vm: &VmFacts| vm.supervised && !is_held(&self.file(&vm.id, SUPERVISOR_LOCK));
            if self.seen.vms.iter().any(has_ended) {
                return;
            }
        }
    }
}

/// Which directory it is; `None` if it is gone.
fn identity(root: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(root).ok().map(|meta| (meta.dev(), meta.ino()))
}
