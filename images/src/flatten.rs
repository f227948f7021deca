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

use nido_confine::Layer;
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
    /// The layers of the confinement of the program that reads them: those that this host has.
    pub confinement: Vec<Layer>,
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
    let root = join(&host, &mut session, scratch.path(), disk)?;
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

/// Joins the layers into one image in `scratch`. They may be hostile: a guest that has taken over its QEMU writes what it likes into
/// its layer, and what that names cannot be opened here.
fn join(host: &Host, session: &mut Session<'_>, scratch: &Path, disk: &Layers) -> Result<PathBuf, ImageError> {
    let real = |path: &Path| path.canonicalize().map_err(|error| ImageError::io("find", path, error));
    let scratch = real(scratch)?;
    let files = disk.files.iter().map(|file| real(file)).collect::<Result<Vec<_>, _>>()?;
    let missing: Vec<_> = Layer::ALL.into_iter().filter(|layer| !disk.confinement.contains(layer)).collect();
    if !missing.is_empty() {
        let names: Vec<_> = missing.into_iter().map(Layer::name).collect();
        session.log.line(&format!("qemu-img is confined without {}", names.join(", ")));
    }
    let root = scratch.join(ROOT);
    let mut convert = host.confined_reader("qemu-img", &scratch, &files, disk.virtual_bytes, &disk.confinement)?;
    convert
        .args(["convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd,lazy_refcounts=off", "--image-opts"])
        .args([image_options(&files), root.clone().into_os_string()]);
    session.run(Stage::Disk, convert, DEADLINE, &mut |_| {})?;
    Ok(root)
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

    /// Changes a qcow2 image so that its data lie in another file, as a captured QEMU could change its disk.
    fn with_data_in(image: &Path, other: &str) {
        let mut bytes = std::fs::read(image).unwrap();
        let header = u32::from_be_bytes(bytes[100..104].try_into().unwrap()) as usize;
        bytes[79] |= 1 << 2;
        let mut extension = 0x4441_5441_u32.to_be_bytes().to_vec();
        extension.extend(u32::try_from(other.len()).unwrap().to_be_bytes());
        extension.extend(other.as_bytes());
        extension.resize(extension.len().next_multiple_of(8), 0);
        extension.extend([0; 8]);
        bytes[header..header + extension.len()].copy_from_slice(&extension);
        std::fs::write(image, bytes).unwrap();
    }

    fn qemu_img(directory: &Path, arguments: &[&str]) {
        let output = std::process::Command::new("qemu-img").args(arguments).current_dir(directory).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// What became of joining a disk, and the log.
    fn joined(file: &Path, confinement: &[Layer]) -> (Result<Vec<u8>, ImageError>, String) {
        let scratch = tempfile::tempdir().unwrap();
        let log = scratch.path().join("log");
        let (cancel, host) = (AtomicBool::new(false), Host::for_images().unwrap());
        let log_file = std::fs::File::create(&log).unwrap();
        let mut session = Session { log: crate::command::BuildLog::new(log.clone(), log_file), cancel: &cancel };
        let disk = Layers { files: vec![file.to_owned()], virtual_bytes: 1 << 20, confinement: confinement.to_vec() };
        let result = join(&host, &mut session, scratch.path(), &disk).map(|root| {
            qemu_img(scratch.path(), &["convert", "-f", "qcow2", "-O", "raw", root.to_str().unwrap(), "out"]);
            std::fs::read(scratch.path().join("out")).unwrap()
        });
        (result, std::fs::read_to_string(&log).unwrap())
    }

    /// The disk of a captured QEMU named a file of the host, whose content went into the template.
    #[test]
    fn a_file_that_a_hostile_disk_names_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("secret"), vec![b's'; 1 << 20]).unwrap();
        let secret = path("secret").to_str().unwrap().to_owned();
        qemu_img(directory.path(), &["create", "-q", "-f", "qcow2", "harmless", "1M"]);
        let nbd = "nbd:127.0.0.1:1:exportname=x".to_owned();
        let json = format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{secret}\"}}}}");
        for (number, backing) in [secret.clone(), json, nbd].iter().enumerate() {
            let name = format!("backed{number}");
            qemu_img(directory.path(), &["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, &name, "1M"]);
        }
        // An image whose every byte is mapped to the secret.
        qemu_img(
            directory.path(),
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                "data_file=data,data_file_raw=on,preallocation=metadata",
                "data-in",
                "1M",
            ],
        );
        with_data_in(&path("data-in"), &secret);
        let nothing: &[Layer] = &[];
        let landlock = (nido_confine::landlock::version() > 0).then_some([Layer::Landlock, Layer::Seccomp]);
        for name in ["backed0", "backed1", "data-in"] {
            let (content, log) = joined(&path(name), nothing);
            assert_eq!(content.unwrap(), vec![b's'; 1 << 20], "{name} reads the secret without confinement");
            assert!(log.contains("qemu-img is confined without namespaces, landlock"), "{log}");
        }
        let Some(layers) = landlock else { return eprintln!("SKIPPED: no Landlock") };
        for name in ["backed0", "backed1", "backed2", "data-in"] {
            let (result, log) = joined(&path(name), &layers);
            assert!(matches!(result, Err(ImageError::Command { .. })), "{name}: {result:?}");
            assert!(name == "backed2" || log.contains("Permission denied"), "{name}: {log}");
        }
        assert_eq!(joined(&path("harmless"), &layers).0.unwrap(), vec![0; 1 << 20]);
    }
}
