//! Builds a template, stage by stage, and publishes it. Synchronous; the caller watches through a closure and stops it
//! through a flag. Invariant: until the manifest is published nothing of the build is visible, and however it ends nothing
//! is left but the log (a killed build's scratch goes with the next build).

mod packages;
mod stages;

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::agent::agent_sha256;
use crate::command::{BuildLog, Session};
use crate::error::ImageError;
use crate::host::Host;
use crate::manifest::{AgentId, FORMAT, Kernel, Manifest, Parts, RecipeId};
use crate::progress::{BuildProgress, Stage};
use crate::recipe::{self, Recipe};
use crate::scratch::Scratch;
use crate::store::{Store, create_private};

/// How long a build waits for another build of the same template.
const LOCK_DEADLINE: Duration = Duration::from_secs(2 * 60 * 60);

/// What the caller may choose.
#[derive(Debug, Clone, Default)]
pub struct BuildOptions {
    /// Build everything anew, with fresh packages, even if the template is up to date.
    pub rebuild: bool,
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
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    UpToDate,
    /// Only the agent is another one.
    InitramfsOnly,
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
    let (path, file) = lock(home, &recipe, progress, cancel)?;

    // Looked at under the lock: a build that waited for another finds its result.
    let existing = store.open(recipe.name).and_then(|manifest| store.check(&manifest).map(|()| manifest));
    let plan = plan(existing.as_ref().ok(), &recipe.sha256, options.rebuild);
    if let (Plan::UpToDate, Ok(manifest)) = (&plan, &existing) {
        let stages_reused = Stage::ALL[1..5].to_vec();
        return Ok(BuildOutcome { manifest: manifest.clone(), already_built: true, stages_reused });
    }
    file.set_len(0).map_err(|error| ImageError::io("empty", &path, error))?;
    let mut session = Session { log: BuildLog::new(path, file), cancel };
    session.log.line(&format!("{} nido {} builds {}", jiff::Timestamp::now(), env!("CARGO_PKG_VERSION"), recipe.name));
    if let Err(reason) = &existing {
        session.log.line(&format!("no template to build on: {reason}"));
    }
    let result = run(home, &store, &recipe, (plan, existing.ok()), progress, &mut session);
    let words = match &result {
        Ok(_) => "done".to_owned(),
        Err(error) => format!("failed: {error}"),
    };
    session.log.line(&format!("{} {words}", jiff::Timestamp::now()));
    result
}

/// Runs the stages the plan asks for.
fn run(
    home: &Path,
    store: &Store,
    recipe: &Recipe,
    (plan, existing): (Plan, Option<Manifest>),
    progress: &mut dyn FnMut(BuildProgress),
    session: &mut Session<'_>,
) -> Result<BuildOutcome, ImageError> {
    let host = if plan == Plan::Everything { Some(Host::probe()?) } else { None };
    let scratch = Scratch::create(&home.join("build"))?;
    for path in scratch.leftovers() {
        session.log.line(&format!("cannot remove what an earlier build left: {}", path.display()));
    }
    let mut work = stages::Work { store, recipe, scratch: scratch.path(), session, progress };
    let (base, made, stages_reused) = match (host, existing) {
        (None, Some(manifest)) => {
            let base = store.blob_path(&manifest.parts.initramfs_base);
            (base, stages::Made::from(manifest), vec![Stage::Packages, Stage::Kernel, Stage::Disk])
        }
        (host, _) => {
            let host = host.map_or_else(Host::probe, Ok)?;
            work.packages(&host)?;
            let kernel = work.kernel(&host)?;
            let root = work.disk(&host)?;
            (scratch.path().join(stages::BASE), stages::Made { kernel, root }, Vec::new())
        }
    };
    let initramfs = work.initramfs(&base)?;
    let manifest = Manifest {
        format: FORMAT,
        name: recipe.name.to_owned(),
        recipe: RecipeId { name: recipe.name.to_owned(), sha256: recipe.sha256.clone() },
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
            packages: made.kernel.packages,
        },
        agent: AgentId { sha256: agent_sha256().to_owned(), protocol: nido_guest_agent::wire::VERSION },
        built_by: env!("CARGO_PKG_VERSION").to_owned(),
        bakes: Vec::new(),
    };
    work.publish(&manifest)?;
    Ok(BuildOutcome { manifest, already_built: false, stages_reused })
}

/// Decides what is left to do. `existing` is a template whose parts are all there.
fn plan(existing: Option<&Manifest>, recipe_sha256: &str, rebuild: bool) -> Plan {
    match existing {
        Some(manifest) if !rebuild && manifest.recipe.sha256 == recipe_sha256 => {
            if manifest.agent.sha256 == agent_sha256() { Plan::UpToDate } else { Plan::InitramfsOnly }
        }
        _ => Plan::Everything,
    }
}

/// Opens the log of this template's builds and locks it: one build of a template at a time.
fn lock(
    home: &Path,
    recipe: &Recipe,
    progress: &mut dyn FnMut(BuildProgress),
    cancel: &AtomicBool,
) -> Result<(PathBuf, File), ImageError> {
    let logs = home.join("logs");
    create_private(&logs)?;
    let path = logs.join(format!("template-{}.log", recipe.name));
    let failed = |error| ImageError::io("open", &path, error);
    let mut options = OpenOptions::new();
    let file = options.append(true).create(true).mode(0o600).open(&path).map_err(failed)?;
    let end = Instant::now() + LOCK_DEADLINE;
    let mut told = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok((path, file)),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
            Err(TryLockError::WouldBlock) => {}
        }
        if cancel.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(ImageError::Interrupted);
        }
        if Instant::now() >= end {
            let program = "another build of this template".to_owned();
            let seconds = LOCK_DEADLINE.as_secs();
            return Err(ImageError::Deadline { stage: Stage::Resolve, program, seconds, log: path });
        }
        if !told {
            progress(BuildProgress::new(Stage::Resolve, "waiting for another build of this template", None));
            told = true;
        }
        std::thread::sleep(Duration::from_millis(100));
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
        let mut manifest = sample("sandbox");
        let recipe = manifest.recipe.sha256.clone();
        assert_eq!(plan(None, &recipe, false), Plan::Everything);
        assert_eq!(plan(Some(&manifest), &recipe, false), Plan::InitramfsOnly);
        manifest.agent.sha256 = agent_sha256().to_owned();
        assert_eq!(plan(Some(&manifest), &recipe, false), Plan::UpToDate);
        assert_eq!(plan(Some(&manifest), &recipe, true), Plan::Everything);
        assert_eq!(plan(Some(&manifest), "another recipe", false), Plan::Everything);
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
