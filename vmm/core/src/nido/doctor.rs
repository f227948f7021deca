//! Checks the host: whether and how well it can run VMs, and whether a crash left orphans.

mod checks;

use std::path::{Path, PathBuf};
use std::time::Duration;

use nido_api::FrontEnd;
use nido_api::error::{Error, Result};
use nido_api::{CheckStatus, DoctorCheck, DoctorReport, TemplateInfo};
use nido_engine::host::delegation::host_groups;
use nido_engine::host::{HostFacts, QemuFacts, confinement, facts, kvm, qemu};
use nido_engine::snapshot;
use nido_files::random;

use self::checks::{
    check, check_confinement, check_disk, check_host_limits, check_kvm, check_machine, check_memory, check_nesting,
    check_qemu, check_unit, check_user, check_vsock, check_webhooks,
};
use crate::nido::reconcile::{Finding, Plan, RemovalCounts, Repair, Scope, VmRepair};
use crate::nido::{Nido, OpenOptions};

/// How long a process may take from the directory of a new VM to its lock, if it is not stopped.
const CREATION_TIME: Duration = Duration::from_millis(200);

impl Nido {
    /// Checks the host. With `gc`, removes orphans of crashes.
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
        let plan = self.plan_reconciliation(Scope::Everything)?;
        if !self.is_read_only() {
            self.repair_vms(&plan).await;
        }
        checks.push(self.check_vms(&plan)?);
        checks.push(self.check_orphans(&plan, gc).await);
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
        checks.push(match error.hint_for(FrontEnd::Cli) {
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
            .hint(nido_engine::template::renewal(&first.name).text(FrontEnd::Cli).unwrap_or_default()));
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
                match error.hint().and_then(|hint| hint.text(FrontEnd::Cli)) {
                    Some(hint) => plain.hint(hint),
                    None => plain,
                }
            }
        }
    }

    /// Repairs of VMs that `doctor` makes without being asked: a QEMU without a supervisor gets one, and a VM that an earlier
    /// version made gets the copy of its row.
    async fn repair_vms(&self, plan: &Plan) {
        for repair in &plan.repairs {
            let Repair::Vm { id, repairs } = repair else { continue };
            if repairs.contains(&VmRepair::WriteRecord) {
                self.context.refresh_record(id);
            }
            if repairs.contains(&VmRepair::Supervise)
                && let Err(error) = self.apply(repair, Scope::Everything).await
            {
                tracing::warn!("no supervisor can be started for VM {id}: {error}");
            }
        }
    }

    /// Files that nothing needs any more. Rows were reconciled when the home was opened.
    async fn check_orphans(&self, plan: &Plan, gc: bool) -> DoctorCheck {
        let unknown = plan.findings.iter().find_map(Finding::unknown_parts);
        if gc {
            return self.remove_orphans(plan, unknown).await;
        }
        let mut removes = plan.removes();
        if removes.directories > 0 {
            // The directory of a VM that is being made is there before its lock and its row.
            tokio::time::sleep(CREATION_TIME).await;
            if let Ok(mut later) = self.plan_reconciliation(Scope::Everything) {
                later.repairs.retain(|repair| plan.repairs.contains(repair));
                removes = later.removes();
            }
        }
        if removes == RemovalCounts::default() && unknown.is_none() {
            return check("orphans", CheckStatus::Ok, "none");
        }
        check("orphans", CheckStatus::Warning, orphans(removes, unknown)).hint("nido doctor --gc")
    }

    async fn remove_orphans(&self, plan: &Plan, unknown: Option<&str>) -> DoctorCheck {
        let mut failures = Vec::new();
        for repair in &plan.repairs {
            if let Err(error) = self.apply(repair, Scope::Everything).await {
                failures.push(error.to_string());
            }
        }
        // Those of stopped VMs are repaired with the VM; these belong to VMs that run.
        match self.store().vm_ids() {
            Ok(ids) => ids.iter().for_each(|id| snapshot::remove_deleted(&self.vm_dir(id))),
            Err(error) => failures.push(error.to_string()),
        }
        let RemovalCounts { directories, part_bytes, .. } = plan.removes();
        let removed = format!("removed {directories} directories");
        match (unknown, &failures[..]) {
            (Some(why), _) => {
                let detail = format!("{removed}; template parts stay, because their owners are unknown: {why}");
                check("orphans", CheckStatus::Warning, detail)
            }
            (None, []) => {
                let detail = format!("{removed} and {} MiB of unused template parts", part_bytes >> 20);
                check("orphans", CheckStatus::Ok, detail)
            }
            (None, failures) => {
                let detail = format!("not everything could be removed: {}", failures.join("; "));
                check("orphans", CheckStatus::Warning, detail)
            }
        }
    }

    /// Whether each VM's row and files belong together.
    fn check_vms(&self, plan: &Plan) -> Result<DoctorCheck> {
        let unknown: Vec<_> = plan.findings.iter().filter_map(Finding::unknown_vm).collect();
        let lost: Vec<_> = plan.findings.iter().filter_map(Finding::lost_files).collect();
        let rows = self.store().vms()?;
        let lost: Vec<_> = rows.iter().filter(|row| lost.contains(&row.id.as_str())).collect();
        let lost = lost.iter().map(|row| row.spec.name.to_string()).collect::<Vec<_>>();
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
            kvm::invalidate(&cache);
            confinement::invalidate(&cache);
        }
        facts::gather(&cache)
    })
    .await
    .map_err(|e| Error::internal(format!("the host could not be looked at: {e}")))?;
    let mut checks = vec![check_qemu(qemu.as_ref()), check_kvm(&host, qemu.as_ref().ok())];
    checks.extend(qemu.as_ref().ok().map(|qemu| check_machine(&host, qemu)));
    checks.push(check_nesting(&host));
    checks.push(check_vsock(&host));
    checks.push(check_confinement(&host));
    checks.push(check_user(&host));
    checks.push(check_unit());
    checks.push(check_memory(&host));
    checks.push(check_host_limits(host_groups()));
    Ok((checks, host, qemu.ok()))
}

/// What `doctor --gc` would remove, in words.
fn orphans(removes: RemovalCounts, unknown_parts: Option<&str>) -> String {
    let RemovalCounts { directories, interrupted, part_bytes } = removes;
    let parts = match unknown_parts {
        Some(why) => format!("the owners of template parts are unknown: {why}"),
        None => format!("{} MiB of unused template parts", part_bytes.div_ceil(1 << 20)),
    };
    let interrupted = match interrupted {
        0 => String::new(),
        count => format!("interrupted snapshots or restores of {count} VMs, "),
    };
    format!("{directories} directories of no VM, {interrupted}{parts}")
}

fn names(templates: &[&TemplateInfo]) -> String {
    templates.iter().map(|template| template.name.as_str()).collect::<Vec<_>>().join(", ")
}
