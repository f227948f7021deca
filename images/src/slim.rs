//! The recipe of the slim kernel (`images/recipes/kernels/slim/`): its text, parsed; whether it is made in memory; how far
//! that is. Pure. Invariant: the recipe's hash covers every byte a build takes from it.

use serde::Deserialize;

use crate::apt::is_package_name;
use crate::digest::sha256;
use crate::progress::printable;

/// The required options, one `CONFIG_X=y` a line.
pub const CONFIG: &str = include_str!("../recipes/kernels/slim/config");
/// Downloads the source.
pub const FETCH: &str = include_str!("../recipes/kernels/slim/fetch.sh");
/// Unpacks, configures and compiles it; stops if an option of [`CONFIG`] does not survive.
pub const MAKE: &str = include_str!("../recipes/kernels/slim/make.sh");
/// Where the source is while it is compiled.
const MODULE_PREFIX: &str = "/mnt/linux/";
const TOML: &str = include_str!("../recipes/kernels/slim/recipe.toml");

/// The content of the slim kernel's `recipe.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlimSpec {
    /// One line for people.
    pub summary: String,
    /// Debian release the source comes from, by code name.
    pub suite: String,
    /// The package with the source.
    pub source: String,
    /// About how many files make reports.
    pub steps: u32,
}

/// Parses the `recipe.toml`.
///
/// # Errors
/// A sentence that describes the error.
pub fn spec() -> Result<SlimSpec, String> {
    let spec: SlimSpec = toml::from_str(TOML).map_err(|error| error.to_string())?;
    if let Some(word) = [&spec.suite, &spec.source].into_iter().find(|word| !is_package_name(word)) {
        return Err(format!("{word:?} is not a plain name"));
    }
    Ok(spec)
}

/// SHA-256 over all the recipe consists of.
pub fn recipe_sha256() -> String {
    let files = [TOML, CONFIG, FETCH, MAKE];
    sha256(files.map(|content| format!("{}\n{content}", content.len())).concat().as_bytes())
}

/// What, beside the source's version, the kernel depends on: the recipe and the compiler. 16 hexadecimal digits.
pub fn tag(compiler: &str) -> String {
    let mut tag = sha256(format!("{}\n{compiler}\n", recipe_sha256()).as_bytes());
    tag.truncate(16);
    tag
}

/// A version out of Debian's package lists, if it is one: it becomes part of a file's name.
pub fn source_version(text: &str) -> Option<&str> {
    let version = text.trim();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'+' | b'-' | b'~');
    let first = version.bytes().next()?;
    (first.is_ascii_digit() && version.len() <= 64 && version.bytes().all(plain)).then_some(version)
}

/// Available memory from which on a kernel is made in memory, in KiB. The files take a quarter of it.
const IN_MEMORY_KIB: u64 = 4 * 1024 * 1024;

/// Whether a host with this `/proc/meminfo` has memory enough to hold source and objects.
pub fn fits_in_memory(meminfo: &str) -> bool {
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = available.and_then(|rest| rest.split_whitespace().next()).and_then(|kib| kib.parse::<u64>().ok());
    kib.is_some_and(|kib| kib >= IN_MEMORY_KIB)
}

/// Progress made out of what make prints.
#[derive(Debug)]
pub struct Compilation {
    steps: u32,
    done: u32,
}

impl Compilation {
    /// One of about so many steps.
    pub fn new(steps: u32) -> Self {
        Self { steps: steps.max(1), done: 0 }
    }

    /// Takes a line; if a step begins or a file is being worked on, returns what to show and how much is done.
    pub fn hear(&mut self, line: &str) -> Option<(String, f32)> {
        if let Some(step) = line.strip_prefix("--- ") {
            return Some((printable(step), 0.0));
        }
        let (verb, file) = line.strip_prefix("  ")?.split_once(' ')?;
        if verb.is_empty() || !verb.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit()) {
            return None;
        }
        self.done = self.done.saturating_add(1);
        let file = file.trim().trim_start_matches(MODULE_PREFIX);
        let place = file.rsplit_once('/').map_or(file, |(directory, _)| directory);
        #[expect(clippy::cast_precision_loss, reason = "a few thousand steps")]
        let fraction = (self.done as f32 / self.steps as f32).min(1.0);
        Some((printable(&format!("compile {place}")), fraction))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nido_api::SLIM_SUFFIX;
    use std::collections::HashSet;

