//! What this host offers a build: its programs, and a place where files can belong to others than the caller.
//! Invariant: a [`Host`] that exists has every program a build needs and a user namespace that works.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::ImageError;

/// Programs a build runs, with the Debian packages that have them.
const TOOLS: [(&str, &str); 8] = [
    ("mmdebstrap", "mmdebstrap"),
    ("apt-get", "apt"),
    ("apt-config", "apt"),
    ("dpkg-deb", "dpkg"),
    ("unshare", "util-linux"),
    ("setpriv", "util-linux"),
    ("mkfs.ext4", "e2fsprogs"),
    ("qemu-img", "qemu-utils"),
];
/// Programs that compile a kernel, likewise.
const COMPILER_TOOLS: [(&str, &str); 7] = [
    ("gcc", "gcc"),
    ("ld", "binutils"),
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("tar", "tar"),
];
/// Headers that compiling a kernel needs, likewise.
const COMPILER_HEADERS: [(&str, &str); 2] =
    [("/usr/include/stdio.h", "libc6-dev"), ("/usr/include/gelf.h", "libelf-dev")];
const XZ: (&str, &str) = ("xz", "xz-utils");
const NEWUIDMAP: (&str, &str) = ("newuidmap", "uidmap");

/// Variables of the caller that programs of a build may see: how to reach the network, nothing else.
const KEPT_VARIABLES: [&str; 8] =
    ["http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "HOME"];

/// Ordinary users often have no `sbin` in their path, but mkfs lives there.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A host that can build.
#[derive(Debug, Clone)]
pub struct Host {
    path: OsString,
    root: bool,
}

impl Host {
    /// Looks for everything a build needs.
    ///
    /// # Errors
    /// [`ImageError::MissingTool`], [`ImageError::Unprivileged`] with exactly what is missing.
    pub fn probe() -> Result<Self, ImageError> {
        let host = Self { path: search_path(), root: rustix::process::geteuid().is_root() };
        let own = (!host.root).then_some(NEWUIDMAP);
        for (tool, package) in TOOLS.into_iter().chain([XZ]).chain(own) {
            host.require(tool, package)?;
        }
        if !host.root {
            host.probe_namespace()?;
        }
        Ok(host)
    }

    /// Looks for everything that compiling a kernel needs beside that.
    ///
    /// # Errors
    /// [`ImageError::MissingTool`] with all that is missing.
    pub fn probe_compiler(&self) -> Result<(), ImageError> {
        let tools = COMPILER_TOOLS.into_iter().filter(|(tool, _)| !self.has(tool));
        let headers = COMPILER_HEADERS.into_iter().filter(|(header, _)| !Path::new(header).is_file());
        let missing: Vec<_> = tools.chain(headers).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let words = |of: fn(&(&'static str, &'static str)) -> &'static str| missing.iter().map(of).collect::<Vec<_>>();
        let tool = format!("what compiles a kernel ({})", words(|pair| pair.0).join(", "));
        Err(ImageError::MissingTool { tool, package: words(|pair| pair.1).join(" ") })
    }

    /// The host as far as it is needed to remove what an earlier build left.
    pub(crate) fn for_cleaning() -> Self {
        Self { path: search_path(), root: rustix::process::geteuid().is_root() }
    }

    /// The host as far as it is needed to make one disk image of another.
    ///
    /// # Errors
    /// [`ImageError::MissingTool`].
    pub(crate) fn for_images() -> Result<Self, ImageError> {
        let host = Self::for_cleaning();
        for (tool, package) in [("qemu-img", "qemu-utils"), ("setpriv", "util-linux")] {
            host.require(tool, package)?;
        }
        Ok(host)
    }

    /// Whether builds run as real root.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.root
    }

    /// A program that dies with this process and sees a clean environment.
    pub(crate) fn command(&self, program: &str, scratch: &Path) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", program]);
        self.clean(&mut command, scratch);
        command
    }

    /// The same inside its own process and mount namespaces, where it is root: really, or by a user namespace in which the
    /// caller is uid 0 and the rest are the caller's subordinate ids. When its first process dies, all in it die.
    pub(crate) fn confined(&self, program: &str, scratch: &Path) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "unshare"]);
        if !self.root {
            command.args(["--user", "--map-root-user", "--map-auto"]);
        }
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--", program]);
        self.clean(&mut command, scratch);
        command
    }

    fn clean(&self, command: &mut Command, scratch: &Path) {
        command.env_clear();
        for name in KEPT_VARIABLES {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command
            .env("PATH", &self.path)
            .env("LC_ALL", "C.UTF-8")
            .env("TMPDIR", scratch)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .current_dir(scratch)
            .stdin(Stdio::null());
    }

    fn require(&self, tool: &str, package: &str) -> Result<(), ImageError> {
        if self.has(tool) {
            return Ok(());
        }
        Err(ImageError::MissingTool { tool: format!("the program {tool}"), package: package.to_owned() })
    }

    fn has(&self, tool: &str) -> bool {
        std::env::split_paths(&self.path).any(|directory| is_executable(&directory.join(tool)))
    }

    /// Proves that a user namespace with subordinate ids works, and explains why not.
    fn probe_namespace(&self) -> Result<(), ImageError> {
        let user = user_name();
        for file in ["/etc/subuid", "/etc/subgid"] {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            if !has_range(&text, &user, rustix::process::getuid().as_raw()) {
                return Err(ImageError::Unprivileged {
                    needs: format!("{file} gives the user {user} no range of 65536 ids"),
                    remedy: format!(
                        "as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user} (another free range will do)"
                    ),
                });
            }
        }
        let output = self
            .confined("true", Path::new("/"))
            .stdout(Stdio::null())
            .output()
            .map_err(|error| ImageError::io("run", Path::new("unshare"), error))?;
        if output.status.success() {
            return Ok(());
        }
        let words = String::from_utf8_lossy(&output.stderr);
        Err(ImageError::Unprivileged {
            needs: format!("a user namespace cannot be made: {}", crate::progress::printable(words.trim())),
            remedy: "allow unprivileged user namespaces on this host (sysctl kernel.unprivileged_userns_clone, \
                     user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns), or build as root"
                .to_owned(),
        })
    }
}

