//! Starting QEMU for a VM, and finding the QEMU of one that lost its supervisor.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nido_api::error::{Code, Error, Result};
use nido_api::sanitize::on_one_line;
use nido_engine::confine::{self, Confinement};
use nido_engine::disk_quota::DiskUsage;
use nido_engine::home::{
    CHANNEL_SOCKET, CONSOLE_LOG, DISK, GUEST_CONFIG, Home, MEMORY_IMAGE, NETWORK_QEMU_SOCKET, QEMU_LOG, QMP_SOCKET,
    VM_LOCK,
};
use nido_engine::host::{self, QemuFacts};
use nido_engine::machine::Machine;
use nido_engine::qemu::argv::{Disk, Files, Memory, flatten, parts};
use nido_engine::qemu::{GroupToJoin, Monitor, MonitorError, MonitorEvent, QemuExit, QemuProcess, needs, process};
use nido_files::lock::HeldLock;
use nido_files::private_dir::remove_socket;
use nido_store::{Origin, Purpose, VmRow};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::qemu_files;

/// How long QEMU may take until its monitor answers.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the end of a QEMU that closed its monitor may take to be seen.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// A monitor that replies, and what QEMU reports over it.
pub(super) type Connection = (Monitor, mpsc::Receiver<MonitorEvent>);

/// The process of a QEMU, from the moment in which it is started or found. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct QemuHandle(Arc<OnceLock<QemuProcess>>);

impl QemuHandle {
    /// Waits until QEMU has ended; for ever while it has not been started.
    pub(super) async fn wait(&self) -> QemuExit {
        match self.0.get() {
            Some(process) => process.wait().await.unwrap_or(QemuExit::Unknown),
            None => std::future::pending().await,
        }
    }

    /// Kills QEMU, if it was started.
    pub(super) fn kill(&self) {
        self.0.get().into_iter().for_each(|process| drop(process.kill()));
    }

    /// Its number, if it was started.
    pub(super) fn pid(&self) -> Option<i32> {
        self.0.get().map(QemuProcess::pid)
    }

    /// Whether it was started.
    pub(super) fn exists(&self) -> bool {
        self.0.get().is_some()
    }
}

/// The connection to QEMU's monitor.
#[derive(Debug)]
enum MonitorLink {
    /// Not connected yet.
    Awaited,
    Open(Monitor),
    /// It does not reply: it hangs, or was suspended by a signal. All that can be done with this QEMU is to kill it.
    Mute,
}

/// A VM's QEMU, and the connection to its monitor.
pub(super) struct RunningQemu {
    pub process: QemuHandle,
    link: MonitorLink,
    /// What QEMU reports; ended for one whose monitor does not reply.
    pub events: mpsc::Receiver<MonitorEvent>,
}

impl RunningQemu {
    /// One that has not been started or found yet.
    pub(super) fn awaited() -> Self {
        Self { process: QemuHandle::default(), link: MonitorLink::Awaited, events: mpsc::channel(1).1 }
    }

    /// Its monitor has replied.
    pub(super) fn connected(&mut self, (monitor, events): Connection) {
        (self.link, self.events) = (MonitorLink::Open(monitor), events);
    }

    /// Its monitor was connected to, and does not reply.
    pub(super) fn fell_mute(&mut self) {
        self.link = MonitorLink::Mute;
    }

    /// QEMU's monitor.
    ///
    /// # Errors
    /// `qemu_failed` if it does not reply; `vm_busy` if it is not connected yet.
    pub(super) fn monitor(&self) -> Result<&Monitor> {
        match &self.link {
            MonitorLink::Open(monitor) => Ok(monitor),
            MonitorLink::Awaited => Err(being_started()),
            MonitorLink::Mute => {
                Err(Error::new(Code::QemuFailed, "the VM's QEMU does not reply").hint("stop the VM with force"))
            }
        }
    }

    /// QEMU's number.
    ///
    /// # Errors
    /// `vm_busy` if it was not started yet.
    pub(super) fn pid(&self) -> Result<i32> {
        self.process.pid().ok_or_else(being_started)
    }

