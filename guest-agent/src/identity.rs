//! What makes the root disk the disk of one VM: machine id, SSH host keys, whatever the guest's hooks make, and a line
//! that names the VM that owns the disk.
//!
//! ```text
//! /var/lib/nido-guest/identity is the wanted one?  yes -> nothing to do
//!                                            no  -> machine id -> host keys -> hooks -> the line, last
//! ```
//!
//! Invariant: the line is written only after everything else was done, so an interrupted reset is repeated.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nido_guest_agent::config::GuestConfig;

use crate::etc_files::{PUBLIC, named, overwrite_file, read_file};
use crate::helper_process::{self, HelperProcess};
use crate::reaper::Reaper;
use crate::warnings::warn;

/// Longest identity, in bytes.
const MAX_IDENTITY: usize = 64;
/// Below the root: whose disk this is.
const IDENTITY: &str = "var/lib/nido-guest/identity";
/// Below the root: programs that reset the state of applications.
const HOOKS: &str = "etc/nido/renew.d";
/// Below the root: where host keys are.
const KEYS: &str = "etc/ssh";
const KEY_MAKER: &str = "/usr/bin/ssh-keygen";
/// How long one host key may take: a long RSA key takes tens of seconds under emulation.
const KEY_DEADLINE: Duration = Duration::from_secs(60);
/// How long one hook may take.
const HOOK_DEADLINE: Duration = Duration::from_secs(30);

/// Whether this can be an identity: the characters of the host's ids, and one word in any shell.
pub fn is_valid(identity: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (1..=MAX_IDENTITY).contains(&identity.len()) && identity.bytes().all(is_part)
}

/// Whether the disk whose root is `root` belongs to this VM.
pub fn is_own(root: &Path, identity: &str) -> bool {
    read_file(&root.join(IDENTITY)).is_ok_and(|line| line.trim_ascii() == identity.as_bytes())
}

/// Records that the disk belongs to this VM from now on.
///
/// # Errors
/// The file system refuses.
pub fn record(root: &Path, identity: &str) -> io::Result<()> {
    let file = root.join(IDENTITY);
    let line = format!("{identity}\n");
    match overwrite_file(&file, line.as_bytes(), PUBLIC) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        written => return written.map_err(named(file.display())),
    }
    if let Some(directory) = file.parent() {
        fs::create_dir_all(directory).map_err(named(directory.display()))?;
    }
    overwrite_file(&file, line.as_bytes(), PUBLIC).map_err(named(file.display()))
}

/// Gives the guest a fresh machine id, also where D-Bus keeps a copy of its own.
///
/// # Errors
/// No random numbers, or the file system refuses.
pub fn reset_machine_id(root: &Path) -> io::Result<()> {
    let line = format!("{:032x}\n", random_uuid()?);
    for file in ["etc/machine-id", "var/lib/dbus/machine-id"].map(|file| root.join(file)) {
        let is_copy = file.symlink_metadata().is_ok_and(|facts| facts.is_file());
        if is_copy || file.ends_with("etc/machine-id") {
            overwrite_file(&file, line.as_bytes(), 0o444).map_err(named(file.display()))?;
        }
    }
    Ok(())
}

/// A random UUID (version 4) as a number.
///
/// # Errors
/// The kernel has no random numbers.
pub fn random_uuid() -> io::Result<u128> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    let random = u128::from_be_bytes(bytes);
    Ok(random & !(0xf << 76) & !(0b11 << 62) | 0x4 << 76 | 0b10 << 62)
}

/// A host key that is there.
#[derive(Debug, PartialEq, Eq)]
pub struct HostKey {
    path: PathBuf,
    /// What `ssh-keygen -t` calls it.
    kind: String,
}

/// The type of the key in a file of this name; `None` if it is no host key. What is no type is left to the key maker to
/// refuse: a key must not be passed over.
fn key_kind(name: &str) -> Option<&str> {
    name.strip_prefix("ssh_host_")?.strip_suffix("_key")
}

