//! Which files a command line of [`super::argv`] makes QEMU use. Pure, but for a look at the program.

use std::path::{Path, PathBuf};

use super::argv::{Files, Memory};
use crate::confine::{Needs, plan};
use crate::machine::{Accel, Machine, Transport};

/// What QEMU needs of the host to run a machine in a VM's directory (an absolute path).
#[must_use]
pub fn needs(machine: &Machine, files: &Files, program: &Path, directory: &Path) -> Needs {
    let absolute = |name: &std::ffi::OsString| directory.join(name);
    let is_outside = |path: &PathBuf| !path.starts_with(directory);
    let mut read: Vec<_> = [&files.kernel, &files.initrd].into_iter().chain(&files.disk.bases).map(absolute).collect();
    let mut write = Vec::new();
    match &files.memory {
        Memory::Image { path, read_only: true } => read.push(absolute(path)),
        Memory::Image { path, read_only: false } => write.push(absolute(path)),
        Memory::Fresh | Memory::File(_) => {}
    }
    read.retain(is_outside);
    Needs {
        program: directory.join(program),
        is_script: plan::is_script(program),
        directory: directory.to_owned(),
        own: vec![directory.to_owned()],
        change: Vec::new(),
        read,
        write,
        kvm: machine.accel == Accel::Kvm,
        vsock: matches!(machine.transport, Transport::Vsock { .. }),
    }
}
