//! Looking at the host: can it run VMs, how well, and is anything left over from a crash.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nido_api::error::{Error, Result};
use nido_api::{
    AccelChoice, CheckStatus, DoctorCheck, DoctorReport, MachineChoice, NetChoice, TemplateInfo, WebhookInfo,
    default_cpus, default_memory_mib,
};
use nido_engine::home::VM_LOCK;
use nido_engine::host::{HostFacts, KvmVerdict, Nesting, QemuFacts, VsockVerdict, facts, kvm, qemu, scope};
use nido_engine::lock::is_held;
use nido_engine::machine::{self, MachineRequest};
use nido_engine::random;

use crate::nido::create::SPACE_RESERVE_BYTES;
use crate::nido::{Nido, OpenOptions};

/// Less free space than this on the home's disk is worth a word, in bytes.
const LOW_DISK: u64 = 4 << 30;
/// Less available memory than this is worth a word, in MiB.
const LOW_MEMORY_MIB: u64 = 1024;
/// How long to wait for operations that work with template parts.
const PARTS_LOCK_TIMEOUT: Duration = Duration::from_secs(600);
const ANOTHER_QEMU: &str = "apt-get install qemu-system-x86, or name another QEMU with NIDO_QEMU";

impl Nido {
    /// Looks at the host. With `gc`, removes what crashes left behind.
    ///
    /// # Errors
    /// Of the store.
    pub async fn doctor(&self, gc: bool) -> Result<DoctorReport> {
        self.report(gc, true).await
    }

    /// The same without doing anything: KVM is not tested again if its verdict is cached.
    ///
    /// # Errors
    /// Of the store.
    pub async fn host_report(&self) -> Result<DoctorReport> {
        self.report(false, false).await
    }

    async fn report(&self, gc: bool, again: bool) -> Result<DoctorReport> {
        let (mut checks, host, qemu) = check_host(self.context.qemu(), self.home().cache(), again).await?;
        checks.push(self.check_home());
        checks.push(self.check_disk());
        checks.push(self.check_templates()?);
        checks.extend(qemu.as_ref().map(|qemu| self.check_bakes(&host, qemu)));
        checks.push(self.check_build_tools());
        checks.extend(check_webhooks(&self.webhook_list()?.webhooks));
        checks.push(self.check_vms().await?);
        checks.push(self.check_leftovers(gc).await?);
        Ok(DoctorReport { ok: checks.iter().all(|check| check.status != CheckStatus::Failed), checks })
    }

    /// What can be checked where nido's home cannot be opened; `error` says why.
    ///
    /// # Errors
    /// `internal`.
    pub async fn doctor_without_home(options: &OpenOptions, error: &Error) -> Result<DoctorReport> {
        let scratch = std::env::temp_dir().join(format!("nido-doctor-{}", random::id()?));
        let (mut checks, ..) = check_host(options.qemu.as_deref(), scratch.clone(), true).await?;
        // Facts may have been cached there; what cannot be removed is a few bytes of the user's own.
        let _ = std::fs::remove_dir_all(&scratch);
        let plain = check("home", CheckStatus::Failed, error.message());
        checks.push(match error.hint_text() {
            Some(hint) => plain.hint(hint),
            None => plain,
        });
        Ok(DoctorReport { ok: false, checks })
    }

    fn check_home(&self) -> DoctorCheck {
        let shown = self.home().root().display();
        if self.is_read_only() {
            return check("home", CheckStatus::Failed, format!("{shown} cannot be written: VMs can only be listed"))
                .hint("check its mount, owner and mode, or use another home with --home or NIDO_HOME");
        }
        check("home", CheckStatus::Ok, shown.to_string())
    }

    fn check_disk(&self) -> DoctorCheck {
        let root = self.home().root();
        check_disk(&root.display().to_string(), facts::disk_free_bytes(root))
    }

