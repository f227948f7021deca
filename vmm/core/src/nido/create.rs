//! Making a VM: its row, its directory, its disk.
//!
//! Order: directory, lock and `vm.json`, then the row (which reserves the name), then the disk. So a directory without a row
//! that a killed command left holds no data, and only such a one is removed (`reconcile/`).

use std::time::{Duration, Instant};

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::name::TemplateName;
use nido_api::state::VmState;
use nido_api::{EgressRule, Grant, Limits, NetChoice, VmInfo, VmSpec, check_within};
use nido_engine::disk;
use nido_engine::home::{DISK, DISK_TEMPORARY, Home, SUPERVISOR_LOCK, VmDir};
use nido_engine::host::facts;
use nido_engine::machine::{self, MachineRequest};
use nido_files::atomic_file::{self, Durability};
use nido_files::lock::HeldLock;
use nido_files::random;
use nido_images::Manifest;
use nido_store::{BootParts, Purpose, VmRow};
use nido_supervisor::vm_record::remove_without_data;

use super::Nido;
use super::reconcile::Scope;

/// Less free space than this, and no VM is made, in bytes.
pub(super) const SPACE_RESERVE_BYTES: u64 = 1 << 20;
/// Most labels a VM may carry.
const LABELS_MAX: usize = 64;
/// The smallest disk quota: an empty disk and the logs fit.
const DISK_QUOTA_MIN: u64 = 16 << 20;
/// The least that a shell and what it starts need, and the most processes that Linux has.
const PROCESSES: std::ops::RangeInclusive<u32> = 16..=4_194_304;
/// Longest label key or value, in bytes.
const LABEL_BYTES_MAX: usize = 256;

impl Nido {
    /// Makes a VM without starting it.
    ///
    /// # Errors
    /// `vm_exists`, `template_not_found`, `spec_invalid`, `limit_exceeded` or `denied` by the grant, and whatever the host lacks to run it.
    pub async fn create(&self, spec: VmSpec, grant: &Grant) -> Result<VmInfo> {
        let (row, _held) =
            self.make_vm(self.with_presets(self.leased(spec)?).await?, Purpose::Use, VmState::Created, grant).await?;
        Ok(self.describe(&row))
    }

    /// The network of a VM for which none is requested: `nat`, unless its template or the limits bound its rules or exclude it.
    #[must_use]
    pub fn default_net(&self, template: &TemplateName, limits: &Limits) -> NetChoice {
        // The creation reports a template that is not there.
        let is_bounded = self.manifest(template).is_ok_and(|manifest| manifest.allow.is_some());
        let of_template = Limits { allow: is_bounded.then(Vec::new), ..Limits::default() };
        limits.and(&of_template).default_net()
    }

    /// Makes a VM and holds it. Nothing is left if this fails.
    pub(super) async fn make_vm(
        &self,
        spec: VmSpec,
        purpose: Purpose,
        state: VmState,
        grant: &Grant,
    ) -> Result<(VmRow, HeldLock)> {
        check_spec(&spec)?;
        if purpose == Purpose::Use {
            self.check_secrets(&spec, grant)?;
        }
        let (host, qemu) = self.host_facts().await?;
        let _template_lock = self.templates_shared().await?;
        let manifest = self.manifest(&spec.template)?;
        let parts = boot_parts(&manifest);
        let disk_bytes = disk_bytes(&spec, &parts)?;
        grant.limits.check(&spec, disk_bytes)?;
        if purpose == Purpose::Use {
            check_template_rules(&spec, parts.allow.as_deref())?;
        }
        // Decided again at each start; here it is only asked whether it can be.
        machine::decide(&machine_request(&spec, disk_bytes, *machine::GUEST_CIDS.start()), &host, &qemu)?;
        // Its disk is made when it starts: what it stands on is decided then.
        self.insert(VmRow::new(random::id()?, spec, purpose, state, parts, disk_bytes), grant).await
    }

    /// Makes the directory and the row of a VM, which is the grant's then.
    pub(super) async fn insert(&self, row: VmRow, grant: &Grant) -> Result<(VmRow, HeldLock)> {
        let row = VmRow { owner: grant.owner.clone(), ..row };
        self.require_space()?;
        self.reconcile_scope(Scope::Create).await?;
        let dir = self.vm_dir(&row.id);
        let held = make_and_hold(&dir).await?;
        nido_files::failpoint!("create.locked");
        // First: a row never is without its record.
        let inserted =
            self.context.write_record(&row).and_then(|()| self.store().insert_vm_within(&row, grant.limits.max_vms));
        if let Err(error) = inserted {
            let _ = remove_without_data(&dir);
            return Err(error);
        }
        nido_files::failpoint!("create.row");
        Ok((row, held))
    }

