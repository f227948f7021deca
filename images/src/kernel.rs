//! The kernel out of Debian's package: the uncompressed ELF inside a bzImage, and the order modules load in.
//! Pure, but for the xz program where an image or a module is packed that way (see `build/`).

use std::collections::BTreeSet;

pub use nido_api::KernelChoice;

/// The modules the agent needs before the root disk is there. What the kernel has built in is left out.
pub const BOOT_MODULES: [&str; 8] = [
    "qemu_fw_cfg",
    "virtio_mmio",
    "virtio_pci",
    "vmw_vsock_virtio_transport",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "pvpanic_mmio",
];

/// Largest kernel accepted, in bytes, packed or not.
pub const MAX_KERNEL_BYTES: usize = 512 * 1024 * 1024;

/// The kernel proper inside a bzImage, still packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload<'a> {
    /// How it is packed.
    pub packing: KernelCompression,
    /// The packed bytes, without the length that follows them.
    pub bytes: &'a [u8],
    /// Length of the unpacked kernel in bytes.
    pub unpacked_bytes: usize,
}

/// How a bzImage packs its kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelCompression {
    /// One zstd frame.
    Zstd,
    /// An xz stream (with the x86 filter).
    Xz,
}

/// Finds the packed kernel in a bzImage by the fields of its setup header.
///
/// # Errors
/// A sentence that describes the mismatch.
pub fn payload(image: &[u8]) -> Result<Payload<'_>, String> {
    let word = |at: usize| image.get(at..at + 4).map(|bytes| le32(bytes) as usize);
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err("it is not a bzImage".to_owned());
    }
    if image.get(0x206..0x208).is_none_or(|version| u16::from_le_bytes([version[0], version[1]]) < 0x0208) {
        return Err("its boot protocol is older than 2.08".to_owned());
    }
    let sectors = match image.get(0x1f1) {
        Some(0) | None => 4,
        Some(count) => usize::from(*count),
    };
    let (Some(offset), Some(length)) = (word(0x248), word(0x24c)) else {
        return Err("its header is truncated".to_owned());
    };
    let start = ((sectors + 1) * 512).checked_add(offset).ok_or("its payload is out of range")?;
    let end = start.checked_add(length).ok_or("its payload is out of range")?;
    let packed = image.get(start..end).filter(|packed| packed.len() > 8).ok_or("its payload is out of range")?;
    let (bytes, tail) = packed.split_at(packed.len() - 4);
    let packing = match bytes {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => KernelCompression::Zstd,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => KernelCompression::Xz,
        _ => return Err("it is compressed neither with zstd nor with xz".to_owned()),
    };
    let unpacked_bytes = le32(tail) as usize;
    if unpacked_bytes > MAX_KERNEL_BYTES {
        return Err(format!("it claims to unpack to {unpacked_bytes} bytes"));
    }
    Ok(Payload { packing, bytes, unpacked_bytes })
}

/// Unpacks a zstd payload to exactly the length its image announces.
///
/// # Errors
/// A sentence that describes the mismatch.
pub fn unpack_zstd(payload: Payload<'_>) -> Result<Vec<u8>, String> {
    use std::io::Read as _;
    let mut kernel = Vec::with_capacity(payload.unpacked_bytes);
    zstd::Decoder::with_buffer(payload.bytes)
        .map(|decoder| decoder.single_frame().take(payload.unpacked_bytes as u64 + 1))
        .and_then(|mut decoder| decoder.read_to_end(&mut kernel))
        .map_err(|error| format!("its zstd data is damaged: {error}"))?;
    check_vmlinux(&kernel, payload.unpacked_bytes)?;
    Ok(kernel)
}

/// Checks that `kernel` is a 64-bit x86 ELF file of the announced length.
///
/// # Errors
/// A sentence that describes the mismatch.
pub fn check_vmlinux(kernel: &[u8], announced: usize) -> Result<(), String> {
    if kernel.len() != announced {
        return Err(format!("it unpacks to {} bytes instead of {announced}", kernel.len()));
    }
    if !kernel.starts_with(b"\x7fELF\x02\x01") || kernel.get(18..20) != Some(&[62, 0]) {
        return Err("its payload is not an x86-64 ELF file".to_owned());
    }
    Ok(())
}