/// The host keys that are there, by name.
///
/// # Errors
/// The directory is there and cannot be read.
pub fn host_keys(root: &Path) -> io::Result<Vec<HostKey>> {
    let directory = root.join(KEYS);
    let keys = names(&directory)?.into_iter().filter_map(|name| {
        let kind = key_kind(name.to_str()?)?.to_owned();
        Some(HostKey { path: directory.join(&name), kind })
    });
    Ok(keys.collect())
}

/// Replaces these keys by new ones of the same types, and lets a running server read them. A key is replaced when its successor
/// is complete, so a guest that is interrupted here keeps a key of each type and replaces it the next time.
///
/// # Errors
/// A key cannot be made, or not in time.
pub async fn reset_host_keys(reaper: &Arc<Reaper>, keys: &[HostKey]) -> io::Result<()> {
    let mut failed = None;
    for key in keys {
        // One that cannot be made is no reason to leave the others to two machines.
        if let Err(error) = reset_host_key(reaper, key).await {
            failed.get_or_insert(error);
        }
    }
    if !keys.is_empty() {
        reload_ssh_server();
    }
    failed.map_or(Ok(()), Err)
}

async fn reset_host_key(reaper: &Arc<Reaper>, HostKey { path, kind }: &HostKey) -> io::Result<()> {
    let fresh = path.with_extension("nido-new");
    let public = |path: &Path| PathBuf::from(format!("{}.pub", path.display()));
    for leftover in [fresh.clone(), public(&fresh)] {
        match fs::remove_file(&leftover) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(named(leftover.display())(error)),
            _ => {}
        }
    }
    let arguments = ["-q", "-N", "", "-t", kind, "-f", &fresh.to_string_lossy()].map(str::to_owned).to_vec();
    let helper =
        HelperProcess { program: KEY_MAKER.into(), arguments, environment: Vec::new(), deadline: KEY_DEADLINE };
    helper_process::run(reaper, helper).await.map_err(named(format!("{KEY_MAKER} for {}", path.display())))?;
    // The public half first: if the new private half exists, the pair is complete.
    fs::rename(public(&fresh), public(path)).map_err(named(path.display()))?;
    fs::rename(&fresh, path).map_err(named(path.display()))
}

/// Makes a running server read its keys again. Its PID file may be stale, so the process is checked first.
fn reload_ssh_server() {
    let text = read_file(Path::new("/run/sshd.pid")).unwrap_or_default();
    let pid = str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok());
    let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) else { return };
    let name = fs::read(format!("/proc/{}/comm", pid.as_raw_nonzero())).unwrap_or_default();
    if name.trim_ascii() == b"sshd" {
        // Gone meanwhile is as good: it reads its keys when it starts.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::HUP);
    }
}

/// The hooks that are there: executable files, by name.
///
/// # Errors
/// The directory is there and cannot be read.
pub fn hooks(root: &Path) -> io::Result<Vec<PathBuf>> {
    let directory = root.join(HOOKS);
    let is_program =
        |path: &PathBuf| path.metadata().is_ok_and(|facts| facts.is_file() && facts.permissions().mode() & 0o111 != 0);
    Ok(names(&directory)?.into_iter().map(|name| directory.join(name)).filter(is_program).collect())
}

/// Runs hooks one after another.
///
/// # Errors
/// One cannot be started, does not end in time, or fails; those behind it are not run.
pub async fn run_hooks(reaper: &Arc<Reaper>, hooks: Vec<PathBuf>, hostname: &str, identity: &str) -> io::Result<()> {
    for hook in hooks {
        let failed = named(format!("the hook {}", hook.display()));
        let Some(program) = hook.to_str().map(str::to_owned) else {
            return Err(failed(io::Error::other("its name is not UTF-8")));
        };
        let environment = vec![format!("NIDO_NAME={hostname}"), format!("NIDO_IDENTITY={identity}")];
        let helper = HelperProcess { program, arguments: Vec::new(), environment, deadline: HOOK_DEADLINE };
        helper_process::run(reaper, helper).await.map_err(failed)?;
    }
    Ok(())
}

/// The names in a directory, sorted; none if there is no such directory.
fn names(directory: &Path) -> io::Result<Vec<OsString>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(named(directory.display()))?,
    };
    let mut names = entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// At a cold boot, before another process 1 takes over: gives a disk that is not this VM's its machine id and host
