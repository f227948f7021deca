//! Where the root of an uploaded tree goes.
//!
//! Invariant: the place is a name in a directory that exists; what has that name now is nothing, a regular file or a
//! directory, and no symlink stands in between.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nido_guest_agent::wire::{Fault, Put, check_component};
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::resolve;
use crate::passwd::{self, User};
use crate::refusal::Refusal;

/// Directories are looked at, not read.
pub const DIRECTORY_PATH_FLAGS: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// How many symlinks lead to a file that does not exist yet: the kernel's limit.
const MAX_LINKS: usize = 40;

/// User and group by number; as the agent if absent.
pub type Ids = Option<(u32, u32)>;

/// Where the root of the tree goes.
pub struct Destination {
    parent: PathBuf,
    pub name: OsString,
}

impl Destination {
    /// Follows the request's path: a directory takes the copy under the name given, everything else is meant itself.
    pub fn find(request: &Put, home: &Path, ids: Ids) -> Result<Self, Refusal> {
        let mut path = resolve(&request.path, home)?;
        let wants_directory = request.path.last().is_none_or(|&byte| byte == b'/');
        let found = fs::metadata(&path);
        if let Some(name) = &request.name {
            check_component(name).map_err(|error| malformed(&error.to_string()))?;
            let is_directory = found.as_ref().is_ok_and(fs::Metadata::is_dir);
            if !is_directory && wants_directory {
                make_directories(&path, request.parents, ids)?;
            }
            if is_directory || wants_directory {
                path.push(OsStr::from_bytes(name));
            }
        }
        // Where a symlink leads is what is meant, whether it is there already or not.
        match fs::metadata(&path) {
            Ok(found) if !found.is_file() && !found.is_dir() => return Err(special(&path)),
            Ok(_) => path = fs::canonicalize(&path).map_err(|error| failed(&path, error))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => path = follow(path)?,
            Err(_) => {}
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Refusal::new(Fault::WrongType, format!("{}: cannot be replaced", path.display())));
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        make_directories(parent, request.parents, ids)?;
        Ok(Self { parent: parent.to_owned(), name: name.to_owned() })
    }

    pub fn path(&self) -> PathBuf {
        self.parent.join(&self.name)
    }

    pub fn open_parent(&self) -> Result<OwnedFd, Refusal> {
        rustix::fs::open(&self.parent, DIRECTORY_PATH_FLAGS, Mode::empty()).map_err(|error| failed(&self.parent, error))
    }
}

/// Where a chain of symlinks ends that leads to nothing.
fn follow(mut path: PathBuf) -> Result<PathBuf, Refusal> {
    for _ in 0..MAX_LINKS {
        match fs::read_link(&path) {
            Ok(target) => path = path.parent().unwrap_or(Path::new("/")).join(target),
            Err(_) => return Ok(path),
        }
    }
    Err(failed(&path, Errno::LOOP))
}

pub fn malformed(message: &str) -> Refusal {
    Refusal::new(Fault::Invalid, message)
}

pub fn failed(path: &Path, error: impl Into<io::Error>) -> Refusal {
    Refusal::from_io(&path.display().to_string(), &error.into())
}

/// Why a device, FIFO or socket is left as it is.
pub fn special(path: &Path) -> Refusal {
    let what = format!("{}: not a regular file: a device, pipe or socket is not replaced by a copy", path.display());
    Refusal::new(Fault::WrongType, what)
}

pub fn owner(wanted: Option<&str>) -> Result<Option<User>, Refusal> {
    let name = wanted.unwrap_or("0");
    match passwd::find(name).map_err(|error| Refusal::from_io("/etc/passwd", &error))? {
        Some(user) if user.uid == 0 && wanted.is_none() && !rustix::process::geteuid().is_root() => Ok(None),
        Some(user) => Ok(Some(user)),
        None => Err(Refusal::new(Fault::NoUser, format!("there is no user {name:?} in the guest"))),
    }
}

/// Makes a directory and what is missing above it, if that is allowed.
fn make_directories(path: &Path, allowed: bool, ids: Ids) -> Result<(), Refusal> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) => return Err(Refusal::new(Fault::WrongType, format!("{}: not a directory", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound && allowed => {}
        Err(error) => return Err(failed(path, error)),
    }
    if let Some(parent) = path.parent() {
        make_directories(parent, allowed, ids)?;
    }
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) => give_to(CWD, path, ids).map_err(|error| failed(path, error)),
        Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(failed(path, error)),
    }
}

/// Gives what was just made its owner.
pub fn give_to(directory: impl AsFd, name: impl rustix::path::Arg, ids: Ids) -> Result<(), Errno> {
    let Some((uid, gid)) = ids else { return Ok(()) };
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::fs::chownat(directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}