    fn check_templates(&self) -> Result<DoctorCheck> {
        let list = self.template_list()?;
        let stale: Vec<_> = list.templates.iter().filter(|template| !template.agent_current).collect();
        if let Some(first) = list.damaged.first() {
            return Ok(check("templates", CheckStatus::Warning, first.clone())
                .hint("nido template delete NAME, and build or import it again"));
        }
        if list.templates.is_empty() {
            return Ok(
                check("templates", CheckStatus::Warning, "there is none yet").hint("nido template build sandbox")
            );
        }
        if let Some(first) = stale.first() {
            return Ok(check(
                "templates",
                CheckStatus::Warning,
                format!("{} holds the agent of another nido", names(&stale)),
            )
            .hint(nido_engine::template::renewal_command(&first.name)));
        }
        Ok(check("templates", CheckStatus::Ok, names(&list.templates.iter().collect::<Vec<_>>())))
    }

    /// Whether VMs with the default settings are forked.
    fn check_bakes(&self, host: &HostFacts, qemu: &QemuFacts) -> DoctorCheck {
        let unfit = |template: &TemplateInfo| {
            let why = self.unfit_by_default(&template.name, host, qemu)?;
            Some((format!("VMs of {} boot instead of being forked: {why}", template.name), template.name.clone()))
        };
        let templates = self.template_list().map(|list| list.templates).unwrap_or_default();
        match templates.iter().find_map(unfit) {
            None if templates.is_empty() => check("bakes", CheckStatus::Ok, "there is no template to fork from"),
            Some((why, name)) => check("bakes", CheckStatus::Warning, why).hint(format!("nido template bake {name}")),
            None => check("bakes", CheckStatus::Ok, "VMs with the default settings are forked"),
        }
    }

    fn check_build_tools(&self) -> DoctorCheck {
        let home = self.home().root();
        match nido_images::Host::probe().and_then(|_| nido_images::Host::probe_directory(home)) {
            Ok(_) => check("template build", CheckStatus::Ok, "everything that it needs is installed"),
            Err(error) => {
                let plain = check("template build", CheckStatus::Warning, error.to_string());
                match error.hint() {
                    Some(hint) => plain.hint(hint),
                    None => plain,
                }
            }
        }
    }

    /// Files that nobody needs any more. Rows were reconciled when the home was opened.
    async fn check_leftovers(&self, gc: bool) -> Result<DoctorCheck> {
        if gc {
            let directories = self.remove_orphans();
            self.remove_all_unfinished()?;
            let bytes = match self.collect_parts(PARTS_LOCK_TIMEOUT).await {
                Ok(bytes) => bytes,
                Err(error) => {
                    let detail = format!("removed {directories} directories; template parts stay: {error}");
                    return Ok(check("leftovers", CheckStatus::Warning, detail));
                }
            };
            let detail = format!("removed {directories} directories and {} MiB of unused template parts", bytes >> 20);
            return Ok(check("leftovers", CheckStatus::Ok, detail));
        }
        let (directories, bytes) = match (self.count_orphans()?, self.unused_part_bytes()) {
            (directories, Ok(bytes)) => (directories, bytes),
            (_, Err(error)) => {
                let detail = format!("it is not known which template parts are used: {error}");
                return Ok(check("leftovers", CheckStatus::Warning, detail));
            }
        };
        if directories == 0 && bytes == 0 {
            return Ok(check("leftovers", CheckStatus::Ok, "none"));
        }
        let detail =
            format!("{directories} directories of no VM, {} MiB of unused template parts", bytes.div_ceil(1 << 20));
        Ok(check("leftovers", CheckStatus::Warning, detail).hint("nido doctor --gc"))
    }

