//! Where nido makes the control groups of VMs: the systemd scope of each, or a tree of version 2 that was delegated to this process.
//!
//! ```text
//!  NIDO_CGROUP names a group ----------------------> that group, or an error
//!  a systemd manager is reachable -----------------> a scope for each VM
//!  the group of this process is the kernel's root -> that group: it alone may have processes and controllers
//!  the group above that of this process -----------> that group, if it is writable and has no processes
//!  otherwise --------------------------------------> none, and why
//! ```
//!
//! Invariants: no process is moved that nido did not start (the kernel refuses controllers for the children of a group that has
//! processes); no group is made in systemd's tree that systemd has not delegated.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat};

use super::control_group::{CONTROLLERS, ControlGroup, MEMBERS, mount, path_in};
use super::scope::{self, Bus};

/// The variable that names a delegated group.
pub const VARIABLE: &str = "NIDO_CGROUP";
/// The controllers that limits need.
const WANTED: [&str; 4] = ["memory", "pids", "cpu", "io"];
/// The file that takes controllers for the children of a group.
const ENABLED: &str = "cgroup.subtree_control";
/// The group that a server makes for itself in a group of its own.
const SERVER_GROUP: &str = "nido-main";
/// How systemd marks a group that it has delegated.
const DELEGATED_MARKS: [&str; 2] = ["user.delegate", "trusted.delegate"];

/// What limits a VM on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostGroups {
    /// A systemd scope for each VM.
    Scopes(Bus),
    /// A group for each VM in a delegated tree.
    Delegated(Delegation),
    /// Nothing.
    None(NotDelegated),
}

/// A group in which nido makes others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delegation {
    /// Where it is.
    pub path: PathBuf,
    /// The controllers of limits that it has.
    pub controllers: Vec<String>,
    /// The user has named it.
    pub is_named: bool,
}

/// Why nido makes no groups in a place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotDelegated {
    /// There are no control groups of version 2.
    NoVersion2,
    /// The group of this process is outside of what it sees.
    OutOfSight,
    /// Not the absolute path of a group of version 2.
    NotAGroup(PathBuf),
    /// systemd manages it and has not delegated it.
    Managed(PathBuf),
    /// This user may not change it.
    NotWritable(PathBuf),
    /// It has no controller of a limit.
    NoControllers(PathBuf),
    /// It has processes, so its children get no controllers.
    HasProcesses(PathBuf),
}

impl NotDelegated {
    /// For people, in a sentence.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::NoVersion2 => "there are no control groups of version 2".into(),
            Self::OutOfSight => "the control group of this process is outside of what it can see".into(),
            Self::NotAGroup(path) => format!("{} is not the absolute path of a control group", path.display()),
            Self::Managed(path) => format!("systemd has not delegated the control group {}", path.display()),
            Self::NotWritable(path) => format!("this user may not change the control group {}", path.display()),
            Self::NoControllers(path) => {
                format!("the control group {} has no controller of memory, processes, CPU or I/O", path.display())
            }
            Self::HasProcesses(path) => {
                format!("the control group {} has processes, so groups in it get no limits", path.display())
            }
        }
    }
}

/// What is known of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
struct GroupFacts {
    path: PathBuf,
    is_group: bool,
    /// The root of the kernel's hierarchy: it may have processes and controllers for its children.
    is_kernel_root: bool,
    is_writable: bool,
    /// systemd runs, and has not marked it as delegated.
    is_managed: bool,
    has_processes: bool,
    controllers: Vec<String>,
}

