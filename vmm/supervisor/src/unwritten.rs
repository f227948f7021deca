//! Changes that the supervisor could not write to the store yet: it keeps them, retries, and publishes them in a small file.
//!
//! The file is made at the start, when there is space, and overwritten where it stands: so a disk without a free byte does not
//! keep other processes from seeing that the VM is paused, nor the next one from learning how it ended.
//!
//! Invariant: the file holds something only while the store lags behind, and it counts only for the run that it names.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use nido_api::Failure;
use nido_api::error::Result;
use nido_api::state::{StateCause, VmState};
use nido_engine::home::{UNWRITTEN, VmDir};
use nido_store::{Transition, TransitionOutcome, VmRow};
use serde::{Deserialize, Serialize};

/// Size of the file.
const FILE_BYTES: usize = 16 << 10;
/// How many changes are kept; of more, the oldest state that is not the last is left out.
const CHANGES_MAX: usize = 64;

/// A state that the store does not know yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnwrittenState {
    /// The start that it belongs to, in milliseconds since 1970.
    started_ms: i64,
    /// The state.
    pub state: VmState,
    /// Why it is paused or stopped.
    pub cause: Option<StateCause>,
    /// Why it failed.
    pub failure: Option<Failure>,
}

/// The state of the VM that `row` describes, if the store lags behind it.
pub fn lagging(dir: &VmDir, row: &VmRow) -> Option<UnwrittenState> {
    let bytes = std::fs::read(dir.file(UNWRITTEN)).ok().filter(|bytes| bytes.first() == Some(&b'{'))?;
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let lagging: UnwrittenState = serde_json::from_slice(&bytes[..end]).ok()?;
    (Some(lagging.started_ms) == started_ms(row)).then_some(lagging)
}

fn started_ms(row: &VmRow) -> Option<i64> {
    row.started_at.map(jiff::Timestamp::as_millisecond)
}

/// The changes that are still to be written, in order.
#[derive(Debug, Default)]
pub(super) struct UnwrittenChanges {
    changes: VecDeque<Transition>,
    file: Option<File>,
    told: bool,
}

impl UnwrittenChanges {
    /// Creates the file. Without it (the disk is full already) changes are only retried.
    pub(super) fn prepare(path: &Path) -> Self {
        let open = || {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
            // Changes of the previous supervisor stay until the store has them.
            if file.metadata()?.len() < FILE_BYTES as u64 {
                file.write_all_at(&[0; FILE_BYTES], 0)?;
            }
            Ok::<_, std::io::Error>(file)
        };
        let file = open().inspect_err(|error| tracing::warn!("cannot create {}: {error}", path.display())).ok();
        Self { changes: VecDeque::new(), file, told: false }
    }

    /// Takes one more change.
    pub(super) fn push(&mut self, change: Transition) {
        self.changes.push_back(change);
        let is_passing = |change: &Transition| matches!(change, Transition::Entered { .. });
        if self.changes.len() > CHANGES_MAX
            && let Some(oldest) = self.changes.iter().position(is_passing)
            && oldest + 1 < self.changes.len()
        {
            self.changes.remove(oldest);
        }
    }

    /// Whether there is nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Writes what is there, in order. At the first change that fails it stops, and the file has what the store lacks.
    pub(super) fn flush(
        &mut self,
        row: &VmRow,
        mut write: impl FnMut(&Transition) -> Result<TransitionOutcome>,
    ) -> Result<()> {
        while let Some(change) = self.changes.front() {
            match write(change) {
                Err(error) => {
                    self.write_file(row);
                    return Err(error);
                }
                Ok(done) => done.log(&row.id, change.to().map_or("a change", VmState::word)),
            }
            self.changes.pop_front();
        }
        if std::mem::take(&mut self.told) {
            self.overwrite(&[0; FILE_BYTES]);
        }
        Ok(())
    }

    /// Ignores what an earlier supervisor could not write: this one has checked the VM itself.
    pub(super) fn mark_checked(&mut self) {
        self.told = true;
    }