/// keys. The hooks, and with them the line, are left to the agent that runs as a service.
pub fn reset_disk_before_init(config: &GuestConfig) {
    let root = Path::new("/");
    if config.identity.is_empty() || is_own(root, &config.identity) {
        return;
    }
    done("the machine id", reset_machine_id(root));
    let keys = match host_keys(root) {
        Ok(keys) if keys.is_empty() => return,
        Ok(keys) => keys,
        Err(error) => {
            done("the host keys", Err(error));
            return;
        }
    };
    let renewed = tokio::runtime::Builder::new_current_thread().enable_all().build().and_then(|runtime| {
        runtime.block_on(async {
            let reaper = Arc::new(Reaper::default());
            let reaped = reaper.clone();
            tokio::spawn(async move { reaped.reap().await });
            reset_host_keys(&reaper, &keys).await
        })
    });
    done("the host keys", renewed);
}

/// At a cold boot, before the host is listened to: what [`reset_disk_before_init`] has left, or (as process 1) everything.
pub async fn reset_new_disk(reaper: &Arc<Reaper>, config: &GuestConfig, is_init: bool) {
    let (root, identity) = (Path::new("/"), config.identity.as_str());
    if identity.is_empty() || is_own(root, identity) {
        return;
    }
    let parts = if is_init { Parts::All } else { Parts::Hooks };
    reset_disk(reaper, root, parts, &config.hostname, identity).await;
}

/// What of a disk is made this VM's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parts {
    /// Machine id, host keys, hooks.
    All,
    /// Hooks only: the rest was done before.
    Hooks,
}

/// Makes a disk this VM's own, and records that on it if everything could be done. What could not is a warning, and is tried
/// again at the next start: a machine id that cannot be written must not keep its owner out.
pub async fn reset_disk(reaper: &Arc<Reaper>, root: &Path, parts: Parts, hostname: &str, identity: &str) {
    let mut is_whole = true;
    if parts == Parts::All {
        is_whole &= done("the machine id", reset_machine_id(root));
        let keys = match host_keys(root) {
            Ok(keys) => reset_host_keys(reaper, &keys).await,
            Err(error) => Err(error),
        };
        is_whole &= done("the host keys", keys);
    }
    let hooks = match hooks(root) {
        Ok(hooks) => run_hooks(reaper, hooks, hostname, identity).await,
        Err(error) => Err(error),
    };
    is_whole &= done("the state that the hooks reset", hooks);
    if is_whole {
        done("the identity", record(root, identity));
    }
}