/// Whether a `/etc/subuid` gives this user a range of at least 65536 ids. Pure.
fn has_range(text: &str, user: &str, uid: u32) -> bool {
    text.lines().any(|line| {
        let mut fields = line.trim().split(':');
        let owner = fields.next().unwrap_or_default();
        let count = fields.nth(1).and_then(|count| count.parse::<u64>().ok()).unwrap_or(0);
        (owner == user || owner == uid.to_string()) && !owner.is_empty() && count >= 65536
    })
}

/// The caller's name by `/etc/passwd`, or the uid where there is none.
fn user_name() -> String {
    let uid = rustix::process::getuid().as_raw().to_string();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&uid.as_str()))
        .map_or_else(|| uid.clone(), |fields| fields[0].to_owned())
}

fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    if !path.is_empty() {
        path.push(":");
    }
    path.push(SYSTEM_PATH);
    let absolute: Vec<PathBuf> = std::env::split_paths(&path).filter(|directory| directory.is_absolute()).collect();
    std::env::join_paths(absolute).unwrap_or_else(|_| OsStr::new(SYSTEM_PATH).to_owned())
}

fn is_executable(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_found_by_name_and_by_number() {
        let text = "alice:100000:65536\n1001:165536:65536\nbob:1:10\n\n::\n";
        assert!(has_range(text, "alice", 1));
        assert!(has_range(text, "carol", 1001));
        assert!(!has_range(text, "bob", 2));
        assert!(!has_range(text, "", 3));
    }

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let host = Host { path: OsString::from("/nonexistent"), root: true };
        let error = host.require("mkfs.ext4", "e2fsprogs").unwrap_err();
        assert!(error.to_string().contains("mkfs.ext4"));
        assert!(error.hint().unwrap().contains("e2fsprogs"));
    }

    #[test]
    fn everything_a_compiler_misses_is_named_at_once() {
        let host = Host { path: OsString::from("/nonexistent"), root: true };
        let hint = host.probe_compiler().unwrap_err().hint().unwrap();
        assert!(COMPILER_TOOLS.iter().all(|(_, package)| hint.contains(package)), "{hint}");
    }

    #[test]
    fn system_directories_are_searched_after_the_callers() {
        let path = search_path();
        assert!(std::env::split_paths(&path).any(|directory| directory == Path::new("/usr/sbin")));
    }
}
