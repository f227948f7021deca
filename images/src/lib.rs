//! `nido-images`: how templates come to be.
//!
//! A *recipe* (built in, `recipes/`) is turned into a *template*: a [`Manifest`] under `templates/` and five
//! content-addressed *parts* under `blobs/sha256/`. [`build()`] does it, [`Store`] keeps it, [`export()`] and [`import()`] carry
//! it elsewhere.
//!
//! ```text
//! recipe ─ packages ─┬─ kernel ── vmlinux, initramfs-base, packages ─┐
//!  (mmdebstrap)      └─ disk ──── root (ext4 in qcow2) ──────────────┼─ publish ─ manifest
//! agent (build.rs) ───────────── initramfs = initramfs-base + agent ─┘
//! ```
//!
//! With `--kernel slim` the kernel stage compiles one of its own from Debian's source instead of taking the package's; the
//! root disk is the same for both.
//!
//! What holds everywhere: the guest agent is in the initramfs and nowhere else; a part never changes once it has its
//! name; a build changes nothing visible until its manifest is renamed into place; the directory of a killed build is
//! removed by the next. Pure: `apt`, `archive`, `cpio`, `initramfs`, `kernel`, `manifest`, `qcow2` (its parser), `recipe`,
//! `recipe_text`, `slim`.

mod agent;
mod api_error;
mod apt;
mod archive;
mod build;
mod command;
mod compose;
mod cpio;
mod digest;
mod error;
mod export;
mod flatten;
mod host;
mod import;
mod initramfs;
mod kernel;
mod manifest;
mod outfile;
mod progress;
mod qcow2;
mod recipe;
mod recipe_text;
mod scratch;
mod slim;
mod store;
mod transfer;

pub use agent::{AGENT, AGENT_PROTOCOL, agent_sha256};
pub use build::{BuildOptions, BuildOutcome, build};
pub use compose::compose_initramfs;
pub use digest::{SPARSE_BLOCK, sha256, sparse_sha256};
pub use error::ImageError;
pub use export::{ExportOptions, ExportOutcome, export};
pub use flatten::{Layers, create};
pub use host::Host;
pub use import::{ImportNote, ImportOptions, ImportOutcome, import};
pub use kernel::KernelChoice;
pub use manifest::{
    AgentId, Bake, BakedMachine, Digest, Disk, FORMAT, Init, Kernel, Manifest, Part, Parts, QemuId, RecipeId,
};
pub use outfile::write_file_whole;
pub use progress::{BuildProgress, Stage};
pub use qcow2::{
    Compression, Overlay, Qcow2Header, parse as parse_qcow2_header, read_overlay_header, read_qcow2_header,
};
pub use recipe::{Recipe, Spec, find as find_recipe};
pub use recipe_text::names as recipe_names;
pub use scratch::{orphaned_builds, remove_orphaned_build};
pub use store::{Store, StoreContents, StoreLock, hash_file};
pub use transfer::{TransferProgress, TransferWatch};