    /// Refuses to make a VM on a disk that has no room even for its logs, before anything of it is written.
    fn require_space(&self) -> Result<()> {
        match facts::disk_free_bytes(self.home().root()) {
            Ok(free) if free < SPACE_RESERVE_BYTES => {
                let (free, needed) = (free >> 10, SPACE_RESERVE_BYTES >> 10);
                let words =
                    format!("the disk that holds nido's home is full: {free} KiB free, a VM needs {needed} KiB");
                Err(Error::new(Code::DiskFull, words).hint(Hint::home_full()))
            }
            // A disk that cannot be asked is no reason to refuse.
            _ => Ok(()),
        }
    }
}

/// Makes the directory of a new VM and holds it. Until it has a row, a process that removes orphans may take it for one: it is
/// made again then.
async fn make_and_hold(dir: &VmDir) -> Result<HeldLock> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        dir.make()?;
        nido_files::failpoint!("create.directory");
        match HeldLock::take(&dir.file(SUPERVISOR_LOCK), deadline).await {
            Ok(Some(held)) => return Ok(held),
            Ok(None) => return Err(Error::new(Code::VmBusy, "the new VM's directory is held by another process")),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && Instant::now() < deadline => {}
            Err(e) => return Err(Error::io("cannot lock the new VM", e)),
        }
    }
}

/// Whether the rules of a VM are within those of its template.
pub(super) fn check_template_rules(spec: &VmSpec, ceiling: Option<&[EgressRule]>) -> Result<()> {
    let Some(ceiling) = ceiling else { return Ok(()) };
    check_within(ceiling, &format!("the rules of template '{}'", spec.template), spec.net, &spec.rules())
}

pub(super) fn check_spec(spec: &VmSpec) -> Result<()> {
    spec.check_rules()?;
    spec.net_limits.check(spec.net)?;
    let long = |text: &String| text.len() > LABEL_BYTES_MAX;
    if spec.labels.len() > LABELS_MAX || spec.labels.iter().any(|(k, v)| k.is_empty() || long(k) || long(v)) {
        let rule =
            format!("at most {LABELS_MAX} labels, each key and value at most {LABEL_BYTES_MAX} bytes and no empty key");
        return Err(Error::new(Code::SpecInvalid, format!("labels: {rule}")));
    }
    for (at, spec_of) in spec.forwards.iter().enumerate() {
        if spec.forwards[..at].iter().any(|before| before.collides(spec_of)) {
            let words = format!("forwards[{at}]: port {} of {} is published twice", spec_of.host_port, spec_of.host);
            return Err(Error::new(Code::SpecInvalid, words));
        }
    }
    if spec.ephemeral && !spec.restart.is_no() {
        let words = "restart: an ephemeral VM is deleted when it stops, so it cannot be restarted";
        return Err(Error::new(Code::SpecInvalid, words).hint("leave out ephemeral, or restart"));
    }
    if spec.disk_quota_bytes.is_some_and(|quota| quota < DISK_QUOTA_MIN) {
        let rule = format!("disk_quota_bytes: at least {} MiB", DISK_QUOTA_MIN >> 20);
        return Err(Error::new(Code::SpecInvalid, rule).hint("leave it out for no quota"));
    }
    if spec.max_processes.is_some_and(|limit| !PROCESSES.contains(&limit)) {
        let rule = format!("max_processes: from {} to {}", PROCESSES.start(), PROCESSES.end());
        return Err(Error::new(Code::SpecInvalid, rule).hint("leave it out for no limit"));
    }
    for (field, limit) in [("ttl_ms", spec.ttl_ms), ("idle_ms", spec.idle_ms)] {
        if limit == Some(0) {
            let words = format!("{field}: a time limit of zero would end the VM at once");
            return Err(Error::new(Code::SpecInvalid, words).hint("leave it out for no limit"));
        }
    }
    Ok(())
}