/// Warns of a step that failed; whether it did not.
fn done(step: &str, result: io::Result<()>) -> bool {
    match result {
        Ok(()) => true,
        Err(error) => {
            warn(format!("{step} could not be reset: {error}"));
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_matches_only_with_its_complete_identity_line() {
        let root = tempfile::tempdir().unwrap();
        assert!(!is_own(root.path(), "0123abc"));
        record(root.path(), "0123abc").unwrap();
        assert_eq!(fs::read(root.path().join(IDENTITY)).unwrap(), b"0123abc\n");
        assert!(is_own(root.path(), "0123abc"));
        assert!(!is_own(root.path(), "0123ab") && !is_own(root.path(), "0123abcd") && !is_own(root.path(), ""));
        fs::write(root.path().join(IDENTITY), b"").unwrap();
        assert!(!is_own(root.path(), "0123abc"));
    }

    #[tokio::test]
    async fn a_failed_disk_reset_is_not_recorded_and_is_retried() {
        // A machine id or a hook that could not be reset ended the start.
        let root = tempfile::tempdir().unwrap();
        let reaper = Arc::new(Reaper::default());
        fs::create_dir_all(root.path().join("etc/machine-id/in-the-way")).unwrap();
        fs::create_dir_all(root.path().join("etc/nido")).unwrap();
        fs::write(root.path().join(HOOKS), "no directory").unwrap();
        reset_disk(&reaper, root.path(), Parts::All, "web", "0123abc").await;
        assert!(!is_own(root.path(), "0123abc"));
        fs::remove_dir_all(root.path().join("etc/machine-id")).unwrap();
        fs::remove_file(root.path().join(HOOKS)).unwrap();
        reset_disk(&reaper, root.path(), Parts::All, "web", "0123abc").await;
        assert!(is_own(root.path(), "0123abc") && root.path().join("etc/machine-id").is_file());
    }

    #[test]
    fn an_identity_is_a_word() {
        for good in ["a", "0123456789abcdef", "a-b", &"x".repeat(64)] {
            assert!(is_valid(good), "{good:?}");
        }
        for bad in ["", "a b", "../x", "a\n", "ä", &"x".repeat(65)] {
            assert!(!is_valid(bad), "{bad:?}");
        }
    }

    #[test]
    fn a_machine_id_is_fresh_and_reaches_every_copy_but_no_link() {
        let root = tempfile::tempdir().unwrap();
        let (etc, dbus) = (root.path().join("etc"), root.path().join("var/lib/dbus"));
        fs::create_dir_all(&etc).unwrap();
        fs::create_dir_all(&dbus).unwrap();
        let read = || fs::read_to_string(etc.join("machine-id")).unwrap();
        reset_machine_id(root.path()).unwrap();
        let first = read();
        assert!(!dbus.join("machine-id").exists());
        assert!(first.len() == 33 && first.trim_end().bytes().all(|byte| byte.is_ascii_hexdigit()));
        std::os::unix::fs::symlink("/etc/machine-id", dbus.join("machine-id")).unwrap();
        reset_machine_id(root.path()).unwrap();
        assert!(dbus.join("machine-id").is_symlink());
        assert_ne!(read(), first);
        fs::remove_file(dbus.join("machine-id")).unwrap();
        fs::write(dbus.join("machine-id"), &first).unwrap();
        reset_machine_id(root.path()).unwrap();
        assert_eq!(fs::read_to_string(dbus.join("machine-id")).unwrap(), read());
    }

    #[test]
    fn a_random_uuid_has_its_version_bits() {
        let (one, other) = (random_uuid().unwrap(), random_uuid().unwrap());
        assert_ne!(one, other);
        assert_eq!((one >> 76 & 0xf, one >> 62 & 0b11), (4, 0b10));
    }

    #[test]
    fn host_keys_are_found_by_name() {
        assert_eq!(key_kind("ssh_host_rsa_key"), Some("rsa"));
        assert_eq!(key_kind("ssh_host_ed25519_key"), Some("ed25519"));
        assert_eq!(key_kind("ssh_host_of_mine_key"), Some("of_mine"));
        for other in ["ssh_host_rsa_key.pub", "ssh_host_rsa_key.nido-new", "ssh_host_key", "ssh_config"] {
            assert_eq!(key_kind(other), None, "{other}");
        }
        let root = tempfile::tempdir().unwrap();
        assert_eq!(host_keys(root.path()).unwrap(), []);
        fs::create_dir_all(root.path().join(KEYS)).unwrap();
        for name in ["ssh_host_rsa_key.pub", "ssh_host_rsa_key", "ssh_host_ecdsa_key", "sshd_config"] {
            fs::write(root.path().join(KEYS).join(name), "").unwrap();
        }
        let kinds: Vec<_> = host_keys(root.path()).unwrap().into_iter().map(|key| key.kind).collect();
        assert_eq!(kinds, ["ecdsa", "rsa"]);
    }

    #[test]
    fn hooks_are_the_executable_files_by_name() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(hooks(root.path()).unwrap(), [] as [PathBuf; 0]);
        let directory = root.path().join(HOOKS);
        fs::create_dir_all(directory.join("10-directory")).unwrap();
        for (name, mode) in [("20-b", 0o755), ("10-a", 0o700), ("15-notes.txt", 0o644)] {
            fs::write(directory.join(name), "").unwrap();
            fs::set_permissions(directory.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        std::os::unix::fs::symlink("20-b", directory.join("30-link")).unwrap();
        std::os::unix::fs::symlink("nowhere", directory.join("40-dangling")).unwrap();
        let names: Vec<_> = hooks(root.path()).unwrap();
        assert_eq!(names, ["10-a", "20-b", "30-link"].map(|name| directory.join(name)));
    }
}
