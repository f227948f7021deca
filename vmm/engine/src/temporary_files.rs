//! Temporary files, which are left if the process that wrote one is killed before it renamed the file.
//!
//! Invariant: those in a VM's directory are removed only by the process that holds the VM's `supervisor.lock`, while no QEMU of the
//! VM runs; those in directories that every process writes only when they are so old that none still writes them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nido_files::atomic_file::is_temporary;

use crate::home::{DISK_TEMPORARY, VmDir};

/// How old a temporary file is that no process still writes: they are written and renamed within seconds.
const ABANDONED_AFTER: Duration = Duration::from_secs(3600);

/// The temporary files in a directory that every process writes, of processes that were killed.
#[must_use]
pub fn abandoned_files(directory: &Path) -> Vec<PathBuf> {
    let is_old = |entry: &fs::DirEntry| {
        let modified = entry.metadata().and_then(|metadata| metadata.modified()).ok();
        modified.and_then(|at| at.elapsed().ok()).is_some_and(|age| age > ABANDONED_AFTER)
    };
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let abandoned = entries.filter(|entry| is_temporary(&entry.file_name().to_string_lossy()) && is_old(entry));
    abandoned.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file())).map(|entry| entry.path()).collect()
}

/// Whether there are any in a VM's directory.
#[must_use]
pub fn has_temporary_files(vm: &VmDir) -> bool {
    files(vm).next().is_some()
}

/// Removes them. What cannot be removed is logged.
pub fn remove_temporary_files(vm: &VmDir) {
    for path in files(vm) {
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!("a temporary file cannot be removed: {}: {error}", path.display());
        }
    }
}

fn files(vm: &VmDir) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(vm.path()).into_iter().flatten().flatten();
    let of_nido = |name: &str| is_temporary(name) || name == DISK_TEMPORARY;
    entries.filter(move |entry| of_nido(&entry.file_name().to_string_lossy())).map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn only_old_temporary_files_are_abandoned() {
        let root = tempfile::tempdir().unwrap();
        let old = SystemTime::now() - 2 * ABANDONED_AFTER;
        for (name, modified) in [(".tmp-old", old), (".tmp-new", SystemTime::now()), ("facts.json", old)] {
            let file = fs::File::create(root.path().join(name)).unwrap();
            file.set_modified(modified).unwrap();
        }
        fs::create_dir(root.path().join(".tmp-directory")).unwrap();
        assert_eq!(abandoned_files(root.path()), [root.path().join(".tmp-old")]);
        assert_eq!(abandoned_files(&root.path().join("missing")), Vec::<PathBuf>::new());
    }
}
