//! What this host offers a build: its programs, and a place where files can belong to others than the caller.
//! Invariant: a [`Host`] that exists has every program a build needs and a user namespace that works.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nido_confine::helper::{self, Limits};
use nido_confine::{Confinement, Layer, Needs, plan};

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

/// Most address space (in bytes), CPU time (in seconds) and open files that a program which reads a guest's disk may use. It also has
/// a deadline.
const GUEST_DATA_MEMORY: u64 = 4 << 30;
const GUEST_DATA_CPU_SECONDS: u64 = 4 * 3600;
const GUEST_DATA_OPEN_FILES: u64 = 256;
/// How much larger than the disk in it an image may become, in bytes.
const IMAGE_OVERHEAD: u64 = 1 << 30;
/// How many ids besides the caller's a build needs.
const SUBORDINATE_IDS: u64 = 65536;

/// Variables of the caller that programs of a build may see: how to reach the network, nothing else.
const KEPT_VARIABLES: [&str; 8] =
    ["http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "HOME"];

/// Ordinary users often have no `sbin` in their path, but mkfs is there.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A host that can build.
#[derive(Debug, Clone)]
pub struct Host {
    path: OsString,
    root: bool,
}

impl Host {
    /// Finds everything a build needs.
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

    /// Finds everything else that compiling a kernel needs.
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
        let tool = format!("tools to compile a kernel ({})", words(|pair| pair.0).join(", "));
        Err(ImageError::MissingTool { tool, package: words(|pair| pair.1).join(" ") })
    }

    /// The host as far as it is needed to remove orphans of an earlier build.
    pub(crate) fn for_cleaning() -> Self {
        Self { path: search_path(), root: rustix::process::geteuid().is_root() }
    }

    /// The host as far as it is needed to make one disk image of another.
    ///
    /// # Errors
    /// [`ImageError::MissingTool`].
    pub(crate) fn for_images() -> Result<Self, ImageError> {
        let host = Self::for_cleaning();
        host.require("qemu-img", "qemu-utils")?;
        Ok(host)
    }

    /// Whether builds run as real root.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.root
    }

    /// A program that ends with this process and sees a clean environment.
    pub(crate) fn command(&self, program: &str, scratch: &Path) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", program]);
        self.clean(&mut command, scratch);
        command
    }

    /// A confined program that reads untrusted files, and writes in `scratch` only. The paths are absolute.
    ///
    /// # Errors
    /// [`ImageError::Io`] if a file is missing, or a layer cannot be prepared.
    pub(crate) fn confined_reader(
        &self,
        program: &str,
        scratch: &Path,
        read: &[PathBuf],
        disk_bytes: u64,
        layers: &[Layer],
    ) -> Result<Command, ImageError> {
        let failed = |error| ImageError::io("confine", Path::new(program), error);
        let path = self.find(program).ok_or(std::io::ErrorKind::NotFound.into()).map_err(failed)?;
        // A link is not part of what a confined program sees.
        let path = path.canonicalize().map_err(failed)?;
        let mut needs = reader_needs(path, scratch, read);
        needs.is_script = plan::is_script(&needs.program);
        let mut command = Command::new(&needs.program);
        self.clean(&mut command, scratch);
        let confinement = Confinement::prepare(plan::plan(&needs), layers).map_err(failed)?;
        helper::confine(&mut command, confinement, reader_limits(disk_bytes));
        Ok(command)
    }

    /// Whether programs can run, and devices work, in what a build unpacks below this directory.
    ///
    /// # Errors
    /// [`ImageError::BuildDirectory`] with the mount that forbids it.
    pub fn probe_directory(directory: &Path) -> Result<(), ImageError> {
        use rustix::fs::{StatVfsMountFlags, statvfs};
        let flags = statvfs(directory).map_err(|error| ImageError::io("read", directory, error.into()))?.f_flag;
        let reason = if flags.contains(StatVfsMountFlags::NOEXEC) {
            "it is mounted noexec, and a build runs programs below it"
        } else if flags.contains(StatVfsMountFlags::NODEV) && rustix::process::geteuid().is_root() {
            "it is mounted nodev, and a build by root creates devices below it"
        } else {
            return Ok(());
        };
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let path = mount_of(&mounts, &std::path::absolute(directory).unwrap_or_else(|_| directory.into()));
        Err(ImageError::BuildDirectory { path, reason })
    }

    /// The same inside its own process and mount namespaces, where it is root: really, or by a user namespace in which the
    /// caller is uid 0 and the rest are the caller's subordinate ids. When its first process ends, all others in it end.
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
        self.find(tool).is_some()
    }

    fn find(&self, tool: &str) -> Option<PathBuf> {
        std::env::split_paths(&self.path).map(|directory| directory.join(tool)).find(|path| is_executable(path))
    }

    /// Proves that a user namespace with subordinate ids works, and explains why not. The source of the ids is not checked before: it
    /// need not be a file.
    fn probe_namespace(&self) -> Result<(), ImageError> {
        let output = self
            .confined("cat", Path::new("/"))
            .args(["/proc/self/uid_map", "/proc/self/gid_map"])
            .output()
            .map_err(|error| ImageError::io("run", Path::new("unshare"), error))?;
        if output.status.success() && mapped(&String::from_utf8_lossy(&output.stdout)) >= 2 * SUBORDINATE_IDS {
            return Ok(());
        }
        let user = self.user_name();
        for file in ["/etc/subuid", "/etc/subgid"] {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            if !has_range(&text, &user, rustix::process::getuid().as_raw()) {
                return Err(ImageError::Unprivileged {
                    needs: format!("{file} gives the user {user} no range of {SUBORDINATE_IDS} ids"),
                    remedy: format!(
                        "run as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user} (another free range will \
                         do; a user that usermod does not know gets a line {user}:100000:65536 in both files)"
                    ),
                });
            }
        }
        let words = String::from_utf8_lossy(&output.stderr);
        Err(ImageError::Unprivileged {
            needs: format!("cannot create a user namespace: {}", crate::progress::printable(words.trim())),
            remedy: "allow unprivileged user namespaces on this host (sysctl kernel.unprivileged_userns_clone, \
                     user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns), or build as root"
                .to_owned(),
        })
    }

    /// The caller's name, wherever the system has its users from; the uid if there is none.
    fn user_name(&self) -> String {
        let mut command = Command::new("id");
        command.arg("-un");
        self.clean(&mut command, Path::new("/"));
        let output = command.stderr(Stdio::null()).output();
        let name = output.ok().filter(|output| output.status.success()).map(|output| output.stdout).unwrap_or_default();
        let name = String::from_utf8_lossy(&name).trim().to_owned();
        if name.is_empty() { rustix::process::getuid().as_raw().to_string() } else { name }
    }
}