    fn write_file(&mut self, row: &VmRow) {
        let last = self.changes.iter().rev().find_map(|change| Some((change.to()?, change)));
        let (Some((state, change)), Some(started_ms)) = (last, started_ms(row)) else { return };
        let mut lagging =
            UnwrittenState { started_ms, state, cause: change.cause(), failure: change.failure().cloned() };
        self.told = true;
        loop {
            match serde_json::to_vec(&lagging) {
                Ok(mut bytes) if bytes.len() <= FILE_BYTES => {
                    bytes.resize(FILE_BYTES, 0);
                    return self.overwrite(&bytes);
                }
                _ => {
                    if lagging.failure.as_mut().and_then(|failure| failure.log_tail.pop()).is_none() {
                        return;
                    }
                }
            }
        }
    }

    fn overwrite(&self, bytes: &[u8]) {
        if let Some(file) = &self.file
            && let Err(error) = file.write_all_at(bytes, 0)
        {
            tracing::error!("cannot write {UNWRITTEN}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nido_api::Limit;
    use nido_api::error::Error;
    use nido_api::state::FailureCause;
    use nido_store::Purpose;

    fn row() -> VmRow {
        let spec = nido_api::VmSpec::named("web".parse().unwrap());
        let parts = serde_json::from_value(serde_json::json!({
            "vmlinux": "", "initramfs": "", "root": "", "root_bytes": 0, "packages": "", "init": "agent", "append": ""
        }));
        let row = VmRow::new("1".into(), spec, Purpose::Use, VmState::Running, parts.unwrap(), 0);
        VmRow { started_at: Some(jiff::Timestamp::from_millisecond(1_700_000_000_000).unwrap()), ..row }
    }

    fn paused(cause: StateCause) -> Transition {
        Transition::Entered { state: VmState::Paused, cause: Some(cause), timings: None }
    }

    // A change of state that the store did not accept was lost: the row kept `running` for a paused VM.
    #[test]
    fn a_failed_change_is_repeated_and_kept_in_a_file() {
        let home = tempfile::tempdir().unwrap();
        std::fs::set_permissions(home.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let dir = nido_engine::home::Home::open(home.path()).unwrap().vm("1");
        dir.make().unwrap();
        let row = row();
        let mut unwritten = UnwrittenChanges::prepare(&dir.file(UNWRITTEN));
        let full = |_: &Transition| Err(Error::internal("full"));
        unwritten.push(paused(StateCause::DiskFull));
        assert!(unwritten.flush(&row, full).is_err());
        let told = lagging(&dir, &row).unwrap();
        assert_eq!((told.state, told.cause), (VmState::Paused, Some(StateCause::DiskFull)));
        let later =
            VmRow { started_at: Some(jiff::Timestamp::from_millisecond(1_700_000_000_001).unwrap()), ..row.clone() };
        assert_eq!(lagging(&dir, &later), None, "it is about another run");

        let failure =
            Failure { cause: FailureCause::QemuSignal, message: "x".into(), log_tail: vec!["y".repeat(900); 30] };
        unwritten.push(Transition::ended(VmState::Failed, Some(failure)));
        assert!(unwritten.flush(&row, full).is_err());
        let told = lagging(&dir, &row).unwrap();
        assert_eq!((told.state, told.cause), (VmState::Failed, None));
        assert_eq!(told.failure.unwrap().cause, FailureCause::QemuSignal);

        let mut written = Vec::new();
        unwritten
            .flush(&row, |change| {
                written.push(change.to());
                Ok(TransitionOutcome::Yes)
            })
            .unwrap();
        assert_eq!(written, [Some(VmState::Paused), Some(VmState::Failed)]);
        assert!(unwritten.is_empty());
        assert_eq!(lagging(&dir, &row), None);
    }

    #[test]
    fn of_too_many_changes_old_states_are_left_out_and_nothing_else() {
        let mut unwritten = UnwrittenChanges::default();
        unwritten.push(Transition::LimitReached(Limit::Ttl));
        for _ in 0..CHANGES_MAX + 20 {
            unwritten.push(paused(StateCause::User));
        }
        unwritten.push(Transition::ended(VmState::Stopped, None));
        let mut written = Vec::new();
        unwritten
            .flush(&row(), |change| {
                written.push(change.clone());
                Ok(TransitionOutcome::Yes)
            })
            .unwrap();
        assert_eq!(written.len(), CHANGES_MAX);
        assert_eq!(written[0], Transition::LimitReached(Limit::Ttl));
        assert_eq!(written[CHANGES_MAX - 1].to(), Some(VmState::Stopped));
    }
}
