//! Which files a command line of [`super::argv`] makes QEMU use. Pure, but for a look at the program.

use std::path::Path;

use super::argv::{Files, Memory};
use crate::confine::{Needs, plan};
use crate::home::QEMU_DIRECTORY;
use crate::machine::{Accel, Machine, Transport};

/// What QEMU needs of the host to run a machine in a VM's directory (an absolute path). The files that it changes have to exist: it cannot make
/// any outside of the directory of its sockets.
#[must_use]
pub fn needs(machine: &Machine, files: &Files, program: &Path, directory: &Path) -> Needs {
    let absolute = |name: &std::ffi::OsString| directory.join(name);
    let boot = [&files.kernel, &files.initrd, &files.guest_config];
    let mut read: Vec<_> = boot.into_iter().chain(&files.disk.bases).map(absolute).collect();
    let mut change = vec![absolute(&files.disk.overlay), absolute(&files.console_log)];
    let mut write = Vec::new();
    match &files.memory {
        Memory::Image { path, read_only: true } => read.push(absolute(path)),
        Memory::Image { path, read_only: false } => write.push(absolute(path)),
        Memory::File(path) => change.push(absolute(path)),
        Memory::Fresh => {}
    }
    Needs {
        program: directory.join(program),
        is_script: plan::is_script(program),
        directory: directory.to_owned(),
        own: vec![directory.join(QEMU_DIRECTORY)],
        change,
        read,
        write,
        kvm: machine.accel == Accel::Kvm,
        vsock: matches!(machine.transport, Transport::Vsock { .. }),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::qemu::argv::Disk;

    #[test]
    fn of_the_vms_directory_qemu_uses_single_files_and_the_directory_of_its_sockets() {
        let machine = crate::qemu::argv_golden::microvm();
        let files = Files {
            disk: Disk {
                overlay: "disk.qcow2".into(),
                bases: vec!["/blobs/root".into()],
                ephemeral: false,
                has_quota: false,
            },
            console_log: "console.log".into(),
            guest_config: "guest.cbor".into(),
            kernel: "/blobs/kernel".into(),
            initrd: "/blobs/initrd".into(),
            memory: Memory::File("memory.img".into()),
            ..Files::default()
        };
        let needs = needs(&machine, &files, Path::new("/usr/bin/qemu"), Path::new("/vm"));
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(needs.own, paths(&["/vm/qemu"]));
        assert_eq!(needs.change, paths(&["/vm/disk.qcow2", "/vm/console.log", "/vm/memory.img"]));
        assert_eq!(needs.read, paths(&["/blobs/kernel", "/blobs/initrd", "/vm/guest.cbor", "/blobs/root"]));
        assert!(needs.write.is_empty());
    }
}
