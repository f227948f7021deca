//! The store of templates: `blobs/sha256/<hex>` (content-addressed, mode 0444) and `templates/<name>.json`.
//! A file appears under its final name only complete and synced. Invariant: every part a published manifest names is
//! there; a process that publishes or removes holds the lock on `templates/`.

use std::collections::HashSet;
use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nido_files::atomic_file::{self, Durability, TemporaryFile, sync_parent};
use nido_files::flock::{Flock, Mode};
use nido_files::layout;
use nido_files::private_dir::make_private_dir;

use crate::digest::{is_sha256, sha256_of, sparse_sha256};
use crate::error::ImageError;
use crate::manifest::{Bake, Digest, Manifest, Part, Parts};
use crate::qcow2::read_qcow2_header;

/// Largest manifest read, in bytes.
const MAX_MANIFEST_BYTES: u64 = 1024 * 1024;
/// How long to wait for the store: a process that holds it may be writing gigabytes to a slow disk.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60 * 60);
/// Names of temporary files start so; reconciliation removes those of killed processes.
const TEMPORARY: &str = ".new-";

/// The templates and their parts under one home directory.
#[derive(Debug, Clone)]
pub struct Store {
    blobs: PathBuf,
    templates: PathBuf,
}

/// What lies in the directories of the store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreContents {
    /// Parts, whether a template names them or not.
    pub parts: Vec<Part>,
    /// File names of manifests whose writer was killed.
    pub unfinished_manifests: Vec<String>,
}

/// The right to publish and to remove. Held only for moments: never while a program runs.
#[derive(Debug)]
pub struct StoreLock {
    _lock: Flock,
}

impl Store {
    /// The store under `home`. Nothing is touched until it is used.
    #[must_use]
    pub fn new(home: &Path) -> Self {
        Self { blobs: home.join(layout::BLOBS), templates: home.join(layout::TEMPLATES) }
    }

    /// Creates the directories (mode 0700) where they are missing.
    ///
    /// # Errors
    /// [`ImageError::Io`] or [`ImageError::DiskFull`].
    pub fn create(&self) -> Result<(), ImageError> {
        [&self.blobs, &self.templates].into_iter().try_for_each(|directory| create_private(directory))
    }

    /// Path of the part with this hash. The hash must come from a parsed manifest.
    #[must_use]
    pub fn blob_path(&self, part: &Part) -> PathBuf {
        self.blobs.join(&part.sha256)
    }

    /// All templates, by name. Manifests that cannot be read are returned as errors beside the others.
    ///
    /// # Errors
    /// [`ImageError::Io`] if the directory cannot be read.
    pub fn ls(&self) -> Result<Vec<Result<Manifest, ImageError>>, ImageError> {
        let mut names: Vec<String> = entries(&self.templates)?
            .into_iter()
            .filter_map(|name| name.strip_suffix(".json").filter(|name| check_name(name).is_ok()).map(str::to_owned))
            .collect();
        names.sort();
        Ok(names.iter().map(|name| self.open(name)).collect())
    }

