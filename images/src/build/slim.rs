//! The kernel stage for the slim kernel: fetch the source, configure, compile; or take the kernel that was kept.
//! Invariant: one build compiles at a time under one home, and what it compiled is kept before it is used.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use super::kept::{KeptKernels, slim_key};
use super::stages::{BASE, BuiltKernel, SHORT_DEADLINE, VMLINUX, Work, apt_sources, read};
use super::{LockWait, packages, wait_for_lock, write_file};
use crate::error::ImageError;
use crate::host::Host;
use crate::kernel::{self, KernelChoice};
use crate::progress::{BuildProgress, Stage, printable};
use crate::slim::{self, Compilation, SlimSpec};
use crate::store::hash_file;
use crate::{apt, initramfs};

const SOURCE: &str = "source";
const FETCH_DEADLINE: Duration = Duration::from_secs(30 * 60);
/// Five minutes on two cores of 2020; a single slow one may take its time.
const COMPILE_DEADLINE: Duration = Duration::from_secs(90 * 60);

/// The compiler's first line about itself: its version and whose it is.
fn first_line(output: &[u8]) -> String {
    printable(String::from_utf8_lossy(output).lines().next().unwrap_or_default())
}

impl Work<'_, '_> {
    /// Leaves the slim kernel and its (empty) base archive in the scratch directory.
    pub fn slim_kernel(&mut self, host: &Host, kept: &KeptKernels) -> Result<BuiltKernel, ImageError> {
        let spec =
            slim::spec().map_err(|reason| ImageError::RecipeInvalid { name: "kernels/slim".to_owned(), reason })?;
        let path = kept.directory()?;
        let directory = File::open(path).map_err(|error| ImageError::io("open", path, error))?;
        let waiting =
            LockWait { stage: Stage::Kernel, program: "another build's kernel", log: self.session.log.path() };
        let _lock = wait_for_lock(directory, path, &waiting, self.progress, self.session.cancel)?;

        let mut ask = host.command("gcc", self.scratch);
        ask.arg("--version");
        let tag = slim::tag(&first_line(&self.session.capture(Stage::Kernel, ask, SHORT_DEADLINE)?));
        self.fetch(host, kept, &spec, &tag)?;
        if let Some(found) = kept.find(&slim_key(&self.source_version()?, &tag)) {
            self.session.log.line("--- kernel: using the cached one");
            return found.link_into(self.scratch);
        }
        if !self.has_source()? {
            // There was one, but it was damaged.
            self.fetch(host, kept, &spec, &tag)?;
        }
        let key = slim_key(&self.source_version()?, &tag);
        let kernel = self.compile(host, &spec)?;
        let files = (self.scratch.join(VMLINUX), self.scratch.join(BASE));
        self.keep(kept, &key, &kernel, (&files.0, &files.1));
        Ok(kernel)
    }

    /// Keeps a kernel. A failure does not fail the build.
    pub fn keep(&mut self, kept: &KeptKernels, key: &str, kernel: &BuiltKernel, files: (&Path, &Path)) {
        if let Err(error) = kept.keep(key, kernel, files, self.scratch) {
            self.session.log.line(&format!("the kernel cannot be cached: {error}"));
        }
    }

    /// Asks the mirror for the source's version, and gets it unless its kernel is kept.
    fn fetch(&mut self, host: &Host, kept: &KeptKernels, spec: &SlimSpec, tag: &str) -> Result<(), ImageError> {
        self.report(Stage::Kernel, "request the kernel's source from the mirror", None);
        let network = self.host_options(host)?;
        let out = self.scratch.join(SOURCE);
        fs::create_dir_all(&out).map_err(|error| ImageError::io("create", &out, error))?;
        let mut command = host.confined("mmdebstrap", self.scratch);
        command
            .env("NIDO_SOURCE", &spec.source)
            .env("NIDO_OUT", &out)
            .env("NIDO_KEPT", kept.directory()?)
            .env("NIDO_TAG", tag)
            .args(["--mode=root", "--variant=custom", "--format=null", "--architectures=amd64", "--verbose"])
            .args(network.iter().map(|option| format!("--aptopt={option}")))
            .arg(format!("--customize-hook={}", slim::FETCH))
            .args([&spec.suite, "/dev/null"])
            .args(apt::lines_for(&spec.suite, &apt_sources()));
        let mut listener = packages::Listener::default();
        let progress = &mut *self.progress;
        self.session.run(Stage::Kernel, command, FETCH_DEADLINE, &mut |line| {
            if let Some((detail, _)) = listener.hear(line).filter(|(detail, _)| detail.starts_with("download")) {
                progress(BuildProgress::new(Stage::Kernel, detail, None));
            }
        })
    }

