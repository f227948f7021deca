//! Namespaces of QEMU's own: of users, networks, System V objects and mounts, with a root directory that holds nothing but the
//! paths of its plan.
//!
//! A program that root starts as another user enters them with root's rights, without a namespace of users: in that one, its user
//! could not be any other than root. Otherwise the user is mapped to itself, so that files, sockets and credentials show the same user on both sides.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use super::landlock::Ruleset;
use super::plan::{Access, Plan, SELF};
use super::{Failure, Step, checked};

/// `struct mount_attr`.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

const READ_ONLY: u64 = 0x1;
const NO_SETUID: u64 = 0x2;
const NO_DEVICES: u64 = 0x4;
const NO_EXECUTION: u64 = 0x8;
const OPEN_TREE_CLONE: libc::c_int = 1;
const MOVE_FROM_DESCRIPTOR: libc::c_int = 4;
const RECURSIVE: libc::c_int = 0x8000;
const ROOT_OPTIONS: &CStr = c"mode=0755,size=1m";
const NODES_OPTIONS: &CStr = c"mode=0700,size=64k";
const NEW: libc::c_int = libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC;

/// One path of the new root.
#[derive(Debug)]
struct Bind {
    /// Its absolute path, which is the same in the new root.
    path: CString,
    /// The directories above it, and itself if it is a directory, relative to the root.
    directories: Vec<CString>,
    /// Its path relative to the root.
    target: CString,
    is_directory: bool,
    attributes: u64,
    /// A device that its user could not open: a node of the same number is made.
    node: Option<Node>,
    tree: RawFd,
}

/// A node for a device.
#[derive(Debug)]
struct Node {
    name: CString,
    device: libc::dev_t,
    owner: u32,
}

/// Everything that is needed to enter the namespaces.
#[derive(Debug)]
pub struct PrivateRoot {
    binds: Vec<Bind>,
    directory: CString,
    /// Of users and groups; `None` for a program that root starts as another user.
    maps: Option<(CString, CString)>,
}

impl PrivateRoot {
    /// Prepares a root directory for a plan whose paths exist. Allocates: before the fork.
    ///
    /// # Errors
    /// A path has a zero in it.
    pub fn new(plan: &Plan, user: Option<u32>) -> io::Result<Self> {
        let mut binds =
            plan.entries.iter().map(|entry| bind(&entry.path, entry.access)).collect::<io::Result<Vec<_>>>()?;
        if let Some(user) = user {
            for (entry, bind) in plan.entries.iter().zip(&mut binds).filter(|(entry, _)| entry.access == Access::Device)
            {
                bind.node = node(&entry.path, user)?;
            }
        }
        let map = |id: u32| CString::new(format!("{id} {id} 1"));
        Ok(Self {
            binds,
            directory: text(&plan.directory)?,
            maps: match user {
                Some(_) => None,
                None => Some((map(rustix::process::geteuid().as_raw())?, map(rustix::process::getegid().as_raw())?)),
            },
        })
    }

