//! Can a QEMU that root starts have a user of its own on this host? Proven by changing to one in a child that ends at once, like the
//! namespaces in [`super::confinement`].

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown};
use std::path::Path;

use nido_files::private_dir::make_private_dir;
use serde::{Deserialize, Serialize};

use super::cache;
use super::trial::{Attempt, CacheKey, cache_key, in_a_child, judge};
use crate::confine::{Confinement, Layer, Needs, own_user, plan};

const CACHE_NAME: &str = "own-user.json";
/// What root needs to start QEMU as another user, and to work with it: the numbers of capabilities and their names.
const CAPABILITIES: [(u32, &str); 7] = [
    (0, "CAP_CHOWN"),
    (1, "CAP_DAC_OVERRIDE"),
    (5, "CAP_KILL"),
    (6, "CAP_SETGID"),
    (7, "CAP_SETUID"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
];
const DEVICES: [&str; 2] = ["/dev/kvm", "/dev/vhost-vsock"];

/// Whether a QEMU that this user starts can have a user of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OwnUser {
    /// This user is not root, and has no other user to give.
    #[default]
    NotRoot,
    /// It has one.
    Available,
    /// Root cannot give it one, and why.
    Unavailable(String),
}

/// What the verdict depends on.
#[derive(PartialEq, Serialize, Deserialize)]
struct Key {
    process: CacheKey,
    capabilities: u64,
    /// The owners, modes and numbers of the devices.
    devices: Vec<Option<(u32, u32, u64)>>,
}

/// Whether this host allows it. The result is remembered as that for namespaces is. Blocks.
pub(super) fn probe(cache_dir: &Path) -> OwnUser {
    if !rustix::process::geteuid().is_root() {
        return OwnUser::NotRoot;
    }
    let capabilities = capabilities().unwrap_or(0);
    if let Some((_, name)) = CAPABILITIES.iter().find(|(number, _)| capabilities & (1 << number) == 0) {
        return OwnUser::Unavailable(format!("root has no {name}"));
    }
    let key = cache_key().map(|process| Key { process, capabilities, devices: DEVICES.map(device).into() });
    let cached = key.as_ref().and_then(|key| cache::get::<_, Option<String>>(cache_dir, CACHE_NAME, key));
    let trouble = cached.unwrap_or_else(|| {
        let Attempt { trouble, is_proof } = try_own_user(cache_dir);
        if let (true, Some(key)) = (is_proof, &key) {
            cache::put(cache_dir, CACHE_NAME, key, &trouble);
        }
        trouble
    });
    trouble.map_or(OwnUser::Available, OwnUser::Unavailable)
}

/// Removes the cached verdict.
pub(super) fn invalidate(cache_dir: &Path) {
    cache::invalidate(cache_dir, CACHE_NAME);
}

fn device(path: &str) -> Option<(u32, u32, u64)> {
    fs::metadata(path).ok().map(|meta| (meta.uid(), meta.mode(), meta.rdev()))
}

/// The capabilities in force.
fn capabilities() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(value.trim(), 16).ok()
}

fn try_own_user(directory: &Path) -> Attempt {
    let attempt = || {
        make_private_dir(directory)?;
        let directory = fs::canonicalize(directory)?;
        if let Err(error) = give_a_file(&directory) {
            return Ok(Err(error));
        }
        let exists = |path: &str| Path::new(path).exists();
        let needs = Needs {
            program: std::env::current_exe()?,
            own: vec![directory.clone()],
            directory,
            kvm: exists(DEVICES[0]),
            vsock: exists(DEVICES[1]),
            ..Needs::default()
        };
        let layers = [Layer::Namespaces, Layer::NoCapabilities];
        let mut confinement = Confinement::prepare_as(plan::plan(&needs), &layers, Some(own_user::PROBE))?;
        in_a_child(&mut confinement).map(Ok)
    };
    match attempt() {
        Ok(Ok(result)) => judge(Ok(result)),
        Ok(Err(error)) => {
            let trouble = format!("files of the home cannot be given a group: {error}");
            Attempt { trouble: Some(trouble), is_proof: false }
        }
        Err(error) => judge(Err(error)),
    }
}

/// Gives a file a group as those of a VM are given one. Network file systems may refuse it.
fn give_a_file(directory: &Path) -> std::io::Result<()> {
    let file = unnamed_file(directory)?;
    fchown(&file, None, Some(own_user::PROBE))?;
    file.set_permissions(fs::Permissions::from_mode(0o660))
}

/// A file without a name.
fn unnamed_file(directory: &Path) -> std::io::Result<File> {
    use rustix::fs::{Mode, OFlags, open};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match open(directory, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        // Not every file system has such files.
        Err(_) => {
            let path = directory.join(format!("own-user.{}.tmp", std::process::id()));
            let file = File::create(&path)?;
            fs::remove_file(&path)?;
            Ok(file)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_gives_another_user_and_the_verdict_is_cached() {
        let dir = tempfile::tempdir().unwrap();
        let first = probe(dir.path());
        assert_eq!(first == OwnUser::NotRoot, !rustix::process::geteuid().is_root());
        assert_eq!(probe(dir.path()), first);
        assert!(fs::read_dir(dir.path()).unwrap().count() <= 1);
    }
}
