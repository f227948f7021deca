//! Which files a confined program may use, and how. Pure, but for [`is_script`].
//!
//! Invariant: nothing can be changed but what is named in `own`, `change` and `write`.

use std::path::{Path, PathBuf};

/// Where programs of the system keep their libraries, firmware and keymaps.
const SYSTEM_DIRECTORIES: [&str; 11] = [
    "/lib",
    "/lib64",
    "/nix/store",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/local/share/qemu",
    "/usr/share/qemu",
    "/usr/share/qemu-kvm",
    "/usr/share/seabios",
    "/etc/alternatives",
];
/// Where a program that was installed below a directory of its own keeps them, seen from that directory.
const PREFIX_DIRECTORIES: [&str; 4] = ["lib", "lib64", "libexec", "share/qemu"];
/// What QEMU and its libraries read about the host. `/proc/self` is the program's own.
const HOST_FACTS: [&str; 4] = ["/etc/ld.so.cache", "/proc/self", "/sys/devices/system/cpu", "/sys/devices/system/node"];
/// Where a shell script that stands for QEMU finds its interpreter and QEMU.
const SCRIPT_DIRECTORIES: [&str; 2] = ["/bin", "/usr/bin"];

/// The directory of the process itself, which has another name in each process.
pub const SELF: &str = "/proc/self";

/// What may be done with a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// A file is read; in a directory, files are listed and read.
    Read,
    /// As [`Access::Read`]; programs are executed, too.
    Execute,
    /// A file is read and written, and keeps its length or grows.
    Write,
    /// A file is read, written and truncated.
    Change,
    /// A device is read, written and controlled.
    Device,
    /// Files and sockets in a directory are made, changed and removed.
    Own,
}

/// A path that the program may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// An absolute path.
    pub path: PathBuf,
    /// What may be done with it, and with all that is below.
    pub access: Access,
    /// The program is not started without it.
    pub is_required: bool,
}

/// What one start of a program needs.
#[derive(Clone, Debug, Default)]
pub struct Needs {
    /// The binary; an absolute path.
    pub program: PathBuf,
    /// It is a script: it has an interpreter.
    pub is_script: bool,
    /// The working directory; an absolute path. Nothing in it may be used that is not named below.
    pub directory: PathBuf,
    /// Directories in which files and sockets are made, changed and removed: absolute paths.
    pub own: Vec<PathBuf>,
    /// Files that are written and truncated, but neither replaced nor removed.
    pub change: Vec<PathBuf>,
    /// Files that are read.
    pub read: Vec<PathBuf>,
    /// Files that are opened for writing, but keep their length.
    pub write: Vec<PathBuf>,
    /// The machine runs under KVM.
    pub kvm: bool,
    /// The guest has an address of the kernel's vsock.
    pub vsock: bool,
}

/// The paths that the program may use, sorted: a directory comes before what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The paths, each once.
    pub entries: Vec<Entry>,
    /// The working directory.
    pub directory: PathBuf,
}

/// Whether a program has an interpreter. Reads its first two bytes.
#[must_use]
pub fn is_script(program: &Path) -> bool {
    use std::io::Read as _;
    let mut magic = [0; 2];
    std::fs::File::open(program).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"#!"
}

