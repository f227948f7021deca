//! The checks of `doctor` that only look at facts: what is wrong, and what to do about it. Pure.

use nido_api::FrontEnd;
use nido_api::error::{Error, Result};
use nido_api::{
    AccelChoice, CheckStatus, DoctorCheck, MachineChoice, NetChoice, WebhookInfo, default_cpus, default_memory_mib,
};
use nido_engine::host::delegation::{Delegation, HostGroups, NotDelegated, VARIABLE};
use nido_engine::host::{HostFacts, KvmVerdict, Nesting, OwnUser, QemuFacts, VsockVerdict, kvm, qemu, scope};
use nido_engine::machine::{self, MachineRequest};

use crate::nido::create::SPACE_RESERVE_BYTES;

/// Less free space than this on the home's disk is worth a word, in bytes.
const LOW_DISK: u64 = 4 << 30;
/// Less available memory than this is worth a word, in MiB.
const LOW_MEMORY_MIB: u64 = 1024;
const ANOTHER_QEMU: &str = "apt-get install qemu-system-x86, or name another QEMU with NIDO_QEMU";

pub(super) fn check(name: &str, status: CheckStatus, detail: impl Into<String>) -> DoctorCheck {
    DoctorCheck { name: name.into(), status, detail: detail.into(), hint: None }
}

/// Whether there is room for VMs below the home `shown`. Pure.
pub(super) fn check_disk(shown: &str, free: std::io::Result<u64>) -> DoctorCheck {
    match free {
        Ok(free) if free >= LOW_DISK => check("disk", CheckStatus::Ok, format!("{} GiB free for {shown}", free >> 30)),
        Ok(free) if free >= SPACE_RESERVE_BYTES => {
            check("disk", CheckStatus::Warning, format!("only {} MiB free for {shown}", free >> 20))
                .hint("free some space, or keep VMs elsewhere with NIDO_HOME")
        }
        Ok(free) => {
            let (free, needed) = (free >> 10, SPACE_RESERVE_BYTES >> 10);
            check("disk", CheckStatus::Failed, format!("{free} KiB free for {shown}; a VM needs {needed} KiB"))
                .hint("free some space: nido delete VM, nido snapshot delete VM NAME, nido doctor --gc")
        }
        Err(e) => check("disk", CheckStatus::Failed, format!("cannot check {shown}: {e}"))
            .hint("use another home with --home"),
    }
}

/// Whether every endpoint is still sent something. Nothing to say where there are none.
pub(super) fn check_webhooks(webhooks: &[WebhookInfo]) -> Option<DoctorCheck> {
    let pending: u64 = webhooks.iter().map(|webhook| webhook.pending).sum();
    let disabled = webhooks.iter().find_map(|webhook| Some((&webhook.id, webhook.disabled.as_ref()?)));
    match disabled {
        None if webhooks.is_empty() => None,
        Some((id, why)) => {
            let what = format!("webhook {id} is disabled: {why}");
            Some(
                check("webhooks", CheckStatus::Warning, what)
                    .hint(format!("nido webhook remove {id}, and add it again")),
            )
        }
        None => {
            let what = format!("{} endpoints, {pending} deliveries pending", webhooks.len());
            Some(check("webhooks", CheckStatus::Ok, what))
        }
    }
}

pub(super) fn check_qemu(found: Result<&QemuFacts, &nido_engine::host::QemuProbeError>) -> DoctorCheck {
    match found {
        Err(error) => check("qemu", CheckStatus::Failed, error.to_string()).hint("apt-get install qemu-system-x86"),
        Ok(qemu) if qemu.version < qemu::MINIMUM_VERSION => {
            let detail =
                format!("{} is version {}; nido needs {}", qemu.path.display(), qemu.version, qemu::MINIMUM_VERSION);
            check("qemu", CheckStatus::Failed, detail)
                .hint("install a newer qemu-system-x86, or name one with NIDO_QEMU")
        }
        Ok(qemu) => {
            let can = [
                ("microvm", qemu.microvm),
                ("pc", qemu.pc),
                ("q35", qemu.q35),
                ("kvm", qemu.accel_kvm),
                ("tcg", qemu.accel_tcg),
                ("sandbox", qemu.sandbox),
                ("network by datagrams", qemu.datagram_network),
                ("vhost-vsock", qemu.vhost_vsock_mmio),
            ];
            let list: Vec<_> = can.iter().filter(|(_, has)| *has).map(|(what, _)| *what).collect();
            check("qemu", CheckStatus::Ok, format!("{} {}: {}", qemu.path.display(), qemu.version, list.join(", ")))
        }
    }
}

