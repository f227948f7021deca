//! Which layers of QEMU's confinement does this host allow? Namespaces are proven by entering them: hosts exist that let a user
//! make them and refuse the rights in them.
//!
//! Invariant: a layer that is reported as available was put in force by a process of this user since the host's boot, or is a
//! question that the kernel answers itself.
#![allow(unsafe_code)]

use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use nido_api::machine::OWN_USER;
use nido_files::private_dir::make_private_dir;
use serde::{Deserialize, Serialize};

use super::cache;
pub use super::own_user::OwnUser;
use crate::confine::{Confinement, Layer, Needs, Step, landlock, plan, seccomp};

const CACHE_NAME: &str = "confinement.json";
/// Switches of the kernel and of distributions that forbid user namespaces, or the rights in them.
const SWITCHES: [&str; 4] = [
    "/proc/sys/user/max_user_namespaces",
    "/proc/sys/kernel/unprivileged_userns_clone",
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
    "/proc/self/attr/current",
];

/// What confines a QEMU on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfinementSupport {
    /// Why there can be no namespaces; `None` if there can.
    pub namespaces_trouble: Option<String>,
    /// The version of Landlock; 0 if the kernel does not have it.
    pub landlock: u32,
    /// Whether system calls can be filtered.
    pub seccomp: bool,
    /// Whether a QEMU that this user starts can have a user of its own.
    #[serde(default)]
    pub own_user: OwnUser,
}

impl ConfinementSupport {
    /// Everything that is known today, for tests.
    #[must_use]
    pub const fn full() -> Self {
        Self { namespaces_trouble: None, landlock: 7, seccomp: true, own_user: OwnUser::NotRoot }
    }

    /// The layers that can be put in force for QEMU. A user of its own is none of them: see [`Self::own_user`].
    #[must_use]
    pub fn layers(&self) -> Vec<Layer> {
        Layer::ALL.into_iter().filter(|layer| self.trouble(*layer).is_none()).collect()
    }

    /// The layers that can be put in force for a helper program, which has this user.
    #[must_use]
    pub fn of_helpers(&self) -> Self {
        Self { own_user: OwnUser::NotRoot, ..self.clone() }
    }

    /// The names of what can be put in force for QEMU.
    #[must_use]
    pub fn names(&self) -> Vec<&'static str> {
        let own_user = (self.own_user == OwnUser::Available).then_some(OWN_USER);
        self.layers().into_iter().map(Layer::name).chain(own_user).collect()
    }

    /// Why a layer cannot be put in force.
    fn trouble(&self, layer: Layer) -> Option<String> {
        match layer {
            // They are made with root's rights, without a namespace of users.
            Layer::Namespaces if self.own_user == OwnUser::Available => None,
            Layer::Namespaces => self.namespaces_trouble.clone(),
            Layer::Landlock => (self.landlock == 0).then(|| "the kernel has no Landlock, or it is off".into()),
            Layer::Seccomp => (!self.seccomp).then(|| "the kernel cannot filter system calls".into()),
            Layer::NoCapabilities => None,
        }
    }

    /// What is missing, and why, in one sentence; `None` if nothing is.
    #[must_use]
    pub fn shortfall(&self) -> Option<String> {
        let missing = Layer::ALL.into_iter().filter_map(|layer| Some((layer.name(), self.trouble(layer)?)));
        let own_user = match &self.own_user {
            OwnUser::Unavailable(why) => Some((OWN_USER, why.clone())),
            OwnUser::NotRoot | OwnUser::Available => None,
        };
        let missing: Vec<_> = missing.chain(own_user).map(|(name, why)| format!("{name} ({why})")).collect();
        (!missing.is_empty()).then(|| missing.join(", "))
    }

    /// The warning for a VM whose QEMU is confined by less than all layers.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        Some(format!("QEMU's process is confined without {}", self.shortfall()?))
    }
}

/// What the verdict on namespaces depends on.
#[derive(PartialEq, Serialize, Deserialize)]
pub(super) struct CacheKey {
    boot_id: String,
    uid: u32,
    /// The user namespace of this process.
    namespace: String,
    switches: Vec<String>,
}

/// What this host allows. Namespaces are tried in a process that ends at once; the result is remembered in `cache_dir` until the
/// host's next boot. Blocks.
#[must_use]
pub fn probe(cache_dir: &Path) -> ConfinementSupport {
    let namespaces_trouble = match cache_key() {
        None => try_namespaces(cache_dir).trouble,
        Some(key) => cache::get(cache_dir, CACHE_NAME, &key).unwrap_or_else(|| {
            let Attempt { trouble, is_proof } = try_namespaces(cache_dir);
            if is_proof {
                cache::put(cache_dir, CACHE_NAME, &key, &trouble);
            }
            trouble
        }),
    };
    ConfinementSupport {
        namespaces_trouble,
        landlock: landlock::version(),
        seccomp: seccomp::is_available(),
        own_user: super::own_user::probe(cache_dir),
    }
}

/// Removes the cached verdict: after a confinement failed that it allowed.
pub fn invalidate(cache_dir: &Path) {
    cache::invalidate(cache_dir, CACHE_NAME);
    super::own_user::invalidate(cache_dir);
}

pub(super) fn cache_key() -> Option<CacheKey> {
    let switch = |path: &&str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    Some(CacheKey {
        boot_id: super::boot::boot_id()?,
        uid: rustix::process::geteuid().as_raw(),
        namespace: fs::read_link("/proc/self/ns/user").ok()?.to_string_lossy().into_owned(),
        switches: SWITCHES.iter().map(switch).collect(),
    })
}

