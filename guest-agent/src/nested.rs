//! Virtual machines inside the guest: the kernel's modules for KVM and vsock, and devices that everybody in it may use.
//!
//! Invariant: what is missing is reported on the console, and the guest continues without it: whether a job can do without KVM
//! is the job's to decide.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use crate::helper_process::{self, HelperProcess};
use crate::reaper::Reaper;

const LOADER: &str = "/sbin/modprobe";
const DEADLINE: Duration = Duration::from_secs(30);
const DEVICES: [&str; 2] = ["/dev/kvm", "/dev/vhost-vsock"];
/// The guest has one user who matters; what runs in it may run machines.
const WORLD_ACCESSIBLE: u32 = 0o666;

/// Loads what VMs inside this one need.
pub async fn prepare(reaper: &Arc<Reaper>) {
    let modules = [kvm_module(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()), Some("vhost_vsock")];
    if modules[0].is_none() {
        log("this machine's CPU has no virtualization extension, so KVM is unavailable");
    }
    for module in modules.into_iter().flatten() {
        if let Err(error) = load(reaper, module).await {
            log(&format!("the module {module} is not loaded: {error}"));
        }
    }
    for device in DEVICES {
        match fs::set_permissions(device, Permissions::from_mode(WORLD_ACCESSIBLE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => log(&format!("{device}: {error}")),
            _ => {}
        }
    }
}

/// The module of this CPU's kind.
fn kvm_module(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    flags.split_ascii_whitespace().find_map(|flag| match flag {
        "svm" => Some("kvm_amd"),
        "vmx" => Some("kvm_intel"),
        _ => None,
    })
}

async fn load(reaper: &Arc<Reaper>, module: &str) -> io::Result<()> {
    let arguments = vec!["--quiet".to_owned(), module.to_owned()];
    helper_process::run(
        reaper,
        HelperProcess { program: LOADER.into(), arguments, environment: Vec::new(), deadline: DEADLINE },
    )
    .await
}

/// How many machines run on this guest's KVM; none where there is no KVM.
pub fn machines() -> u32 {
    ["kvm_amd", "kvm_intel"].iter().map(|module| users(&format!("/sys/module/{module}/refcnt"))).sum()
}

fn users(counter: &str) -> u32 {
    fs::read_to_string(counter).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

fn log(message: &str) {
    eprintln!("nido-guest-agent: {message}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_is_that_of_the_cpu() {
        let cpu = |flags: &str| format!("processor\t: 0\nflags\t\t: fpu {flags} sse\nbugs\t\t: svm\n");
        assert_eq!(kvm_module(&cpu("svm")), Some("kvm_amd"));
        assert_eq!(kvm_module(&cpu("vmx")), Some("kvm_intel"));
        assert_eq!(kvm_module(&cpu("vmxx")), None);
        assert_eq!(kvm_module(""), None);
    }

    #[test]
    fn a_counter_that_cannot_be_read_counts_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "2\n").unwrap();
        assert_eq!(users(file.path().to_str().unwrap()), 2);
        assert_eq!(users("/nowhere"), 0);
    }
}
