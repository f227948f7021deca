//! Builds a template, stage by stage, and publishes it. Synchronous; the caller watches through a closure and stops it
//! through a flag. Invariant: until the manifest is published nothing of the build is visible, and however it ends nothing
//! is left but the log (a killed build's scratch goes with the next build).

mod kept;
mod packages;
mod slim;
mod stages;

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use nido_files::flock::{Flock, Mode};
use nido_files::layout;

use crate::agent::agent_sha256;
use crate::command::{BuildLog, Session};
use crate::error::ImageError;
use crate::host::Host;
use crate::kernel::KernelChoice;
use crate::manifest::{AgentId, FORMAT, Kernel, Manifest, Parts, RecipeId};
use crate::progress::{BuildProgress, Stage};
use crate::recipe::{self, Recipe};
use crate::scratch::Scratch;
use crate::store::{Store, create_private};
use kept::{KeptKernels, stock_key};
use stages::{BuiltParts, Work};

/// How long a build waits for another build of the same template.
const LOCK_DEADLINE: Duration = Duration::from_secs(2 * 60 * 60);

/// What the caller may choose.
#[derive(Debug, Clone, Default)]
pub struct BuildOptions {
    /// Rebuild everything with fresh packages, even if the template is up to date.
    pub rebuild: bool,
    /// Which kernel it shall boot. By default the one it boots now; a new template gets the stock kernel.
    pub kernel: Option<KernelChoice>,
}

/// What a build came to.
#[derive(Debug, Clone)]
pub struct BuildOutcome {
    /// The published template.
    pub manifest: Manifest,
    /// It was up to date; nothing was done.
    pub already_built: bool,
    /// Stages whose results were taken from the template as it was.
    pub stages_reused: Vec<Stage>,
}

/// How much has to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    UpToDate,
    /// Only the agent is another one.
    InitramfsOnly,
    /// Another kernel is requested.
    KernelOnly,
    Everything,
}

/// Builds the template of a built-in recipe under `home`. Templates are named like their recipes.
///
/// # Errors
/// Any [`ImageError`]; after an error the template is as it was before.
pub fn build(
    home: &Path,
    recipe: &str,
    options: &BuildOptions,
    progress: &mut dyn FnMut(BuildProgress),
    cancel: &AtomicBool,
) -> Result<BuildOutcome, ImageError> {
    let recipe = recipe::find(recipe)?;
    let store = Store::new(home);
    store.create()?;
    progress(BuildProgress::new(Stage::Resolve, format!("recipe {}", recipe.name), None));
    let (path, file) = lock(home, recipe.name, progress, cancel)?;

    // Looked at under the lock: a build that waited for another finds its result.
    let opened = store.open(recipe.name);
    let present =
        opened.as_ref().map_or_else(|_| KernelChoice::default(), |found| KernelChoice::of(&found.kernel.version));
    let kernel = options.kernel.unwrap_or(present);
    let existing = opened.and_then(|manifest| store.check(&manifest).map(|()| manifest));
    let plan = plan(existing.as_ref().ok(), &recipe, kernel, options.rebuild);
    if let (Plan::UpToDate, Ok(manifest)) = (&plan, &existing) {
        let stages_reused = Stage::ALL[1..5].to_vec();
        return Ok(BuildOutcome { manifest: manifest.clone(), already_built: true, stages_reused });
    }
    Host::probe_directory(home)?;
    file.set_len(0).map_err(|error| ImageError::io("empty", &path, error))?;
    let mut session = Session { log: BuildLog::new(path, file), cancel };
    session.log.line(&format!("{} nido {} builds {}", jiff::Timestamp::now(), env!("CARGO_PKG_VERSION"), recipe.name));
    if let Err(reason) = &existing {
        session.log.line(&format!("no template to reuse: {reason}"));
    }
    let wanted = BuildInputs { plan, kernel, existing: existing.ok() };
    let result = run(home, &store, &recipe, wanted, progress, &mut session);
    let words = match &result {
        Ok(_) => "done".to_owned(),
        Err(error) => format!("failed: {error}"),
    };
    session.log.line(&format!("{} {words}", jiff::Timestamp::now()));
    result
}

/// What a build is to do.
struct BuildInputs {
    plan: Plan,
    kernel: KernelChoice,
    /// The template as it is, if all its parts are there.
    existing: Option<Manifest>,
}

