//! Templates: what the images crate makes, with the VMs that use them in view.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::name::TemplateName;
use nido_api::operation as op;
use nido_api::{
    AllowEntry, BakeRequest, BuildRequest, BuildResult, BuildStep, CaptureRequest, EGRESS_RULES_MAX, EgressRule,
    Limits, NetChoice, PageRequest, StartStage, TemplateInfo, TemplateList, VmRef, check_within, moment, plain_rules,
};
use nido_engine::confine::Layer;
use nido_engine::machine::Refusal;
use nido_images::Manifest;
use nido_store::{Purpose, VmRow};
use tokio::sync::mpsc;

use super::Nido;
use super::template_store::TEMPLATES_LOCK_TIMEOUT;

impl Nido {
    /// The manifest of a template whose parts are all there.
    pub(super) fn manifest(&self, name: &TemplateName) -> Result<Manifest> {
        let images = self.images();
        let manifest = images.open(name.as_str()).map_err(Error::from)?;
        images.check(&manifest)?;
        Ok(manifest)
    }

    /// Templates by name, a page at a time, with the cursor of the next page.
    ///
    /// # Errors
    /// `spec_invalid` for a limit that cannot be; of the disk.
    pub fn template_page(&self, page: &PageRequest) -> Result<(TemplateList, Option<String>)> {
        let mut list = self.template_list()?;
        let place = |template: &TemplateInfo| template.name.as_str().to_owned();
        let (templates, next_cursor) = page.of(list.templates, place, PageRequest::LIMIT_MAX)?;
        list.templates = templates;
        Ok((list, next_cursor))
    }

    /// Templates and recipes.
    ///
    /// # Errors
    /// Of the disk.
    pub fn template_list(&self) -> Result<TemplateList> {
        let used = self.template_users()?;
        // Asked before it is looked which there are: what is made meanwhile is not taken for gone.
        let announced = self.store().announced_templates()?;
        let found = self.images().ls()?;
        let all_readable = found.iter().all(std::result::Result::is_ok);
        let mut templates: Vec<TemplateInfo> = Vec::new();
        let mut damaged = Vec::new();
        for manifest in found {
            match manifest.map_err(Error::from).and_then(|manifest| describe(&manifest, &used)) {
                Ok(template) => templates.push(template),
                Err(error) => damaged.push(error.to_string()),
            }
        }
        let list =
            TemplateList { templates, damaged, recipes: nido_images::recipe_names().map(str::to_owned).collect() };
        // A home that cannot be written is only read.
        if self.is_read_only() {
            return Ok(list);
        }
        let templates = &list.templates;
        for template in templates {
            self.store().announce_template(&template.name, &template.created_at.to_string())?;
        }
        // The process that deleted it was killed before the event was written.
        let there = |name: &TemplateName| templates.iter().any(|template| template.name == *name);
        for gone in announced.iter().filter(|name| all_readable && !there(name)) {
            self.store().record_template_deleted(gone)?;
        }
        Ok(list)
    }

    /// One template.
    ///
    /// # Errors
    /// `template_not_found`, `template_mismatch` if it is damaged.
    pub fn template_info(&self, name: &TemplateName) -> Result<TemplateInfo> {
        describe(&self.manifest(name)?, &self.template_users()?)
    }

    /// Builds a template from the recipe of that name. Dropping the future cancels the build.
    ///
    /// # Errors
    /// `template_not_found` for an unknown recipe, `tool_missing`, `template_build_failed`, `disk_full`, `denied`.
    pub async fn template_build(
        &self,
        name: &TemplateName,
        request: BuildRequest,
        progress: &mut (dyn FnMut(BuildStep) + Send),
    ) -> Result<BuildResult> {
        let began = Instant::now();
        self.remove_orphaned_builds().await;
        let cancel = CancelOnDrop(Arc::default());
        let (home, recipe, flag) = (self.home().root().to_owned(), name.to_string(), Arc::clone(&cancel.0));
        let (steps, mut step) = mpsc::unbounded_channel();
        let options = nido_images::BuildOptions { rebuild: request.rebuild, kernel: request.kernel };
        let work = tokio::task::spawn_blocking(move || {
            let mut tell = |progress: nido_images::BuildProgress| drop(steps.send(progress));
            nido_images::build(&home, &recipe, &options, &mut tell, &flag)
        });
        while let Some(now) = step.recv().await {
            progress(build_step(now));
        }
        let outcome = work.await.map_err(|e| Error::internal(format!("the build broke down: {e}")))??;
        self.drop_unowned_parts().await;
        let mut already_built = outcome.already_built;
        if request.bake {
            already_built &= self.default_bakes(name, progress).await?;
        }
        if !already_built {
            self.refresh_pools();
        }
        let template = self.template_info(name)?;
        self.store().announce_template(name, &template.created_at.to_string())?;
        let duration_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(BuildResult { template, already_built, duration_ms })
    }