/// What a program needs that reads untrusted files and writes in a directory. Pure.
fn reader_needs(program: PathBuf, scratch: &Path, read: &[PathBuf]) -> Needs {
    let directory = scratch.to_owned();
    Needs { program, own: vec![directory.clone()], directory, read: read.to_owned(), ..Needs::default() }
}

/// The most that it may use, for a disk of this size. Pure.
fn reader_limits(disk_bytes: u64) -> Limits {
    Limits {
        memory_bytes: GUEST_DATA_MEMORY,
        cpu_seconds: GUEST_DATA_CPU_SECONDS,
        file_bytes: disk_bytes.saturating_add(IMAGE_OVERHEAD),
        open_files: GUEST_DATA_OPEN_FILES,
    }
}

/// How many ids the lines of `uid_map` and `gid_map` map together. Pure.
fn mapped(maps: &str) -> u64 {
    maps.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok()).sum()
}

/// The mount that a path lies on. Pure, over the text of `mountinfo`.
fn mount_of(mountinfo: &str, path: &Path) -> PathBuf {
    let points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).map(|point| point.replace("\\040", " "));
    let around = points.map(PathBuf::from).filter(|point| path.starts_with(point));
    around.max_by_key(|point| point.components().count()).unwrap_or_else(|| path.into())
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
    fn ids_of_both_maps_are_counted() {
        let whole = "         0       1000          1\n         1     100000      65536\n";
        assert!(mapped(&whole.repeat(2)) >= 2 * SUBORDINATE_IDS);
        assert!(mapped(whole) < 2 * SUBORDINATE_IDS);
        assert_eq!(mapped(""), 0);
    }

    #[test]
    fn the_innermost_mount_is_named() {
        let text = "21 1 8:1 / / rw - ext4 a rw\n22 21 0:5 / /mnt/x rw,noexec - tmpfs b rw\n23 21 0:6 / /mnt/x\\040y rw - tmpfs c rw\n";
        let of = |path: &str| mount_of(text, Path::new(path));
        assert_eq!(of("/mnt/x/home/build"), Path::new("/mnt/x"));
        assert_eq!(of("/mnt/x y/home"), Path::new("/mnt/x y"));
        assert_eq!(of("/mnt/xy"), Path::new("/"));
    }

    /// A build on a mount without the right to run programs failed after most of a minute, with words about dpkg.
    #[test]
    fn a_directory_whose_mount_runs_no_programs_is_refused() {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let options = |line: &str| line.split(' ').nth(5).is_some_and(|words| words.split(',').any(|w| w == "noexec"));
        let place = |line: &str| line.split(' ').nth(4).map(PathBuf::from).filter(|place| place.is_dir());
        for noexec in mounts.lines().filter(|line| options(line)).filter_map(place) {
            let refused = Host::probe_directory(&noexec).unwrap_err();
            assert!(refused.to_string().contains("noexec"), "{refused}");
        }
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("x"), "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(directory.path().join("x"), std::fs::Permissions::from_mode(0o700)).unwrap();
        let runs = Command::new("/bin/sh").arg("-c").arg("exec ./x").current_dir(directory.path()).status().unwrap();
        let refused = Host::probe_directory(directory.path());
        assert!(
            !runs.success() || !matches!(&refused, Err(error) if error.to_string().contains("noexec")),
            "{refused:?}"
        );
    }

    /// qemu-img read a guest's disk without a limit of what it may use.
    #[test]
    fn readers_of_a_guests_disk_run_under_limits() {
        let directory = tempfile::tempdir().unwrap();
        let mut command =
            Host::for_cleaning().confined_reader("cat", directory.path(), &[], 1 << 20, &[Layer::Seccomp]).unwrap();
        let output = command.arg("/proc/self/limits").arg("/proc/self/status").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let limit = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
        assert!(limit("Max address space").contains(&GUEST_DATA_MEMORY.to_string()), "{text}");
        assert!(limit("Max cpu time").contains(&GUEST_DATA_CPU_SECONDS.to_string()), "{text}");
        assert!(limit("Max file size").contains(&(IMAGE_OVERHEAD + (1 << 20)).to_string()), "{text}");
        assert!(limit("Max open files").contains(&GUEST_DATA_OPEN_FILES.to_string()), "{text}");
        assert!(limit("NoNewPrivs").ends_with('1') && limit("Seccomp:").ends_with('2'), "{text}");
    }

    #[test]
    fn a_reader_changes_nothing_but_its_directory() {
        let (scratch, disk) = (Path::new("/home/u/build/1"), PathBuf::from("/home/u/vms/1/disk.qcow2"));
        let needs = reader_needs("/usr/bin/qemu-img".into(), scratch, std::slice::from_ref(&disk));
        assert_eq!((needs.own, needs.read), (vec![scratch.to_owned()], vec![disk]));
        assert!(needs.change.is_empty() && needs.write.is_empty() && !needs.kvm);
    }

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let host = Host { path: OsString::from("/nonexistent"), root: true };
        let error = host.require("mkfs.ext4", "e2fsprogs").unwrap_err();
        assert!(error.to_string().contains("mkfs.ext4"));
        assert!(error.hint().unwrap().text(nido_api::FrontEnd::Cli).unwrap().contains("e2fsprogs"));
    }

    #[test]
    fn everything_a_compiler_misses_is_named_at_once() {
        let host = Host { path: OsString::from("/nonexistent"), root: true };
        let hint = host.probe_compiler().unwrap_err().hint().unwrap().text(nido_api::FrontEnd::Cli).unwrap();
        assert!(COMPILER_TOOLS.iter().all(|(_, package)| hint.contains(package)), "{hint}");
    }

    #[test]
    fn system_directories_are_searched_after_the_callers() {
        let path = search_path();
        assert!(std::env::split_paths(&path).any(|directory| directory == Path::new("/usr/sbin")));
    }
}
