//! The directory of the sockets between QEMU and its supervisor. The working directory is the VM's.
//!
//! Earlier versions had these sockets in the VM's directory. A QEMU that one of them started keeps the names that it was given:
//! its own sockets get a second name in the directory, and where it connects to are links to ours. Invariant: each step can be
//! repeated, so a supervisor may be killed between any two.

use std::fs::{hard_link, symlink_metadata};
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use nido_engine::home::{EARLIER_SOCKETS, QEMU_DIRECTORY};
use nido_files::private_dir::{make_private_dir_in_place, remove_socket};

/// The monitor of a QEMU that an earlier version started.
const EARLIER_MONITOR: &str = "qmp.sock";
/// Sockets that such a QEMU has bound, and those that it connects to.
const BOUND: [&str; 2] = [EARLIER_MONITOR, "net-qemu.sock"];
const CONNECTED: [&str; 2] = ["channel.sock", "net.sock"];

/// Makes the directory before a QEMU is started or taken over.
///
/// # Errors
/// Of the file system.
pub(super) fn prepare(here: &Path, takes_over: bool) -> io::Result<()> {
    make_private_dir_in_place(&here.join(QEMU_DIRECTORY))?;
    if !takes_over {
        return remove_earlier(here);
    }
    if symlink_metadata(here.join(EARLIER_MONITOR)).is_err() {
        return Ok(());
    }
    let inside = |name: &str| Path::new(QEMU_DIRECTORY).join(name);
    for name in BOUND {
        match hard_link(here.join(name), here.join(inside(name))) {
            Err(error) if !matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) => {
                return Err(error);
            }
            _ => {}
        }
    }
    for name in CONNECTED {
        let path = here.join(name);
        if !symlink_metadata(&path).is_ok_and(|file| file.is_symlink()) {
            remove_socket(&path)?;
            symlink(inside(name), &path)?;
        }
    }
    Ok(())
}

/// Removes what earlier versions have left.
///
/// # Errors
/// Of the file system.
pub(super) fn remove_earlier(here: &Path) -> io::Result<()> {
    EARLIER_SOCKETS.iter().try_for_each(|name| remove_socket(&here.join(name)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    /// A QEMU of an earlier version keeps its monitor, its channel and its network when its supervisor is replaced.
    #[test]
    fn a_qemu_of_an_earlier_version_is_reached_and_finds_its_supervisor() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let monitor = UnixListener::bind(path("qmp.sock")).unwrap();
        let card = UnixDatagram::bind(path("net-qemu.sock")).unwrap();
        drop(UnixListener::bind(path("channel.sock")).unwrap());
        for _ in 0..2 {
            prepare(dir.path(), true).unwrap();
            for name in ["qemu/channel.sock", "qemu/net.sock"] {
                remove_socket(&path(name)).unwrap();
            }
            let _client = UnixStream::connect(path("qemu/qmp.sock")).unwrap();
            monitor.accept().unwrap();
            let ours = UnixDatagram::bind(path("qemu/net.sock")).unwrap();
            card.send_to(b"to us", path("net.sock")).unwrap();
            ours.send_to(b"to QEMU", path("qemu/net-qemu.sock")).unwrap();
            assert_eq!((ours.recv(&mut [0; 9]).unwrap(), card.recv(&mut [0; 9]).unwrap()), (5, 7));
            let channel = UnixListener::bind(path("qemu/channel.sock")).unwrap();
            let _qemu = UnixStream::connect(path("channel.sock")).unwrap();
            channel.accept().unwrap();
        }
        prepare(dir.path(), false).unwrap();
        assert!(EARLIER_SOCKETS.iter().all(|name| symlink_metadata(path(name)).is_err()));
    }

    #[test]
    fn a_qemu_of_this_version_has_no_socket_in_the_vms_directory() {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path(), false).unwrap();
        let _monitor = UnixListener::bind(dir.path().join("qemu/qmp.sock")).unwrap();
        prepare(dir.path(), true).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
