//! Directories and sockets that only their owner can use.
//!
//! Invariant: they have their mode whatever the umask of the process that makes them.

use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

/// Makes a directory, and its parents, for its owner alone (0700), whatever the umask of this process. One that is there already
/// is left as it is, a read-only one included, unless its owner cannot enter it: earlier versions made such directories.
///
/// # Errors
/// Of the file system; a file that is not a directory has the name.
pub fn make_private_dir(path: &Path) -> std::io::Result<()> {
    if let Some(parent) = path.parent()
        && !parent.as_os_str().is_empty()
        && !parent.is_dir()
    {
        make_private_dir(parent)?;
    }
    make_private_dir_in_place(path)
}

/// The same in a directory that has to be there.
///
/// # Errors
/// As [`make_private_dir`].
pub fn make_private_dir_in_place(path: &Path) -> std::io::Result<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            // What is there may be a file, or have been removed in this moment: the caller finds out by using it.
            if !path.is_dir() && path.exists() {
                return Err(error);
            }
            if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.mode() & 0o100 != 0) {
                return Ok(());
            }
        }
        Err(error) => return Err(error),
    }
    match give_owner_rights(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        given => given,
    }
}

/// Makes a directory for its owner alone, which must not exist: in a place such as `TMPDIR`, where
/// other users make directories too.
///
/// # Errors
/// `AlreadyExists` if something has that name; those of the file system.
pub fn create_private_dir(path: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().mode(0o700).create(path)?;
    give_owner_rights(path)
}

/// Gives the owner of a directory all rights to it, if that is this user and one is missing.
///
/// # Errors
/// Of the file system.
pub fn give_owner_rights(path: &Path) -> std::io::Result<()> {
    let meta = std::fs::symlink_metadata(path)?;
    let ours = meta.is_dir() && meta.uid() == rustix::process::geteuid().as_raw();
    if !ours || meta.mode() & 0o700 == 0o700 {
        return Ok(());
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(meta.mode() & 0o7777 | 0o700))
}

/// The mode of a directory in which a QEMU with a user of its own makes sockets. Its group is that user's, and what is made there
/// gets it, too; a file can be replaced or removed only by its owner and by the directory's.
pub const SHARED_WITH_GROUP: u32 = 0o3770;

/// Makes a socket that was just bound its owner's alone (0600), whatever the umask of this process; in a directory that is
/// [`SHARED_WITH_GROUP`], its group's, too (0660).
///
/// # Errors
/// Of the file system.
pub fn make_socket_private(path: &Path) -> std::io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let is_shared = std::fs::metadata(parent)?.mode() & 0o7777 == SHARED_WITH_GROUP;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(if is_shared { 0o660 } else { 0o600 }))
}

/// Removes what is left of a socket, so that its path can be bound again.
///
/// # Errors
/// Of the file system; not that there is nothing.
pub fn remove_socket(path: &Path) -> std::io::Result<()> {
    std::fs::remove_file(path).or_else(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_its_groups_only_in_a_directory_that_is_shared() {
        let root = tempfile::tempdir().unwrap();
        for (of_directory, of_socket) in [(0o700, 0o600), (0o770, 0o600), (0o2770, 0o600), (SHARED_WITH_GROUP, 0o660)] {
            std::fs::set_permissions(root.path(), std::fs::Permissions::from_mode(of_directory)).unwrap();
            let path = root.path().join("a.sock");
            remove_socket(&path).unwrap();
            let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
            make_socket_private(&path).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, of_socket, "{of_directory:o}");
        }
    }

    // A socket that could not be removed was "address in use" when its path was bound.
    #[test]
    fn a_socket_that_cannot_be_removed_is_reported_and_a_missing_one_is_not() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a.sock");
        remove_socket(&path).unwrap();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        remove_socket(&path).unwrap();
        assert!(!path.exists());
        std::fs::create_dir(&path).unwrap();
        remove_socket(&path).unwrap_err();
        assert!(path.exists());
    }

    /// Directories that a supervisor made could not be entered by an ordinary user: snapshots and forks of running VMs failed.
    #[test]
    fn directories_are_usable_whatever_the_umask() {
        let root = tempfile::tempdir().unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        // The umask belongs to the process, and other tests run in it: a directory with too few rights stands for one.
        let (outer, inner) = (root.path().join("a"), root.path().join("a/b/c"));
        make_private_dir(&inner).unwrap();
        assert_eq!((mode(&outer), mode(&inner)), (0o700, 0o700));
        for earlier in [0o600, 0o200, 0o000] {
            std::fs::set_permissions(&outer, std::fs::Permissions::from_mode(earlier)).unwrap();
            make_private_dir(&outer).unwrap();
            assert_eq!(mode(&outer), 0o700);
        }
        // More than that is the user's business.
        std::fs::set_permissions(&outer, std::fs::Permissions::from_mode(0o755)).unwrap();
        make_private_dir(&outer).unwrap();
        assert_eq!(mode(&outer), 0o755);
        std::fs::write(root.path().join("file"), b"").unwrap();
        assert!(make_private_dir(&root.path().join("file")).is_err());
    }
}