    /// The options of the recipe, as written: `CONFIG_X=y`.
    fn options() -> impl Iterator<Item = &'static str> {
        CONFIG.lines().filter(|line| !line.is_empty() && !line.starts_with('#'))
    }

    /// What nido and its agent cannot do without, by component. The recipe holds more; it must never hold less.
    const NEEDED: [(&str, &str); 15] = [
        ("QEMU's direct start", "PVH SMP PCI ACPI PNP BLK_DEV_INITRD"),
        ("the machine types", "VIRTIO_MMIO VIRTIO_PCI PCI_MMCONFIG X86_PM_TIMER KVM_GUEST"),
        ("the console", "TTY PRINTK SERIAL_8250 SERIAL_8250_PNP SERIAL_8250_CONSOLE"),
        ("the channel", "VIRTIO_CONSOLE VSOCKETS VIRTIO_VSOCKETS"),
        ("the configuration", "FW_CFG_SYSFS"),
        ("the root disk", "VIRTIO_BLK EXT4_FS EXT4_FS_POSIX_ACL EXT4_FS_SECURITY"),
        ("the network", "VIRTIO_NET PACKET INET IPV6 UNIX"),
        ("entropy and renewal", "HW_RANDOM_VIRTIO RANDOM_TRUST_CPU VMGENID RTC_DRV_CMOS RTC_HCTOSYS"),
        ("a panic that is told", "PVPANIC PVPANIC_MMIO"),
        ("what the agent mounts", "PROC_FS SYSFS DEVTMPFS TMPFS UNIX98_PTYS SHMEM CGROUPS"),
        ("limits of commands", "MEMCG CGROUP_PIDS CPUSETS CFS_BANDWIDTH CGROUP_FREEZER BLK_CGROUP CGROUP_BPF"),
        (
            "systemd",
            "FHANDLE INOTIFY_USER SIGNALFD TIMERFD EPOLL EVENTFD AUTOFS_FS TMPFS_XATTR KCMP DMIID NET_NS SECCOMP_FILTER",
        ),
        (
            "containers",
            "USER_NS PID_NS UTS_NS IPC_NS OVERLAY_FS FUSE_FS VETH BRIDGE TUN NF_TABLES BINFMT_MISC POSIX_MQUEUE",
        ),
        ("other root disks", "EROFS_FS BLK_DEV_LOOP"),
        ("programs of all kinds", "FUTEX AIO IO_URING USERFAULTFD SYSVIPC COREDUMP BINFMT_SCRIPT BPF_SYSCALL"),
    ];

    #[test]
    fn the_recipe_is_valid() {
        assert!(spec().unwrap().source.starts_with("linux-source-"));
    }

    #[test]
    fn the_configuration_is_well_formed() {
        let mut names = HashSet::new();
        for option in options() {
            let (name, value) = option.split_once('=').unwrap_or_else(|| panic!("{option:?} has no value"));
            let bare = name.strip_prefix("CONFIG_").unwrap_or_default();
            let plain = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
            assert!(!bare.is_empty() && bare.bytes().all(plain), "{option:?} is no option");
            let quoted = value.len() > 2 && value.starts_with('"') && value.ends_with('"');
            assert!(value == "y" || value.parse::<u32>().is_ok() || quoted, "{option:?} has an odd value");
            assert!(names.insert(name), "{name} is there twice");
        }
    }

    #[test]
    fn everything_nido_needs_is_built_in() {
        let present: HashSet<&str> = options().collect();
        for (who, needed) in NEEDED {
            for name in needed.split(' ') {
                assert!(present.contains(format!("CONFIG_{name}=y").as_str()), "{who}: {name}");
            }
        }
    }

    #[test]
    fn the_kernel_version_is_read_from_its_image() {
        assert!(options().any(|option| option == format!("CONFIG_LOCALVERSION=\"{SLIM_SUFFIX}\"")));
    }

    #[test]
    fn a_kernel_is_built_in_memory_only_with_enough_memory() {
        assert!(fits_in_memory("MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:    8000000 kB\n"));
        assert!(!fits_in_memory("MemTotal:  9000000 kB\nMemAvailable:    2000000 kB\n"));
        assert!(!fits_in_memory(""));
    }

    #[test]
    fn a_path_is_not_a_version() {
        assert_eq!(source_version("6.1.192-2\n"), Some("6.1.192-2"));
        for text in ["", "../6", "6/1", "6.1\n6.2", "-6", "6 1", &"6".repeat(65)] {
            assert_eq!(source_version(text), None, "{text:?}");
        }
    }

    #[test]
    fn another_compiler_makes_another_kernel() {
        assert_eq!(tag("gcc 12").len(), 16);
        assert_ne!(tag("gcc 12"), tag("gcc 13"));
    }

    #[test]
    fn compilation_is_counted_by_the_file() {
        let mut compilation = Compilation::new(2);
        assert_eq!(compilation.hear("--- configure the kernel"), Some(("configure the kernel".to_owned(), 0.0)));
        assert_eq!(compilation.hear("make[1]: Entering directory 'linux'"), None);
        assert_eq!(compilation.hear("  CC      kernel/sched/core.o"), Some(("compile kernel/sched".to_owned(), 0.5)));
        assert_eq!(
            compilation.hear("  LD      /mnt/linux/tools/objtool/objtool-in.o").unwrap().0,
            "compile tools/objtool"
        );
        assert_eq!(compilation.hear("    note: something"), None);
        assert_eq!(compilation.hear("  LD      vmlinux").unwrap().1, 1.0);
        assert_eq!(compilation.hear("  SORTTAB vmlinux").unwrap().1, 1.0);
    }

    proptest::proptest! {
        #[test]
        fn no_output_confuses_the_listener(line: String) {
            let fraction = Compilation::new(0).hear(&line).map_or(0.0, |(_, fraction)| fraction);
            proptest::prop_assert!((0.0..=1.0).contains(&fraction));
        }
    }
}
