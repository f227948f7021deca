//! Every path and file name, once. What the files are for and who writes them: `docs/state.md`.
//!
//! Invariant: nothing that users or guests choose becomes a path: VMs' directories carry ids, templates' files carry
//! parsed names.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nido_api::error::{Code, Error, Hint, Result};
use nido_files::atomic_file::{Durability, create_private};
use nido_files::layout;
use nido_files::private_dir::{make_private_dir, make_private_dir_in_place};

/// Locked while QEMU runs: QEMU inherits the descriptor.
pub const VM_LOCK: &str = "vm.lock";
/// Locked by the process that may change the VM: its supervisor, or the command that starts or deletes it.
pub const SUPERVISOR_LOCK: &str = "supervisor.lock";
/// The directory of the sockets of QEMU, and of those that it connects to: QEMU can change it, and nothing else that is a directory.
pub const QEMU_DIRECTORY: &str = "qemu";
/// Sockets that earlier versions had in the VM's directory itself.
pub const EARLIER_SOCKETS: [&str; 7] =
    ["qmp.sock", "channel.sock", "net.sock", "net-qemu.sock", "load.sock", "save.sock", "snapshot.sock"];
/// QEMU's monitor.
pub const QMP_SOCKET: &str = "qemu/qmp.sock";
/// Where QEMU brings the guest's virtio-serial port; the supervisor listens.
pub const CHANNEL_SOCKET: &str = "qemu/channel.sock";
/// Each connection is one stream to the agent; the supervisor listens.
pub const AGENT_SOCKET: &str = "agent.sock";
/// Requests to the supervisor.
pub const CONTROL_SOCKET: &str = "control.sock";
/// The supervisor's end of the guest's network link: a frame is a datagram.
pub const NETWORK_SOCKET: &str = "qemu/net.sock";
/// QEMU's end of it.
pub const NETWORK_QEMU_SOCKET: &str = "qemu/net-qemu.sock";
/// The guest's serial console, as QEMU writes it.
pub const CONSOLE_LOG: &str = "console.log";
/// What QEMU itself prints.
pub const QEMU_LOG: &str = "qemu.log";
/// The supervisor's log.
pub const SUPERVISOR_LOG: &str = "supervisor.log";
/// The configuration that the guest reads at boot (contains the token).
pub const GUEST_CONFIG: &str = "guest.cbor";
/// The memory of a VM that is there to be baked.
pub const MEMORY_IMAGE: &str = "memory.img";
/// The device state of one.
pub const DEVICE_STATE: &str = "state.bin";
/// Where QEMU is given the state of a machine that was saved.
pub const LOAD_SOCKET: &str = "qemu/load.sock";
/// Where QEMU saves the state of a machine that becomes a warm image.
pub const SAVE_SOCKET: &str = "qemu/save.sock";
/// Where QEMU saves the state of a machine for a snapshot.
pub const SNAPSHOT_SOCKET: &str = "qemu/snapshot.sock";
/// The VM's snapshots, by name.
pub const SNAPSHOTS: &str = "snapshots";
/// What the supervisor could not write into the store yet.
pub const UNWRITTEN: &str = "unwritten.json";
/// The addresses that the guest has resolved names to.
pub const NAME_PINS: &str = "names.json";
/// How many bytes the guest has sent and received since its start.
pub const TRAFFIC: &str = "traffic";
/// The VM's disk: an overlay on the template's.
pub const DISK: &str = "disk.qcow2";
/// Its disk while that is made.
pub const DISK_TEMPORARY: &str = "disk.qcow2.new";
/// What the VM's row needs, so that the row can be rebuilt from its directory.
pub const VM_RECORD: &str = "vm.json";
/// The sealed key of the VM's certificate authority.
pub const AUTHORITY: &str = "authority.sealed";
/// The path of the control group that nido has made for QEMU, until it is removed.
pub const CONTROL_GROUP: &str = "cgroup";
/// Prefix of the name of a directory that is being removed: a VM's or a snapshot's.
pub const REMOVED_PREFIX: &str = ".gone-";

/// Where nido keeps everything.
#[derive(Debug, Clone)]
pub struct Home {
    root: PathBuf,
}

impl Home {
    /// The home that applies when none is named: `/var/lib/nido` for root, `$XDG_DATA_HOME/nido` or
    /// `~/.local/share/nido` for others.
    ///
    /// # Errors
    /// `spec_invalid` if the user has no home directory.
    pub fn default_root() -> Result<PathBuf> {
        if rustix::process::geteuid().is_root() {
            return Ok("/var/lib/nido".into());
        }
        xdg("XDG_DATA_HOME", ".local/share").map(|base| base.join("nido")).ok_or_else(|| {
            Error::new(Code::SpecInvalid, "there is no home directory for nido's data")
                .hint(Hint::host("set NIDO_HOME"))
        })
    }