    /// Whether its monitor does not reply.
    pub(super) const fn is_mute(&self) -> bool {
        matches!(self.link, MonitorLink::Mute)
    }

    /// Whether its monitor has been connected to.
    pub(super) const fn is_connected(&self) -> bool {
        !matches!(self.link, MonitorLink::Awaited)
    }
}

fn being_started() -> Error {
    Error::new(Code::VmBusy, "the VM is being started")
}

/// Connects to the monitor of a QEMU that was just started, whose end another task awaits; for so long at most, or a default that
/// is shorter.
pub(super) async fn connect(limit: Duration) -> Result<Connection> {
    let why = match Monitor::connect(Path::new(QMP_SOCKET), MONITOR_TIMEOUT.min(limit)).await {
        Ok(connected) => return Ok(connected),
        // It closed the monitor: it takes a moment until its end is seen.
        Err(MonitorError::QemuGone | MonitorError::Io(_)) => {
            tokio::time::sleep(END_TIMEOUT).await;
            "QEMU's monitor does not reply".to_owned()
        }
        Err(error) => on_one_line(&error.to_string()),
    };
    Err(Error::new(Code::QemuFailed, format!("QEMU could not be controlled: {why}")))
}

/// Starts QEMU for the VM. The working directory is the VM's.
pub(super) fn launch(
    home: &Home,
    row: &VmRow,
    machine: &Machine,
    qemu: &QemuFacts,
    handle: &QemuHandle,
    group: Option<GroupToJoin>,
) -> Result<()> {
    let process = spawn(home, row, machine, qemu, group)?;
    let _ = handle.0.set(process);
    nido_files::failpoint!("launch.spawned");
    Ok(())
}

fn spawn(
    home: &Home,
    row: &VmRow,
    machine: &Machine,
    qemu: &QemuFacts,
    group: Option<GroupToJoin>,
) -> Result<QemuProcess> {
    let frozen = row.parts.frozen.iter().map(|frozen| &frozen.sha256);
    let bases: Vec<_> = std::iter::once(&row.parts.root).chain(frozen).collect();
    let incoming = row.origin != Origin::Boot;
    let (memory, image) = memory(home, row, qemu);
    let quota = row.spec.disk_quota_bytes.filter(|_| row.purpose == Purpose::Use);
    let files = Files {
        memory,
        incoming,
        vm_name: row.spec.name.to_string(),
        kernel: home.blob(&row.parts.vmlinux).into(),
        initrd: home.blob(&row.parts.initramfs).into(),
        kernel_append: row.parts.append.clone(),
        disk: Disk {
            overlay: DISK.into(),
            bases: bases.iter().map(|hash| home.blob(hash).into()).collect(),
            // A clone is deleted when it stops, but the VM that it becomes may not be ephemeral.
            ephemeral: row.spec.ephemeral && row.purpose != Purpose::Pool,
            has_quota: quota.is_some(),
        },
        monitor_socket: QMP_SOCKET.into(),
        channel_socket: CHANNEL_SOCKET.into(),
        console_log: CONSOLE_LOG.into(),
        guest_config: GUEST_CONFIG.into(),
    };
    check_parts(home, row, bases.into_iter().chain(image))?;
    let broken = |e| Error::io("cannot prepare QEMU", e);
    if let Some(image) = image.filter(|_| !qemu.memory_file_rom) {
        qemu_files::make_writable(&home.blob(image)).map_err(broken)?;
    }
    // First of all: while a QEMU of this VM runs, its logs and its monitor's socket are its own.
    let lock = HeldLock::try_take(Path::new(VM_LOCK))
        .map_err(broken)?
        .ok_or_else(|| Error::new(Code::VmBusy, "a QEMU of this VM runs already"))?;
    nido_files::failpoint!("launch.locked");
    // Those that QEMU binds: it cannot replace what another user has left.
    [QMP_SOCKET, NETWORK_QEMU_SOCKET].iter().try_for_each(|path| remove_socket(Path::new(path))).map_err(broken)?;
    let log = OpenOptions::new().append(true).create(true).mode(0o600).open(QEMU_LOG).map_err(broken)?;
    // The last run's words are not this one's: they would be taken for the reason of its end.
    log.set_len(0).map_err(broken)?;
    let _ = std::fs::write(CONSOLE_LOG, b"");
    if let Memory::File(path) = &files.memory {
        // QEMU cannot make a file there, and gives an empty one its size.
        OpenOptions::new().append(true).create(true).mode(0o600).open(path).map_err(broken)?;
    }
    let file_bytes = quota.map(|quota| layer_limit(home, row, quota)).transpose()?;
    let args = flatten(parts(machine, &files));
    let program = qemu.path.as_path();
    let confinement = confinement(row, machine, &files, program)?;
    tracing::info!(program = %program.display(), ?args, confinement = ?machine.confinement_names(), "starting QEMU");
    let vm_dir = Path::new(".");
    let launch =
        process::Launch { program, args: &args, vm_dir, log, lock: lock.file(), confinement, file_bytes, group };
    QemuProcess::spawn(launch).map_err(|e| {
        // A verdict on the host that does not hold any more is not for the next start.
        host::confinement::invalidate(&home.cache());
        Error::io(format!("cannot start {}", program.display()), e)
    })
}