/// Plans the confinement of one program.
#[must_use]
pub fn plan(needs: &Needs) -> Plan {
    let optional = |path: &str, access| Entry { path: path.into(), access, is_required: false };
    let required = |path: &Path, access| Entry { path: path.into(), access, is_required: true };
    let mut entries = vec![required(&needs.program, Access::Execute)];
    entries.extend(needs.own.iter().map(|path| required(path, Access::Own)));
    entries.extend(SYSTEM_DIRECTORIES.map(|path| optional(path, Access::Execute)));
    if needs.is_script {
        entries.extend(SCRIPT_DIRECTORIES.map(|path| optional(path, Access::Execute)));
    }
    // PREFIX/bin/qemu-system-x86_64.
    if let Some(prefix) = needs.program.parent().and_then(Path::parent).filter(|prefix| prefix.parent().is_some()) {
        let own = PREFIX_DIRECTORIES.map(|name| prefix.join(name));
        entries.extend(own.into_iter().map(|path| Entry { path, access: Access::Execute, is_required: false }));
    }
    entries.extend(HOST_FACTS.map(|path| optional(path, Access::Read)));
    entries.push(optional("/dev/null", Access::Device));
    entries.push(optional("/dev/urandom", Access::Read));
    entries.extend(needs.kvm.then(|| required(Path::new("/dev/kvm"), Access::Device)));
    entries.extend(needs.vsock.then(|| required(Path::new("/dev/vhost-vsock"), Access::Device)));
    entries.extend(needs.read.iter().map(|path| required(path, Access::Read)));
    entries.extend(needs.change.iter().map(|path| required(path, Access::Change)));
    entries.extend(needs.write.iter().map(|path| required(path, Access::Write)));
    // Of several rights for the same path, the largest: the last.
    entries.sort_by(|a, b| (&a.path, b.access, b.is_required).cmp(&(&b.path, a.access, a.is_required)));
    entries.dedup_by(|later, first| later.path == first.path);
    Plan { entries, directory: needs.directory.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs() -> Needs {
        Needs {
            program: "/usr/bin/qemu-system-x86_64".into(),
            directory: "/home/u/.nido/vms/1".into(),
            own: vec!["/home/u/.nido/vms/1/qemu".into()],
            change: vec!["/home/u/.nido/vms/1/disk.qcow2".into()],
            read: vec!["/home/u/.nido/blobs/b".into(), "/home/u/.nido/blobs/a".into()],
            ..Needs::default()
        }
    }

    fn access(plan: &Plan, path: &str) -> Option<Access> {
        plan.entries.iter().find(|entry| entry.path == Path::new(path)).map(|entry| entry.access)
    }

    #[test]
    fn only_what_is_named_for_it_can_be_changed() {
        let plan = plan(&needs());
        let changed: Vec<_> = plan.entries.iter().filter(|entry| entry.access >= Access::Write).collect();
        let paths: Vec<_> = changed.iter().map(|entry| entry.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/dev/null", "/home/u/.nido/vms/1/disk.qcow2", "/home/u/.nido/vms/1/qemu"]);
        assert_eq!(access(&plan, "/home/u/.nido/blobs/a"), Some(Access::Read));
    }

    #[test]
    fn nothing_above_what_is_named_can_be_read() {
        let plan = plan(&needs());
        let around = ["/home", "/home/u/.nido", "/home/u/.nido/blobs", "/home/u/.nido/vms", "/home/u/.nido/vms/1"];
        for closed in ["/", "/etc", "/proc", "/dev", "/usr", "/usr/bin"].into_iter().chain(around) {
            assert_eq!(access(&plan, closed), None, "{closed}");
        }
    }

    #[test]
    fn devices_are_open_only_to_machines_that_use_them() {
        for (kvm, vsock) in [(false, false), (true, false), (true, true)] {
            let plan = plan(&Needs { kvm, vsock, ..needs() });
            assert_eq!(access(&plan, "/dev/kvm").is_some(), kvm);
            assert_eq!(access(&plan, "/dev/vhost-vsock").is_some(), vsock);
        }
    }

    #[test]
    fn a_path_has_one_entry_with_its_largest_access() {
        let memory = PathBuf::from("/home/u/.nido/blobs/a");
        let plan = plan(&Needs { write: vec![memory.clone()], ..needs() });
        let found: Vec<_> = plan.entries.iter().filter(|entry| entry.path == memory).collect();
        assert_eq!(found, [&Entry { path: memory.clone(), access: Access::Write, is_required: true }]);
    }

    #[test]
    fn a_directory_comes_before_its_contents() {
        let plan = plan(&Needs { read: vec!["/usr/lib/nido/blobs/a".into()], ..needs() });
        let position = |path: &str| plan.entries.iter().position(|entry| entry.path == Path::new(path)).unwrap();
        assert!(position("/usr/lib") < position("/usr/lib/nido/blobs/a"));
    }

    #[test]
    fn a_qemu_outside_of_the_system_finds_its_own_files() {
        let plan = plan(&Needs { program: "/opt/qemu/bin/qemu-system-x86_64".into(), ..needs() });
        assert_eq!(access(&plan, "/opt/qemu/share/qemu"), Some(Access::Execute));
        assert_eq!(access(&plan, "/opt/qemu"), None);
        let alone = super::plan(&Needs { program: "/bin/qemu-system-x86_64".into(), ..needs() });
        assert_eq!(access(&alone, "/share/qemu"), None);
    }
}
