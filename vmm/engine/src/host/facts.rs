//! The host's facts in one value: what [`crate::machine::decide`] decides by and `nido doctor` prints.
//!
//! Invariant: gathering never fails and never takes more than a fraction of a second; what cannot be determined is reported
//! as absent.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{ConfinementSupport, KvmVerdict, VsockVerdict, cache, confinement, kvm, kvm_features, tsc, vsock};

/// What a file system in memory calls itself.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// What this host offers, QEMU apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// CPUs that this process may use.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Memory that is free or can be freed, in MiB.
    pub memory_available_mib: u64,
    /// The rate of the time-stamp counter in kHz; `None` if it is not steady.
    pub tsc_khz: Option<u32>,
    /// The CPU's name, stepping and microcode, and what of it KVM shows its guests.
    pub cpu_model: String,
    /// Whether KVM works.
    pub kvm: KvmVerdict,
    /// Whether kernel vsock can be used.
    pub vsock: VsockVerdict,
    /// Whether guests of this host's KVM may have KVM of their own.
    pub nesting: Nesting,
    /// Which layers of QEMU's confinement the host allows.
    pub confinement: ConfinementSupport,
    /// Identifies the host's current boot; empty if unknown.
    pub boot_id: String,
    /// The user nido runs as.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// What the kernel's module for KVM reports about virtual machines inside virtual machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Nesting {
    /// No module reports anything: there is no KVM, or it is built into the kernel.
    Unknown,
    /// Its parameter `nested` is on.
    On,
    /// It is off in this module.
    Off {
        /// Its name.
        module: KvmModule,
    },
}

/// The kernel's modules for KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvmModule {
    /// For AMD's processors.
    KvmAmd,
    /// For Intel's.
    KvmIntel,
}

impl KvmModule {
    /// As `modprobe` knows it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::KvmAmd => "kvm_amd",
            Self::KvmIntel => "kvm_intel",
        }
    }

    /// The command that turns nesting on, now and from the next boot on. No VM may run meanwhile.
    #[must_use]
    pub fn turn_on(self) -> String {
        let name = self.name();
        format!(
            "with all VMs stopped, as root: echo options {name} nested=1 > /etc/modprobe.d/kvm-nested.conf && \
             modprobe -r {name} && modprobe {name}"
        )
    }
}

fn nesting(modules: &Path) -> Nesting {
    let of = |module: KvmModule| {
        let value = fs::read_to_string(modules.join(module.name()).join("parameters/nested")).ok()?;
        Some(if matches!(value.trim(), "1" | "Y") { Nesting::On } else { Nesting::Off { module } })
    };
    of(KvmModule::KvmIntel).or_else(|| of(KvmModule::KvmAmd)).unwrap_or(Nesting::Unknown)
}

/// Gathers the facts. Blocks for up to 0.3 s the first time after a boot, microseconds later.
#[must_use]
pub fn gather(cache_dir: &Path) -> HostFacts {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kvm = kvm::probe(cache_dir);
    HostFacts {
        cpus: std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
        memory_mib: meminfo_mib(&meminfo, "MemTotal").unwrap_or(0),
        memory_available_mib: meminfo_mib(&meminfo, "MemAvailable").unwrap_or(0),
        tsc_khz: tsc_khz(cache_dir),
        cpu_model: cpu_model(&first_cpus()) + &kvm_features(&kvm),
        kvm,
        vsock: vsock::probe(),
        nesting: nesting(Path::new("/sys/module")),
        confinement: confinement::probe(cache_dir),
        boot_id: super::boot::boot_id().unwrap_or_default(),
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
    }
}

/// Bytes that this user can still write where `path` (an existing file or directory) lies.
///
/// # Errors
/// The system's, if the path cannot be looked at.
pub fn disk_free_bytes(path: &Path) -> std::io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Whether files in this directory are memory of the host.
#[must_use]
pub fn is_in_memory(dir: &Path) -> bool {
    rustix::fs::statfs(dir).is_ok_and(|facts| facts.f_type == TMPFS_MAGIC)
}

fn tsc_khz(cache_dir: &Path) -> Option<u32> {
    let boot_id = super::boot::boot_id()?;
    if let Some(khz) = cache::get(cache_dir, "tsc.json", &boot_id) {
        return khz;
    }
    let khz = tsc::measure_khz();
    cache::put(cache_dir, "tsc.json", &boot_id, &khz);
    khz
}

/// The beginning of `/proc/cpuinfo`: the kernel asks each CPU that is read about, and some hosts have hundreds.
fn first_cpus() -> String {
    use std::io::Read as _;
    let mut bytes = [0; 8192];
    let read = fs::File::open("/proc/cpuinfo").and_then(|mut file| file.read(&mut bytes)).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..read]).into_owned()
}

/// A digest of the features that KVM offers: they depend on the kernel, its command line and the firmware as well as on the CPU.
fn kvm_features(kvm: &KvmVerdict) -> String {
    match kvm {
        KvmVerdict::Usable { .. } => kvm_features::digest().map(|digest| format!(" kvm {digest}")).unwrap_or_default(),
        _ => String::new(),
    }
}

/// The fields of the first CPU's entry that identify its model.
fn cpu_model(cpuinfo: &str) -> String {
    let keys = ["vendor_id", "cpu family", "model", "model name", "stepping", "microcode"];
    let first = cpuinfo.split("\n\n").next().unwrap_or_default();
    let pairs = first.lines().filter_map(|line| line.split_once(':')).map(|(key, value)| (key.trim(), value.trim()));
    pairs.filter(|(key, _)| keys.contains(key)).map(|(_, value)| value).collect::<Vec<_>>().join(" ")
}

fn meminfo_mib(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_its_own_line() {
        let text = "MemTotal:       24683944 kB\nMemFree:  1 kB\nMemAvailable:   24333312 kB\n";
        assert_eq!(meminfo_mib(text, "MemTotal"), Some(24105));
        assert_eq!(meminfo_mib(text, "MemAvailable"), Some(23763));
        assert_eq!(meminfo_mib(text, "Mem"), None);
    }

    #[test]
    fn nesting_is_read_from_the_kernel_module() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(nesting(dir.path()), Nesting::Unknown);
        let parameters = dir.path().join("kvm_amd/parameters");
        fs::create_dir_all(&parameters).unwrap();
        for (text, found) in [
            ("1\n", Nesting::On),
            ("Y\n", Nesting::On),
            ("0\n", Nesting::Off { module: KvmModule::KvmAmd }),
            ("N\n", Nesting::Off { module: KvmModule::KvmAmd }),
        ] {
            fs::write(parameters.join("nested"), text).unwrap();
            assert_eq!(nesting(dir.path()), found, "{text:?}");
        }
        assert!(KvmModule::KvmAmd.turn_on().contains("options kvm_amd nested=1"));
    }

    #[test]
    fn a_cpu_is_read_from_its_own_entry() {
        let text =
            "processor\t: 0\nvendor_id\t: V\nmodel\t\t: 1\nmodel name\t: M x\ncpu MHz\t: 9\n\nmodel name\t: other\n";
        assert_eq!(cpu_model(text), "V 1 M x");
        assert_eq!(cpu_model(""), "");
    }

    #[test]
    fn facts_are_stable() {
        let dir = tempfile::tempdir().unwrap();
        let first = gather(dir.path());
        let second = HostFacts { memory_available_mib: first.memory_available_mib, ..gather(dir.path()) };
        assert_eq!(first, second);
        assert!(first.cpus >= 1 && first.memory_mib > 0 && !first.boot_id.is_empty());
    }
}