/// The guest's memory, and the part of the template that it is mapped from.
fn memory<'a>(home: &Home, row: &'a VmRow, qemu: &QemuFacts) -> (Memory, Option<&'a String>) {
    match &row.origin {
        Origin::Fork(saved) => {
            let path = home.blob(&saved.memory).into();
            (Memory::Image { path, read_only: qemu.memory_file_rom }, Some(&saved.memory))
        }
        _ if row.purpose == Purpose::Bake => (Memory::File(MEMORY_IMAGE.into()), None),
        Origin::Boot | Origin::Restore { .. } => (Memory::Fresh, None),
    }
}

/// Whether the parts of the template can be read that the VM needs.
fn check_parts<'a>(home: &Home, row: &'a VmRow, disks_and_memory: impl Iterator<Item = &'a String>) -> Result<()> {
    for part in [&row.parts.vmlinux, &row.parts.initramfs].into_iter().chain(disks_and_memory) {
        std::fs::File::open(home.blob(part)).map_err(|e| {
            Error::new(Code::TemplateMismatch, format!("a part of the VM's template cannot be read: {e}"))
                .hint(nido_engine::template::renewal(&row.spec.template))
        })?;
    }
    Ok(())
}

/// How long the VM's own disk layer may become.
fn layer_limit(home: &Home, row: &VmRow, quota: u64) -> Result<u64> {
    let usage = DiskUsage::of(&home.vm(&row.id)).map_err(|e| Error::io("cannot read the VM's directory", e))?;
    Ok(usage.layer_limit(quota))
}

/// Prepares what QEMU may do on the host: what was decided with the machine. The working directory is the VM's.
fn confinement(row: &VmRow, machine: &Machine, files: &Files, program: &Path) -> Result<Option<Confinement>> {
    let broken = |e| Error::io("cannot confine QEMU", e);
    let needs = needs(machine, files, program, &std::env::current_dir().map_err(broken)?);
    if nido_files::failpoint::ENABLED && needs.is_script {
        return Ok(None);
    }
    let user = machine.own_user.then(|| confine::own_user::id_of(&row.id));
    qemu_files::prepare(&needs, user).map_err(broken)?;
    Confinement::prepare_as(confine::plan::plan(&needs), &machine.confinement, user).map(Some).map_err(broken)
}

/// Finds the QEMU behind the VM's monitor; its connection is returned if it replies. The working directory is the VM's.
pub(super) async fn attach(handle: &QemuHandle) -> Result<Option<Connection>> {
    let lost =
        |why: String| Error::new(Code::QemuFailed, format!("the VM's QEMU cannot be reached: {}", on_one_line(&why)));
    let stream = UnixStream::connect(QMP_SOCKET).await.map_err(|e| lost(e.to_string()))?;
    let process = QemuProcess::behind(&stream).map_err(|e| lost(e.to_string()))?;
    let _ = handle.0.set(process);
    Ok(Monitor::negotiate(stream).await.inspect_err(|error| tracing::error!("{}", lost(error.to_string()))).ok())
}