    /// Reads the manifest of one template.
    ///
    /// # Errors
    /// [`ImageError::NameInvalid`], [`ImageError::TemplateNotFound`], [`ImageError::ManifestInvalid`], [`ImageError::Io`].
    pub fn open(&self, name: &str) -> Result<Manifest, ImageError> {
        check_name(name)?;
        let path = self.manifest_path(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(ImageError::TemplateNotFound { name: name.to_owned() });
            }
            Err(error) => return Err(ImageError::io("open", &path, error)),
        };
        let mut json = Vec::new();
        file.take(MAX_MANIFEST_BYTES).read_to_end(&mut json).map_err(|error| ImageError::io("read", &path, error))?;
        let invalid = |reason| ImageError::ManifestInvalid { path: path.clone(), reason };
        let manifest = Manifest::parse(&json).map_err(invalid)?;
        if manifest.name != name {
            return Err(invalid(format!("it is the manifest of {:?}", manifest.name)));
        }
        Ok(manifest)
    }

    /// Checks that every part is there with the right length. Cheap: reads no content.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] names the first part that is not as it should be.
    pub fn check(&self, manifest: &Manifest) -> Result<(), ImageError> {
        for (part_name, part, _) in manifest.all_parts() {
            let damaged =
                |reason: String| ImageError::Damaged { template: manifest.name.clone(), part: part_name, reason };
            match fs::symlink_metadata(self.blob_path(part)) {
                Ok(found) if found.is_file() && found.len() == part.bytes => {}
                Ok(found) => return Err(damaged(format!("it has {} bytes instead of {}", found.len(), part.bytes))),
                Err(error) => return Err(damaged(error.to_string())),
            }
        }
        Ok(())
    }

    /// Reads every part of a template and compares its hash; checks the root disk's header, too.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] or [`ImageError::ImageRefused`].
    pub fn verify(&self, name: &str) -> Result<Manifest, ImageError> {
        let manifest = self.open(name)?;
        self.check(&manifest)?;
        for (part_name, part, digest) in manifest.all_parts() {
            let path = self.blob_path(part);
            let (hash, _) = File::open(&path)
                .and_then(|file| match digest {
                    Digest::Plain => sha256_of(file),
                    Digest::Sparse => sparse_sha256(&file),
                })
                .map_err(|error| ImageError::io("read", &path, error))?;
            if hash != part.sha256 {
                let reason = "its content does not match its hash".to_owned();
                return Err(ImageError::Damaged { template: name.to_owned(), part: part_name, reason });
            }
        }
        read_qcow2_header(&self.blob_path(&manifest.parts.root.file))?;
        Ok(manifest)
    }

    /// Waits for the right to publish and to remove.
    ///
    /// # Errors
    /// [`ImageError::Io`] if the directory cannot be opened or locked.
    pub fn lock(&self) -> Result<StoreLock, ImageError> {
        let failed = |error| ImageError::io("lock", &self.templates, error);
        let directory = File::open(&self.templates).map_err(failed)?;
        lock_directory(directory).map(|lock| StoreLock { _lock: lock }).map_err(failed)
    }

    /// Takes the finished file at `path` (on the same file system) into the store: sync, mode 0444, rename.
    /// Hashing happens here, so a caller that holds no [`StoreLock`] yet may call [`hash_file`] first.
    ///
    /// # Errors
    /// [`ImageError::Io`] or [`ImageError::DiskFull`].
    pub fn import(&self, path: &Path, part: &Part, lock: &StoreLock) -> Result<(), ImageError> {
        self.import_as(path, part, 0o444, lock)
    }

    /// As [`Store::import`], with another mode: a QEMU that opens a memory image for writing, although it maps it privately,
    /// needs one that its owner may write.
    ///
    /// # Errors
    /// As there.
    pub fn import_as(&self, path: &Path, part: &Part, mode: u32, _lock: &StoreLock) -> Result<(), ImageError> {
        let target = self.blob_path(part);
        let failed = |error| ImageError::io("store", &target, error);
        fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed)?;
        let file = File::open(path).map_err(failed)?;
        atomic_file::publish(&file, path, &target, Durability::PowerCut).map_err(failed)
    }

    /// Publishes a manifest under its name; an older one of that name is replaced at once.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] if a part is missing, [`ImageError::Io`], [`ImageError::DiskFull`].
    pub fn publish(&self, manifest: &Manifest, _lock: &StoreLock) -> Result<(), ImageError> {
        check_name(&manifest.name)?;
        self.check(manifest)?;
        let path = self.manifest_path(&manifest.name);
        let failed = |error| ImageError::io("write", &path, error);
        let mut temporary = TemporaryFile::with_prefix(&self.templates, TEMPORARY).map_err(failed)?;
        temporary.file().write_all(&manifest.to_json()).map_err(failed)?;
        nido_files::failpoint!("template.written");
        temporary.replace(&path, Durability::PowerCut).map_err(failed)
    }

    /// Adds a bake whose parts are in the store to a template, in place of an older one for the same machine. `of` is what was
    /// baked: a template that was rebuilt meanwhile does not get it.
    ///
    /// # Errors
    /// [`ImageError::TemplateChanged`], and those of [`Store::open`] and [`Store::publish`].
    pub fn add_bake(&self, name: &str, bake: Bake, of: &Parts, lock: &StoreLock) -> Result<Manifest, ImageError> {
        let mut manifest = self.open(name)?;
        if manifest.parts != *of {
            return Err(ImageError::TemplateChanged { name: name.to_owned() });
        }
        manifest.bakes.retain(|other| !other.machine.is_asked_for_as(&bake.machine));
        manifest.bakes.push(bake);
        self.publish(&manifest, lock)?;
        Ok(manifest)
    }

    /// Removes a template's manifest. Its parts stay until they are found to be unused.
    ///
    /// # Errors
    /// [`ImageError::NameInvalid`], [`ImageError::TemplateNotFound`], [`ImageError::Io`].
    pub fn delete(&self, name: &str) -> Result<(), ImageError> {
        check_name(name)?;
        let path = self.manifest_path(name);
        if !path.exists() {
            return Err(ImageError::TemplateNotFound { name: name.to_owned() });
        }
        nido_files::failpoint!("template.deleting");
        let _lock = self.lock()?;
        match fs::remove_file(&path).and_then(|()| sync_parent(&path)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(ImageError::io("remove", &path, error)),
            _ => Ok(()),
        }
    }

    /// The parts that are stored, and the manifests whose writer was killed. What is being added meanwhile is included, unless
    /// the caller holds the lock.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub fn stored(&self) -> Result<StoreContents, ImageError> {
        let length = |path: PathBuf| fs::symlink_metadata(path).map_or(0, |found| found.len());
        let parts = entries(&self.blobs)?.into_iter().filter(|name| is_sha256(name));
        let parts = parts.map(|name| (length(self.blobs.join(&name)), name));
        let manifests = entries(&self.templates)?.into_iter().filter(|name| name.starts_with(TEMPORARY));
        Ok(StoreContents {
            parts: parts.map(|(bytes, sha256)| Part { sha256, bytes }).collect(),
            unfinished_manifests: manifests.collect(),
        })
    }

    /// Hashes of the parts that templates name.
    ///
    /// # Errors
    /// [`ImageError::ManifestInvalid`] if a manifest cannot be read: then its parts are unknown.
    pub fn named_parts(&self) -> Result<HashSet<String>, ImageError> {
        let mut named = HashSet::new();
        for manifest in self.ls()? {
            named.extend(manifest?.all_parts().map(|(_, part, _)| part.sha256.clone()));
        }
        Ok(named)
    }

    /// Removes a part that nothing uses.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub fn remove_part(&self, sha256: &str, _lock: &StoreLock) -> Result<(), ImageError> {
        remove(&self.blobs.join(sha256))
    }

    /// Removes a manifest that [`Store::stored`] found unfinished.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub fn remove_unfinished_manifest(&self, name: &str, _lock: &StoreLock) -> Result<(), ImageError> {
        remove(&self.templates.join(name))
    }

    fn manifest_path(&self, name: &str) -> PathBuf {
        self.templates.join(format!("{name}.json"))
    }
}