    /// Bakes a fresh template for the machine that a VM has by default, with and without a network. True if
    /// nothing had to be done.
    async fn default_bakes(&self, name: &TemplateName, progress: &mut (dyn FnMut(BuildStep) + Send)) -> Result<bool> {
        let mut nothing_done = true;
        let kinds = [NetChoice::Nat, NetChoice::None];
        for (number, net) in (1..).zip(kinds) {
            let mut tell = |stage: StartStage| {
                let detail = format!("a machine with network {}: {}", net.name(), stage.word());
                let total = kinds.len() as u32;
                progress(BuildStep { stage: "bake".into(), index: number, total, detail, fraction: None });
            };
            let request = BakeRequest { net, ..BakeRequest::default() };
            nothing_done &= self.template_bake(name, &request, &mut tell).await?.already_baked;
        }
        Ok(nothing_done)
    }

    /// Makes a template of a VM: its disk as it is, everything else as in the template it was made from; then bakes it. A
    /// running VM is paused for a moment and resumed.
    ///
    /// # Errors
    /// `vm_not_found`, `template_exists`, `denied` if the VM's own bound does not cover `allow`, `spec_invalid`,
    /// `template_mismatch` if the VM's own template has changed since, those of a snapshot and of a build.
    pub async fn template_create(
        &self,
        name: &TemplateName,
        from: impl Into<VmRef<'_>>,
        request: CaptureRequest,
        progress: &mut (dyn FnMut(BuildStep) + Send),
    ) -> Result<BuildResult> {
        let began = Instant::now();
        let from = from.into();
        let (row, from) = (self.resolve(from)?, from.name);
        let rules = self.rules_of_new_template(&row, request.allow).await?;
        {
            let _parts_stay = self.templates_shared().await?;
            let of = self.manifest(&row.spec.template)?;
            if !super::bake::same_parts(&of, &row) {
                let words = format!("template '{}' has changed since VM '{from}' was made from it", of.name);
                return Err(Error::new(Code::TemplateMismatch, words).hint("make a VM from it as it is now"));
            }
            self.flatten(name, &row, of.with_rules(rules), progress).await?;
        }
        if request.bake {
            self.default_bakes(name, progress).await?;
        }
        let template = self.template_info(name)?;
        self.store().announce_template(name, &template.created_at.to_string())?;
        let duration_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(BuildResult { template, already_built: false, duration_ms })
    }

    /// The rules that bound those of the VMs of a template that is made of this VM.
    async fn rules_of_new_template(
        &self,
        row: &VmRow,
        allow: Option<Vec<AllowEntry>>,
    ) -> Result<Option<Vec<EgressRule>>> {
        let Some(allow) = allow else { return Ok(row.parts.allow.clone()) };
        let limits = self.with_plain_rules(Limits { allow: Some(allow), ..Limits::default() }).await?;
        let mut rules: Vec<EgressRule> = Vec::new();
        for rule in limits.allow.as_deref().map(plain_rules).unwrap_or_default() {
            if !rules.contains(&rule) {
                rules.push(rule);
            }
        }
        if rules.len() > EGRESS_RULES_MAX {
            let words = format!("allow: a template has at most {EGRESS_RULES_MAX} rules, those of presets included");
            return Err(Error::new(Code::SpecInvalid, words));
        }
        if let Some(ceiling) = &row.parts.allow {
            let whose = format!("the rules of template '{}', of which the VM is", row.spec.template);
            check_within(ceiling, &whose, NetChoice::Restricted, &rules)?;
        }
        Ok(Some(rules))
    }

    async fn flatten(
        &self,
        name: &TemplateName,
        row: &VmRow,
        of: Manifest,
        progress: &mut (dyn FnMut(BuildStep) + Send),
    ) -> Result<()> {
        let (vm, dir) = (&row.spec.name, self.vm_dir(&row.id));
        let confinement = self.helper_confinement(row.spec.require_confinement).await?;
        let lower = std::iter::once(&row.parts.root).chain(row.parts.frozen.iter().map(|frozen| &frozen.sha256));
        let mut files: Vec<_> = lower.map(|hash| self.home().blob(hash)).collect();
        // A running VM is copied by a hidden snapshot, which is removed again.
        let mut held = None;
        let copy = if row.state.is_inactive() {
            held = Some(self.lock_stopped(row).await?);
            let disk = dir.file(nido_engine::home::DISK);
            if !disk.exists() {
                let words =
                    format!("VM '{vm}' has never been started, so it has nothing that its template does not have");
                return Err(Error::new(Code::VmNotRunning, words)
                    .hint(Hint::run_on(op::VM_START, vm).to("start it, and change something in it")));
            }
            files.push(disk);
            None
        } else {
            let aside = self.take_hidden_snapshot(row).await?;
            files.push(
                nido_engine::snapshot::dir(&self.vm_dir(&aside.row.id), &aside.name).join(nido_engine::home::DISK),
            );
            Some(aside)
        };
        let cancel = CancelOnDrop(Arc::default());
        let (home, flag, name) = (self.home().root().to_owned(), Arc::clone(&cancel.0), name.to_string());
        let disk = nido_images::Layers { files, virtual_bytes: row.disk_bytes, confinement };
        let (steps, mut step) = mpsc::unbounded_channel();
        let work = tokio::task::spawn_blocking(move || {
            let mut tell = |progress: nido_images::BuildProgress| drop(steps.send(progress));
            nido_images::create(&home, &name, &of, &disk, &mut tell, &flag)
        });
        while let Some(now) = step.recv().await {
            progress(build_step(now));
        }
        let outcome = work.await.map_err(|e| Error::internal(format!("the work broke down: {e}")));
        if let Some(aside) = copy {
            self.context.erase(&aside.row.id)?;
        }
        drop(held);
        outcome??;
        Ok(())
    }

