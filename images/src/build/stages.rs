//! The stages of a build, one method each. Each writes its results to the scratch directory; only the last touches
//! the store. Invariant: a stage names every file that it writes by a constant of this file.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{packages, write_file};
use crate::agent::AGENT;
use crate::apt;
use crate::command::Session;
use crate::error::ImageError;
use crate::host::Host;
use crate::initramfs::{self, Module};
use crate::kernel::{self, KernelCompression};
use crate::manifest::{Disk, Manifest, Part};
use crate::progress::{BuildProgress, Stage};
use crate::qcow2::{Compression, read_qcow2_header};
use crate::recipe::{DPKG_OPTIONS, Recipe};
use crate::recipe_text::COMMON;
use crate::store::{Store, hash_file};

const ROOTFS: &str = "rootfs";
const KERNEL: &str = "kernel";
const FILES: &str = "files";
/// The uncompressed kernel.
pub const VMLINUX: &str = "vmlinux";
/// The initramfs without the agent.
pub const BASE: &str = "initramfs-base";
const INITRAMFS: &str = "initramfs";
const ROOT: &str = "root.qcow2";
const PACKAGES: &str = "packages";

const PACKAGES_DEADLINE: Duration = Duration::from_secs(60 * 60);
const DISK_DEADLINE: Duration = Duration::from_secs(20 * 60);
pub const SHORT_DEADLINE: Duration = Duration::from_secs(60);

/// Where mmdebstrap keeps its hooks for a root with `/bin` inside `/usr`.
const MERGED_USR_HOOKS: &str = "/usr/share/mmdebstrap/hooks/merged-usr";

/// What the kernel stage makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltKernel {
    pub version: String,
    pub vmlinux: Part,
    pub base: Part,
}

/// What the expensive stages make, or what an existing template has of it.
pub struct BuiltParts {
    pub kernel: BuiltKernel,
    pub packages: Part,
    pub root: Disk,
}

impl From<Manifest> for BuiltParts {
    fn from(manifest: Manifest) -> Self {
        let Manifest { kernel, parts, .. } = manifest;
        let kernel = BuiltKernel { version: kernel.version, vmlinux: parts.vmlinux, base: parts.initramfs_base };
        Self { kernel, packages: parts.packages, root: parts.root }
    }
}

/// A build at work.
pub struct Work<'a, 'session> {
    pub store: &'a Store,
    pub recipe: &'a Recipe,
    pub scratch: &'a Path,
    pub session: &'a mut Session<'session>,
    pub progress: &'a mut dyn FnMut(BuildProgress),
}

impl Work<'_, '_> {
    /// Makes the root directory and unpacks the kernel package next to it.
    pub fn packages(&mut self, host: &Host) -> Result<(), ImageError> {
        let network = self.host_options(host)?;
        self.write_files(&apt::mirror_options(&network))?;
        let spec = &self.recipe.spec;
        let mut command = host.confined("mmdebstrap", self.scratch);
        command
            .env("NIDO_KERNEL", &spec.kernel)
            .env("NIDO_USER", &spec.user)
            .env("NIDO_SHELL", &spec.shell)
            .args(["--mode=root", "--format=directory", "--architectures=amd64", "--verbose"])
            .arg(format!("--variant={}", spec.variant))
            .arg(format!("--include={}", spec.packages.join(",")))
            .arg(format!("--hook-dir={MERGED_USR_HOOKS}"))
            .args(DPKG_OPTIONS.map(|option| format!("--dpkgopt={option}")))
            .args(network.iter().map(|option| format!("--aptopt={option}")));
        for script in [COMMON.kernel, COMMON.files, self.recipe.customize, COMMON.finish] {
            if !script.is_empty() {
                command.arg(format!("--customize-hook={script}"));
            }
        }
        command.arg(&spec.suite).arg(self.scratch.join(ROOTFS));
        command.args(apt::lines_for(&spec.suite, &apt_sources()));

        self.report(Stage::Packages, "request packages from the mirror", None);
        let mut listener = packages::Listener::default();
        let progress = &mut *self.progress;
        self.session.run(Stage::Packages, command, PACKAGES_DEADLINE, &mut |line| {
            if let Some((detail, fraction)) = listener.hear(line) {
                progress(BuildProgress::new(Stage::Packages, detail, fraction));
            }
        })
    }

