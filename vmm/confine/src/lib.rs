//! The confinement of a program that works on untrusted data: what a guest that has taken over its QEMU, or an image that has
//! taken over `qemu-img`, can still do on the host.
//!
//! ```text
//!  parent   Needs --plan--> Plan --prepare--> Confinement         everything that allocates
//!  child    fork -> namespaces -> own user -> no capabilities -> Landlock -> seccomp -> exec
//! ```
//!
//! | layer           | what it takes away                                       | needs                              |
//! |-----------------|----------------------------------------------------------|------------------------------------|
//! | namespaces      | files, sockets and networks of the host                  | user namespaces                    |
//! | own-user        | what belongs to root, for a QEMU that root starts        | root, CAP_SYS_ADMIN, namespaces    |
//! | no-capabilities | root's rights, also those that a program would gain      | nothing                            |
//! | landlock        | files, TCP, signals and abstract sockets, as it knows    | Linux 5.13; signals from 6.12      |
//! | seccomp         | system calls: sockets but local ones, mounts, tracing    | nothing                            |
//!
//! Invariants: a layer that was promised is in force, or the program does not start; between fork and exec nothing allocates and
//! nothing locks.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

pub mod capabilities;
pub mod helper;
pub mod landlock;
pub mod own_user;
pub mod plan;
pub mod private_root;
pub mod seccomp;

pub use nido_api::machine::Layer;
pub use plan::{Access, Needs, Plan};

use landlock::Ruleset;
use plan::SELF;
use private_root::PrivateRoot;
use seccomp::Filter;

/// A confinement that is ready to be entered.
#[derive(Debug)]
pub struct Confinement {
    root: Option<PrivateRoot>,
    ruleset: Option<Ruleset>,
    filter: Option<Filter>,
    user: Option<u32>,
    drops_capabilities: bool,
}

/// What failed in the child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The step.
    pub step: Step,
    /// The kernel's number for the reason.
    pub errno: i32,
}

/// A step on the way into a confinement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// New namespaces.
    Unshare,
    /// The user's number in the new namespace.
    MapUser,
    /// The mounts of the new root directory.
    Mount,
    /// The change of the root directory.
    PivotRoot,
    /// The end of all capabilities.
    Capabilities,
    /// The end of rights to files.
    Landlock,
    /// The filter of system calls.
    Seccomp,
    /// The device nodes for a user of its own.
    Devices,
    /// The change to a user of its own.
    OwnUser,
}

impl Step {
    /// All steps.
    pub const ALL: [Self; 9] = [
        Self::Unshare,
        Self::MapUser,
        Self::Mount,
        Self::PivotRoot,
        Self::Capabilities,
        Self::Landlock,
        Self::Seccomp,
        Self::Devices,
        Self::OwnUser,
    ];

    /// Its name, for messages.
    #[must_use]
    pub const fn name(self) -> &'static CStr {
        match self {
            Self::Unshare => c"namespaces cannot be made",
            Self::MapUser => c"the user cannot be mapped into its namespace",
            Self::Mount => c"the root directory cannot be mounted",
            Self::PivotRoot => c"the root directory cannot be changed",
            Self::Capabilities => c"capabilities cannot be dropped",
            Self::Landlock => c"Landlock cannot be put in force",
            Self::Seccomp => c"the filter of system calls cannot be installed",
            Self::Devices => c"device nodes for its own user cannot be made",
            Self::OwnUser => c"it cannot change to its own user",
        }
    }

    /// This step of a failure that [`Failure::error`] has made.
    fn of(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|step| (*step as i32 + 1) == code >> 16)
    }

    fn failed(self, error: &io::Error) -> Failure {
        Failure { step: self, errno: error.raw_os_error().unwrap_or(libc::EIO) }
    }
}

impl Failure {
    /// The failure as one number, which is all that a child can report to the parent that waits for its exec. Allocates nothing.
    #[must_use]
    pub fn error(self) -> io::Error {
        io::Error::from_raw_os_error(((self.step as i32 + 1) << 16) | self.errno)
    }
}

