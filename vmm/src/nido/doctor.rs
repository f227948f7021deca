//! Looking at the host: can it run VMs, how well, and is anything left over from a crash.

use crate::api::{
    AccelChoice, CheckStatus, DoctorCheck, DoctorReport, MachineChoice, NetChoice, TemplateInfo, WebhookInfo,
    default_cpus, default_memory_mib,
};
use crate::error::{Error, Result};
use crate::host::{HostFacts, KvmVerdict, Nesting, QemuFacts, VsockVerdict, facts, kvm, qemu};
use crate::machine::{self, MachineRequest};
use crate::nido::Nido;

/// Less free space than this on the home's disk is worth a word, in bytes.
const LOW_DISK: u64 = 4 << 30;
/// Less available memory than this is worth a word, in MiB.
const LOW_MEMORY_MIB: u64 = 1024;
const ANOTHER_QEMU: &str = "apt-get install qemu-system-x86, or name another QEMU with NIDO_QEMU";

impl Nido {
    /// Looks at the host. With `gc`, removes what crashes left behind.
    ///
    /// # Errors
    /// Of the store.
    pub async fn doctor(&self, gc: bool) -> Result<DoctorReport> {
        let mut checks = Vec::new();
        let cache = self.home.cache();
        let qemu = qemu::find(self.options.qemu.as_deref()).and_then(|program| qemu::probe(&program, &cache));
        checks.push(check_qemu(qemu.as_ref()));
        let host = tokio::task::spawn_blocking(move || {
            // Who asks the doctor may have changed something.
            kvm::forget(&cache);
            facts::gather(&cache)
        })
        .await
        .map_err(|e| Error::internal(format!("the host could not be looked at: {e}")))?;
        checks.push(check_kvm(&host, qemu.as_ref().ok()));
        checks.extend(qemu.as_ref().ok().map(|qemu| check_machine(&host, qemu)));
        checks.push(check_nesting(&host));
        checks.push(check_vsock(&host));
        checks.push(check_user(&host));
        checks.push(check_memory(&host));
        checks.push(check_cgroups(std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").ok().as_deref()));
        checks.push(self.check_disk());
        checks.push(self.check_templates()?);
        checks.extend(qemu.as_ref().ok().map(|qemu| self.check_bakes(&host, qemu)));
        checks.push(self.check_build_tools());
        checks.extend(check_webhooks(&self.webhook_list()?.webhooks));
        checks.push(self.check_leftovers(gc).await?);
        Ok(DoctorReport { ok: checks.iter().all(|check| check.status != CheckStatus::Failed), checks })
    }

    fn check_disk(&self) -> DoctorCheck {
        let shown = self.home.root().display();
        match facts::disk_free_bytes(self.home.root()) {
            Ok(free) if free >= LOW_DISK => {
                check("disk", CheckStatus::Ok, format!("{} GiB free for {shown}", free >> 30))
            }
            Ok(free) => check("disk", CheckStatus::Warning, format!("only {} MiB free for {shown}", free >> 20))
                .hint("free some space, or keep VMs elsewhere with NIDO_HOME"),
            Err(e) => check("disk", CheckStatus::Failed, format!("{shown} cannot be looked at: {e}"))
                .hint("use another home with --home"),
        }
    }

    fn check_templates(&self) -> Result<DoctorCheck> {
        let list = self.template_list()?;
        let stale: Vec<_> = list.templates.iter().filter(|template| !template.agent_current).collect();
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
            .hint(first.renewal()));
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
        match nido_images::Host::probe() {
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

    async fn check_leftovers(&self, gc: bool) -> Result<DoctorCheck> {
        // Rows were settled when the home was opened; what is left are files.
        if !gc {
            let strays = self.count_strays();
            return Ok(if strays == 0 {
                check("leftovers", CheckStatus::Ok, "none")
            } else {
                check("leftovers", CheckStatus::Warning, format!("{strays} VM directories belong to no VM"))
                    .hint("nido doctor --gc")
            });
        }
        let strays = self.remove_strays().len();
        let bytes = self.drop_unused_parts().await?;
        Ok(check(
            "leftovers",
            CheckStatus::Ok,
            format!("removed {strays} directories and {} MiB of unused template parts", bytes >> 20),
        ))
    }

    fn count_strays(&self) -> usize {
        let Ok(entries) = std::fs::read_dir(self.home.vms()) else { return 0 };
        let ids = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        ids.filter(|id| matches!(self.store().vm_by_id(id), Ok(None))).count()
    }
}

fn names(templates: &[&TemplateInfo]) -> String {
    templates.iter().map(|template| template.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn check(name: &str, status: CheckStatus, detail: impl Into<String>) -> DoctorCheck {
    DoctorCheck { name: name.into(), status, detail: detail.into(), hint: None }
}

impl DoctorCheck {
    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
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

fn check_qemu(found: Result<&QemuFacts, &crate::host::QemuProbeError>) -> DoctorCheck {
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
                KvmVerdict::NotPermitted => plain.hint("adduser $USER $(stat -c %G /dev/kvm), then log in again"),
                KvmVerdict::PresentUnusable { .. } => plain
                    .hint("dmesg | grep -i kvm may tell why; in a VM, its host must allow nesting, and well enough"),
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
