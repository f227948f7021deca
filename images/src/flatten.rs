//! A template made of a VM: its disk, whatever layers that stands on, becomes one root disk; everything else is that of
//! the template the VM was made from.
//!
//! Invariant: as with a build, nothing is visible until the manifest is renamed into place, and nothing but the log is left if
//! it fails.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use nido_files::layout;

use crate::build::open_log;
use crate::command::Session;
use crate::error::ImageError;
use crate::host::Host;
use crate::manifest::{Disk, Manifest, RecipeId};
use crate::progress::{BuildProgress, Stage};
use crate::qcow2::read_qcow2_header;
use crate::scratch::Scratch;
use crate::store::{Store, hash_file};

/// How long copying a disk may take.
const DEADLINE: Duration = Duration::from_secs(60 * 60);
const ROOT: &str = "root.qcow2";

/// A disk that stands on others.
#[derive(Debug, Clone)]
pub struct Layers {
    /// The qcow2 files, the lowest first. None of them changes meanwhile.
    pub files: Vec<PathBuf>,
    /// Size of the disk the guest sees, in bytes.
    pub virtual_bytes: u64,
}

/// Makes the template `name` of a disk; the rest is taken from `of`.
///
/// # Errors
/// [`ImageError::TemplateExists`], [`ImageError::MissingTool`], [`ImageError::DiskFull`], [`ImageError::Interrupted`]
/// and whatever else a build may end in.
pub fn create(
    home: &Path,
    name: &str,
    of: &Manifest,
    disk: &Layers,
    progress: &mut dyn FnMut(BuildProgress),
    cancel: &AtomicBool,
) -> Result<Manifest, ImageError> {
    let store = Store::new(home);
    store.create()?;
    if store.open(name).is_ok() {
        return Err(ImageError::TemplateExists { name: name.to_owned() });
    }
    let host = Host::for_images()?;
    let mut session = Session { log: open_log(home, name, progress, cancel)?, cancel };
    let scratch = Scratch::create(&home.join(layout::BUILD))?;
    progress(BuildProgress::new(Stage::Disk, "join the layers of the disk", None));
    let root = scratch.path().join(ROOT);
    let mut convert = host.limited("qemu-img", scratch.path(), disk.virtual_bytes);
    convert
        .args(["convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd,lazy_refcounts=off", "--image-opts"])
        .args([image_options(&disk.files), root.clone().into_os_string()]);
    session.run(Stage::Disk, convert, DEADLINE, &mut |_| {})?;
    let header = read_qcow2_header(&root)?;
    if header.virtual_bytes != disk.virtual_bytes {
        let reason = format!("the disk has {} bytes instead of {}", header.virtual_bytes, disk.virtual_bytes);
        return Err(ImageError::ImageRefused { path: root, reason });
    }
    progress(BuildProgress::new(Stage::Publish, "publish the template", None));
    let file = hash_file(&root)?;
    let mut manifest = of.clone();
    name.clone_into(&mut manifest.name);
    manifest.recipe = RecipeId { name: format!("a VM of {}", of.name), sha256: file.sha256.clone() };
    manifest.created_at = jiff::Timestamp::now();
    manifest.parts.root = Disk { file: file.clone(), virtual_bytes: disk.virtual_bytes };
    manifest.bakes = Vec::new();
    env!("CARGO_PKG_VERSION").clone_into(&mut manifest.built_by);
    session.check_cancel()?;
    let lock = store.lock()?;
    if store.open(name).is_ok() {
        return Err(ImageError::TemplateExists { name: name.to_owned() });
    }
    store.import(&root, &file, &lock)?;
    store.publish(&manifest, &lock)?;
    Ok(manifest)
}

/// Layers as `--image-opts` takes them: every format stated, every file named, nothing probed.
fn image_options(files: &[PathBuf]) -> OsString {
    let mut options = Vec::new();
    let mut prefix = String::new();
    for file in files.iter().rev() {
        let comma = if options.is_empty() { "" } else { "," };
        let words = format!("{comma}{prefix}driver=qcow2,{prefix}file.driver=file,{prefix}file.filename=");
        options.extend(words.as_bytes());
        options.extend(escaped(file.as_os_str()));
        prefix.push_str("backing.");
    }
    OsString::from_vec(options)
}

/// A value in which commas are doubled.
fn escaped(value: &OsStr) -> impl Iterator<Item = u8> {
    value.as_bytes().iter().flat_map(|byte| std::iter::repeat_n(*byte, if *byte == b',' { 2 } else { 1 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layer_is_named_with_its_format() {
        let files = ["/a,b/root", "/vm/disk"].map(PathBuf::from);
        let wanted = "driver=qcow2,file.driver=file,file.filename=/vm/disk,\
                      backing.driver=qcow2,backing.file.driver=file,backing.file.filename=/a,,b/root";
        assert_eq!(image_options(&files), wanted);
    }
}