    /// Opens a home; makes it (0700) if it is not there.
    ///
    /// # Errors
    /// `denied` if it belongs to another user, `disk_full`, `internal`.
    pub fn open(root: &Path) -> Result<Self> {
        let shown = root.display();
        let root = std::path::absolute(root).map_err(|e| Error::io_at("use", root, e))?;
        make_private_dir(&root).map_err(|e| Error::io_at("create nido's home", &root, e))?;
        let meta = std::fs::metadata(&root).map_err(|e| Error::io_at("read nido's home", &root, e))?;
        let me = rustix::process::geteuid().as_raw();
        if meta.uid() != me {
            return Err(Error::new(Code::Denied, format!("{shown} belongs to another user (uid {})", meta.uid()))
                .hint(Hint::host("use a home of your own with --home or NIDO_HOME")));
        }
        if meta.mode() & 0o077 != 0 {
            return Err(Error::new(Code::Denied, format!("{shown} can be opened by other users"))
                .hint(Hint::host(format!("run chmod 700 {shown}, since it holds tokens and monitor sockets"))));
        }
        let home = Self { root };
        if home.is_writable() {
            make_private_dir(&home.vms()).map_err(|e| Error::io_at("make", &home.vms(), e))?;
        }
        Ok(home)
    }

    /// Whether files can be made in it: not on a read-only mount, nor where its mode forbids it.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        rustix::fs::access(&self.root, rustix::fs::Access::WRITE_OK).is_ok()
    }

    /// The directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The store.
    #[must_use]
    pub fn database(&self) -> PathBuf {
        self.root.join(layout::DATABASE)
    }

    /// Space that is kept for giving space back.
    #[must_use]
    pub fn space_reserve(&self) -> PathBuf {
        self.root.join(layout::SPACE_RESERVE)
    }

    /// Facts about the host that are worth keeping.
    #[must_use]
    pub fn cache(&self) -> PathBuf {
        self.root.join(layout::CACHE)
    }

    /// The directory of all VMs.
    #[must_use]
    pub fn vms(&self) -> PathBuf {
        self.root.join(layout::VMS)
    }

    /// The last backup of the store, and the one before.
    #[must_use]
    pub fn database_backups(&self) -> [PathBuf; 2] {
        [layout::DATABASE_BACKUP, layout::DATABASE_BACKUP_OLDER].map(|name| self.root.join(name))
    }

    /// A new store while it is rebuilt.
    #[must_use]
    pub fn rebuilt_database(&self) -> PathBuf {
        self.root.join(layout::DATABASE_REBUILT)
    }

    /// Held by the process that rebuilds the store.
    #[must_use]
    pub fn rebuild_lock(&self) -> PathBuf {
        self.root.join(layout::REBUILD_LOCK)
    }

    /// Held by the process that makes a backup of the store.
    #[must_use]
    pub fn backup_lock(&self) -> PathBuf {
        self.root.join(layout::DATABASE_BACKUP_LOCK)
    }

    /// Where the directory of a VM that is being removed lies until all its files are gone.
    #[must_use]
    pub fn removed_vm(&self, id: &str) -> PathBuf {
        self.vms().join(format!("{REMOVED_PREFIX}{id}"))
    }

    /// A VM's directory.
    #[must_use]
    pub fn vm(&self, id: &str) -> VmDir {
        VmDir { path: self.vms().join(id) }
    }

    /// The directory of liveness locks: of servers that carry out jobs, of sessions that VMs belong to.
    #[must_use]
    pub fn present(&self) -> PathBuf {
        self.root.join(layout::LIVENESS_LOCKS)
    }

    /// Held (flock(2)) shared while a VM is created, exclusively while template parts are removed.
    #[must_use]
    pub fn templates_lock(&self) -> PathBuf {
        self.root.join(layout::TEMPLATES_LOCK)
    }

    /// Held by the process that fills the pools.
    #[must_use]
    pub fn pool_lock(&self) -> PathBuf {
        self.root.join(layout::POOL_LOCK)
    }

    /// Held by the process that delivers messages of webhooks.
    #[must_use]
    pub fn delivery_lock(&self) -> PathBuf {
        self.root.join(layout::DELIVERY_LOCK)
    }

    /// Held by the guardian: the process that starts a supervisor for a QEMU that has none.
    #[must_use]
    pub fn guardian_lock(&self) -> PathBuf {
        self.root.join(layout::GUARDIAN_LOCK)
    }

    /// The directory of the logs of background processes and builds.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.root.join(layout::LOGS)
    }

    /// The directory of the server's own certificate.
    #[must_use]
    pub fn tls(&self) -> PathBuf {
        self.root.join(layout::TLS)
    }

    /// The sealed secrets.
    #[must_use]
    pub fn secrets(&self) -> PathBuf {
        self.root.join(layout::SECRETS)
    }

    /// The key that seals them.
    #[must_use]
    pub fn secrets_key(&self) -> PathBuf {
        self.root.join(layout::SECRETS_KEY)
    }

    /// Where agents on this machine may have files copied from and to.
    #[must_use]
    pub fn exchange(&self) -> PathBuf {
        self.root.join(layout::EXCHANGE)
    }

    /// A part of a template, as seen from inside a VM's directory: goes into the overlay's header, so a home can move.
    #[must_use]
    pub fn blob_from_vm_dir(sha256: &str) -> String {
        format!("../../{}/{sha256}", layout::BLOBS)
    }

    /// Where the audit log is: as the home records. Before anything was written into it: of the home that applies when none is named,
    /// `/var/log/nido` for root, else `nido` in `$XDG_STATE_HOME` or `~/.local/state`; of every other, in the home.
    #[must_use]
    pub fn audit(&self) -> PathBuf {
        match std::fs::read(self.root.join(layout::AUDIT_PLACE)) {
            Ok(kept) if !kept.is_empty() => self.root.join(OsString::from_vec(kept)),
            _ => self.audit_of_environment(),
        }
    }

    /// The same, and from now on it is fixed, whatever the environment of other processes: one home never has two logs.
    ///
    /// # Errors
    /// The home cannot be written.
    pub fn keep_audit_place(&self) -> std::io::Result<PathBuf> {
        let kept = self.root.join(layout::AUDIT_PLACE);
        if !kept.exists() {
            let place = self.audit_of_environment();
            // A home may be moved, and what is in it with it.
            let told = place.strip_prefix(&self.root).unwrap_or(&place);
            match create_private(&kept, told.as_os_str().as_bytes(), Durability::PowerCut) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        Ok(self.audit())
    }

    fn audit_of_environment(&self) -> PathBuf {
        let real = |path: PathBuf| path.canonicalize().unwrap_or(path);
        let is_default = Self::default_root().is_ok_and(|default| real(default) == real(self.root.clone()));
        let is_root = rustix::process::geteuid().is_root();
        audit_of(&self.root, is_default, is_root, xdg("XDG_STATE_HOME", ".local/state"))
    }

    /// The directory of all template parts.
    #[must_use]
    pub fn blobs(&self) -> PathBuf {
        self.root.join(layout::BLOBS)
    }

    /// A part of a template.
    #[must_use]
    pub fn blob(&self, sha256: &str) -> PathBuf {
        self.blobs().join(sha256)
    }
}