/// Whether a VM can be started at all, asked of whatever decides when one is.
pub(super) fn check_machine(host: &HostFacts, qemu: &QemuFacts) -> DoctorCheck {
    let with = |net, machine_choice| {
        let request = MachineRequest {
            cpus: default_cpus(),
            memory_mib: default_memory_mib(),
            disk_bytes: 1 << 30,
            machine: machine_choice,
            accel: AccelChoice::default(),
            net,
            nested: false,
            require_isolation: false,
            require_confinement: false,
            ran_under: None,
            cid: *machine::GUEST_CIDS.start(),
        };
        machine::decide(&request, host, qemu)
    };
    let (net, machine) = (NetChoice::default(), MachineChoice::default());
    let refusal = match with(net, machine) {
        Ok(machine) => return check("machine", CheckStatus::Ok, machine.reason),
        Err(refusal) => refusal,
    };
    let others = [
        (net, MachineChoice::Pc, "--machine pc"),
        (NetChoice::None, machine, "--net none"),
        (NetChoice::None, MachineChoice::Pc, "--net none --machine pc"),
    ];
    match others.into_iter().find(|(net, machine, _)| with(*net, *machine).is_ok()) {
        Some((.., flags)) => {
            check("machine", CheckStatus::Warning, format!("VMs start only with {flags}: {refusal}")).hint(ANOTHER_QEMU)
        }
        None => {
            let hint = Error::from(refusal.clone()).hint_for(FrontEnd::Cli).unwrap_or_else(|| ANOTHER_QEMU.to_owned());
            check("machine", CheckStatus::Failed, format!("no VM can be started: {refusal}")).hint(hint)
        }
    }
}

pub(super) fn check_kvm(host: &HostFacts, qemu: Option<&QemuFacts>) -> DoctorCheck {
    let emulation = "VMs run under emulation, slowly and without isolation";
    match (&host.kvm, qemu.is_none_or(|q| q.accel_kvm)) {
        (KvmVerdict::Usable { micros }, true) => {
            check("kvm", CheckStatus::Ok, format!("usable: it ran the test program ({micros} µs)"))
        }
        (KvmVerdict::Usable { .. }, false) => {
            check("kvm", CheckStatus::Warning, "usable, but this QEMU was built without it")
        }
        (verdict, _) => {
            let why = verdict.trouble().unwrap_or_default();
            let plain = check("kvm", CheckStatus::Warning, format!("{why}; {emulation}"));
            match verdict {
                _ if qemu.is_some_and(|qemu| !qemu.accel_tcg) => {
                    check("kvm", CheckStatus::Failed, format!("{why}, and this QEMU was built without emulation (TCG)"))
                        .hint("apt-get install qemu-system-x86")
                }
                KvmVerdict::NotPermitted => plain.hint(kvm::permission_hint()),
                KvmVerdict::PresentUnusable { .. } => {
                    plain.hint("check dmesg | grep -i kvm; in a VM, its host must support nested virtualization")
                }
                KvmVerdict::Undecided { .. } => check(
                    "kvm",
                    CheckStatus::Warning,
                    format!("{why}; until this is resolved, VMs start only with --accel tcg"),
                )
                .hint("run nido doctor again when the host is less busy, or when no other hypervisor uses KVM"),
                KvmVerdict::Absent => plain.hint("modprobe kvm_intel or kvm_amd; in a VM, its host must allow nesting"),
                KvmVerdict::Usable { .. } => plain,
            }
        }
    }
}

/// How far QEMU's processes are confined.
pub(super) fn check_confinement(host: &HostFacts) -> DoctorCheck {
    let (names, version) = (host.confinement.names().join(", "), host.confinement.landlock);
    match host.confinement.shortfall() {
        None => check("confinement", CheckStatus::Ok, format!("QEMU: {names} (Landlock version {version})")),
        Some(missing) => {
            let hint = match host.confinement.own_user {
                OwnUser::Unavailable(_) => {
                    "give root what is missing (in a container, its capabilities), or run nido as an ordinary user"
                }
                OwnUser::NotRoot | OwnUser::Available => {
                    "allow user namespaces (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns) and Landlock (lsm=)"
                }
            };
            check("confinement", CheckStatus::Warning, format!("QEMU: {names}; without {missing}")).hint(hint)
        }
    }
}

pub(super) fn check_nesting(host: &HostFacts) -> DoctorCheck {
    let usable = host.kvm.trouble().is_none();
    match host.nesting {
        _ if !usable => check("nesting", CheckStatus::Ok, "an emulated VM can run VMs (--nested); they are slow"),
        Nesting::On => check("nesting", CheckStatus::Ok, "a VM can run VMs (--nested)"),
        Nesting::Unknown => check("nesting", CheckStatus::Ok, "the kernel does not report whether a VM can run VMs"),
        Nesting::Off { module } => {
            let why = format!("a VM cannot run VMs: the parameter `nested` of {} is off", module.name());
            check("nesting", CheckStatus::Ok, why).hint(module.turn_on())
        }
    }
}