/// Runs the stages of the plan.
fn run(
    home: &Path,
    store: &Store,
    recipe: &Recipe,
    wanted: BuildInputs,
    progress: &mut dyn FnMut(BuildProgress),
    session: &mut Session<'_>,
) -> Result<BuildOutcome, ImageError> {
    let scratch = Scratch::create(&home.join(layout::BUILD))?;
    let kept = KeptKernels::new(home);
    let kernel = wanted.kernel;
    // A template is built again with the rules that it has.
    let rules = store.open(recipe.name).ok().and_then(|existing| existing.allow);
    let mut work = Work { store, recipe, scratch: scratch.path(), session, progress };
    let (made, stages_reused) = make(&mut work, &kept, wanted)?;
    let base = match scratch.path().join(stages::BASE) {
        base if base.exists() => base,
        _ => store.blob_path(&made.kernel.base),
    };
    let initramfs = work.initramfs(&base)?;
    let manifest = Manifest {
        format: FORMAT,
        name: recipe.name.to_owned(),
        recipe: RecipeId { name: recipe.name.to_owned(), sha256: recipe.identity(kernel) },
        created_at: jiff::Timestamp::now(),
        architecture: "x86_64".to_owned(),
        init: recipe.spec.init,
        user: recipe.spec.user.clone(),
        shell: recipe.spec.shell.clone(),
        kernel: Kernel { version: made.kernel.version, append: recipe.spec.append.clone() },
        parts: Parts {
            vmlinux: made.kernel.vmlinux,
            initramfs,
            initramfs_base: made.kernel.base,
            root: made.root,
            packages: made.packages,
        },
        agent: AgentId { sha256: agent_sha256().to_owned(), protocol: nido_guest_agent::wire::VERSION },
        built_by: env!("CARGO_PKG_VERSION").to_owned(),
        bakes: Vec::new(),
        allow: None,
    }
    .with_rules(rules);
    work.publish(&manifest)?;
    if let Ok(templates) = store.ls().and_then(|found| found.into_iter().collect::<Result<Vec<_>, _>>()) {
        kept.prune(&templates.iter().map(|template| template.parts.root.file.sha256.clone()).collect());
    }
    Ok(BuildOutcome { manifest, already_built: false, stages_reused })
}

/// Makes kernel and root disk, or reuses them; returns the stages that were skipped.
fn make(
    work: &mut Work<'_, '_>,
    kept: &KeptKernels,
    wanted: BuildInputs,
) -> Result<(BuiltParts, Vec<Stage>), ImageError> {
    let Some(manifest) = wanted.existing else { return Ok((make_everything(work, kept, wanted.kernel)?, Vec::new())) };
    let made = BuiltParts::from(manifest);
    let stock = stock_key(&made.root.file);
    match (wanted.plan, wanted.kernel) {
        (Plan::UpToDate | Plan::InitramfsOnly, _) => {
            return Ok((made, vec![Stage::Packages, Stage::Kernel, Stage::Disk]));
        }
        (Plan::KernelOnly, KernelChoice::Slim) => {
            let host = Host::probe()?;
            host.probe_compiler()?;
            let kernel = work.slim_kernel(&host, kept)?;
            let files = (work.store.blob_path(&made.kernel.vmlinux), work.store.blob_path(&made.kernel.base));
            work.keep(kept, &stock, &made.kernel, (&files.0, &files.1));
            return Ok((BuiltParts { kernel, ..made }, vec![Stage::Packages, Stage::Disk]));
        }
        (Plan::KernelOnly, KernelChoice::Stock) => match kept.find(&stock) {
            Some(found) => {
                let kernel = found.link_into(work.scratch)?;
                return Ok((BuiltParts { kernel, ..made }, vec![Stage::Packages, Stage::Kernel, Stage::Disk]));
            }
            // Another version would not fit the modules in the root disk.
            None => work.session.log.line("the stock kernel is not cached: building everything again"),
        },
        (Plan::Everything, _) => {}
    }
    Ok((make_everything(work, kept, wanted.kernel)?, Vec::new()))
}

/// Rebuilds kernel and root disk. The modules of the stock kernel are in every root disk, so that it serves both kernels.
fn make_everything(
    work: &mut Work<'_, '_>,
    kept: &KeptKernels,
    kernel: KernelChoice,
) -> Result<BuiltParts, ImageError> {
    let host = Host::probe()?;
    if kernel == KernelChoice::Slim {
        host.probe_compiler()?;
    }
    work.packages(&host)?;
    let stock = work.kernel(&host)?;
    let packages = work.package_list()?;
    if kernel == KernelChoice::Stock {
        return Ok(BuiltParts { kernel: stock, packages, root: work.disk(&host)? });
    }
    let aside = work.set_kernel_aside()?;
    let kernel = work.slim_kernel(&host, kept)?;
    let root = work.disk(&host)?;
    work.keep(kept, &stock_key(&root.file), &stock, (&aside.0, &aside.1));
    Ok(BuiltParts { kernel, packages, root })
}

/// Decides what is left to do. `existing` is a template whose parts are all there.
fn plan(existing: Option<&Manifest>, recipe: &Recipe, kernel: KernelChoice, rebuild: bool) -> Plan {
    let Some(manifest) = existing.filter(|_| !rebuild) else { return Plan::Everything };
    if manifest.recipe.sha256 == recipe.identity(kernel.other()) {
        return Plan::KernelOnly;
    }
    if manifest.recipe.sha256 != recipe.identity(kernel) {
        return Plan::Everything;
    }
    if manifest.agent.sha256 == agent_sha256() { Plan::UpToDate } else { Plan::InitramfsOnly }
}

