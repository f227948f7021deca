//! Kernels kept for builds to come, in `cache/kernels/<key>/`: slim ones, so that none is compiled twice, and the stock ones of
//! templates that have a slim one now, so that they can go back. Nothing depends on what is here; it may be removed at any
//! time. Invariant: an entry appears by rename, complete; what is taken out has the hashes it was put in with.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nido_files::atomic_file::{Durability, publish_directory};
use nido_files::flock::{Mode, try_lock};
use nido_files::layout;
use serde::{Deserialize, Serialize};

use super::stages::{BASE, BuiltKernel, VMLINUX};
use super::write_file;
use crate::error::ImageError;
use crate::manifest::Part;
use crate::store::{create_private, hash_file};

const RECORD: &str = "kernel.json";
/// How many slim kernels are kept: those used last.
const SLIM_KEPT: usize = 2;

/// The kernels kept under one home.
#[derive(Debug)]
pub struct KeptKernels {
    directory: PathBuf,
}

/// A kept kernel whose files are what they should be.
#[derive(Debug)]
pub struct KeptKernel {
    pub kernel: BuiltKernel,
    directory: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Record {
    version: String,
    vmlinux: Part,
    initramfs_base: Part,
}

/// The key of the stock kernel whose modules are in this root disk.
pub fn stock_key(root: &Part) -> String {
    format!("stock-{}", root.sha256)
}

/// The key of a slim kernel.
pub fn slim_key(source_version: &str, tag: &str) -> String {
    format!("slim-{source_version}-{tag}")
}

impl KeptKernels {
    /// Those under `home`. Nothing is touched until one is kept.
    pub fn new(home: &Path) -> Self {
        Self { directory: home.join(layout::KERNELS) }
    }

    /// Where they are, created if need be; its lock is held while one is compiled.
    pub fn directory(&self) -> Result<&Path, ImageError> {
        create_private(&self.directory)?;
        Ok(&self.directory)
    }

    /// Finds a kernel and reads it. One that is damaged is removed.
    pub fn find(&self, key: &str) -> Option<KeptKernel> {
        let directory = self.directory.join(key);
        let bytes = fs::read(directory.join(RECORD)).ok()?;
        let sound = |record: &Record| {
            let is = |name: &str, part: &Part| hash_file(&directory.join(name)).is_ok_and(|found| found == *part);
            is(VMLINUX, &record.vmlinux) && is(BASE, &record.initramfs_base)
        };
        match serde_json::from_slice::<Record>(&bytes) {
            Ok(record) if sound(&record) => {
                // Only tells which are used last.
                let _ = File::open(&directory).and_then(|entry| entry.set_modified(SystemTime::now()));
                let Record { version, vmlinux, initramfs_base } = record;
                Some(KeptKernel { kernel: BuiltKernel { version, vmlinux, base: initramfs_base }, directory })
            }
            _ => {
                let _ = fs::remove_dir_all(&directory);
                None
            }
        }
    }

    /// Keeps a kernel by links to its two files, which must not change any more. Made in `scratch`, on the same file system.
    pub fn keep(
        &self,
        key: &str,
        kernel: &BuiltKernel,
        (vmlinux, base): (&Path, &Path),
        scratch: &Path,
    ) -> Result<(), ImageError> {
        let new = scratch.join(format!("keep-{key}"));
        let BuiltKernel { version, vmlinux: vmlinux_part, base: base_part } = kernel.clone();
        let record = Record { version, vmlinux: vmlinux_part, initramfs_base: base_part };
        create_private(&new)?;
        link(vmlinux, &new.join(VMLINUX))?;
        link(base, &new.join(BASE))?;
        write_file(&new.join(RECORD), &serde_json::to_vec_pretty(&record).unwrap_or_default())?;
        let target = self.directory()?.join(key);
        // What a power cut damages is found by its hashes.
        match publish_directory(&new, &target, Durability::Kill) {
            // It is kept already.
            Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {
                Ok(())
            }
            result => result.map_err(|error| ImageError::io("write", &target, error)),
        }
    }