/// What an attempt to enter namespaces has shown.
pub(super) struct Attempt {
    /// Why no process of this user can have namespaces of its own; `None` if it can.
    pub trouble: Option<String>,
    /// The host allows or forbids it. Otherwise the system was short of something, which passes.
    pub is_proof: bool,
}

/// Whether an error says that the host forbids namespaces or does not have what they need.
fn is_refusal(error: &std::io::Error) -> bool {
    [libc::EPERM, libc::EACCES, libc::ENOSYS, libc::EINVAL].map(Some).contains(&error.raw_os_error())
}

fn try_namespaces(directory: &Path) -> Attempt {
    let directory = make_private_dir(directory).and_then(|()| fs::canonicalize(directory));
    let result = directory.and_then(|directory| {
        let program = std::env::current_exe()?;
        let plan = plan::plan(&Needs { program, own: vec![directory.clone()], directory, ..Needs::default() });
        in_a_child(&mut Confinement::prepare(plan, &[Layer::Namespaces, Layer::NoCapabilities])?)
    });
    judge(result)
}

/// What the result of [`in_a_child`] shows.
pub(super) fn judge(result: std::io::Result<Option<(Step, std::io::Error)>>) -> Attempt {
    match result {
        Ok(None) => Attempt { trouble: None, is_proof: true },
        Ok(Some((step, error))) => {
            let trouble = format!("{}: {error}", step.name().to_string_lossy());
            Attempt { trouble: Some(trouble), is_proof: is_refusal(&error) }
        }
        Err(error) => Attempt { trouble: Some(format!("they could not be tried: {error}")), is_proof: false },
    }
}

/// Enters a confinement in a child that ends then. Returns what failed there.
pub(super) fn in_a_child(confinement: &mut Confinement) -> std::io::Result<Option<(Step, std::io::Error)>> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: the child makes system calls only, and ends without running anything of this program's.
    let pid = unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            if let Err(failure) = confinement.enter() {
                let failure = [failure.step as i32, failure.errno];
                libc::write(writer.as_raw_fd(), failure.as_ptr().cast(), size_of_val(&failure));
            }
            libc::_exit(0);
        }
        pid
    };
    if pid == -1 {
        return Err(std::io::Error::last_os_error());
    }
    drop(writer);
    let failure = read_failure(&reader);
    // SAFETY: waits for the child of this function, which nothing else waits for.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    failure
}

fn read_failure(reader: &OwnedFd) -> std::io::Result<Option<(Step, std::io::Error)>> {
    let mut bytes = [0; 8];
    let read = rustix::io::retry_on_intr(|| rustix::io::read(reader, &mut bytes))?;
    let word = |at: usize| i32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let step = Step::ALL.into_iter().find(|step| *step as i32 == word(0));
    Ok(step.filter(|_| read == bytes.len()).map(|step| (step, std::io::Error::from_raw_os_error(word(4)))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_reason() {
        assert_eq!(
            (ConfinementSupport::full().layers(), ConfinementSupport::full().warning()),
            (Layer::ALL.into(), None)
        );
        let less =
            ConfinementSupport { namespaces_trouble: Some("no".into()), landlock: 0, ..ConfinementSupport::full() };
        assert_eq!(less.layers(), [Layer::Seccomp, Layer::NoCapabilities]);
        assert_eq!(
            less.warning().unwrap(),
            "QEMU's process is confined without namespaces (no), landlock (the kernel has no Landlock, or it is off)"
        );
    }

    #[test]
    fn a_user_of_its_own_is_missed_only_for_root() {
        let of = |own_user| ConfinementSupport {
            namespaces_trouble: Some("no".into()),
            own_user,
            ..ConfinementSupport::full()
        };
        assert_eq!(of(OwnUser::NotRoot).shortfall().unwrap(), "namespaces (no)");
        assert_eq!(of(OwnUser::Unavailable("why".into())).shortfall().unwrap(), "namespaces (no), own-user (why)");
        let root = of(OwnUser::Available);
        assert_eq!((root.shortfall(), root.names().last()), (None, Some(&OWN_USER)));
        assert_eq!(root.of_helpers().shortfall().unwrap(), "namespaces (no)");
        let earlier: ConfinementSupport =
            serde_json::from_str(r#"{"namespaces_trouble":null,"landlock":7,"seccomp":true}"#).unwrap();
        assert_eq!(earlier, ConfinementSupport::full());
    }

    #[test]
    fn the_verdict_is_cached() {
        let dir = tempfile::tempdir().unwrap();
        let first = probe(dir.path());
        assert_eq!(probe(dir.path()), first);
        let cached: Option<Option<String>> = cache::get(dir.path(), CACHE_NAME, &cache_key().unwrap());
        assert!(cached.is_none_or(|cached| cached == first.namespaces_trouble));
    }

    /// A host that was short of memory once would confine less until its next boot.
    #[test]
    fn only_a_refusal_is_cached() {
        let error = std::io::Error::from_raw_os_error;
        assert!(is_refusal(&error(libc::EPERM)) && is_refusal(&error(libc::ENOSYS)));
        assert!(
            ![libc::ENOMEM, libc::ENOSPC, libc::EAGAIN, libc::EMFILE, libc::ENFILE].map(error).iter().any(is_refusal)
        );
    }

    #[test]
    fn a_failure_names_its_step() {
        let plan = plan::plan(&Needs {
            program: "/no/such/program".into(),
            directory: "/no/such/directory".into(),
            own: vec!["/no/such/directory".into()],
            ..Needs::default()
        });
        let Ok(mut confinement) = Confinement::prepare(plan, &[Layer::Namespaces]) else { panic!("no root") };
        let (step, error) = in_a_child(&mut confinement).unwrap().unwrap();
        assert!([Step::Mount, Step::Unshare, Step::MapUser].contains(&step), "{step:?}: {error}");
    }
}