    /// Extracts the stock kernel and the modules the agent loads.
    pub fn kernel(&mut self, host: &Host) -> Result<BuiltKernel, ImageError> {
        self.report(Stage::Kernel, "extract the kernel", Some(0.0));
        let invalid = |reason| ImageError::KernelInvalid { reason };
        let boot = self.scratch.join(KERNEL).join("boot");
        let version = the_kernel_version(&boot)?;
        let image = read(&boot.join(format!("vmlinuz-{version}")))?;
        let payload = kernel::payload(&image).map_err(invalid)?;
        let vmlinux = match payload.packing {
            KernelCompression::Zstd => kernel::unpack_zstd(payload).map_err(invalid)?,
            KernelCompression::Xz => {
                let packed = self.scratch.join("vmlinux.xz");
                write_file(&packed, payload.bytes)?;
                let vmlinux = self.unpack(host, &packed)?;
                kernel::check_vmlinux(&vmlinux, payload.unpacked_bytes).map_err(invalid)?;
                vmlinux
            }
        };
        write_file(&self.scratch.join(VMLINUX), &vmlinux)?;

        self.report(Stage::Kernel, "unpack the modules", Some(0.5));
        let modules = self.scratch.join(ROOTFS).join("usr/lib/modules").join(&version);
        let text = |name: &str| read(&modules.join(name)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let order = kernel::loading_order(&kernel::BOOT_MODULES, &text("modules.dep")?, &text("modules.builtin")?)
            .map_err(invalid)?;
        let mut unpacked = Vec::new();
        for path in order {
            let bytes = self.unpack(host, &modules.join(&path))?;
            unpacked.push(Module { file: format!("{}.ko", kernel::module_name(&path)), bytes });
        }
        let base = initramfs::base(&unpacked).map_err(|error| invalid(error.to_string()))?;
        write_file(&self.scratch.join(BASE), &base)?;
        let part = |name: &str| hash_file(&self.scratch.join(name));
        Ok(BuiltKernel { version, vmlinux: part(VMLINUX)?, base: part(BASE)? })
    }

    /// Makes room for another kernel's files; returns where those of this one are now.
    pub fn set_kernel_aside(&mut self) -> Result<(PathBuf, PathBuf), ImageError> {
        let aside = |name: &str| {
            let (from, to) = (self.scratch.join(name), self.scratch.join(format!("stock-{name}")));
            fs::rename(&from, &to).map(|()| to).map_err(|error| ImageError::io("move", &from, error))
        };
        Ok((aside(VMLINUX)?, aside(BASE)?))
    }

    /// Writes the list of packages.
    pub fn package_list(&mut self) -> Result<Part, ImageError> {
        let status = read(&self.scratch.join(ROOTFS).join("var/lib/dpkg/status"))?;
        let list = packages::installed(&String::from_utf8_lossy(&status));
        let path = self.scratch.join(PACKAGES);
        write_file(&path, list.as_bytes())?;
        hash_file(&path)
    }

    /// Turns the root directory into a disk image.
    pub fn disk(&mut self, host: &Host) -> Result<Disk, ImageError> {
        self.report(Stage::Disk, "create the file system", Some(0.0));
        // Real root leaves device nodes there, a user namespace cannot; the guest mounts its own.
        let mut empty_dev = host.confined("find", self.scratch);
        empty_dev.arg(self.scratch.join(ROOTFS).join("dev")).args(["-mindepth", "1", "-delete"]);
        self.session.run(Stage::Disk, empty_dev, SHORT_DEADLINE, &mut |_| {})?;

        let raw = self.scratch.join("root.raw");
        let mut mkfs = host.confined("mkfs.ext4", self.scratch);
        // A small journal: a guest killed in mid-write must come back without a check, but most guests are short-lived.
        // The file is fresh and so all zeros; stating that spares the guest the background zeroing of inode tables.
        mkfs.args(["-q", "-F", "-L", "nido-root", "-m", "1", "-J", "size=16"])
            .args(["-E", "root_owner=0:0,assume_storage_prezeroed=1", "-d"])
            .args([&self.scratch.join(ROOTFS), &raw])
            .arg(format!("{}M", self.recipe.spec.disk_mib));
        self.session.run(Stage::Disk, mkfs, DISK_DEADLINE, &mut |_| {})?;

        self.report(Stage::Disk, "compress the image", Some(0.5));
        let image = self.scratch.join(ROOT);
        let mut convert = host.command("qemu-img", self.scratch);
        convert
            .args(["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd,lazy_refcounts=off"])
            .args([&raw, &image]);
        self.session.run(Stage::Disk, convert, DISK_DEADLINE, &mut |_| {})?;
        fs::remove_file(&raw).map_err(|error| ImageError::io("remove", &raw, error))?;

        let header = read_qcow2_header(&image)?;
        let virtual_bytes = self.recipe.spec.disk_mib * 1024 * 1024;
        if header.virtual_bytes != virtual_bytes || header.compression != Compression::Zstd {
            let reason = format!("qemu-img created an unexpected image ({header:?})");
            return Err(ImageError::ImageRefused { path: image, reason });
        }
        Ok(Disk { file: hash_file(&image)?, virtual_bytes })
    }

    /// Puts the agent on top of the base archive.
    pub fn initramfs(&mut self, base: &Path) -> Result<Part, ImageError> {
        self.session.check_cancel()?;
        self.report(Stage::Initramfs, "install the guest agent", None);
        let initramfs = initramfs::with_agent(&read(base)?, AGENT)
            .map_err(|error| ImageError::KernelInvalid { reason: error.to_string() })?;
        let path = self.scratch.join(INITRAMFS);
        write_file(&path, &initramfs)?;
        hash_file(&path)
    }

    /// Moves what was made into the store and publishes the manifest.
    pub fn publish(&mut self, manifest: &Manifest) -> Result<(), ImageError> {
        self.session.check_cancel()?;
        self.report(Stage::Publish, "publish the template", None);
        let parts = &manifest.parts;
        let files = [
            (VMLINUX, &parts.vmlinux),
            (INITRAMFS, &parts.initramfs),
            (BASE, &parts.initramfs_base),
            (ROOT, &parts.root.file),
            (PACKAGES, &parts.packages),
        ];
        let lock = self.store.lock()?;
        for (name, part) in files {
            let path = self.scratch.join(name);
            // What was reused is in the store already.
            if path.exists() {
                self.store.import(&path, part, &lock)?;
            }
        }
        self.store.publish(manifest, &lock)
    }

    /// The host's apt options for reaching its mirror.
    pub fn host_options(&mut self, host: &Host) -> Result<Vec<String>, ImageError> {
        let mut command = host.command("apt-config", self.scratch);
        command.arg("dump");
        let dump = self.session.capture(Stage::Resolve, command, SHORT_DEADLINE)?;
        Ok(apt::network_options(&String::from_utf8_lossy(&dump)))
    }

    /// Lays out the files the recipe adds to the root, with their modes.
    fn write_files(&mut self, mirror_options: &[String]) -> Result<(), ImageError> {
        let top = self.scratch.join(FILES);
        let options: String = mirror_options.iter().map(|option| format!("{option};\n")).collect();
        let mut files = self.recipe.files.to_vec();
        if !options.is_empty() {
            files.push(("etc/apt/apt.conf.d/90mirror", &options));
        }
        make_directory(&top)?;
        for (path, content) in files {
            let mut directory = top.clone();
            for component in Path::new(path).parent().into_iter().flat_map(Path::components) {
                directory.push(component);
                make_directory(&directory)?;
            }
            let path = top.join(path);
            write_file(&path, content.as_bytes())?;
            set_mode(&path, 0o644)?;
        }
        Ok(())
    }

    /// The content of a file that may be packed with xz, by its name.
    fn unpack(&mut self, host: &Host, path: &Path) -> Result<Vec<u8>, ImageError> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("ko") => read(path),
            Some("xz") => {
                let mut command: Command = host.command("xz", self.scratch);
                command.args(["--decompress", "--stdout", "--"]).arg(path);
                self.session.capture(Stage::Kernel, command, SHORT_DEADLINE)
            }
            _ => Err(ImageError::KernelInvalid { reason: format!("{} has an unknown compression", path.display()) }),
        }
    }

    pub fn report(&mut self, stage: Stage, detail: &str, fraction: Option<f32>) {
        (self.progress)(BuildProgress::new(stage, detail, fraction));
    }
}