/// Opens the log of this template's builds and locks it: one build of a template at a time.
fn lock(
    home: &Path,
    name: &str,
    progress: &mut dyn FnMut(BuildProgress),
    cancel: &AtomicBool,
) -> Result<(PathBuf, File), ImageError> {
    let logs = home.join(layout::LOGS);
    create_private(&logs)?;
    let path = logs.join(layout::template_log(name));
    let failed = |error| ImageError::io("open", &path, error);
    let mut options = OpenOptions::new();
    let file = options.append(true).create(true).mode(0o600).open(&path).map_err(failed)?;
    let waiting = LockWait { stage: Stage::Resolve, program: "another build of this template", log: &path };
    let lock = wait_for_lock(file, &path, &waiting, progress, cancel)?;
    Ok((path, lock.into_file()))
}

/// The log of work on the template `name`, emptied; its holder is the only process that works on that template.
pub(crate) fn open_log(
    home: &Path,
    name: &str,
    progress: &mut dyn FnMut(BuildProgress),
    cancel: &AtomicBool,
) -> Result<BuildLog, ImageError> {
    let (path, file) = lock(home, name, progress, cancel)?;
    file.set_len(0).map_err(|error| ImageError::io("empty", &path, error))?;
    Ok(BuildLog::new(path, file))
}

/// What is reported while waiting for a lock.
struct LockWait<'a> {
    stage: Stage,
    /// Its holder.
    program: &'a str,
    log: &'a Path,
}

/// Waits for the lock on `file`, which is at `path`.
fn wait_for_lock(
    file: File,
    path: &Path,
    waiting: &LockWait<'_>,
    progress: &mut dyn FnMut(BuildProgress),
    cancel: &AtomicBool,
) -> Result<Flock, ImageError> {
    let is_cancelled = || cancel.load(std::sync::atomic::Ordering::Relaxed);
    let mut is_reported = false;
    let taken = Flock::take_blocking(file, Mode::Exclusive, Instant::now() + LOCK_DEADLINE, || {
        if !is_reported && !is_cancelled() {
            progress(BuildProgress::new(waiting.stage, format!("waiting for {}", waiting.program), None));
            is_reported = true;
        }
        !is_cancelled()
    });
    match taken.map_err(|error| ImageError::io("lock", path, error))? {
        Some(lock) => Ok(lock),
        None if is_cancelled() => Err(ImageError::Interrupted),
        None => {
            let (program, seconds) = (waiting.program.to_owned(), LOCK_DEADLINE.as_secs());
            Err(ImageError::Deadline { stage: waiting.stage, program, seconds, log: waiting.log.to_owned() })
        }
    }
}

/// Writes a new file below a scratch directory.
fn write_file(path: &Path, content: &[u8]) -> Result<(), ImageError> {
    File::create_new(path)
        .and_then(|mut file| file.write_all(content))
        .map_err(|error| ImageError::io("write", path, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::tests::sample;

    #[test]
    fn only_what_changed_is_built() {
        use KernelChoice::{Slim, Stock};
        let recipe = recipe::find("sandbox").unwrap();
        let mut manifest = sample("sandbox");
        assert_eq!(plan(None, &recipe, Stock, false), Plan::Everything);
        assert_eq!(plan(Some(&manifest), &recipe, Stock, false), Plan::Everything);
        for (kernel, other) in [(Stock, Slim), (Slim, Stock)] {
            manifest.recipe.sha256 = recipe.identity(kernel);
            manifest.agent.sha256 = "another agent".to_owned();
            assert_eq!(plan(Some(&manifest), &recipe, kernel, false), Plan::InitramfsOnly);
            manifest.agent.sha256 = agent_sha256().to_owned();
            assert_eq!(plan(Some(&manifest), &recipe, kernel, false), Plan::UpToDate);
            assert_eq!(plan(Some(&manifest), &recipe, kernel, true), Plan::Everything);
            assert_eq!(plan(Some(&manifest), &recipe, other, false), Plan::KernelOnly);
        }
    }

    #[test]
    fn an_unknown_recipe_touches_nothing() {
        let home = tempfile::tempdir().unwrap();
        let cancel = AtomicBool::new(false);
        let result = build(home.path(), "windows", &BuildOptions::default(), &mut |_| {}, &cancel);
        assert!(matches!(result, Err(ImageError::RecipeNotFound { .. })));
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_build_that_is_already_cancelled_leaves_only_its_log() {
        let home = tempfile::tempdir().unwrap();
        let cancel = AtomicBool::new(true);
        let result = build(home.path(), "sandbox", &BuildOptions::default(), &mut |_| {}, &cancel);
        assert!(result.is_err());
        let files: Vec<_> = walkdir::WalkDir::new(home.path())
            .into_iter()
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_file())
            .map(|entry| entry.file_name().to_owned())
            .collect();
        assert_eq!(files, ["template-sandbox.log"]);
    }
}
