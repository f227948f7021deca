//! Templates: what VMs are made from.

use std::fs::File;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{AccelChoice, MachineChoice, NetChoice};
use crate::name::TemplateName;

/// Which kernel a template boots.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelChoice {
    /// Debian's own, as its package has it.
    #[default]
    Stock,
    /// Compiled from Debian's source with what a guest needs and nothing else: boots faster, takes less memory.
    Slim,
}

/// How the release of a slim kernel ends.
pub const SLIM_SUFFIX: &str = "-nido-slim";

impl KernelChoice {
    /// Which one a kernel is, by its release.
    #[must_use]
    pub fn of(release: &str) -> Self {
        if release.ends_with(SLIM_SUFFIX) { Self::Slim } else { Self::Stock }
    }

    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Stock => Self::Slim,
            Self::Slim => Self::Stock,
        }
    }
}

/// What nido tells about a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TemplateInfo {
    /// Its name.
    pub name: TemplateName,
    /// The recipe it was built from.
    pub recipe: String,
    /// Hash of the manifest's content.
    pub digest: String,
    /// Who is process 1 in its guests: `agent` or `systemd`.
    pub init: String,
    /// Version of the guest's kernel.
    pub kernel: String,
    /// Bytes on the host's disk, all parts together.
    pub size_bytes: u64,
    /// Default size of a VM's disk in bytes.
    pub disk_bytes: u64,
    /// When it was built.
    pub created_at: Timestamp,
    /// Whether the agent inside is the one of this nido. If not, `template build` brings that of a recipe up to date, and
    /// another template has to be made again.
    pub agent_current: bool,
    /// VMs made from it.
    pub used_by: Vec<String>,
    /// The machines that VMs can be forked on.
    pub bakes: Vec<BakeInfo>,
}

/// A guest of a template, saved while it ran on one kind of machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct BakeInfo {
    /// When it was saved.
    pub created_at: Timestamp,
    /// Machine type.
    pub machine: String,
    /// `kvm` or `tcg`.
    pub accel: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// `nat` or `none`.
    pub net: String,
    /// `vsock` or `virtio-serial`.
    pub transport: String,
    /// The QEMU that saved it.
    pub qemu: String,
    /// Bytes on the host's disk, without the memory image.
    pub size_bytes: u64,
}

/// For which machine a template is baked. What is absent is as for a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BakeRequest {
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory in MiB.
    pub memory_mib: Option<u32>,
    /// Network.
    pub net: NetChoice,
    /// Machine type.
    pub machine: MachineChoice,
    /// Accelerator.
    pub accel: AccelChoice,
    /// Virtualization in the guest.
    pub nested: bool,
    /// Bake anew even where a bake fits.
    pub again: bool,
    /// How long the guest may take to become ready, in milliseconds.
    pub timeout_ms: Option<u64>,
}

/// How a bake ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct BakeResult {
    /// The template.
    pub template: TemplateName,
    /// What was saved.
    pub bake: BakeInfo,
    /// Nothing had to be done.
    pub already_baked: bool,
    /// How long it took.
    pub duration_ms: u64,
}

/// The answer of a list of templates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TemplateList {
    /// Templates that stand ready, by name.
    pub templates: Vec<TemplateInfo>,
    /// Templates whose manifest cannot be read, one sentence each; absent if there is none. They can be deleted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<String>,
    /// Names of recipes that can be built.
    pub recipes: Vec<String>,
}

/// How a template is built.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BuildRequest {
    /// Fetch packages anew even if nothing in the recipe has changed.
    pub rebuild: bool,
    /// Bake it for the usual machines as well.
    pub bake: bool,
    /// Which kernel it shall boot; by default the one it boots now, or the stock kernel.
    pub kernel: Option<KernelChoice>,
}

/// How far a build has come.
#[derive(Debug, Clone, PartialEq)]
pub struct BuildStep {
    /// The stage's name.
    pub stage: String,
    /// Its number, from 1.
    pub index: u32,
    /// How many stages there are.
    pub total: u32,
    /// What is being done.
    pub detail: String,
    /// How much of the stage is done, 0 to 1, if known.
    pub fraction: Option<f32>,
}

/// How a build ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct BuildResult {
    /// The template.
    pub template: TemplateInfo,
    /// Nothing had to be done.
    pub already_built: bool,
    /// How long it took.
    pub duration_ms: u64,
}

/// How a template is exported.
#[derive(Debug)]
pub struct ExportRequest {
    /// Where to.
    pub target: ExportTarget,
    /// Replace a file that exists.
    pub overwrite: bool,
    /// Take saved guests along, from which VMs are forked.
    pub memory: bool,
    /// How hard to compress, 1 to 19.
    pub level: i32,
}

/// Where an archive goes.
#[derive(Debug)]
pub enum ExportTarget {
    /// A file, which appears when it is complete, readable by its owner only.
    Path(PathBuf),
    /// A pipe, a socket, an open file.
    Stream(File),
}

/// How a template is imported.
#[derive(Debug)]
pub struct ImportRequest {
    /// Where from.
    pub source: ImportSource,
    /// The name it gets, if not that of the archive.
    pub name: Option<TemplateName>,
    /// Replace another template of that name.
    pub force: bool,
    /// Take in saved guests too, from which VMs are forked.
    pub memory: bool,
}

/// Where an archive comes from.
#[derive(Debug)]
pub enum ImportSource {
    /// A file or a named pipe.
    Path(PathBuf),
    /// A pipe, a socket, an open file.
    Stream(File),
}

/// How far an export or an import has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TravelStep {
    /// The part that is worked on, or `publish`.
    pub stage: String,
    /// Its number, from 1.
    pub index: u32,
    /// How many there are.
    pub total: u32,
    /// Bytes of the parts that are done, holes included.
    pub bytes: u64,
    /// Bytes of all parts.
    pub total_bytes: u64,
}

/// How an export ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ExportResult {
    /// The template.
    pub template: TemplateName,
    /// The file that was written; `null` for a stream.
    pub path: Option<String>,
    /// Length of the archive in bytes.
    pub archive_bytes: u64,
    /// Bytes of the parts that are no holes.
    pub data_bytes: u64,
    /// How many saved guests it holds.
    pub bakes: u32,
    /// How long it took.
    pub duration_ms: u64,
}

/// How an import ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImportResult {
    /// The template.
    pub template: TemplateInfo,
    /// It was here already; nothing was done.
    pub already_present: bool,
    /// In which ways it is not as it was where it came from.
    pub warnings: Vec<String>,
    /// How long it took.
    pub duration_ms: u64,
}