/// The one kernel in the unpacked package.
fn the_kernel_version(boot: &Path) -> Result<String, ImageError> {
    let failed = |error| ImageError::io("read", boot, error);
    let names: Result<Vec<_>, _> = fs::read_dir(boot).map_err(failed)?.collect();
    let versions: Vec<String> = names
        .map_err(failed)?
        .iter()
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("vmlinuz-").map(str::to_owned))
        .collect();
    match <[String; 1]>::try_from(versions) {
        Ok([version]) => Ok(version),
        Err(versions) => {
            Err(ImageError::KernelInvalid { reason: format!("its package holds {} kernels", versions.len()) })
        }
    }
}

/// The host's apt source files.
pub fn apt_sources() -> Vec<(String, String)> {
    let mut paths = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(listing) = fs::read_dir("/etc/apt/sources.list.d") {
        paths.extend(listing.filter_map(Result::ok).map(|entry| entry.path()));
    }
    paths.sort();
    paths
        .into_iter()
        .filter_map(|path| Some((path.file_name()?.to_str()?.to_owned(), fs::read_to_string(&path).ok()?)))
        .collect()
}

pub fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    fs::read(path).map_err(|error| ImageError::io("read", path, error))
}

fn make_directory(path: &Path) -> Result<(), ImageError> {
    fs::create_dir_all(path).map_err(|error| ImageError::io("create", path, error))?;
    set_mode(path, 0o755)
}

fn set_mode(path: &Path, mode: u32) -> Result<(), ImageError> {
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(|error| ImageError::io("change", path, error))
}