/// Where the audit log of the home at `root` is. Pure.
fn audit_of(root: &Path, is_default: bool, is_root: bool, state: Option<PathBuf>) -> PathBuf {
    match (is_default, is_root, state) {
        (true, true, _) => "/var/log/nido".into(),
        (true, false, Some(state)) => state.join("nido"),
        _ => root.join(layout::AUDIT),
    }
}

/// A base directory of the user: what the variable names, else `tail` in the user's home directory.
fn xdg(variable: &str, tail: &str) -> Option<PathBuf> {
    let from = |key: &str| std::env::var_os(key).map(PathBuf::from).filter(|p| p.is_absolute());
    from(variable).or_else(|| from("HOME").map(|home| home.join(tail)))
}

/// A VM's directory.
#[derive(Debug, Clone)]
pub struct VmDir {
    path: PathBuf,
}

impl VmDir {
    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One of its files.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Makes it, 0700.
    ///
    /// # Errors
    /// `disk_full`, `internal`.
    pub fn make(&self) -> Result<()> {
        make_private_dir_in_place(&self.path).map_err(|e| Error::io_at("create the VM's directory", &self.path, e))
    }

    /// A way to its sockets that is short enough for a socket address, however deep the home lies.
    ///
    /// # Errors
    /// The directory cannot be opened.
    pub fn sockets(&self) -> std::io::Result<SocketDir> {
        use rustix::fs::{Mode, OFlags};
        let fd = rustix::fs::open(&self.path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(SocketDir { fd })
    }
}

/// An open VM directory, for socket addresses.
#[derive(Debug)]
pub struct SocketDir {
    fd: OwnedFd,
}

impl SocketDir {
    /// A path to `name` in it; valid as long as this value lives.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_home_has_its_audit_log_apart_and_every_other_within() {
        let place = |is_default, is_root, state: Option<&str>| {
            audit_of(Path::new("/home/me/vms"), is_default, is_root, state.map(PathBuf::from))
        };
        assert_eq!(place(true, true, Some("/root/.local/state")), Path::new("/var/log/nido"));
        assert_eq!(place(true, false, Some("/home/me/.local/state")), Path::new("/home/me/.local/state/nido"));
        for (is_default, is_root, state) in [(false, true, Some("/s")), (false, false, Some("/s")), (true, false, None)]
        {
            assert_eq!(place(is_default, is_root, state), Path::new("/home/me/vms/audit"));
        }
    }
}