    /// The layers that confine a helper program on a guest's data.
    async fn helper_confinement(&self, is_required: bool) -> Result<Vec<Layer>> {
        let cache = self.home().cache();
        let support = tokio::task::spawn_blocking(move || nido_engine::host::confinement::probe(&cache))
            .await
            .map_err(|e| Error::internal(format!("the host could not be checked: {e}")))?;
        // A helper reads files of this user, so it has this user.
        let support = support.of_helpers();
        if let (true, Some(missing)) = (is_required, support.shortfall()) {
            return Err(Refusal::ConfinementRequired { missing }.into());
        }
        Ok(support.layers())
    }

    /// Deletes a template that no VM uses.
    ///
    /// # Errors
    /// `template_not_found`, `template_in_use` with the VMs that use it.
    pub async fn template_delete(&self, name: &TemplateName) -> Result<()> {
        let lock = self.templates_exclusive(TEMPLATES_LOCK_TIMEOUT).await?;
        self.refuse_pools_of(name)?;
        let users: Vec<String> = self
            .template_users()?
            .into_iter()
            .filter(|(template, _)| template == name.as_str())
            .map(|(_, vm)| vm)
            .collect();
        if !users.is_empty() {
            let list = users.join(", ");
            return Err(Error::new(Code::TemplateInUse, format!("template '{name}' is used by {list}"))
                .hint("delete them first")
                .or_hint(Hint::command_line(format!("nido delete {}", users.join(" ")))));
        }
        let gone = name.clone();
        self.with_images(move |images| images.delete(gone.as_str())).await?;
        nido_files::failpoint!("template.deleted");
        self.store().record_template_deleted(name)?;
        drop(lock);
        self.drop_unowned_parts().await;
        Ok(())
    }

    /// Which VM was made from which template.
    pub(super) fn template_users(&self) -> Result<Vec<(String, String)>> {
        let is_user = |row: &VmRow| row.purpose == Purpose::Use && row.unreadable.is_none();
        let rows = self.store().vms()?.into_iter().filter(is_user);
        Ok(rows.map(|row| (row.spec.template.to_string(), row.spec.name.to_string())).collect())
    }
}

/// Cancels work when the future that waits for it is dropped.
pub(super) struct CancelOnDrop(pub(super) Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn digest(bytes: &[u8]) -> String {
    use sha2::Digest;
    nido_api::hex::encode(&sha2::Sha256::digest(bytes))
}

fn build_step(progress: nido_images::BuildProgress) -> BuildStep {
    BuildStep {
        stage: progress.stage.word().to_owned(),
        index: u32::try_from(progress.index).unwrap_or(u32::MAX),
        total: u32::try_from(progress.total).unwrap_or(u32::MAX),
        detail: progress.detail,
        fraction: progress.fraction,
    }
}

pub(super) fn describe(manifest: &Manifest, users: &[(String, String)]) -> Result<TemplateInfo> {
    Ok(TemplateInfo {
        name: manifest.name.parse()?,
        recipe: manifest.recipe.name.clone(),
        digest: digest(&manifest.to_json()),
        init: match manifest.init {
            nido_images::Init::Agent => "agent".into(),
            nido_images::Init::Systemd => "systemd".into(),
        },
        kernel: manifest.kernel.version.clone(),
        bakes: manifest.bakes.iter().map(super::bake::bake_info).collect(),
        size_bytes: manifest.parts.all().iter().map(|(_, part)| part.bytes).sum(),
        disk_bytes: manifest.parts.root.virtual_bytes,
        created_at: moment::in_ms(manifest.created_at),
        agent_current: manifest.agent.sha256 == nido_images::agent_sha256(),
        allow: manifest.allow.clone(),
        used_by: users.iter().filter(|(template, _)| *template == manifest.name).map(|(_, vm)| vm.clone()).collect(),
    })
}