/// The files of the `wanted` modules and of all they depend on, in loading order, as written in `modules.dep`
/// (paths relative to the modules directory).
///
/// # Errors
/// A sentence that names a module that is neither a file nor built in, or a dependency that is not listed.
pub fn loading_order(wanted: &[&str], modules_dep: &str, modules_builtin: &str) -> Result<Vec<String>, String> {
    let builtin: BTreeSet<String> = modules_builtin.lines().map(module_name).collect();
    let files: Vec<(&str, Vec<&str>)> = modules_dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needs)| (file.trim(), needs.split_whitespace().collect()))
        .collect();
    let mut order: Vec<String> = Vec::new();
    for name in wanted {
        let Some((file, needs)) = files.iter().find(|(file, _)| module_name(file) == *name) else {
            if builtin.contains(*name) {
                continue;
            }
            return Err(format!("it has no module {name}"));
        };
        // depmod lists all dependencies, the innermost last.
        for path in needs.iter().rev().chain([file]) {
            if !files.iter().any(|(known, _)| known == path) {
                return Err(format!("the module {name} needs {path}, which is missing"));
            }
            if !order.iter().any(|known| known == path) {
                order.push((*path).to_owned());
            }
        }
    }
    Ok(order)
}

/// `kernel/net/vmw_vsock/vsock.ko.xz` -> `vsock`. Dashes and underscores are the same in module names.
#[must_use]
pub fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

fn le32(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn elf(length: usize) -> Vec<u8> {
        let mut kernel = vec![7; length];
        kernel[..6].copy_from_slice(b"\x7fELF\x02\x01");
        kernel[18..20].copy_from_slice(&[62, 0]);
        kernel
    }

    fn bzimage(packed: &[u8], announced: u32) -> Vec<u8> {
        let mut image = vec![0; 2 * 512 + 16];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(packed.len() as u32 + 4).to_le_bytes());
        image.extend_from_slice(packed);
        image.extend_from_slice(&announced.to_le_bytes());
        image.extend_from_slice(b"what follows");
        image
    }

    #[test]
    fn a_zstd_kernel_is_unpacked_completely() {
        let kernel = elf(5000);
        let image = bzimage(&zstd::encode_all(&kernel[..], 3).unwrap(), 5000);
        assert_eq!(unpack_zstd(payload(&image).unwrap()).unwrap(), kernel);
    }

    #[test]
    fn a_kernel_larger_than_announced_is_refused() {
        let image = bzimage(&zstd::encode_all(&elf(5000)[..], 3).unwrap(), 4000);
        assert!(unpack_zstd(payload(&image).unwrap()).is_err());
    }

    #[test]
    fn other_packings_are_named_as_the_reason() {
        assert!(payload(&bzimage(b"\x1f\x8b gzip data", 1)).unwrap_err().contains("zstd"));
        assert_eq!(payload(&bzimage(b"\xfd7zXZ\0 and so on", 1)).unwrap().packing, KernelCompression::Xz);
    }

    proptest! {
        #[test]
        fn no_image_makes_the_parser_panic(mut image: Vec<u8>, header: [u8; 8], at in 0_usize..2000) {
            image.resize(image.len().max(0x260), 0);
            image[0x202..0x206].copy_from_slice(b"HdrS");
            image[0x206..0x208].copy_from_slice(&[15, 2]);
            image[0x248..0x250].copy_from_slice(&header);
            let end = image.len().min(at);
            let _ = payload(&image);
            let _ = payload(&image[..end]);
        }
    }

    const DEP: &str = "kernel/a/virtio_net.ko.xz: kernel/b/net_failover.ko.xz kernel/c/failover.ko.xz\n\
        kernel/b/net_failover.ko.xz: kernel/c/failover.ko.xz\nkernel/c/failover.ko.xz:\nkernel/d/virtio-rng.ko.xz:\n";

    #[test]
    fn dependencies_load_first_and_once() {
        let order = loading_order(&["virtio_net", "net_failover", "virtio_rng"], DEP, "").unwrap();
        let names: Vec<_> = order.iter().map(|path| module_name(path)).collect();
        assert_eq!(names, ["failover", "net_failover", "virtio_net", "virtio_rng"]);
    }

    #[test]
    fn a_release_name_identifies_its_kernel() {
        assert_eq!(KernelChoice::of("6.1.192-nido-slim"), KernelChoice::Slim);
        assert_eq!(KernelChoice::of("6.12.117+deb12-cloud-amd64"), KernelChoice::Stock);
    }

    #[test]
    fn a_module_must_exist_or_be_built_in() {
        assert_eq!(loading_order(&["ext4"], DEP, "kernel/fs/ext4/ext4.ko\n"), Ok(vec![]));
        assert!(loading_order(&["ext4"], DEP, "").unwrap_err().contains("ext4"));
    }
}
