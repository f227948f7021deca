//! Files of the host that a caller may name, and directories to be read: below directories that were allowed.
//!
//! ```text
//!  /srv/exchange/in/data.csv      which root? by whole components
//!  [opened root]  in/data.csv     openat2: beneath, no symlinks, no magic links
//! ```
//!
//! Invariant: no path of a caller is ever resolved by anything but `openat2` from a root that was opened at the start, and its
//! last component by calls that follow nothing. So a process that writes below a root meanwhile (a guest's download, another program)
//! cannot make a path mean something else; nothing but regular files and directories is opened; and a file that is written appears whole.

mod writing;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nido_api::error::{Code, Error, Hint, Result};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::policy::Policy;

pub use self::writing::PendingFile;
use self::writing::{NAME_ATTEMPTS_MAX, check_target, make};

const INSIDE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);
const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The directories that were allowed, each held open.
#[derive(Debug, Default)]
pub struct Roots(Vec<Root>);

/// The directories of the host that callers may name: to read from, and to write to.
#[derive(Debug, Default)]
pub struct HostPaths {
    /// Files and directories below these may be read.
    pub read: Roots,
    /// Files below these may be written.
    pub write: Roots,
}

/// Which directories count where a policy names none.
#[derive(Debug, Clone, Default)]
pub struct DefaultPaths {
    /// For reading.
    pub read: Vec<PathBuf>,
    /// For writing.
    pub write: Vec<PathBuf>,
}

impl HostPaths {
    /// Opens what a policy names, and where it names nothing the defaults. Below a default root hidden names are refused: no user
    /// has decided which files it contains.
    ///
    /// # Errors
    /// As [`Roots::open`].
    pub fn open(policy: &Policy, defaults: &DefaultPaths) -> Result<Self> {
        let open = |named: Option<&[PathBuf]>, default: &[PathBuf]| match named {
            Some(paths) => Roots::open(paths),
            None => Roots::open_default(default),
        };
        let read = open(policy.readable_roots(), &defaults.read)?;
        Ok(Self { read, write: open(policy.writable_roots(), &defaults.write)? })
    }

    /// Which they are, in a sentence.
    #[must_use]
    pub fn summary(&self) -> String {
        let list = |roots: &Roots| match roots.0.is_empty() {
            true => "nowhere".to_owned(),
            false => {
                format!("below {}", roots.paths().into_iter().map(shown).collect::<Vec<_>>().join(", "))
            }
        };
        format!("host files can be read {} and written {}", list(&self.read), list(&self.write))
    }
}

#[derive(Debug)]
struct Root {
    fd: OwnedFd,
    /// As it was named, absolute.
    named: PathBuf,
    /// Without symlinks.
    real: PathBuf,
    /// Whether names that begin with a dot may be used.
    hidden: bool,
}

/// A directory that may be read.
#[derive(Debug)]
pub struct Folder {
    /// It, open.
    pub fd: OwnedFd,
    /// Whether names in it that begin with a dot may be read.
    pub hidden: bool,
}

/// A file that may be read.
#[derive(Debug)]
pub struct Readable {
    /// It, open at its beginning.
    pub file: File,
    /// How long it is now.
    pub bytes: u64,
    /// Its permission bits.
    pub mode: u16,
    /// Its own name.
    pub name: OsString,
}