/// Whether VMs that are started from here outlive the service or the login session of this process.
pub(super) fn check_unit() -> DoctorCheck {
    match (scope::ties_here(), scope::bus()) {
        (Some((why, hint)), _) => check("systemd unit", CheckStatus::Warning, why).hint(hint),
        (None, Some(_)) => check("systemd unit", CheckStatus::Ok, "VMs outlive the unit that they are started in"),
        (None, None) => check("systemd unit", CheckStatus::Ok, "VMs outlive the process that starts them"),
    }
}

pub(super) fn check_user(host: &HostFacts) -> DoctorCheck {
    if host.uid == 0 {
        return check("user", CheckStatus::Ok, "root");
    }
    let groups = rustix::process::getgroups().unwrap_or_default();
    let groups: Vec<_> = groups.iter().map(|group| group.as_raw().to_string()).collect();
    check(
        "user",
        CheckStatus::Ok,
        format!("user {}, group {}, further groups {}", host.uid, host.gid, groups.join(" ")),
    )
}

/// What limits VMs on the host. Pure.
pub(super) fn check_host_limits(groups: std::result::Result<HostGroups, NotDelegated>) -> DoctorCheck {
    const NAME: &str = "host limits";
    match groups {
        Ok(HostGroups::Scopes(_)) => check(
            NAME,
            CheckStatus::Ok,
            "each running VM gets a systemd scope of its own, with limits of memory, processes, CPU and I/O",
        ),
        Ok(HostGroups::Delegated(Delegation { path, controllers, .. })) => {
            let (path, controllers) = (path.display(), controllers.join(", "));
            let detail =
                format!("each running VM gets a control group of its own in {path}, with limits by {controllers}");
            check(NAME, CheckStatus::Ok, detail)
        }
        Ok(HostGroups::None(why)) => {
            let detail = format!("VMs have no limits: no systemd manager can be reached, and {}", why.describe());
            let plain = check(NAME, CheckStatus::Ok, detail);
            match why {
                NotDelegated::HasProcesses(path) => {
                    let path = path.display();
                    plain.hint(format!(
                        "name another group with {VARIABLE}, or move the processes of {path} into a child of it"
                    ))
                }
                _ => plain,
            }
        }
        Err(why) => check(NAME, CheckStatus::Failed, format!("{VARIABLE} cannot be used: {}", why.describe()))
            .hint(format!("name a delegated control group that has no processes, or unset {VARIABLE}")),
    }
}

pub(super) fn check_vsock(host: &HostFacts) -> DoctorCheck {
    match &host.vsock {
        VsockVerdict::Usable => check("vsock", CheckStatus::Ok, "/dev/vhost-vsock is usable"),
        VsockVerdict::Absent => {
            check("vsock", CheckStatus::Ok, "there is no /dev/vhost-vsock; agents are reached over virtio-serial")
                .hint("modprobe vhost_vsock makes exec and copies a little faster")
        }
        VsockVerdict::NotPermitted => check(
            "vsock",
            CheckStatus::Ok,
            "this user may not open /dev/vhost-vsock; agents are reached over virtio-serial",
        )
        .hint("adduser $USER $(stat -c %G /dev/vhost-vsock), then log in again"),
        VsockVerdict::Unusable { reason } => {
            check("vsock", CheckStatus::Ok, format!("not usable ({reason}); agents are reached over virtio-serial"))
        }
    }
}

pub(super) fn check_memory(host: &HostFacts) -> DoctorCheck {
    let detail = format!("{} MiB of {} MiB available, {} CPUs", host.memory_available_mib, host.memory_mib, host.cpus);
    if host.memory_available_mib >= LOW_MEMORY_MIB {
        return check("memory", CheckStatus::Ok, detail);
    }
    check("memory", CheckStatus::Warning, detail).hint("nido ls shows what runs; nido stop NAME ends it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_reported_as_a_failure() {
        let status = |free| check_disk("/home/nido", free).status;
        assert_eq!(status(Ok(LOW_DISK)), CheckStatus::Ok);
        assert_eq!(status(Ok(SPACE_RESERVE_BYTES)), CheckStatus::Warning);
        assert_eq!(status(Ok(0)), CheckStatus::Failed);
        assert_eq!(status(Err(std::io::ErrorKind::NotFound.into())), CheckStatus::Failed);
    }
}
