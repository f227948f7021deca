//! Which layers of QEMU's confinement does this host allow? Namespaces are proven by entering them: hosts exist that let a user
//! make them and refuse the rights in them.
//!
//! Invariant: a layer that is reported as available was put in force by a process of this user since the host's boot, or is a
//! question that the kernel answers itself.

use std::fs;
use std::path::Path;

use nido_api::machine::OWN_USER;
use nido_files::private_dir::make_private_dir;
use serde::{Deserialize, Serialize};

use super::cache;
pub use super::own_user::OwnUser;
use super::trial::{Attempt, cache_key, in_a_child, judge};
use crate::confine::{Confinement, Layer, Needs, landlock, plan, seccomp};

const CACHE_NAME: &str = "confinement.json";
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

    /// The layers that can be put in force for QEMU. They do not include a user of its own: see [`Self::own_user`].
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

fn try_namespaces(directory: &Path) -> Attempt {
    let directory = make_private_dir(directory).and_then(|()| fs::canonicalize(directory));
    let result = directory.and_then(|directory| {
        let program = std::env::current_exe()?;
        let plan = plan::plan(&Needs { program, own: vec![directory.clone()], directory, ..Needs::default() });
        in_a_child(&mut Confinement::prepare(plan, &[Layer::Namespaces, Layer::NoCapabilities])?)
    });
    judge(result)
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
}