impl Roots {
    /// Opens the directories. Their paths may contain symlinks: the author of the policy is trusted.
    ///
    /// # Errors
    /// `path_not_found`, `path_invalid` if one is no directory.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        paths.iter().map(|path| Root::open(path, true)).collect::<Result<_>>().map(Self)
    }

    /// The same for default directories: names that begin with a dot are refused below them.
    fn open_default(paths: &[PathBuf]) -> Result<Self> {
        paths.iter().map(|path| Root::open(path, false)).collect::<Result<_>>().map(Self)
    }

    /// The directories, as they were named.
    #[must_use]
    pub fn paths(&self) -> Vec<&Path> {
        self.0.iter().map(|root| root.named.as_path()).collect()
    }

    /// Opens a regular file. A relative path is one below the first root.
    ///
    /// # Errors
    /// `denied` outside of the roots and where a symlink is on the way, `path_not_found`, `path_invalid` for what is no regular
    /// file, `limit_exceeded`.
    pub fn read(&self, path: &Path, max_bytes: u64) -> Result<Readable> {
        let (root, below) = self.find(path)?;
        let name = below.file_name().ok_or_else(|| not_a_file(path, FileType::Directory))?.to_owned();
        // Looked at before it is opened: to open a device or a pipe may do something, or never return.
        let found = root.resolve(&below, OFlags::PATH | OFlags::CLOEXEC).map_err(|e| refused(path, e))?;
        let stat = rustix::fs::fstat(&found).map_err(|e| refused(path, e))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != FileType::RegularFile {
            return Err(not_a_file(path, kind));
        }
        let bytes = u64::try_from(stat.st_size).unwrap_or(0);
        check_size(path, bytes, max_bytes)?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let open = rustix::fs::open(of(&found), flags, Mode::empty()).map_err(|e| refused(path, e))?;
        let mode = u16::try_from(stat.st_mode & 0o777).unwrap_or(0);
        Ok(Readable { file: open.into(), bytes, mode, name })
    }

    /// Opens a directory, for what is in it to be read through the answer. A relative path is one below the first root.
    ///
    /// # Errors
    /// `denied` outside of the roots and where a symlink is on the way, `path_not_found`, `path_invalid` for what is no directory.
    pub fn directory(&self, path: &Path) -> Result<Folder> {
        let (root, below) = self.find(path)?;
        let below = if below.as_os_str().is_empty() { Path::new(".") } else { &below };
        let fd =
            root.resolve(below, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC).map_err(|e| refused(path, e))?;
        Ok(Folder { fd, hidden: root.hidden })
    }

    /// Begins a file. Its directory must be there. A relative path is one below the first root.
    ///
    /// # Errors
    /// `denied` outside of the roots and where a symlink is on the way, `path_not_found`, `path_exists` unless it may be
    /// overwritten, `path_invalid` for what is not a regular file.
    pub fn write(&self, path: &Path, overwrite: bool) -> Result<PendingFile> {
        let (root, below) = self.find(path)?;
        let name = below.file_name().ok_or_else(|| not_a_file(path, FileType::Directory))?.to_owned();
        let parent = below.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let directory = root.resolve(parent, DIRECTORY).map_err(|e| refused(path, e))?;
        check_target(&directory, &name, overwrite, path)?;
        let (file, fresh) = make(&directory).map_err(|e| refused(path, e))?;
        Ok(PendingFile { file: file.into(), fresh, directory, name, overwrite, path: root.named.join(&below) })
    }

    /// The root of a path, and what of it lies below. Pure but for what it borrows: nothing is looked up.
    fn find(&self, path: &Path) -> Result<(&Root, PathBuf)> {
        if leads_upwards(path) {
            return Err(
                Error::new(Code::Denied, format!("{} contains '..'", shown(path))).hint("write the path without '..'")
            );
        }
        let below = |root: &&Root| [&root.named, &root.real].into_iter().find_map(|dir| path.strip_prefix(dir).ok());
        let roots = self.0.iter().filter_map(|root| below(&root).map(|rest| (root, rest)));
        // Where one root lies in another, the inner one knows what is in it.
        let found = match path.is_absolute() {
            true => roots.min_by_key(|(_, rest)| rest.components().count()),
            false => self.0.first().map(|root| (root, path)),
        };
        let (root, rest) = found.ok_or_else(|| {
            let roots: Vec<_> = self.0.iter().map(|root| shown(&root.named)).collect();
            let hint = match roots.is_empty() {
                true => "this server may not use files of its host; send the content itself".to_owned(),
                false => format!("allowed are paths below {}", roots.join(", ")),
            };
            Error::new(Code::Denied, format!("{} is outside the paths that this server may use", shown(path)))
                .hint(hint)
        })?;
        let is_hidden = |part: Component<'_>| matches!(part, Component::Normal(name) if is_hidden(name));
        if !root.hidden && rest.components().any(is_hidden) {
            let words = format!("{} has a name that begins with a dot", shown(path));
            return Err(Error::new(Code::Denied, words)
                .hint("such files are settings and secrets; a policy can allow their directory with read_roots and write_roots"));
        }
        Ok((root, rest.components().collect()))
    }
}