    /// Whether each VM's row and files belong together.
    async fn check_vms(&self) -> Result<DoctorCheck> {
        let unknown = self.unknown_vms()?;
        let rows = self.store().vms()?;
        let lost = rows.iter().filter(|row| !row.deleting && self.files_are_gone(&row.id));
        let lost: Vec<_> = lost.map(|row| row.spec.name.to_string()).collect();
        for row in rows.iter().filter(|row| row.state.at_rest() && !lost.contains(&row.spec.name.to_string())) {
            // A VM of an older nido has none yet.
            self.context.refresh_record(&row.id);
            // A QEMU that outlived its row gets a supervisor again.
            if is_held(&self.vm_dir(&row.id).file(VM_LOCK)) {
                self.settle(row).await?;
            }
        }
        Ok(match (unknown.len(), &lost[..]) {
            (0, []) => check("VMs", CheckStatus::Ok, "each has its row and its files"),
            (0, lost) => {
                let detail = format!("the files of {} are gone, and their disks with them", lost.join(", "));
                check("VMs", CheckStatus::Warning, detail).hint(format!("nido delete {}", lost.join(" ")))
            }
            (count, _) => {
                let list = unknown.iter().take(5).map(|id| self.vm_dir(id).path().display().to_string());
                let detail = format!(
                    "{count} directories hold VMs that the store does not know: {}",
                    list.collect::<Vec<_>>().join(", ")
                );
                check("VMs", CheckStatus::Warning, detail)
                    .hint("nido doctor --adopt gives them a row again; then they can be started, or deleted")
            }
        })
    }
}

/// What does not depend on a home: QEMU, KVM, memory and so on. Facts are cached in `cache`. With `again` KVM is tested even if
/// its verdict is cached.
async fn check_host(
    named: Option<&Path>,
    cache: PathBuf,
    again: bool,
) -> Result<(Vec<DoctorCheck>, HostFacts, Option<QemuFacts>)> {
    let qemu = qemu::find(named).and_then(|program| qemu::probe(&program, &cache));
    let host = tokio::task::spawn_blocking(move || {
        if again {
            // The user may have changed something just before.
            kvm::forget(&cache);
        }
        facts::gather(&cache)
    })
    .await
    .map_err(|e| Error::internal(format!("the host could not be looked at: {e}")))?;
    let mut checks = vec![check_qemu(qemu.as_ref()), check_kvm(&host, qemu.as_ref().ok())];
    checks.extend(qemu.as_ref().ok().map(|qemu| check_machine(&host, qemu)));
    checks.push(check_nesting(&host));
    checks.push(check_vsock(&host));
    checks.push(check_user(&host));
    checks.push(check_unit());
    checks.push(check_memory(&host));
    checks.push(check_cgroups(std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").ok().as_deref()));
    Ok((checks, host, qemu.ok()))
}

fn names(templates: &[&TemplateInfo]) -> String {
    templates.iter().map(|template| template.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn check(name: &str, status: CheckStatus, detail: impl Into<String>) -> DoctorCheck {
    DoctorCheck { name: name.into(), status, detail: detail.into(), hint: None }
}

/// Whether there is room for VMs below the home `shown`. Pure.
fn check_disk(shown: &str, free: std::io::Result<u64>) -> DoctorCheck {
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
        Err(e) => check("disk", CheckStatus::Failed, format!("{shown} cannot be looked at: {e}"))
            .hint("use another home with --home"),
    }
}

/// Whether every endpoint is still sent something. Nothing to say where there are none.
fn check_webhooks(webhooks: &[WebhookInfo]) -> Option<DoctorCheck> {
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
            let what = format!("{} endpoints, {pending} deliveries wait for them", webhooks.len());
            Some(check("webhooks", CheckStatus::Ok, what))
        }
    }
}

fn check_qemu(found: Result<&QemuFacts, &nido_engine::host::QemuProbeError>) -> DoctorCheck {
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
                ("user network", qemu.user_network),
                ("vhost-vsock", qemu.vhost_vsock_mmio),
            ];
            let list: Vec<_> = can.iter().filter(|(_, has)| *has).map(|(what, _)| *what).collect();
            check("qemu", CheckStatus::Ok, format!("{} {}: {}", qemu.path.display(), qemu.version, list.join(", ")))
        }
    }
}

/// Whether a VM can be started at all, asked of whatever decides when one is.
fn check_machine(host: &HostFacts, qemu: &QemuFacts) -> DoctorCheck {
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
            let hint = Error::from(refusal.clone()).hint_text().unwrap_or(ANOTHER_QEMU).to_owned();
            check("machine", CheckStatus::Failed, format!("no VM can be started: {refusal}")).hint(hint)
        }
    }
}