    fn source_version(&self) -> Result<String, ImageError> {
        let text = read(&self.scratch.join(SOURCE).join("version"))?;
        let text = String::from_utf8_lossy(&text);
        slim::source_version(&text)
            .map(str::to_owned)
            .ok_or_else(|| ImageError::KernelInvalid { reason: format!("{:?} is not a version", printable(&text)) })
    }

    /// Whether the source package is there.
    fn has_source(&self) -> Result<bool, ImageError> {
        let directory = self.scratch.join(SOURCE);
        let listing = fs::read_dir(&directory).map_err(|error| ImageError::io("read", &directory, error))?;
        Ok(listing.filter_map(Result::ok).any(|entry| entry.path().extension().is_some_and(|kind| kind == "deb")))
    }

    fn compile(&mut self, host: &Host, spec: &SlimSpec) -> Result<BuiltKernel, ImageError> {
        let source = self.scratch.join(SOURCE);
        write_file(&source.join("config"), slim::CONFIG.as_bytes())?;
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let in_memory = slim::fits_in_memory(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
        let mut command = host.confined("sh", self.scratch);
        command
            .env("NIDO_OUT", &source)
            .env("NIDO_CPUS", cpus.to_string())
            .env("NIDO_IN_MEMORY", if in_memory { "yes" } else { "no" })
            .args(["-c", slim::MAKE]);
        self.session.log.line(&format!("--- kernel: compiled on {cpus} CPUs, in memory: {in_memory}"));
        let mut compilation = Compilation::new(spec.steps);
        let progress = &mut *self.progress;
        self.session.run(Stage::Kernel, command, COMPILE_DEADLINE, &mut |line| {
            if let Some((detail, fraction)) = compilation.hear(line) {
                progress(BuildProgress::new(Stage::Kernel, detail, Some(fraction)));
            }
        })?;
        self.taken(&source)
    }

    /// Checks what was compiled and puts it where later stages expect a kernel.
    fn taken(&mut self, source: &Path) -> Result<BuiltKernel, ImageError> {
        let invalid = |reason| ImageError::KernelInvalid { reason };
        let release = read(&source.join("release"))?;
        let version = String::from_utf8_lossy(&release).trim().to_owned();
        if slim::source_version(&version).is_none() || KernelChoice::of(&version) != KernelChoice::Slim {
            return Err(invalid(format!("its release is {:?}", printable(&version))));
        }
        let made = read(&source.join(VMLINUX))?;
        kernel::check_vmlinux(&made, made.len()).map_err(invalid)?;
        let vmlinux = self.scratch.join(VMLINUX);
        fs::rename(source.join(VMLINUX), &vmlinux).map_err(|error| ImageError::io("move", &vmlinux, error))?;
        let base = self.scratch.join(BASE);
        write_file(&base, &initramfs::base(&[]).map_err(|error| invalid(error.to_string()))?)?;
        Ok(BuiltKernel { version, vmlinux: hash_file(&vmlinux)?, base: hash_file(&base)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compiler_is_identified_by_its_first_line() {
        assert_eq!(first_line(b"gcc (Debian 12.2.0-14) 12.2.0\nCopyright\n"), "gcc (Debian 12.2.0-14) 12.2.0");
        assert_eq!(first_line(b""), "");
    }
}
