//! Starting QEMU for a VM, and finding the QEMU of one that lost its supervisor.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use nido_api::error::{Code, Error, Result};
use nido_engine::home::{
    CHANNEL_SOCKET, CONSOLE_LOG, DISK, GUEST_CONFIG, Home, MEMORY_IMAGE, QEMU_LOG, QMP_SOCKET, VM_LOCK,
};
use nido_engine::host::QemuFacts;
use nido_engine::machine::Machine;
use nido_engine::qemu::argv::{Disk, Files, Memory, flatten, parts};
use nido_engine::qemu::{Monitor, MonitorError, MonitorEvent, QemuProcess, process};
use nido_files::lock::HeldLock;
use nido_store::{Origin, Purpose, VmRow};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// How long QEMU may take until its monitor answers.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(30);

/// A QEMU that runs, and the connection to its monitor.
pub(super) struct RunningQemu {
    pub process: QemuProcess,
    /// `None`: its monitor does not reply, and all that can be done with this QEMU is to kill it.
    monitor: Option<Monitor>,
    /// What QEMU reports; ended for one whose monitor does not reply.
    pub events: mpsc::Receiver<MonitorEvent>,
}

impl RunningQemu {
    /// QEMU's monitor.
    ///
    /// # Errors
    /// `qemu_failed` if it does not reply.
    pub(super) fn monitor(&self) -> Result<&Monitor> {
        self.monitor
            .as_ref()
            .ok_or_else(|| Error::new(Code::QemuFailed, "the VM's QEMU does not reply").hint("stop the VM with force"))
    }

    /// Whether its monitor does not reply: it hangs, or was suspended by a signal.
    pub(super) const fn is_mute(&self) -> bool {
        self.monitor.is_none()
    }
}

/// Why there is no QEMU.
pub(super) enum LaunchError {
    /// It ended before it answered.
    Exited(process::QemuExit),
    /// It could not be started or reached.
    Failed(Error),
}

/// Starts QEMU for the VM. The working directory is the VM's.
pub(super) async fn launch(
    home: &Home,
    row: &VmRow,
    machine: &Machine,
    qemu: &QemuFacts,
) -> Result<RunningQemu, LaunchError> {
    let process = spawn(home, row, machine, qemu).map_err(LaunchError::Failed)?;
    nido_files::failpoint!("launch.spawned");
    let connected = tokio::select! {
        connected = Monitor::connect(Path::new(QMP_SOCKET), MONITOR_TIMEOUT) => connected,
        exit = process.wait() => return Err(LaunchError::Exited(exit.unwrap_or(process::QemuExit::Unknown))),
    };
    match connected {
        Ok((monitor, events)) => Ok(RunningQemu { process, monitor: Some(monitor), events }),
        // It closed the monitor: give it the moment it takes to be seen ending.
        Err(MonitorError::QemuGone | MonitorError::Io(_)) => {
            match tokio::time::timeout(Duration::from_secs(2), process.wait()).await {
                Ok(exit) => Err(LaunchError::Exited(exit.unwrap_or(process::QemuExit::Unknown))),
                Err(_) => Err(give_up(&process, "QEMU's monitor does not reply").await),
            }
        }
        Err(error) => Err(give_up(&process, &error.to_string()).await),
    }
}

async fn give_up(process: &QemuProcess, why: &str) -> LaunchError {
    let _ = process.kill();
    let _ = tokio::time::timeout(Duration::from_secs(5), process.wait()).await;
    LaunchError::Failed(Error::new(
        Code::QemuFailed,
        format!("QEMU could not be controlled: {}", nido_api::sanitize::on_one_line(why)),
    ))
}

fn spawn(home: &Home, row: &VmRow, machine: &Machine, qemu: &QemuFacts) -> Result<QemuProcess> {
    let frozen = row.parts.frozen.iter().map(|frozen| &frozen.sha256);
    let bases: Vec<_> = std::iter::once(&row.parts.root).chain(frozen).collect();
    let incoming = row.origin != Origin::Boot;
    let (memory, image) = match &row.origin {
        Origin::Fork(saved) => {
            let path = home.blob(&saved.memory).into();
            (Memory::Image { path, read_only: qemu.memory_file_rom }, Some(&saved.memory))
        }
        _ if row.purpose == Purpose::Bake => (Memory::File(MEMORY_IMAGE.into()), None),
        Origin::Boot | Origin::Restore { .. } => (Memory::Fresh, None),
    };
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
        },
        monitor_socket: QMP_SOCKET.into(),
        channel_socket: CHANNEL_SOCKET.into(),
        console_log: CONSOLE_LOG.into(),
        guest_config: GUEST_CONFIG.into(),
    };
    for part in [&row.parts.vmlinux, &row.parts.initramfs].into_iter().chain(bases).chain(image) {
        std::fs::File::open(home.blob(part)).map_err(|e| {
            Error::new(Code::TemplateMismatch, format!("a part of the VM's template cannot be read: {e}"))
                .hint(nido_engine::template::renewal(&row.spec.template))
        })?;
    }
    let broken = |e| Error::io("cannot prepare QEMU", e);
    // First of all: while a QEMU of this VM runs, its logs and its monitor's socket are its own.
    let lock = HeldLock::try_take(Path::new(VM_LOCK))
        .map_err(broken)?
        .ok_or_else(|| Error::new(Code::VmBusy, "a QEMU of this VM runs already"))?;
    nido_files::failpoint!("launch.locked");
    let _ = std::fs::remove_file(QMP_SOCKET);
    let log = OpenOptions::new().append(true).create(true).mode(0o600).open(QEMU_LOG).map_err(broken)?;
    // The last run's words are not this one's: they would be taken for the reason of its end.
    log.set_len(0).map_err(broken)?;
    let _ = std::fs::write(CONSOLE_LOG, b"");
    let args = flatten(parts(machine, &files));
    let program = qemu.path.as_path();
    tracing::info!(program = %program.display(), ?args, "starting QEMU");
    QemuProcess::spawn(process::Launch { program, args: &args, vm_dir: Path::new("."), log, lock: lock.file() })
        .map_err(|e| Error::io(format!("cannot start {}", program.display()), e))
}

/// Finds the QEMU behind the VM's monitor, which may not reply. The working directory is the VM's.
pub(super) async fn attach() -> Result<RunningQemu> {
    let lost = |why: String| {
        Error::new(
            Code::QemuFailed,
            format!("the VM's QEMU cannot be reached: {}", nido_api::sanitize::on_one_line(&why)),
        )
    };
    let stream = UnixStream::connect(QMP_SOCKET).await.map_err(|e| lost(e.to_string()))?;
    let process = QemuProcess::behind(&stream).map_err(|e| lost(e.to_string()))?;
    Ok(match Monitor::negotiate(stream).await {
        Ok((monitor, events)) => RunningQemu { process, monitor: Some(monitor), events },
        Err(error) => {
            tracing::error!("{}", lost(error.to_string()));
            RunningQemu { process, monitor: None, events: mpsc::channel(1).1 }
        }
    })
}