fn check_kvm(host: &HostFacts, qemu: Option<&QemuFacts>) -> DoctorCheck {
    let emulation = "VMs run under emulation, slowly and without isolation";
    match (&host.kvm, qemu.is_none_or(|q| q.accel_kvm)) {
        (KvmVerdict::Usable { micros }, true) => {
            check("kvm", CheckStatus::Ok, format!("usable: proven by running code in it ({micros} µs)"))
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
                KvmVerdict::PresentUnusable { .. } => plain
                    .hint("dmesg | grep -i kvm may tell why; in a VM, its host must allow nesting, and well enough"),
                KvmVerdict::Undecided { .. } => check(
                    "kvm",
                    CheckStatus::Warning,
                    format!("{why}; until it is known, VMs start only with --accel tcg"),
                )
                .hint("run nido doctor again when the host is less busy, or when no other hypervisor uses KVM"),
                KvmVerdict::Absent => plain.hint("modprobe kvm_intel or kvm_amd; in a VM, its host must allow nesting"),
                KvmVerdict::Usable { .. } => plain,
            }
        }
    }
}

fn check_nesting(host: &HostFacts) -> DoctorCheck {
    let usable = host.kvm.trouble().is_none();
    match host.nesting {
        _ if !usable => {
            check("nesting", CheckStatus::Ok, "an emulated VM can have VMs of its own (--nested); they are slow")
        }
        Nesting::On => check("nesting", CheckStatus::Ok, "a VM can have VMs of its own (--nested)"),
        Nesting::Unknown => {
            check("nesting", CheckStatus::Ok, "the kernel does not say whether a VM can have VMs of its own")
        }
        Nesting::Off { module } => {
            let why = format!("a VM cannot have VMs of its own: the parameter `nested` of {} is off", module.name());
            check("nesting", CheckStatus::Ok, why).hint(module.turn_on())
        }
    }
}

/// Whether VMs that are started from here outlive the service or the login session of this process.
fn check_unit() -> DoctorCheck {
    match (scope::ties_here(), scope::bus()) {
        (Some((why, hint)), _) => check("systemd unit", CheckStatus::Warning, why).hint(hint),
        (None, Some(_)) => check("systemd unit", CheckStatus::Ok, "each running VM gets a systemd scope of its own"),
        (None, None) => check("systemd unit", CheckStatus::Ok, "VMs outlive the process that starts them"),
    }
}

fn check_user(host: &HostFacts) -> DoctorCheck {
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

/// `controllers`: what the file of that name says, if it is there.
fn check_cgroups(controllers: Option<&str>) -> DoctorCheck {
    match controllers {
        Some(list) => check("cgroups", CheckStatus::Ok, format!("version 2: {}", list.trim())),
        None => check("cgroups", CheckStatus::Ok, "version 1 or none"),
    }
}

fn check_vsock(host: &HostFacts) -> DoctorCheck {
    match &host.vsock {
        VsockVerdict::Usable => check("vsock", CheckStatus::Ok, "/dev/vhost-vsock is usable"),
        VsockVerdict::Absent => {
            check("vsock", CheckStatus::Ok, "there is no /dev/vhost-vsock; agents are reached over virtio-serial")
                .hint("modprobe vhost_vsock makes exec and copies a little quicker")
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

fn check_memory(host: &HostFacts) -> DoctorCheck {
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
    fn no_vm_can_be_made_on_a_full_disk() {
        let status = |free| check_disk("/home/nido", free).status;
        assert_eq!(status(Ok(LOW_DISK)), CheckStatus::Ok);
        assert_eq!(status(Ok(SPACE_RESERVE_BYTES)), CheckStatus::Warning);
        assert_eq!(status(Ok(0)), CheckStatus::Failed);
        assert_eq!(status(Err(std::io::ErrorKind::NotFound.into())), CheckStatus::Failed);
    }
}