/// What a child reported, in words.
#[must_use]
pub fn explained(error: io::Error) -> io::Error {
    let code = error.raw_os_error().unwrap_or(0);
    let Some(step) = Step::of(code) else { return error };
    let why = io::Error::from_raw_os_error(code & 0xffff);
    io::Error::new(why.kind(), format!("its process cannot be confined: {}: {why}", step.name().to_string_lossy()))
}

/// The result of a system call that returns -1 on failure.
fn checked(step: Step, result: libc::c_long) -> Result<(), Failure> {
    if result == -1 { Err(step.failed(&io::Error::last_os_error())) } else { Ok(()) }
}

impl Confinement {
    /// Prepares the layers for a plan. Opens its paths; allocates.
    ///
    /// # Errors
    /// A required path does not exist, or the kernel has no Landlock although that is wanted.
    pub fn prepare(plan: Plan, layers: &[Layer]) -> io::Result<Self> {
        Self::prepare_as(plan, layers, None)
    }

    /// The same for a program that root starts as another user, in namespaces that root makes with its own rights. That user must
    /// be able to use the plan's files.
    ///
    /// # Errors
    /// As [`Self::prepare`]; a user without namespaces: files below a private directory are not reached by path.
    pub fn prepare_as(mut plan: Plan, layers: &[Layer], user: Option<u32>) -> io::Result<Self> {
        if user.is_some() && !layers.contains(&Layer::Namespaces) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a user of its own needs namespaces"));
        }
        plan.entries.retain(|entry| entry.is_required || entry.path.exists());
        let wants = |layer| layers.contains(&layer);
        Ok(Self {
            root: wants(Layer::Namespaces).then(|| PrivateRoot::new(&plan, user)).transpose()?,
            ruleset: wants(Layer::Landlock).then(|| ruleset(&plan)).transpose()?,
            filter: wants(Layer::Seccomp).then(Filter::new),
            user,
            drops_capabilities: wants(Layer::NoCapabilities),
        })
    }

    /// Puts the layers in force for this process, which must have ruled out new privileges. For a child between fork and exec:
    /// makes system calls only.
    ///
    /// # Errors
    /// The first step that failed. This process has lost some of its rights then, and must end.
    pub fn enter(&mut self) -> Result<(), Failure> {
        if let Some(ruleset) = &self.ruleset {
            allow_self(ruleset).map_err(|e| Step::Landlock.failed(&e))?;
        }
        if let Some(root) = &mut self.root {
            root.enter(self.ruleset.as_ref())?;
        }
        if let Some(user) = self.user {
            // Only root can empty the bounding set.
            if self.drops_capabilities {
                capabilities::drop_bounding();
            }
            own_user::change_to(user)?;
        }
        if self.drops_capabilities {
            capabilities::drop_all().map_err(|e| Step::Capabilities.failed(&e))?;
        }
        if let Some(ruleset) = &self.ruleset {
            ruleset.restrict_self().map_err(|e| Step::Landlock.failed(&e))?;
        }
        if let Some(filter) = &mut self.filter {
            filter.install().map_err(|e| Step::Seccomp.failed(&e))?;
        }
        Ok(())
    }
}

fn ruleset(plan: &Plan) -> io::Result<Ruleset> {
    let ruleset = Ruleset::new()?;
    for entry in plan.entries.iter().filter(|entry| entry.path != Path::new(SELF)) {
        let path = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&entry.path)?;
        ruleset.allow(path.as_raw_fd(), path.metadata()?.is_dir(), entry.access)?;
    }
    Ok(ruleset)
}

/// Allows this process to read what the kernel reports about it, before it is out of sight.
fn allow_self(ruleset: &Ruleset) -> io::Result<()> {
    // SAFETY: plain system calls on a constant text, and a descriptor that is closed once.
    unsafe {
        let fd = libc::open(c"/proc/self".as_ptr(), libc::O_PATH | libc::O_CLOEXEC);
        if fd == -1 {
            // Nothing that QEMU needs is there.
            return Ok(());
        }
        let result = ruleset.allow(fd, true, Access::Read);
        libc::close(fd);
        result
    }
}
