//! Templates: what VMs are made from.

use std::fs::File;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{AccelChoice, AllowEntry, EgressRule, MachineChoice, NetChoice};
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

/// A template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TemplateInfo {
    /// Its name.
    pub name: TemplateName,
    /// The recipe it was built from.
    pub recipe: String,
    /// Hash of the manifest.
    pub digest: String,
    /// Process 1 of its guests: `agent` or `systemd`.
    pub init: String,
    /// Version of the guest's kernel.
    pub kernel: String,
    /// Bytes on the host's disk, all parts together.
    pub size_bytes: u64,
    /// Default size of a VM's disk in bytes.
    pub disk_bytes: u64,
    /// When it was built.
    pub created_at: Timestamp,
    /// Whether it contains the guest agent of this nido. If not, `template build` updates a template that has a recipe;
    /// create any other one again.
    pub agent_current: bool,
    /// VMs that use it.
    pub used_by: Vec<String>,
    /// The machines for which it has a warm image.
    pub bakes: Vec<BakeInfo>,
    /// Rules that bound those of its VMs: each must be covered. Absent: no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub allow: Option<Vec<EgressRule>>,
}

/// A warm image: the saved state of a template's guest on one kind of machine.
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

/// The machine to bake a warm image for. Absent fields have the default of a VM.
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
    /// Replace a warm image that matches.
    pub again: bool,
    /// Time limit for the guest to become ready, in milliseconds.
    pub timeout_ms: Option<u64>,
}

/// Result of a bake.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct BakeResult {
    /// The template.
    pub template: TemplateName,
    /// The warm image.
    pub bake: BakeInfo,
    /// A matching one existed; nothing was done.
    pub already_baked: bool,
    /// Duration.
    pub duration_ms: u64,
}

/// A list of templates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TemplateList {
    /// Templates, by name.
    pub templates: Vec<TemplateInfo>,
    /// Templates whose manifest cannot be read, one sentence each; absent if all can. They can be deleted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<String>,
    /// Names of recipes that can be built.
    pub recipes: Vec<String>,
}

/// How a template is built.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BuildRequest {
    /// Download packages again even if the recipe has not changed.
    pub rebuild: bool,
    /// Bake it for the usual machines as well.
    pub bake: bool,
    /// Which kernel it shall boot; by default the one it boots now, or the stock kernel.
    pub kernel: Option<KernelChoice>,
}

/// How a template is made of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureRequest {
    /// Bake it for the usual machines as well.
    pub bake: bool,
    /// What bounds the rules of its VMs. If absent, they are bounded as those of the VM are.
    pub allow: Option<Vec<AllowEntry>>,
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

/// Result of a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct BuildResult {
    /// The template.
    pub template: TemplateInfo,
    /// It was up to date; nothing was done.
    pub already_built: bool,
    /// Duration.
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
pub struct TransferStep {
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

/// Result of an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ExportResult {
    /// The template.
    pub template: TemplateName,
    /// The file that was written; `null` for a stream.
    pub path: Option<String>,
    /// Length of the archive in bytes.
    pub archive_bytes: u64,
    /// Bytes of data in the parts, without holes.
    pub data_bytes: u64,
    /// Number of warm images.
    pub bakes: u32,
    /// Duration.
    pub duration_ms: u64,
}

/// Result of an import.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImportResult {
    /// The template.
    pub template: TemplateInfo,
    /// It existed already; nothing was done.
    pub already_present: bool,
    /// Differences from the exported template.
    pub warnings: Vec<String>,
    /// Duration.
    pub duration_ms: u64,
}
