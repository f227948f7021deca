//! What is done before a snapshot is taken: QEMU is identified, the space is checked, and the directory and the copy of the disk
//! are begun.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::Duration;

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::name::SnapshotName;
use nido_engine::bake::qemu_id;
use nido_engine::home::VmDir;
use nido_engine::host::facts;
use nido_engine::host::facts::is_in_memory;
use nido_engine::machine::Machine;
use nido_engine::qemu::migration::Bounds;
use nido_engine::snapshot::{self, LayerCopy, PendingSnapshot, RunningState};

use super::HostProbe;

/// How long, and in how many passes over the memory, the changes of a running guest are followed before it is paused.
const FOLLOWED_FOR: Duration = Duration::from_secs(2);
const PASSES: u64 = 8;

/// A snapshot that is to be taken.
#[derive(Debug)]
pub(crate) struct Preparation {
    pub host: HostProbe,
    pub machine: Machine,
    /// The agent's token, in hexadecimal.
    pub token: String,
    pub name: SnapshotName,
    pub dir: VmDir,
    /// The directory of the VM that gets it.
    pub into: VmDir,
    /// The VM is paused, and stays so.
    pub paused: bool,
    pub pid: i32,
    pub memory_bytes: u64,
    /// The memory image that the guest maps, if it was forked.
    pub image: Option<PathBuf>,
}

/// A snapshot that has been begun.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub unfinished: PendingSnapshot,
    pub running: RunningState,
    /// The copy of the disk, unless the VM is paused.
    pub disk: Option<LayerCopy>,
    /// Within them it is saved while it runs; else it is paused for that.
    pub bounds: Option<Bounds>,
}

impl Preparation {
    /// Does what can be done while the guest runs; `precopy` is whether its memory can be saved meanwhile, and if not, why.
    ///
    /// # Errors
    /// `snapshot_exists`, `disk_full`, `internal`, those of a test of QEMU. Then nothing is left.
    pub(crate) fn run(self, precopy: Result<(), String>) -> Result<Prepared> {
        let qemu = qemu_id(&self.host.qemu()?);
        let running = RunningState { machine: self.host.shape(&self.machine), qemu, token: self.token.clone() };
        let bounds = self.check_space(precopy)?;
        let unfinished = PendingSnapshot::begin(&self.dir, &self.into, &self.name)?;
        nido_files::failpoint!("take.begun");
        let disk = if self.paused { None } else { Some(unfinished.begin_disk(&self.dir)?) };
        Ok(Prepared { unfinished, running, disk, bounds })
    }

    /// Refuses where the disk is too full, before anything is done to the VM. Returns the bounds within which it can be saved
    /// while it runs, if it may be and there is enough space for that.
    fn check_space(&self, precopy: Result<(), String>) -> Result<Option<Bounds>> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let used = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        let memory = used.map_or(self.memory_bytes, |kib| self.memory_bytes.min(kib << 10));
        let needed = memory + snapshot::copy_bytes(&self.dir) + self.holes();
        let free = facts::disk_free_bytes(self.dir.path()).unwrap_or(u64::MAX);
        // What is sent before the guest is paused, and all of it once more.
        let sent = memory + memory / 4;
        if precopy.is_ok() && free >= needed + sent {
            return Ok(Some(Bounds { passes: PASSES, bytes: sent, within: FOLLOWED_FOR }));
        }
        if free >= needed {
            let why = precopy.err().unwrap_or_else(|| "the disk is too full to save it while it runs".to_owned());
            tracing::info!("the VM is paused until its memory is saved: {why}");
            return Ok(None);
        }
        let words = format!(
            "the disk that holds nido's home is too full for a snapshot: {} MiB may be needed, {} MiB are free",
            needed.div_ceil(1 << 20),
            free >> 20
        );
        Err(Error::new(Code::DiskFull, words).hint(Hint::home_full()))
    }

    /// Saving reads all of the guest's memory. In a memory file system a hole of the image takes space when it is read; QEMU is
    /// killed by SIGBUS if no space is left.
    fn holes(&self) -> u64 {
        match self.image.as_ref().filter(|_| is_in_memory(self.dir.path())).and_then(|image| fs::metadata(image).ok()) {
            Some(facts) => facts.len().saturating_sub(facts.blocks() * 512),
            None => 0,
        }
    }
}