impl GroupFacts {
    fn read(path: &Path) -> Self {
        let file = |name: &str| path.join(name);
        let words = fs::read_to_string(file(CONTROLLERS)).unwrap_or_default();
        let has_mark = DELEGATED_MARKS.iter().any(|mark| rustix::fs::getxattr(path, *mark, &mut [0; 8][..]).is_ok());
        Self {
            path: path.into(),
            is_group: path.is_absolute() && file(ENABLED).is_file() && file(MEMBERS).is_file(),
            is_kernel_root: !file("cgroup.type").exists(),
            is_writable: [path, &file(MEMBERS), &file(ENABLED)].into_iter().all(may_write),
            is_managed: Path::new("/run/systemd/system").is_dir() && !has_mark,
            has_processes: fs::read(file(MEMBERS)).is_ok_and(|members| !members.is_empty()),
            controllers: WANTED.iter().filter(|name| has_word(&words, name)).map(ToString::to_string).collect(),
        }
    }

    /// Whether groups with limits can be made in it.
    fn check(&self, is_named: bool) -> Result<Delegation, NotDelegated> {
        let path = self.path.clone();
        Err(match self {
            Self { is_group: false, .. } => NotDelegated::NotAGroup(path),
            Self { is_managed: true, .. } if !is_named => NotDelegated::Managed(path),
            Self { is_writable: false, .. } => NotDelegated::NotWritable(path),
            Self { controllers, .. } if controllers.is_empty() => NotDelegated::NoControllers(path),
            Self { has_processes: true, is_kernel_root: false, .. } => NotDelegated::HasProcesses(path),
            Self { controllers, .. } => return Ok(Delegation { path, controllers: controllers.clone(), is_named }),
        })
    }
}

/// Which of the group of this process and the one above is used. Pure.
fn choose(own: &GroupFacts, above: Option<&GroupFacts>) -> Result<Delegation, NotDelegated> {
    match above.map(|above| above.check(false)) {
        Some(Ok(found)) => Ok(found),
        // What can be said of the own group is more useful.
        _ => own.check(false),
    }
}

/// Finds out what limits VMs on this host.
///
/// # Errors
/// The user has named a group that cannot be used.
pub fn host_groups() -> Result<HostGroups, NotDelegated> {
    if let Some(named) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
        return named_group(&named).map(HostGroups::Delegated);
    }
    if let Some(bus) = scope::bus() {
        return Ok(HostGroups::Scopes(bus));
    }
    Ok(found_group().map_or_else(HostGroups::None, HostGroups::Delegated))
}

fn named_group(path: &OsStr) -> Result<Delegation, NotDelegated> {
    GroupFacts::read(Path::new(path)).check(true)
}

fn found_group() -> Result<Delegation, NotDelegated> {
    let mount = mount().ok_or(NotDelegated::NoVersion2)?;
    let own = own_group(mount)?;
    let above = own.parent().filter(|above| above.starts_with(mount)).map(GroupFacts::read);
    choose(&GroupFacts::read(&own), above.as_ref())
}

fn own_group(mount: &Path) -> Result<PathBuf, NotDelegated> {
    let text = fs::read_to_string("/proc/self/cgroup").map_err(|_| NotDelegated::NoVersion2)?;
    path_in(&text).map(|path| mount.join(path)).ok_or(NotDelegated::OutOfSight)
}

/// Moves this process, a server that has a delegated group for itself, into a child of it: as in a container whose only process it
/// is. So its VMs can have groups beside it. Returns whether it was moved.
///
/// # Errors
/// Of the file system.
pub fn leave_group_for_vms() -> io::Result<bool> {
    let is_needed = std::env::var_os(VARIABLE).is_none() && scope::bus().is_none();
    let Some(own) = mount().filter(|_| is_needed).and_then(|mount| own_group(mount).ok()) else { return Ok(false) };
    let (facts, members) = (GroupFacts::read(&own), fs::read_to_string(own.join(MEMBERS))?);
    if found_group().is_ok() || !has_group_for_itself(&facts, &members, std::process::id()) {
        return Ok(false);
    }
    let child = own.join(SERVER_GROUP);
    match fs::create_dir(&child) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    OpenOptions::new().write(true).open(child.join(MEMBERS))?.write_all(b"0")?;
    Ok(true)
}

