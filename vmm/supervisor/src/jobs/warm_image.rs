//! Taking the files of a saved guest into the store of parts.

use std::fs::File;
use std::path::{Path, PathBuf};

use nido_api::error::{Error, Result};
use nido_engine::bake::qemu_id;
use nido_engine::home::{DEVICE_STATE, DISK, MEMORY_IMAGE, VmDir};
use nido_engine::host::QemuFacts;
use nido_engine::machine::Machine;
use nido_images::{Bake, Disk, Part, hash_file, sparse_sha256};

use super::HostProbe;

/// A saved guest, and what is recorded with it.
#[derive(Debug)]
pub(crate) struct WarmImage {
    pub host: HostProbe,
    pub machine: Machine,
    /// The agent's token, in hexadecimal.
    pub token: String,
    pub disk_bytes: u64,
    pub dir: VmDir,
    /// The directory of the home.
    pub home: PathBuf,
}

impl WarmImage {
    /// Hashes the files and takes them into the store of parts.
    ///
    /// # Errors
    /// `disk_full`, `internal`, those of a test of QEMU.
    pub(crate) fn keep(self) -> Result<Bake> {
        let qemu = self.host.qemu()?;
        let machine = self.host.shape(&self.machine);
        let here = |name: &str| self.dir.file(name);
        let (state, disk) = (hash_file(&here(DEVICE_STATE))?, hash_file(&here(DISK))?);
        let memory = memory_part(&here(MEMORY_IMAGE))?;
        let images = nido_images::Store::new(&self.home);
        let lock = images.lock()?;
        images.import_as(&here(MEMORY_IMAGE), &memory, memory_mode(&qemu), &lock)?;
        nido_files::failpoint!("save.memory-kept");
        images.import(&here(DEVICE_STATE), &state, &lock)?;
        images.import(&here(DISK), &disk, &lock)?;
        nido_files::failpoint!("save.disk-kept");
        Ok(Bake {
            created_at: nido_api::moment::now(),
            machine,
            qemu: qemu_id(&qemu),
            token: self.token,
            memory,
            state,
            disk: Disk { file: disk, virtual_bytes: self.disk_bytes },
        })
    }
}

fn memory_part(path: &Path) -> Result<Part> {
    let broken = |e| Error::io("cannot read the saved memory", e);
    let file = File::open(path).map_err(broken)?;
    let (sha256, _) = sparse_sha256(&file).map_err(broken)?;
    Ok(Part { sha256, bytes: file.metadata().map_err(broken)?.len() })
}

/// An older QEMU opens the image for writing although it maps it privately, and root's has no capabilities either.
fn memory_mode(qemu: &QemuFacts) -> u32 {
    if qemu.memory_file_rom { 0o400 } else { 0o600 }
}