    /// Enters new namespaces, and allows the devices that it makes in `ruleset`. The working directory is that of the plan then. For a child between fork and exec.
    ///
    /// # Errors
    /// The host does not allow that; in which step.
    pub fn enter(&mut self, ruleset: Option<&Ruleset>) -> Result<(), Failure> {
        // SAFETY: plain system calls on values that live as long as this call.
        unsafe {
            self.unshare()?;
            let private = libc::MS_REC | libc::MS_PRIVATE;
            let nothing = std::ptr::null();
            checked(Step::Mount, libc::mount(nothing, c"/".as_ptr(), nothing, private, nothing.cast()).into())?;
            for bind in self.binds.iter_mut().filter(|bind| bind.node.is_none()) {
                bind.clone_tree()?;
            }
            self.make_nodes(ruleset)?;
            // Any directory would do to put the new root on, and this one exists.
            let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
            let (name, place) = (c"tmpfs".as_ptr(), self.directory.as_ptr());
            checked(Step::Mount, libc::mount(name, place, name, flags, ROOT_OPTIONS.as_ptr().cast()).into())?;
            let root = libc::open(place, libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC);
            checked(Step::Mount, root.into())?;
            for bind in &self.binds {
                bind.attach(root)?;
            }
            checked(Step::PivotRoot, libc::fchdir(root).into())?;
            checked(Step::PivotRoot, libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()))?;
            checked(Step::PivotRoot, libc::umount2(c".".as_ptr(), libc::MNT_DETACH).into())?;
            set_attributes(libc::AT_FDCWD, c"/", 0, READ_ONLY)?;
            checked(Step::PivotRoot, libc::chdir(place).into())?;
            libc::close(root);
        }
        Ok(())
    }

    fn unshare(&self) -> Result<(), Failure> {
        let users = if self.maps.is_some() { libc::CLONE_NEWUSER } else { 0 };
        // SAFETY: a plain system call.
        checked(Step::Unshare, unsafe { libc::unshare(NEW | users) }.into())?;
        if let Some((users, groups)) = &self.maps {
            write(c"/proc/self/setgroups", c"deny").map_err(|e| Step::MapUser.failed(&e))?;
            write(c"/proc/self/uid_map", users).map_err(|e| Step::MapUser.failed(&e))?;
            write(c"/proc/self/gid_map", groups).map_err(|e| Step::MapUser.failed(&e))?;
        }
        Ok(())
    }

    /// Makes the device nodes, on a file system that nothing but their mounts keeps.
    unsafe fn make_nodes(&mut self, ruleset: Option<&Ruleset>) -> Result<(), Failure> {
        if self.binds.iter().all(|bind| bind.node.is_none()) {
            return Ok(());
        }
        // SAFETY: plain system calls on texts of this value, and descriptors that are closed once.
        unsafe {
            let (name, place) = (c"tmpfs".as_ptr(), self.directory.as_ptr());
            let flags = libc::MS_NOSUID | libc::MS_NOEXEC;
            checked(Step::Devices, libc::mount(name, place, name, flags, NODES_OPTIONS.as_ptr().cast()).into())?;
            let nodes = libc::open(place, libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC);
            checked(Step::Devices, nodes.into())?;
            for bind in &mut self.binds {
                bind.make_node(nodes, ruleset)?;
            }
            libc::close(nodes);
            checked(Step::Devices, libc::umount2(place, libc::MNT_DETACH).into())
        }
    }
}

impl Bind {
    unsafe fn make_node(&mut self, nodes: RawFd, ruleset: Option<&Ruleset>) -> Result<(), Failure> {
        let Some(node) = &self.node else { return Ok(()) };
        let name = node.name.as_ptr();
        let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC;
        // SAFETY: plain system calls on texts of this value.
        unsafe {
            checked(Step::Devices, libc::mknodat(nodes, name, libc::S_IFCHR | 0o600, node.device).into())?;
            let owned = libc::fchownat(nodes, name, node.owner, node.owner, libc::AT_SYMLINK_NOFOLLOW);
            checked(Step::Devices, owned.into())?;
            let tree = libc::syscall(libc::SYS_open_tree, nodes, name, flags);
            checked(Step::Devices, tree)?;
            self.tree = RawFd::try_from(tree).unwrap_or(-1);
        }
        if let Some(ruleset) = ruleset {
            ruleset.allow(self.tree, false, Access::Device).map_err(|e| Step::Landlock.failed(&e))?;
        }
        set_attributes(self.tree, c"", libc::AT_EMPTY_PATH, self.attributes)
    }

    unsafe fn clone_tree(&mut self) -> Result<(), Failure> {
        let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC | RECURSIVE;
        // SAFETY: a plain system call on a text of this value.
        let tree = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, self.path.as_ptr(), flags) };
        checked(Step::Mount, tree)?;
        self.tree = RawFd::try_from(tree).unwrap_or(-1);
        set_attributes(self.tree, c"", libc::AT_EMPTY_PATH | RECURSIVE, self.attributes)
    }

    unsafe fn attach(&self, root: RawFd) -> Result<(), Failure> {
        // What is there already lies in a tree that was attached before: the plan is sorted.
        let made = |result: libc::c_int| match io::Error::last_os_error().raw_os_error() {
            Some(libc::EEXIST) if result == -1 => Ok(()),
            _ => checked(Step::Mount, result.into()),
        };
        // SAFETY: plain system calls on texts of this value, and a descriptor that is closed once.
        unsafe {
            for directory in &self.directories {
                made(libc::mkdirat(root, directory.as_ptr(), 0o755))?;
            }
            if !self.is_directory {
                made(libc::mknodat(root, self.target.as_ptr(), libc::S_IFREG | 0o600, 0))?;
            }
            let (from, to) = (c"".as_ptr(), self.target.as_ptr());
            let moved = libc::syscall(libc::SYS_move_mount, self.tree, from, root, to, MOVE_FROM_DESCRIPTOR);
            checked(Step::Mount, moved)?;
            libc::close(self.tree);
        }
        Ok(())
    }
}

