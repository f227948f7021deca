//! The rights of a QEMU with a user of its own to the files of its plan, given before it starts.
//!
//! All files stay root's, so that root's programs without capabilities can use them. Outside of the VM's directory QEMU reads as one of
//! the others: the home is closed to them (0700), and its own root directory holds only what its plan names.
//!
//! Invariant: nothing in the VM's directory but what is named for it is open to QEMU's group. Each step can be repeated.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, fchown, lchown};
use std::path::Path;

use nido_engine::confine::{Needs, own_user};
use nido_files::private_dir::{SHARED_WITH_GROUP, make_socket_private};
use rustix::fs::{Mode, OFlags};

const PRIVATE_DIRECTORY: u32 = 0o700;
const GROUP_READS: u32 = 0o040;
const GROUP_WRITES: u32 = 0o020;
const OTHERS_READ: u32 = 0o004;
const OTHERS_WRITE: u32 = 0o002;
const OTHERS_EXECUTE: u32 = 0o001;

/// Gives a user the rights that a plan needs. Without one, takes back what an earlier start has given to the sockets' directory.
///
/// # Errors
/// Of the file system; a program that other users cannot execute.
pub(super) fn prepare(needs: &Needs, user: Option<u32>) -> io::Result<()> {
    let Some(user) = user else {
        return needs.own.iter().try_for_each(|directory| close(directory));
    };
    let mode = std::fs::metadata(&needs.program)?.mode();
    if mode & (OTHERS_READ | OTHERS_EXECUTE) != OTHERS_READ | OTHERS_EXECUTE {
        let program = needs.program.display();
        return Err(io::Error::other(format!("its own user cannot execute {program}: run chmod o+rx {program}")));
    }
    for directory in &needs.own {
        let opened = open(directory, OFlags::DIRECTORY)?;
        fchown(&opened, None, Some(user))?;
        opened.set_permissions(Permissions::from_mode(SHARED_WITH_GROUP))?;
        share_sockets(directory, user)?;
    }
    for file in &needs.change {
        share(&open(file, OFlags::empty())?, user, GROUP_READS | GROUP_WRITES)?;
    }
    for file in &needs.read {
        if file.parent() == Some(&needs.directory) {
            share(&open(file, OFlags::empty())?, user, GROUP_READS)?;
        } else {
            set_bits(&File::open(file)?, OTHERS_READ, GROUP_WRITES)?;
        }
    }
    needs.write.iter().try_for_each(|file| set_bits(&File::open(file)?, OTHERS_READ | OTHERS_WRITE, GROUP_WRITES))
}

/// Opens what is in the VM's directory, where a name is never a link.
fn open(path: &Path, kind: OFlags) -> io::Result<File> {
    Ok(rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | kind,
        Mode::empty(),
    )?
    .into())
}

/// Shares the sockets that the supervisor has bound before the directory was shared; no QEMU runs that could replace them. Those that
/// are bound later are shared by [`nido_files::private_dir::make_socket_private`].
fn share_sockets(directory: &Path, group: u32) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_socket() {
            lchown(entry.path(), None, Some(group))?;
            make_socket_private(&entry.path())?;
        }
    }
    Ok(())
}

fn share(file: &File, group: u32, bits: u32) -> io::Result<()> {
    fchown(file, None, Some(group))?;
    set_bits(file, bits, (GROUP_READS | GROUP_WRITES) & !bits)
}

/// Sets and clears bits of a mode; changes no file that has it already.
fn set_bits(file: &File, set: u32, clear: u32) -> io::Result<()> {
    let mode = file.metadata()?.mode() & 0o7777;
    let wanted = mode & !clear | set;
    if mode == wanted { Ok(()) } else { file.set_permissions(Permissions::from_mode(wanted)) }
}

/// Makes a directory its owner's alone if it was given to a QEMU's own user.
fn close(directory: &Path) -> io::Result<()> {
    let opened = open(directory, OFlags::DIRECTORY)?;
    let meta = opened.metadata()?;
    if !own_user::RANGE.contains(&meta.gid()) {
        return Ok(());
    }
    fchown(&opened, None, Some(rustix::process::getegid().as_raw()))?;
    opened.set_permissions(Permissions::from_mode(PRIVATE_DIRECTORY))
}

/// Lets QEMU before 8.2 open the memory of a warm image, which it does for writing although it maps it privately. Earlier versions of
/// nido made it read-only for root, whose QEMU has no capability any more to open it all the same.
pub(super) fn make_writable(image: &Path) -> io::Result<()> {
    const OWNER_WRITES: u32 = 0o200;
    let mode = std::fs::metadata(image)?.permissions().mode();
    if mode & OWNER_WRITES == 0 {
        std::fs::set_permissions(image, Permissions::from_mode(mode | OWNER_WRITES))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_is_read_only_becomes_writable_for_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("memory");
        std::fs::write(&image, b"memory").unwrap();
        let mode = || std::fs::metadata(&image).unwrap().permissions().mode() & 0o777;
        std::fs::set_permissions(&image, Permissions::from_mode(0o400)).unwrap();
        make_writable(&image).unwrap();
        assert_eq!(mode(), 0o600);
        std::fs::set_permissions(&image, Permissions::from_mode(0o644)).unwrap();
        make_writable(&image).unwrap();
        assert_eq!(mode(), 0o644);
    }

    fn file(path: &Path, mode: u32) {
        std::fs::write(path, b"content").unwrap();
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_user_is_given_what_the_plan_names_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(path("vm/qemu")).unwrap();
        std::fs::create_dir(path("blobs")).unwrap();
        for name in ["vm/disk", "vm/config", "vm/vm.json", "blobs/root", "blobs/memory", "blobs/other"] {
            file(&path(name), 0o600);
        }
        let _socket = std::os::unix::net::UnixListener::bind(path("vm/qemu/channel.sock")).unwrap();
        make_socket_private(&path("vm/qemu/channel.sock")).unwrap();
        // What was the disk of a VM before.
        file(&path("blobs/frozen"), 0o660);
        file(&path("program"), 0o755);
        let needs = Needs {
            program: path("program"),
            directory: path("vm"),
            own: vec![path("vm/qemu")],
            change: vec![path("vm/disk")],
            read: vec![path("vm/config"), path("blobs/root"), path("blobs/frozen")],
            write: vec![path("blobs/memory")],
            ..Needs::default()
        };
        // The only group that every user may give a file to.
        let group = rustix::process::getegid().as_raw();
        for _ in 0..2 {
            prepare(&needs, Some(group)).unwrap();
        }
        let expected = [
            ("vm/qemu", SHARED_WITH_GROUP),
            ("vm/qemu/channel.sock", 0o660),
            ("vm/disk", 0o660),
            ("vm/config", 0o640),
            ("vm/vm.json", 0o600),
            ("blobs/root", 0o604),
            ("blobs/frozen", 0o644),
            ("blobs/memory", 0o606),
            ("blobs/other", 0o600),
        ];
        for (name, mode) in expected {
            assert_eq!(std::fs::metadata(path(name)).unwrap().mode() & 0o7777, mode, "{name}");
        }
        std::fs::set_permissions(path("program"), Permissions::from_mode(0o700)).unwrap();
        assert!(prepare(&needs, Some(group)).unwrap_err().to_string().contains("chmod o+rx"));
    }

    #[test]
    fn a_link_in_place_of_a_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        file(&dir.path().join("secret"), 0o600);
        std::os::unix::fs::symlink("secret", dir.path().join("disk")).unwrap();
        assert!(open(&dir.path().join("disk"), OFlags::empty()).is_err());
    }
}