/// The identity of a file: hash and length.
///
/// # Errors
/// [`ImageError::Io`] if it cannot be read.
pub fn hash_file(path: &Path) -> Result<Part, ImageError> {
    let (sha256, bytes) = File::open(path).and_then(sha256_of).map_err(|error| ImageError::io("read", path, error))?;
    Ok(Part { sha256, bytes })
}

/// Creates a directory and its parents, mode 0700.
pub(crate) fn create_private(path: &Path) -> Result<(), ImageError> {
    make_private_dir(path).map_err(|error| ImageError::io("create", path, error))
}

/// Locks an open directory whose lock is held for moments only.
pub(crate) fn lock_directory(directory: File) -> io::Result<Flock> {
    let taken = Flock::take_blocking(directory, Mode::Exclusive, Instant::now() + LOCK_TIMEOUT, || true)?;
    taken.ok_or_else(|| io::Error::new(ErrorKind::TimedOut, "another process does not release it"))
}

/// The rule for template names: 1 to 63 of `a-z 0-9 -`, a letter or digit at both ends.
pub(crate) fn check_name(name: &str) -> Result<(), ImageError> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = name.as_bytes();
    let ends = bytes.first().zip(bytes.last()).is_some_and(|(first, last)| plain(*first) && plain(*last));
    if ends && bytes.len() <= 63 && bytes.iter().all(|byte| plain(*byte) || *byte == b'-') {
        return Ok(());
    }
    Err(ImageError::NameInvalid { name: crate::progress::printable(name) })
}

/// File names in a directory; none if it does not exist.
fn entries(directory: &Path) -> Result<Vec<String>, ImageError> {
    let failed = |error| ImageError::io("read", directory, error);
    let listing = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        listing => listing.map_err(failed)?,
    };
    let names: io::Result<Vec<_>> = listing.map(|entry| entry.map(|entry| entry.file_name())).collect();
    Ok(names.map_err(failed)?.into_iter().filter_map(|name| name.into_string().ok()).collect())
}

fn remove(path: &Path) -> Result<(), ImageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(ImageError::io("remove", path, error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