fn bind(path: &Path, access: Access) -> io::Result<Bind> {
    let is_directory = path == Path::new(SELF) || path.is_dir();
    let relative = path.strip_prefix("/").map_err(|_| io::ErrorKind::InvalidInput)?;
    let above = relative.ancestors().skip(usize::from(!is_directory)).filter(|above| !above.as_os_str().is_empty());
    let mut directories = above.map(text).collect::<io::Result<Vec<_>>>()?;
    directories.reverse();
    let attributes = match access {
        Access::Read => READ_ONLY | NO_DEVICES | NO_EXECUTION,
        Access::Execute => READ_ONLY | NO_DEVICES,
        Access::Write | Access::Change | Access::Own => NO_DEVICES | NO_EXECUTION,
        Access::Device => READ_ONLY | NO_EXECUTION,
    };
    // The C library may read random numbers from a device.
    let attributes = if path.starts_with("/dev") { attributes & !NO_DEVICES } else { attributes } | NO_SETUID;
    Ok(Bind { path: text(path)?, directories, target: text(relative)?, is_directory, attributes, node: None, tree: -1 })
}

/// The node that a user needs for a device; `None` if everybody can open the host's.
fn node(path: &Path, owner: u32) -> io::Result<Option<Node>> {
    const ALL_READ_AND_WRITE: u32 = 0o006;
    let device = std::fs::metadata(path)?;
    if !device.file_type().is_char_device() || device.mode() & ALL_READ_AND_WRITE == ALL_READ_AND_WRITE {
        return Ok(None);
    }
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    Ok(Some(Node { name: text(Path::new(name))?, device: device.rdev(), owner }))
}

fn text(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn set_attributes(at: RawFd, path: &CStr, flags: libc::c_int, set: u64) -> Result<(), Failure> {
    let attributes = MountAttributes { set, clear: 0, propagation: 0, user_namespace: 0 };
    let size = size_of::<MountAttributes>();
    // SAFETY: the kernel reads a text and a structure of this frame.
    let result =
        unsafe { libc::syscall(libc::SYS_mount_setattr, at, path.as_ptr(), flags, &raw const attributes, size) };
    checked(Step::Mount, result)
}

/// Writes a file with one system call, without allocating.
fn write(path: &CStr, value: &CStr) -> io::Result<()> {
    // SAFETY: plain system calls on texts that live as long as this call, and a descriptor that is closed once.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd == -1 {
            return Err(io::Error::last_os_error());
        }
        let written = libc::write(fd, value.as_ptr().cast(), value.count_bytes());
        let result = if written == -1 { Err(io::Error::last_os_error()) } else { Ok(()) };
        libc::close(fd);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_put_below_the_directories_above_it() {
        let names = |bind: &Bind| bind.directories.iter().map(|d| d.to_str().unwrap().to_owned()).collect::<Vec<_>>();
        let file = bind(Path::new("/no/such/file"), Access::Read).unwrap();
        assert_eq!(
            (names(&file), file.target.to_str().unwrap()),
            (vec!["no".into(), "no/such".into()], "no/such/file")
        );
        let directory = bind(Path::new(SELF), Access::Read).unwrap();
        assert_eq!(names(&directory), ["proc", "proc/self"]);
        assert!(bind(Path::new("relative"), Access::Read).is_err());
    }

    #[test]
    fn only_what_may_be_changed_is_mounted_writable() {
        for (access, is_writable) in
            [(Access::Read, false), (Access::Execute, false), (Access::Write, true), (Access::Own, true)]
        {
            assert_eq!(bind(Path::new("/x"), access).unwrap().attributes & READ_ONLY == 0, is_writable, "{access:?}");
        }
    }
}
