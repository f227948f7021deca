//! Process 1 in the initramfs: from a bare kernel to the guest's root disk.
//!
//! ```text
//! proc sys dev run -> modules -> configuration -> /dev/vda -> switch root -> Agent:  hostname, mounts, serve
//!                                                                         '> System: copy into /run/nido, /sbin/init
//! ```
//!
//! Invariant: a failed step without which the agent cannot serve is reported on the console and ends the VM; any other is a warning.
//! Nothing waits without a deadline.

use std::fs;
use std::io::{self, Read as _, Seek as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nido_guest_agent::config::{Channel, FW_CFG_PATH, GuestConfig, Init};
use rustix::mount::{MountFlags, mount, mount_move};

use crate::warnings::{self, warn};
use crate::{ServeMode, hostname, identity, power, read_config, run as serve, sys};

/// Where the initramfs stores the configuration for the agent as a service.
pub const SAVED_CONFIG: &str = "/run/nido/config";
/// Where the initramfs stores the agent itself.
const SAVED_AGENT: &str = "/run/nido/nido-guest-agent";
/// How long the root disk may take to appear.
const DISK_DEADLINE: Duration = Duration::from_secs(20);
const DISK: &str = "/dev/vda";
const NEW_ROOT: &str = "/newroot";
const MODULES: &str = "/lib/modules";

/// Runs the guest. Returns only if that cannot be done.
///
/// # Errors
/// What has gone wrong.
pub fn run() -> io::Result<()> {
    mount_kernel_views()?;
    let config = load_modules()?;
    mount_root()?;
    let rest = config.init == Init::System;
    if rest {
        leave_for_service()?;
    }
    switch_root()?;
    hostname::set(&config.hostname);
    if rest {
        identity::reset_disk_before_init(&config);
        warnings::save();
        let error = std::process::Command::new("/sbin/init").env_clear().exec();
        return Err(during("starting /sbin/init", error));
    }
    mount_for_programs();
    for (what, done) in [
        ("raising the limit of open files", raise_limits()),
        // Ctrl-Alt-Del would restart the guest at once.
        ("taking Ctrl-Alt-Del from the kernel", nix::sys::reboot::set_cad_enabled(false).map_err(Into::into)),
    ] {
        done.unwrap_or_else(|error| warn(format!("{what}: {error}")));
    }
    serve(config, ServeMode::Guest(power::Mode::Init))
}

fn during(what: &str, error: impl Into<io::Error>) -> io::Error {
    let error = error.into();
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// A file system of the kernel's own.
fn mount_own(kind: &str, target: &str, flags: MountFlags, data: &str) -> io::Result<()> {
    fs::create_dir_all(target).map_err(|error| during(target, error))?;
    let data = std::ffi::CString::new(data).map_err(io::Error::other)?;
    mount(kind, target, kind, flags, data.as_c_str()).map_err(|error| during(&format!("mounting {target}"), error))
}

const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

fn mount_kernel_views() -> io::Result<()> {
    mount_own("proc", "/proc", PLAIN, "")?;
    mount_own("sysfs", "/sys", PLAIN, "")?;
    mount_own("devtmpfs", "/dev", MountFlags::NOSUID, "mode=0755")?;
    mount_own("tmpfs", "/run", MountFlags::NOSUID | MountFlags::NODEV, "mode=0755,size=20%")
}

/// Loads the kernel's modules in the order of their list, and reads the configuration as soon as it can be read, since
/// it lists which of them are needed.
fn load_modules() -> io::Result<GuestConfig> {
    let list = format!("{MODULES}/list");
    let list = fs::read_to_string(&list).map_err(|error| during(&list, error))?;
    let mut config = None;
    for name in list.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if config.is_none() && Path::new(FW_CFG_PATH).exists() {
            config = Some(read_config(FW_CFG_PATH)?);
        }
        if config.as_ref().is_none_or(|config| is_needed(name, config)) {
            load_module(name)?;
        }
    }
    match config {
        Some(config) => Ok(config),
        None => read_config(FW_CFG_PATH),
    }
}

/// Whether a module serves a VM of this configuration.
fn is_needed(module: &str, config: &GuestConfig) -> bool {
    let is_vsock = module.contains("vsock");
    let is_network = matches!(module, "virtio_net.ko" | "net_failover.ko" | "failover.ko");
    (!is_vsock || config.channel == Channel::Vsock) && (!is_network || config.network.is_some())
}

fn load_module(name: &str) -> io::Result<()> {
    let file = fs::File::open(Path::new(MODULES).join(name)).map_err(|error| during(name, error))?;
    match rustix::system::finit_module(&file, c"", 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(during(&format!("loading {name}"), error)),
    }
}

fn mount_root() -> io::Result<()> {
    let deadline = Instant::now() + DISK_DEADLINE;
    while !Path::new(DISK).exists() {
        if Instant::now() > deadline {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("the root disk {DISK} does not appear")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    fs::create_dir_all(NEW_ROOT)?;
    mount(DISK, NEW_ROOT, "ext4", MountFlags::NOATIME, c"").map_err(|error| during("mounting the root disk", error))
}

/// Lets the root file system fill its disk, if that has become larger. The file system is in use meanwhile, and this
/// may take a second: it is done beside the sessions.
pub fn grow_root_in_background() {
    tokio::task::spawn_blocking(|| {
        if let Err(error) = grow_root() {
            warn(format!("the root file system does not fill its disk: {error}"));
        }
    });
}

fn grow_root() -> io::Result<()> {
    let mut device = fs::File::open(DISK)?;
    let bytes = device.seek(io::SeekFrom::End(0))?;
    let mut superblock = vec![0; 1024];
    device.seek(io::SeekFrom::Start(1024))?;
    device.read_exact(&mut superblock)?;
    match wanted_blocks(&superblock, bytes) {
        Some(blocks) => sys::resize_ext4(&fs::File::open("/")?, blocks),
        None => Ok(()),
    }
}

/// How many blocks an ext4 file system should get on a device of so many bytes; `None` if it fills it already.
fn wanted_blocks(superblock: &[u8], device_bytes: u64) -> Option<u64> {
    const HAS_64_BIT: u32 = 0x80;
    let word = |at: usize| Some(u32::from_le_bytes(*superblock.get(at..)?.first_chunk::<4>()?));
    let high = if word(0x60)? & HAS_64_BIT == 0 { 0 } else { u64::from(word(0x150)?) << 32 };
    let blocks = high | u64::from(word(0x04)?);
    let block_bytes = 1024u64.checked_shl(word(0x18)?)?;
    let possible = device_bytes.checked_div(block_bytes)?;
    (possible > blocks).then_some(possible)
}

/// Keeps the agent and its configuration where they survive the switch of roots.
fn leave_for_service() -> io::Result<()> {
    fs::create_dir_all("/run/nido")?;
    fs::set_permissions("/run/nido", fs::Permissions::from_mode(0o700))?;
    let config = fs::read(FW_CFG_PATH)?;
    let mut saved = fs::OpenOptions::new();
    let mut saved = saved.write(true).create_new(true).mode(0o600).open(SAVED_CONFIG)?;
    io::Write::write_all(&mut saved, &config)?;
    fs::copy("/init", SAVED_AGENT).map_err(|error| during("keeping a copy of the agent", error))?;
    fs::set_permissions(SAVED_AGENT, fs::Permissions::from_mode(0o700))
}

/// Makes the root disk the root, and frees what the initramfs holds.
fn switch_root() -> io::Result<()> {
    for view in ["/dev", "/proc", "/sys", "/run"] {
        let target = format!("{NEW_ROOT}{view}");
        fs::create_dir_all(&target).map_err(|error| during(&target, error))?;
        mount_move(view, &target).map_err(|error| during(&format!("moving {view}"), error))?;
    }
    // Only memory is at stake.
    let _ = fs::remove_dir_all("/lib");
    let _ = fs::remove_file("/init");
    std::env::set_current_dir(NEW_ROOT)?;
    mount_move(".", "/").map_err(|error| during("moving the root disk", error))?;
    rustix::process::chroot(".").map_err(|error| during("changing the root", error))?;
    std::env::set_current_dir("/")
}

/// What programs expect beyond the kernel's own views, where no other init mounts it.
/// Whatever of it cannot be had is a warning: the guest can still be reached, and put right.
fn mount_for_programs() {
    let terminals = MountFlags::NOSUID | MountFlags::NOEXEC;
    let mounts = [
        mount_own("devpts", "/dev/pts", terminals, "mode=0620,gid=5,ptmxmode=0666"),
        mount_own("tmpfs", "/dev/shm", MountFlags::NOSUID | MountFlags::NODEV, "mode=1777"),
        // Without the second option, which older kernels lack, each command that is started waits for the others' CPUs.
        mount_own("cgroup2", "/sys/fs/cgroup", PLAIN, "nsdelegate,favordynmods")
            .or_else(|_older| mount_own("cgroup2", "/sys/fs/cgroup", PLAIN, "nsdelegate")),
    ];
    let links =
        [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")].map(|(name, target)| {
            let link = Path::new("/dev").join(name);
            std::os::unix::fs::symlink(target, &link).map_err(|error| during(&link.to_string_lossy(), error))
        });
    let shared = ["/tmp", "/run/lock"].map(|directory| {
        let made = fs::create_dir_all(directory);
        made.and_then(|()| fs::set_permissions(directory, fs::Permissions::from_mode(0o1777)))
            .map_err(|error| during(directory, error))
    });
    let all = mounts.into_iter().chain(links).chain(shared);
    all.filter_map(Result::err).for_each(|error| warn(error.to_string()));
}

/// As many open files as other systems allow; the kernel's own limit for process 1 is 4096.
fn raise_limits() -> io::Result<()> {
    Ok(nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 65_536, 524_288)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock(blocks: u64, log_block: u32, wide: bool) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        bytes[0x04..0x08].copy_from_slice(&(blocks as u32).to_le_bytes());
        bytes[0x18..0x1c].copy_from_slice(&log_block.to_le_bytes());
        bytes[0x60] = if wide { 0x80 } else { 0 };
        bytes[0x150..0x154].copy_from_slice(&((blocks >> 32) as u32).to_le_bytes());
        bytes
    }

    #[test]
    fn a_file_system_grows_only_into_a_larger_disk() {
        assert_eq!(wanted_blocks(&superblock(1000, 2, true), 8_192_000), Some(2000));
        assert_eq!(wanted_blocks(&superblock(2000, 2, true), 8_192_000), None);
        assert_eq!(wanted_blocks(&superblock(2000, 2, false), 8_191_999), None);
        assert_eq!(wanted_blocks(&superblock((1 << 32) + 5, 2, true), 8_192_000), None);
        assert_eq!(wanted_blocks(&superblock(1, 77, true), 8_192_000), None);
        assert_eq!(wanted_blocks(&[], 8_192_000), None);
    }
}
