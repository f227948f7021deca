//! Landlock: a process gives up every right to files, TCP ports, devices and signals but those that it names.
//!
//! Best effort: what the kernel's version of Landlock cannot restrict is left out. The crate of that name would make the
//! ruleset, too, but the rule for `/proc/self` has to be added between fork and exec, where nothing may allocate.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

use super::plan::Access;

const EXECUTE: u64 = 1;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const REMOVE_FILE: u64 = 1 << 5;
const MAKE_REG: u64 = 1 << 8;
const MAKE_SOCK: u64 = 1 << 9;
const TRUNCATE: u64 = 1 << 14;
const IOCTL_DEV: u64 = 1 << 15;
/// Rights that a file can have; the others are those of directories.
const OF_FILES: u64 = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV;

const CREATE_VERSION: libc::c_uint = 1;
const PATH_BENEATH: libc::c_uint = 1;

/// `struct landlock_ruleset_attr`. An older kernel is given the part that it knows.
#[repr(C)]
struct RulesetAttributes {
    files: u64,
    network: u64,
    scopes: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: RawFd,
}

/// The version of Landlock that this kernel has; 0 if it has none, or if it is off.
#[must_use]
pub fn version() -> u32 {
    // SAFETY: asks for the version.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<RulesetAttributes>(), 0_usize, CREATE_VERSION)
    };
    u32::try_from(version).unwrap_or(0)
}

/// What a version can restrict: files, TCP ports, abstract sockets and signals; and how much of the attributes it knows.
fn restricted(version: u32) -> (RulesetAttributes, usize) {
    let files = match version {
        0 | 1 => (1 << 13) - 1,
        2 => (1 << 14) - 1,
        3 | 4 => (1 << 15) - 1,
        _ => (1 << 16) - 1,
    };
    let network = if version >= 4 { 0b11 } else { 0 };
    let scopes = if version >= 6 { 0b11 } else { 0 };
    let size = match version {
        0..4 => 8,
        4..6 => 16,
        _ => 24,
    };
    (RulesetAttributes { files, network, scopes }, size)
}

const fn rights(access: Access) -> u64 {
    match access {
        Access::Read => READ_FILE | READ_DIR,
        Access::Execute => READ_FILE | READ_DIR | EXECUTE,
        Access::Write => READ_FILE | WRITE_FILE,
        Access::Change => READ_FILE | WRITE_FILE | TRUNCATE,
        Access::Device => READ_FILE | WRITE_FILE | IOCTL_DEV,
        Access::Own => READ_FILE | WRITE_FILE | READ_DIR | REMOVE_FILE | MAKE_REG | MAKE_SOCK | TRUNCATE,
    }
}

/// A set of rules that is being made.
#[derive(Debug)]
pub struct Ruleset {
    ruleset: OwnedFd,
    files: u64,
}

impl Ruleset {
    /// A set that allows nothing yet.
    ///
    /// # Errors
    /// The kernel has no Landlock.
    pub fn new() -> io::Result<Self> {
        let (attributes, size) = restricted(version());
        // SAFETY: the kernel reads `size` bytes of the attributes.
        let fd = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attributes, size, 0) };
        let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the descriptor is new.
        Ok(Self { ruleset: unsafe { OwnedFd::from_raw_fd(fd) }, files: attributes.files })
    }

    /// Allows something to be done with an opened path and what is below. Makes one system call.
    ///
    /// # Errors
    /// It is no file.
    pub fn allow(&self, path: RawFd, is_directory: bool, access: Access) -> io::Result<()> {
        let kind = if is_directory { u64::MAX } else { OF_FILES };
        let rule = PathBeneath { allowed: rights(access) & kind & self.files, parent: path };
        let fd = self.ruleset.as_raw_fd();
        // SAFETY: the kernel reads the rule.
        let result = unsafe { libc::syscall(libc::SYS_landlock_add_rule, fd, PATH_BENEATH, &raw const rule, 0) };
        if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Restricts this thread, which must have ruled out new privileges. For a child between fork and exec.
    ///
    /// # Errors
    /// There are too many sets in force already.
    pub fn restrict_self(&self) -> io::Result<()> {
        // SAFETY: a plain system call.
        let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, self.ruleset.as_raw_fd(), 0) };
        if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_asked_only_for_what_it_knows() {
        assert_eq!((restricted(2).0.files & TRUNCATE, restricted(2).1), (0, 8));
        assert_eq!((restricted(3).0.files & TRUNCATE, restricted(3).0.network), (TRUNCATE, 0));
        assert_eq!((restricted(4).0.files & IOCTL_DEV, restricted(4).1), (0, 16));
        assert_eq!((restricted(7).0.files & IOCTL_DEV, restricted(7).0.scopes, restricted(7).1), (IOCTL_DEV, 3, 24));
    }

    #[test]
    fn a_memory_image_cannot_be_truncated_and_a_template_not_written() {
        assert_eq!(rights(Access::Write) & TRUNCATE, 0);
        assert_eq!(rights(Access::Change) & (REMOVE_FILE | MAKE_REG | TRUNCATE), TRUNCATE);
        assert_eq!(rights(Access::Read) & (WRITE_FILE | TRUNCATE), 0);
        assert_eq!(rights(Access::Own) & (EXECUTE | IOCTL_DEV), 0);
    }
}