    /// Removes kernels that no build is likely to need again. `roots` are the hashes of the templates' root disks.
    pub fn prune(&self, roots: &HashSet<String>) {
        // A build that compiles a kernel now keeps it; the next build prunes.
        let Ok(lock) = File::open(&self.directory) else { return };
        let Ok(listing) = fs::read_dir(&self.directory) else { return };
        if !try_lock(&lock, Mode::Exclusive).is_ok_and(|taken| taken) {
            return;
        }
        let entries = listing.filter_map(Result::ok).filter_map(|entry| {
            let used = entry.metadata().and_then(|found| found.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            Some((entry.file_name().into_string().ok()?, used))
        });
        for name in superfluous(entries.collect(), roots) {
            let _ = fs::remove_dir_all(self.directory.join(name));
        }
    }
}

impl KeptKernel {
    /// Puts the kernel's files into a scratch directory, where stages expect them.
    pub fn link_into(self, scratch: &Path) -> Result<BuiltKernel, ImageError> {
        link(&self.directory.join(VMLINUX), &scratch.join(VMLINUX))?;
        link(&self.directory.join(BASE), &scratch.join(BASE))?;
        Ok(self.kernel)
    }
}

/// Names of the entries to remove, of those with the time of their last use. Others' names are let be. Pure.
fn superfluous(mut entries: Vec<(String, SystemTime)>, roots: &HashSet<String>) -> Vec<String> {
    entries.sort_by_key(|(_, used)| std::cmp::Reverse(*used));
    let (slim, others): (Vec<_>, Vec<_>) =
        entries.into_iter().map(|(name, _)| name).partition(|name| name.starts_with("slim-"));
    let unused = |name: &String| name.strip_prefix("stock-").is_some_and(|root| !roots.contains(root));
    slim.into_iter().skip(SLIM_KEPT).chain(others.into_iter().filter(unused)).collect()
}

fn link(from: &Path, to: &Path) -> Result<(), ImageError> {
    fs::hard_link(from, to).map_err(|error| ImageError::io("link", to, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// A home with a scratch directory that holds a kernel.
    fn home() -> (tempfile::TempDir, PathBuf, BuiltKernel) {
        let home = tempfile::tempdir().unwrap();
        let scratch = home.path().join("scratch");
        create_private(&scratch).unwrap();
        write_file(&scratch.join("made"), b"the kernel").unwrap();
        write_file(&scratch.join("base"), b"modules").unwrap();
        let part = |name: &str| hash_file(&scratch.join(name)).unwrap();
        let kernel = BuiltKernel { version: "6.1.0".to_owned(), vmlinux: part("made"), base: part("base") };
        (home, scratch, kernel)
    }

    #[test]
    fn a_kept_kernel_is_read_back_unchanged() {
        let (home, scratch, kernel) = home();
        let kept = KeptKernels::new(home.path());
        let files = (scratch.join("made"), scratch.join("base"));
        assert!(kept.find("slim-1-a").is_none());
        kept.keep("slim-1-a", &kernel, (&files.0, &files.1), &scratch).unwrap();
        kept.keep("slim-1-a", &kernel, (&files.0, &files.1), &home.path().join("other")).unwrap();
        let found = kept.find("slim-1-a").unwrap();
        assert_eq!(found.link_into(&scratch).unwrap(), kernel);
        assert_eq!(hash_file(&scratch.join(VMLINUX)).unwrap(), kernel.vmlinux);
        assert!(kept.find("slim-2-a").is_none());
    }

    #[test]
    fn a_damaged_kernel_is_not_used_and_goes() {
        let (home, scratch, kernel) = home();
        let kept = KeptKernels::new(home.path());
        kept.keep("slim-1-a", &kernel, (&scratch.join("made"), &scratch.join("base")), &scratch).unwrap();
        fs::write(kept.directory.join("slim-1-a").join(VMLINUX), "the kernal").unwrap();
        assert!(kept.find("slim-1-a").is_none());
        assert!(!kept.directory.join("slim-1-a").exists());
    }

    #[test]
    fn the_slim_kernels_used_last_and_the_stock_ones_of_templates_stay() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let entry = |name: &str, seconds| (name.to_owned(), at(seconds));
        let entries = vec![
            entry("slim-1-a", 1),
            entry("stock-gone", 9),
            entry("slim-3-a", 3),
            entry("stock-used", 0),
            entry("slim-2-a", 2),
            entry("not-ours", 0),
        ];
        let roots = HashSet::from(["used".to_owned()]);
        assert_eq!(superfluous(entries, &roots), ["slim-1-a", "stock-gone"]);
    }
}