pub(super) fn boot_parts(manifest: &Manifest) -> BootParts {
    BootParts {
        vmlinux: manifest.parts.vmlinux.sha256.clone(),
        initramfs: manifest.parts.initramfs.sha256.clone(),
        initramfs_base: Some(manifest.parts.initramfs_base.sha256.clone()),
        agent: Some(manifest.agent.sha256.clone()),
        root: manifest.parts.root.file.sha256.clone(),
        root_bytes: manifest.parts.root.virtual_bytes,
        init: manifest.init,
        append: manifest.kernel.append.clone(),
        packages: manifest.parts.packages.sha256.clone(),
        frozen: Vec::new(),
        allow: manifest.allow.clone(),
    }
}

pub(super) fn disk_bytes(spec: &VmSpec, parts: &BootParts) -> Result<u64> {
    let asked = spec.disk_bytes.unwrap_or(parts.root_bytes);
    let asked = asked.checked_next_multiple_of(512).unwrap_or(u64::MAX);
    if asked < parts.root_bytes {
        let rule = format!("the disk cannot be smaller than its template's, {} MiB", parts.root_bytes >> 20);
        return Err(Error::new(Code::SpecInvalid, rule).hint("omit the size of the disk, or request more"));
    }
    Ok(asked)
}

/// What decides on the machine of a VM that has not been started yet.
pub(super) fn machine_request(spec: &VmSpec, disk_bytes: u64, cid: u32) -> MachineRequest {
    MachineRequest {
        cpus: spec.cpus,
        memory_mib: spec.memory_mib,
        disk_bytes,
        machine: spec.machine,
        accel: spec.accel,
        net: spec.net,
        nested: spec.nested,
        require_isolation: spec.require_isolation,
        require_confinement: spec.require_confinement,
        ran_under: None,
        cid,
    }
}

/// Whether the VM has a disk. An empty file is not one: after a power cut, a disk without writes can be empty.
pub(super) fn has_disk(dir: &VmDir) -> bool {
    std::fs::metadata(dir.file(DISK)).is_ok_and(|disk| disk.len() > 0)
}

/// Makes the VM's disk if it is not there yet.
pub(super) fn make_disk(dir: &VmDir, row: &VmRow) -> Result<()> {
    let path = dir.file(DISK);
    if has_disk(dir) {
        return Ok(());
    }
    // A half-written overlay must never carry the disk's name.
    let fresh = dir.file(DISK_TEMPORARY);
    let _ = std::fs::remove_file(&fresh);
    let (bytes, below) = match (row.parts.frozen.last(), row.purpose) {
        // A guest that resumes finds the disk it was saved with; the supervisor enlarges it.
        (Some(frozen), _) => (frozen.virtual_bytes, Home::blob_from_vm_dir(&frozen.sha256)),
        // It becomes a part itself, and lies beside the disk it stands on.
        (None, Purpose::Bake) => (row.disk_bytes, row.parts.root.clone()),
        (None, _) => (row.disk_bytes, Home::blob_from_vm_dir(&row.parts.root)),
    };
    // The disk of an ephemeral VM is of no use after a power cut.
    let durability = if row.spec.ephemeral { Durability::Kill } else { Durability::PowerCut };
    disk::create_overlay(&fresh, bytes, &below)
        .and_then(|file| atomic_file::publish(&file, &fresh, &path, durability))
        .inspect_err(|_| drop(std::fs::remove_file(&fresh)))
        .map_err(|e| Error::io("cannot make the VM's disk", e))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use super::*;

    // A command that removed orphans took the directory of a VM that another one was just making: "cannot lock the new VM".
    #[test]
    fn a_directory_removed_as_an_orphan_is_recreated() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::open(&root.path().join("home")).unwrap();
        let dir = home.vm("fresh");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let (done, removed) = (AtomicBool::new(false), AtomicU32::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let Ok(Some(_held)) = HeldLock::try_take(&dir.file(SUPERVISOR_LOCK)) else { continue };
                    removed.fetch_add(u32::from(std::fs::remove_dir_all(dir.path()).is_ok()), Ordering::Relaxed);
                }
            });
            // On a busy machine the two may not meet for a while.
            let deadline = Instant::now() + Duration::from_secs(30);
            let mut rounds = 0;
            while rounds < 300 || (removed.load(Ordering::Relaxed) == 0 && Instant::now() < deadline) {
                let held = runtime.block_on(make_and_hold(&dir)).unwrap();
                let there = dir.file(SUPERVISOR_LOCK).exists();
                drop(held);
                if !there {
                    done.store(true, Ordering::Relaxed);
                }
                assert!(there, "what is held is there");
                rounds += 1;
            }
            done.store(true, Ordering::Relaxed);
        });
        assert!(removed.into_inner() > 0, "nothing was taken for a stray");
    }
}
