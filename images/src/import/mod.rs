//! Takes in a template from an archive (`archive.rs` has its form), which is hostile until proven otherwise. Synchronous;
//! bounded memory.
//!
//! ```text
//!  head, manifest ── judged ── parts ── hashes compared ── contents judged ── agent fitted ── lock ── publish
//!                              (scratch directory)                                                 (store)
//! ```
//!
//! Invariant: the store does not change before the whole archive has been read and found good; however an import ends,
//! nothing else is left of it (a killed import's scratch goes with the next import or build).

pub(crate) mod judge;
mod unpack;

use std::fs;
use std::io::Read;
use std::path::Path;

use nido_files::layout;
use unpack::{Archive, refused};

use crate::agent::{AGENT, AGENT_PROTOCOL, agent_sha256};
use crate::digest::sha256;
use crate::error::ImageError;
use crate::initramfs;
use crate::manifest::{AgentId, Digest, Manifest, Part};
use crate::scratch::Scratch;
use crate::store::{Store, check_name};
use crate::transfer::{TransferWatch, pieces};

/// How parts lie in the store, and memory images: QEMU may open those for writing, although it maps them privately.
const PART_MODE: u32 = 0o444;
const MEMORY_MODE: u32 = 0o600;

/// What the caller may choose.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    /// The name it gets here, if not that of the archive.
    pub name: Option<String>,
    /// Replace another template of that name.
    pub force: bool,
    /// Leave out the bakes.
    pub without_memory: bool,
}

/// What an import came to.
#[derive(Debug, Clone)]
pub struct ImportOutcome {
    /// The template as it stands here now.
    pub manifest: Manifest,
    /// It was here already; nothing was done.
    pub already_present: bool,
    /// What is not as it was where it came from.
    pub notes: Vec<ImportNote>,
}

/// A way in which an imported template differs from the exported one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImportNote {
    /// The agent inside was another build of the same protocol; this program's took its place.
    AgentReplaced,
    /// So many bakes cannot be used, for the other agent is in their memory.
    BakesDropped(usize),
}

impl std::fmt::Display for ImportNote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AgentReplaced => f.write_str("the guest agent of another nido version was replaced by this one's"),
            Self::BakesDropped(count) => write!(
                f,
                "{count} {} left out, because the memory contains the other agent: VMs boot until the template is baked again",
                if *count == 1 { "warm image was" } else { "warm images were" }
            ),
        }
    }
}

/// The agent that belongs into an initramfs.
#[derive(Debug, Clone, Copy)]
struct OwnAgent<'a> {
    binary: &'a [u8],
    sha256: &'a str,
    protocol: u16,
}

/// Imports a template into `home` from the archive that `source` yields.
///
/// # Errors
/// [`ImageError::ArchiveRefused`], [`ImageError::TemplateExists`], [`ImageError::AgentProtocol`],
/// [`ImageError::NameInvalid`], [`ImageError::Interrupted`], [`ImageError::DiskFull`], [`ImageError::Io`]; after an error
/// all templates are as they were before.
pub fn import(
    home: &Path,
    source: &mut dyn Read,
    options: &ImportOptions,
    watch: &mut TransferWatch<'_>,
) -> Result<ImportOutcome, ImageError> {
    let agent = OwnAgent { binary: AGENT, sha256: agent_sha256(), protocol: AGENT_PROTOCOL };
    import_with(agent, home, source, options, watch)
}