/// Whether a group would be delegated if it had no processes, and this process is the only one. Pure.
fn has_group_for_itself(facts: &GroupFacts, members: &str, pid: u32) -> bool {
    matches!(facts.check(false), Err(NotDelegated::HasProcesses(_))) && members.trim() == pid.to_string()
}

impl Delegation {
    /// The group of the VM `id` in it. It need not exist.
    #[must_use]
    pub fn group(&self, id: &str) -> ControlGroup {
        ControlGroup::below(&self.path, id)
    }

    /// Has the kernel make its controllers available in its children. A controller that it refuses stays out; [`super::control_group`]
    /// reads what is in force.
    pub fn enable_controllers(&self) {
        let file = self.path.join(ENABLED);
        let enabled = fs::read_to_string(&file).unwrap_or_default();
        for name in self.controllers.iter().filter(|name| !has_word(&enabled, name)) {
            let on = OpenOptions::new().write(true).open(&file);
            if let Err(error) = on.and_then(|mut file| file.write_all(format!("+{name}").as_bytes())) {
                tracing::warn!("no limits by the controller {name} in {}: {error}", self.path.display());
            }
        }
    }
}

fn has_word(text: &str, word: &str) -> bool {
    text.split_whitespace().any(|found| found == word)
}

fn may_write(path: &Path) -> bool {
    accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(path: &str) -> GroupFacts {
        GroupFacts {
            path: path.into(),
            is_group: true,
            is_kernel_root: false,
            is_writable: true,
            is_managed: false,
            has_processes: false,
            controllers: vec!["memory".into(), "pids".into()],
        }
    }

    fn with_processes(path: &str) -> GroupFacts {
        GroupFacts { has_processes: true, ..group(path) }
    }

    #[test]
    fn groups_are_made_beside_the_group_of_the_process() {
        let (own, above) = (with_processes("/cg/a/main"), group("/cg/a"));
        assert_eq!(choose(&own, Some(&above)).unwrap().path, Path::new("/cg/a"));
        let foreign = GroupFacts { is_writable: false, ..above.clone() };
        assert_eq!(choose(&own, Some(&foreign)), Err(NotDelegated::HasProcesses(own.path.clone())));
        // As in a container: the group of this process is the root of what it sees.
        assert_eq!(choose(&own, None), Err(NotDelegated::HasProcesses(own.path.clone())));
        let bare = GroupFacts { controllers: Vec::new(), ..own.clone() };
        assert_eq!(choose(&bare, None), Err(NotDelegated::NoControllers(own.path)));
    }

    #[test]
    fn only_the_kernels_root_may_have_processes() {
        let root = GroupFacts { is_kernel_root: true, ..with_processes("/cg") };
        assert_eq!(choose(&root, None).unwrap().controllers, ["memory", "pids"]);
        assert!(!has_group_for_itself(&root, "7\n", 7));
    }

    #[test]
    fn what_systemd_manages_is_used_only_if_it_is_named() {
        let managed = GroupFacts { is_managed: true, ..group("/cg/system.slice") };
        assert_eq!(managed.check(false), Err(NotDelegated::Managed(managed.path.clone())));
        assert!(managed.check(true).unwrap().is_named);
    }

    #[test]
    fn a_server_leaves_only_a_group_that_it_has_for_itself() {
        let own = with_processes("/cg");
        assert!(has_group_for_itself(&own, "7\n", 7));
        assert!(!has_group_for_itself(&own, "7\n8\n", 7));
        assert!(!has_group_for_itself(&GroupFacts { is_writable: false, ..own }, "7\n", 7));
    }

    #[test]
    fn a_directory_that_is_no_group_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let named = named_group(dir.path().as_os_str());
        assert_eq!(named, Err(NotDelegated::NotAGroup(dir.path().into())));
        assert!(named_group(OsStr::new("ci")).unwrap_err().describe().contains("ci is not the absolute path"));
    }
}