impl Root {
    fn open(path: &Path, hidden: bool) -> Result<Self> {
        let failed = |e: std::io::Error| match e.raw_os_error().map(Errno::from_raw_os_error) {
            Some(errno) => refused(path, errno),
            None => Error::io(format!("cannot use {}", shown(path)), e),
        };
        let fd = rustix::fs::open(path, DIRECTORY, Mode::empty()).map_err(|e| refused(path, e))?;
        let real = std::fs::read_link(of(&fd)).map_err(failed)?;
        // What is answered can be requested again: a path with '..' in it could not.
        let named = std::path::absolute(path).map_err(failed)?;
        let named = if leads_upwards(&named) { real.clone() } else { named };
        Ok(Self { fd, named, real, hidden })
    }

    fn resolve(&self, below: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        for _ in 0..NAME_ATTEMPTS_MAX {
            match rustix::fs::openat2(&self.fd, below, flags, Mode::empty(), INSIDE) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                outcome => return outcome,
            }
        }
        Err(Errno::AGAIN)
    }
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().first() == Some(&b'.')
}

fn leads_upwards(path: &Path) -> bool {
    path.components().any(|part| part == Component::ParentDir)
}

/// A way to an open file that needs no name.
fn of(fd: &impl std::os::fd::AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

fn shown(path: &Path) -> String {
    path.display().to_string().escape_debug().to_string()
}

fn check_size(path: &Path, bytes: u64, max_bytes: u64) -> Result<()> {
    if bytes <= max_bytes {
        return Ok(());
    }
    let words = format!("{} has {bytes} bytes; at most {max_bytes} are copied", shown(path));
    Err(Error::new(Code::LimitExceeded, words).hint("copy it in parts").or_hint(Hint::host("copy it with nido cp")))
}

fn not_a_file(path: &Path, kind: FileType) -> Error {
    let (what, hint) = match kind {
        FileType::Directory => ("a directory", "only single files can be copied: pack it first, for example with tar"),
        FileType::Symlink => ("a symlink", "name the file itself"),
        _ => ("not a regular file", "only regular files can be copied"),
    };
    Error::new(Code::PathInvalid, format!("{} is {what}", shown(path))).hint(hint)
}

/// A failed system call, as an error about the path.
fn refused(path: &Path, error: Errno) -> Error {
    let (code, words, hint) = match error {
        Errno::NOENT => (Code::PathNotFound, "is not there", "check the path on the host"),
        Errno::EXIST => (Code::PathExists, "exists", "choose another name, or allow overwriting"),
        Errno::LOOP | Errno::XDEV => {
            (Code::Denied, "is reached through a symlink", "name the file itself, below an allowed directory")
        }
        Errno::NOTDIR => (Code::PathInvalid, "has a component that is not a directory", "check the path on the host"),
        Errno::ROFS => (Code::ReadOnly, "is in a directory that cannot be written", "choose another directory"),
        Errno::ISDIR => (Code::PathInvalid, "is a directory", "choose another name"),
        Errno::NOSYS => {
            (Code::HostFailed, "cannot be opened safely: this kernel has no openat2", "use Linux 5.6 or newer")
        }
        Errno::NAMETOOLONG | Errno::INVAL => (Code::PathInvalid, "is not a usable path", "choose another name"),
        Errno::ACCESS | Errno::PERM => {
            (Code::PermissionDenied, "is not accessible to the user that runs nido", "check its permissions")
        }
        other => return Error::io(format!("cannot use {}", shown(path)), other.into()),
    };
    Error::new(code, format!("{} {words}", shown(path))).hint(hint)
}

#[cfg(test)]
mod tests;
