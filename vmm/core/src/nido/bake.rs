//! Baking: a template's guest is booted once and saved, so that VMs can be forked from it; and the choice between a
//! fork and a boot at each start.
//!
//! A bake is created by an ordinary VM with a generated name, which is saved when it is ready, and deleted.
//! Invariant: a template's manifest names a bake only when all its parts are in the store.

use std::time::Instant;

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::name::TemplateName;
use nido_api::state::VmState;
use nido_api::{BakeInfo, BakeRequest, BakeResult, Grant, PathChoice, StartRequest, StartStage, VmSpec, moment};
use nido_engine::bake::{BakeMismatch, choose, qemu_id, shape};
use nido_engine::host::{HostFacts, QemuFacts};
use nido_engine::machine::{self, Machine};
use nido_files::lock::HeldLock;
use nido_files::random;
use nido_images::{Bake, Manifest};
use nido_store::{BackingLayer, Origin, Purpose, StoredBake, VmRow};
use nido_supervisor::control::{Reply, Request};

use super::Nido;
use super::create::machine_request;

/// How soon a VM that is to be saved ends when no process waits for it any more.
pub(super) const ABANDONED_VM_TTL_MS: u64 = 3000;

impl Nido {
    /// Bakes a template for one kind of machine. A bake for the same kind is replaced.
    ///
    /// # Errors
    /// `template_not_found`, those of a start, `vm_busy` if the template was built again meanwhile.
    pub async fn template_bake(
        &self,
        name: &TemplateName,
        request: &BakeRequest,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<BakeResult> {
        let began = Instant::now();
        let (info, already_baked) = {
            let _parts_stay = self.templates_shared().await?;
            let manifest = self.manifest(name)?;
            let spec = bake_spec(name, request)?;
            let (host, qemu) = self.host_facts().await?;
            let disk_bytes = manifest.parts.root.virtual_bytes;
            let machine =
                machine::decide(&machine_request(&spec, disk_bytes, *machine::GUEST_CIDS.start()), &host, &qemu)?;
            match choose(&manifest.bakes, &shape(&machine, &host), &qemu_id(&qemu)) {
                Ok(bake) if !request.again => (bake_info(bake), true),
                _ => {
                    let bake = self.bake(spec, request.timeout_ms, progress).await?;
                    let info = bake_info(&bake);
                    nido_files::failpoint!("bake.saved");
                    let (template, parts) = (name.clone(), manifest.parts);
                    let add = move |images: &nido_images::Store| {
                        let lock = images.lock()?;
                        images.add_bake(template.as_str(), bake, &parts, &lock)
                    };
                    self.with_images(add).await?;
                    nido_files::failpoint!("bake.published");
                    (info, false)
                }
            }
        };
        if !already_baked {
            self.drop_unowned_parts().await;
            self.refresh_pools();
        }
        let duration_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(BakeResult { template: name.clone(), bake: info, already_baked, duration_ms })
    }

    /// Why a VM of this template with the default settings would not be forked; nothing if it would.
    pub(super) fn unfit_by_default(&self, name: &TemplateName, host: &HostFacts, qemu: &QemuFacts) -> Option<String> {
        let unfit = || -> Result<Option<String>> {
            let manifest = self.manifest(name)?;
            let request = machine_request(
                &bake_spec(name, &BakeRequest::default())?,
                manifest.parts.root.virtual_bytes,
                *machine::GUEST_CIDS.start(),
            );
            let machine = machine::decide(&request, host, qemu)?;
            Ok(choose(&manifest.bakes, &shape(&machine, host), &qemu_id(qemu))
                .err()
                .map(|unfit| unfit.why().to_owned()))
        };
        unfit().unwrap_or_else(|error| Some(error.to_string()))
    }

    /// Runs a VM until it has saved itself.
    async fn bake(
        &self,
        spec: VmSpec,
        timeout_ms: Option<u64>,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<Bake> {
        progress(StartStage::Preparing);
        let (row, held) = self.make_vm(spec, Purpose::Bake, VmState::Starting, &Grant::own()).await?;
        self.await_bake(&row, held, timeout_ms, None, progress).await
    }

    /// Starts a VM that is there to be baked, and waits until it has been. Nothing is left of it then.
    pub(super) async fn await_bake(
        &self,
        row: &VmRow,
        held: HeldLock,
        timeout_ms: Option<u64>,
        from: Option<Origin>,
        progress: &mut (dyn FnMut(StartStage) + Send),
    ) -> Result<Bake> {
        let start = StartRequest { wait: true, timeout_ms, path: PathChoice::Cold, ..StartRequest::default() };
        let outcome = match Box::pin(self.launch_from(row, held, start, Instant::now(), from)).await {
            Ok(()) => self.request_with_stages(row, &Request::Ready, progress).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(Reply::Baked { bake }) => Ok(*bake),
            Ok(_) => Err(Error::internal("a VM was created for a warm image, but was not saved")),
            Err(error) => {
                if let Err(left) = self.delete_id(&row.id).await {
                    tracing::warn!("VM {} could not be deleted: {left}", row.spec.name);
                }
                Err(error)
            }
        }
    }

    /// How a VM starts, and the backing layers of its disk. Adds the reason to the machine's.
    pub(super) fn origin(
        &self,
        row: &VmRow,
        path: PathChoice,
        machine: &mut Machine,
        (host, qemu): (&HostFacts, &QemuFacts),
    ) -> Result<(Origin, Vec<BackingLayer>)> {
        let boot = |row: &VmRow| (Origin::Boot, row.parts.frozen.clone());
        if row.purpose == Purpose::Bake {
            return Ok(boot(row));
        }
        let refused = |why: &str| {
            Error::new(Code::TemplateMismatch, format!("VM '{}' cannot be forked: {why}", row.spec.name))
                .hint("omit the path, so that it boots if it cannot be forked")
                .or_hint(Hint::host(format!("run nido template bake {}", row.spec.template)))
        };
        if super::create::has_disk(&self.vm_dir(&row.id)) {
            machine.reason.push_str("; booted because its disk has been in use");
            return if path == PathChoice::Fork { Err(refused("its disk has been in use")) } else { Ok(boot(row)) };
        }
        if path == PathChoice::Cold {
            machine.reason.push_str("; booted as requested");
            return Ok((Origin::Boot, Vec::new()));
        }
        match self.fitting_bake(row, machine, (host, qemu)) {
            Ok(bake) => {
                machine.reason.push_str("; forked from a warm image of the template");
                Ok((Origin::Fork(saved(&bake)), vec![frozen(&bake)]))
            }
            Err(unfit) if path == PathChoice::Fork => Err(refused(unfit.why())),
            Err(unfit) => {
                machine.reason.push_str(&format!("; booted because {}", unfit.why()));
                if let BakeMismatch::Mismatch(why) = &unfit {
                    machine.warnings.push(format!(
                        "booted instead of forked: the template's warm image cannot be used, {why}; a new one has to be baked"
                    ));
                }
                Ok((Origin::Boot, Vec::new()))
            }
        }
    }

    fn fitting_bake(
        &self,
        row: &VmRow,
        machine: &Machine,
        (host, qemu): (&HostFacts, &QemuFacts),
    ) -> Result<Bake, BakeMismatch> {
        let changed = || BakeMismatch::Missing("the template has changed since the VM was created".into());
        let manifest = self.manifest(&row.spec.template).map_err(|_| changed())?;
        if !same_parts(&manifest, row) {
            return Err(changed());
        }
        choose(&manifest.bakes, &shape(machine, host), &qemu_id(qemu)).cloned()
    }
}

pub(super) fn same_parts(manifest: &Manifest, row: &VmRow) -> bool {
    let (parts, ours) = (&manifest.parts, &row.parts);
    parts.vmlinux.sha256 == ours.vmlinux
        && parts.initramfs.sha256 == ours.initramfs
        && parts.root.file.sha256 == ours.root
}

/// What a start needs of a bake.
pub(super) fn saved(bake: &Bake) -> StoredBake {
    StoredBake {
        memory: bake.memory.sha256.clone(),
        state: bake.state.sha256.clone(),
        token: bake.token.clone(),
        live: false,
    }
}

/// What a disk needs of one.
pub(super) fn frozen(bake: &Bake) -> BackingLayer {
    BackingLayer { sha256: bake.disk.file.sha256.clone(), virtual_bytes: bake.disk.virtual_bytes }
}

fn bake_spec(template: &TemplateName, request: &BakeRequest) -> Result<VmSpec> {
    let defaults = VmSpec::named(random::vm_name("bake")?);
    Ok(VmSpec {
        template: template.clone(),
        cpus: request.cpus.unwrap_or(defaults.cpus),
        memory_mib: request.memory_mib.unwrap_or(defaults.memory_mib),
        net: request.net.hardware(),
        machine: request.machine,
        accel: request.accel,
        nested: request.nested,
        ephemeral: true,
        idle_ms: Some(ABANDONED_VM_TTL_MS),
        ..defaults
    })
}

/// A bake as the API describes it.
pub(super) fn bake_info(bake: &Bake) -> BakeInfo {
    BakeInfo {
        created_at: moment::in_ms(bake.created_at),
        machine: bake.machine.machine.clone(),
        accel: bake.machine.accel.clone(),
        cpus: bake.machine.cpus,
        memory_mib: bake.machine.memory_mib,
        net: bake.machine.net.clone(),
        transport: bake.machine.transport.clone(),
        qemu: bake.qemu.version.clone(),
        size_bytes: bake.state.bytes + bake.disk.file.bytes,
    }
}
