//! Templates: what VMs are made from.

use jiff::Timestamp;
pub use nido_images::KernelChoice;
use serde::{Deserialize, Serialize};

use crate::name::TemplateName;

/// What nido tells about a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Whether the agent inside is the one of this nido. If not, `template build` brings it up to date.
    pub agent_current: bool,
    /// VMs made from it.
    pub used_by: Vec<String>,
}

/// The answer of a list of templates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateList {
    /// Templates that stand ready, by name.
    pub templates: Vec<TemplateInfo>,
    /// Names of recipes that can be built.
    pub recipes: Vec<String>,
}

/// How a template is built.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BuildRequest {
    /// Fetch packages anew even if nothing in the recipe has changed.
    pub rebuild: bool,
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildResult {
    /// The template.
    pub template: TemplateInfo,
    /// Nothing had to be done.
    pub already_built: bool,
    /// How long it took.
    pub duration_ms: u64,
}