fn import_with(
    agent: OwnAgent<'_>,
    home: &Path,
    source: &mut dyn Read,
    options: &ImportOptions,
    watch: &mut TransferWatch<'_>,
) -> Result<ImportOutcome, ImageError> {
    options.name.as_deref().map_or(Ok(()), check_name)?;
    let store = Store::new(home);
    store.create()?;
    let scratch = Scratch::create(&home.join(layout::BUILD))?;
    nido_files::failpoint!("import.scratch");
    let mut archive = Archive::new(source, scratch.path(), watch)?;
    let mut manifest = archive.manifest()?;
    judge::manifest(&manifest).map_err(refused)?;
    let theirs = manifest.agent.protocol;
    if theirs != agent.protocol {
        return Err(ImageError::AgentProtocol { theirs, ours: agent.protocol });
    }
    if let Some(name) = &options.name {
        manifest.name.clone_from(name);
    }
    // Before everything is read for nothing; the answer that counts is given under the lock.
    refuse_other(&store, &manifest, options.force, may_be_same)?;

    archive.parts(&pieces(&manifest))?;
    judge::contents(&manifest, scratch.path()).map_err(refused)?;
    if options.without_memory {
        manifest.bakes.clear();
    }
    let (manifest, notes) = fit_agent(manifest, agent, scratch.path())?;

    archive.publishing()?;
    nido_files::failpoint!("import.read");
    let lock = store.lock()?;
    if let Some(manifest) = refuse_other(&store, &manifest, options.force, includes)? {
        return Ok(ImportOutcome { manifest, already_present: true, notes });
    }
    for piece in pieces(&manifest) {
        let mode = if piece.digest == Digest::Sparse { MEMORY_MODE } else { PART_MODE };
        store.import_as(&scratch.path().join(&piece.part.sha256), &piece.part, mode, &lock)?;
    }
    nido_files::failpoint!("import.parts-stored");
    store.publish(&manifest, &lock)?;
    Ok(ImportOutcome { manifest, already_present: false, notes })
}

/// Makes sure that the agent in the initramfs is this program's: the one in the archive may claim anything of itself. What
/// was saved with another agent in its memory is dropped.
fn fit_agent(
    mut manifest: Manifest,
    agent: OwnAgent<'_>,
    scratch: &Path,
) -> Result<(Manifest, Vec<ImportNote>), ImageError> {
    let path = scratch.join(&manifest.parts.initramfs_base.sha256);
    let base = fs::read(&path).map_err(|error| ImageError::io("read", &path, error))?;
    let initramfs = initramfs::with_agent(&base, agent.binary).map_err(|error| refused(error.to_string()))?;
    let own = Part { sha256: sha256(&initramfs), bytes: initramfs.len() as u64 };
    if manifest.agent.sha256 == agent.sha256 && manifest.parts.initramfs == own {
        return Ok((manifest, Vec::new()));
    }
    let path = scratch.join(&own.sha256);
    fs::write(&path, initramfs).map_err(|error| ImageError::io("write", &path, error))?;
    manifest.parts.initramfs = own;
    manifest.agent = AgentId { sha256: agent.sha256.to_owned(), protocol: agent.protocol };
    let mut notes = vec![ImportNote::AgentReplaced];
    if !manifest.bakes.is_empty() {
        notes.push(ImportNote::BakesDropped(manifest.bakes.len()));
        manifest.bakes.clear();
    }
    Ok((manifest, notes))
}

/// Finds a template of that name. Returns it if it is the `same` as the new one; that there is another is an error unless
/// it is to be replaced. One that is damaged counts as absent if it is otherwise the same.
fn refuse_other(
    store: &Store,
    new: &Manifest,
    force: bool,
    same: impl FnOnce(&Manifest, &Manifest) -> bool,
) -> Result<Option<Manifest>, ImageError> {
    let existing = match store.open(&new.name) {
        _ if force => return Ok(None),
        Err(ImageError::TemplateNotFound { .. }) => return Ok(None),
        Err(ImageError::ManifestInvalid { .. }) => None,
        found => Some(found?),
    };
    match existing {
        Some(existing) if same(&existing, new) => Ok(store.check(&existing).is_ok().then_some(existing)),
        _ => Err(ImageError::TemplateExists { name: new.name.clone() }),
    }
}

/// Whether the new template is the existing one. Bakes that were made here meanwhile do not matter. Pure.
fn includes(existing: &Manifest, new: &Manifest) -> bool {
    let bare = |manifest: &Manifest| Manifest { bakes: Vec::new(), ..manifest.clone() };
    bare(existing) == bare(new) && new.bakes.iter().all(|bake| existing.bakes.contains(bake))
}

/// Whether it may turn out so once the agent is fitted. Pure.
fn may_be_same(existing: &Manifest, new: &Manifest) -> bool {
    let mut fitted = Manifest { agent: existing.agent.clone(), bakes: Vec::new(), ..new.clone() };
    fitted.parts.initramfs = existing.parts.initramfs.clone();
    includes(existing, &fitted)
}

#[cfg(test)]
mod tests;
