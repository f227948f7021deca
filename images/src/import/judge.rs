//! What of an archive is acceptable before and after its parts are read. Pure but for the heads of disk images.
//! Invariant: a manifest that passed names parts of plausible sizes only, no hash in two meanings, and no text that could
//! be more than a word or a line.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use crate::manifest::{Bake, Digest, Manifest, Part};
use crate::qcow2::{read_overlay_header, read_qcow2_header};
use crate::store::check_name;

const MIB: u64 = 1024 * 1024;
/// Most that the parts of one template may come to, holes included, in bytes.
const MAX_TOTAL_BYTES: u64 = 64 * 1024 * MIB;
/// Largest disk a guest may see, in bytes.
const MAX_VIRTUAL_BYTES: u64 = 16 * 1024 * 1024 * MIB;
/// Most bakes of one template.
const MAX_BAKES: usize = 64;
/// What QEMU loads as the kernel begins so.
const ELF: [u8; 4] = *b"\x7fELF";

/// Judges a manifest by itself.
///
/// # Errors
/// What is wrong with it.
pub fn manifest(manifest: &Manifest) -> Result<(), String> {
    check_name(&manifest.name).map_err(|error| error.to_string())?;
    if manifest.architecture != "x86_64" {
        return Err(format!("it is for the architecture {}", crate::progress::printable(&manifest.architecture)));
    }
    let texts = [
        ("recipe", &manifest.recipe.name, 63),
        ("recipe's hash", &manifest.recipe.sha256, 64),
        ("user", &manifest.user, 32),
        ("shell", &manifest.shell, 255),
        ("kernel version", &manifest.kernel.version, 64),
        ("kernel command line", &manifest.kernel.append, 1024),
        ("agent's hash", &manifest.agent.sha256, 64),
        ("version of nido", &manifest.built_by, 64),
    ];
    texts.into_iter().try_for_each(|(what, text, longest)| plain(what, text, longest))?;
    virtual_size(manifest.parts.root.virtual_bytes)?;
    if manifest.bakes.len() > MAX_BAKES {
        return Err(format!("it has {} warm images, more than {MAX_BAKES}", manifest.bakes.len()));
    }
    manifest.bakes.iter().try_for_each(bake)?;
    parts(manifest)
}

fn bake(bake: &Bake) -> Result<(), String> {
    let machine = &bake.machine;
    let texts = [
        ("machine type", &machine.machine, 32),
        ("accelerator", &machine.accel, 32),
        ("CPU model", &machine.cpu_model, 1024),
        ("network", &machine.net, 32),
        ("transport", &machine.transport, 32),
        ("version of QEMU", &bake.qemu.version, 128),
        ("hash of QEMU", &bake.qemu.sha256, 64),
        ("token", &bake.token, 256),
    ];
    texts.into_iter().try_for_each(|(what, text, longest)| plain(what, text, longest))?;
    plain("host's CPU", machine.host_cpu.as_deref().unwrap_or_default(), 256)?;
    if !bake.token.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err("the token of a warm image is malformed".to_owned());
    }
    if bake.memory.bytes != u64::from(machine.memory_mib) * MIB {
        return Err(format!("a warm image of {} MiB has a memory of {} bytes", machine.memory_mib, bake.memory.bytes));
    }
    virtual_size(bake.disk.virtual_bytes)
}

/// Sizes, and hashes that mean one thing only.
fn parts(manifest: &Manifest) -> Result<(), String> {
    let mut total: u64 = 0;
    let mut seen: Vec<(&Part, Digest)> = Vec::new();
    for (name, part, digest) in manifest.all_parts() {
        if part.bytes > longest(name) {
            return Err(format!("its {name} of {} bytes is too large", part.bytes));
        }
        match seen.iter().find(|(other, _)| other.sha256 == part.sha256) {
            Some(same) if *same == (part, digest) => {}
            Some(_) => return Err(format!("the hash of its {name} is also that of another part")),
            None => {
                total = total.saturating_add(part.bytes);
                seen.push((part, digest));
            }
        }
    }
    if total > MAX_TOTAL_BYTES {
        return Err(format!("its parts have {} MiB, more than {}", total / MIB, MAX_TOTAL_BYTES / MIB));
    }
    Ok(())
}

/// Most bytes a part may have, by its name. The initramfs is held in memory when the agent is put in.
const fn longest(name: &str) -> u64 {
    match name.as_bytes() {
        b"vmlinux" => 512 * MIB,
        b"initramfs" | b"initramfs_base" | b"state" => 256 * MIB,
        b"packages" => 16 * MIB,
        _ => MAX_TOTAL_BYTES,
    }
}

fn virtual_size(bytes: u64) -> Result<(), String> {
    if bytes == 0 || bytes > MAX_VIRTUAL_BYTES || !bytes.is_multiple_of(512) {
        return Err(format!("{bytes} bytes is not a valid disk size"));
    }
    Ok(())
}

/// One line of printable ASCII.
fn plain(what: &str, text: &str, longest: usize) -> Result<(), String> {
    if text.len() > longest || !text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Err(format!("its {what} is not a short line of printable characters"));
    }
    Ok(())
}

/// Judges the content of parts whose hashes are right. They lie in `directory`, named by their hashes.
///
/// # Errors
/// What is wrong with them.
pub fn contents(manifest: &Manifest, directory: &Path) -> Result<(), String> {
    let path = |part: &Part| directory.join(&part.sha256);
    let mut head = [0; ELF.len()];
    let vmlinux = path(&manifest.parts.vmlinux);
    if !File::open(vmlinux).and_then(|mut file| file.read_exact(&mut head)).is_ok_and(|()| head == ELF) {
        return Err("its kernel is not an ELF file".to_owned());
    }
    let root = &manifest.parts.root;
    let header = read_qcow2_header(&path(&root.file)).map_err(|error| format!("its root disk: {}", reason(error)))?;
    if header.virtual_bytes != root.virtual_bytes {
        return Err(format!("its root disk has {} bytes, not {}", header.virtual_bytes, root.virtual_bytes));
    }
    for bake in &manifest.bakes {
        let overlay = read_overlay_header(&path(&bake.disk.file))
            .map_err(|error| format!("the disk of a warm image: {}", reason(error)))?;
        if overlay.header.virtual_bytes != bake.disk.virtual_bytes {
            return Err("the disk of a warm image does not have the size in its manifest".to_owned());
        }
        if !has_backing_file(&overlay.backing, &root.file.sha256) {
            return Err("the disk of a warm image is not based on the template's root disk".to_owned());
        }
    }
    Ok(())
}

/// Whether an overlay's name for its backing file is that of a part: as seen from its directory, or from a VM's directory.
fn has_backing_file(backing: &str, sha256: &str) -> bool {
    backing.strip_prefix("../../blobs/sha256/").unwrap_or(backing) == sha256
}

/// Without the path, which is that of a file that will be gone.
fn reason(error: crate::ImageError) -> String {
    match error {
        crate::ImageError::ImageRefused { reason, .. } => reason,
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::tests::sample;

    fn refused(change: impl FnOnce(&mut Manifest)) -> String {
        let mut changed = sample("sandbox");
        assert_eq!(manifest(&changed), Ok(()));
        change(&mut changed);
        manifest(&changed).unwrap_err()
    }

    #[test]
    fn manifests_that_cannot_be_are_refused() {
        assert!(refused(|m| m.name = "../x".into()).contains("not a template name"));
        assert!(refused(|m| m.architecture = "arm64\x1b[2J".into()).contains("arm64\\u{1b}"));
        assert!(refused(|m| m.kernel.append = "a\nb".into()).contains("kernel command line"));
        assert!(refused(|m| m.kernel.append = "a".repeat(2000)).contains("kernel command line"));
        assert!(refused(|m| m.shell = "/bin/\u{202e}hs".into()).contains("shell"));
        assert!(refused(|m| m.parts.root.virtual_bytes = 0).contains("not a valid disk size"));
        assert!(refused(|m| m.parts.root.virtual_bytes = u64::MAX).contains("not a valid disk size"));
        assert!(refused(|m| m.parts.packages.bytes = 1 << 40).contains("packages"));
        assert!(refused(|m| m.parts.root.file.bytes = u64::MAX).contains("too large"));
        assert!(refused(|m| m.parts.root.file.bytes = MAX_TOTAL_BYTES).contains("its parts have"));
        assert!(refused(|m| m.parts.root.file.sha256 = m.parts.vmlinux.sha256.clone()).contains("another part"));
    }

    #[test]
    fn an_overlay_must_name_exactly_its_root_disk() {
        let hash = "a".repeat(64);
        assert!(has_backing_file(&hash, &hash) && has_backing_file(&format!("../../blobs/sha256/{hash}"), &hash));
        for other in [format!("/blobs/sha256/{hash}"), format!("../{hash}"), "b".repeat(64), format!("json:{hash}")] {
            assert!(!has_backing_file(&other, &hash), "{other}");
        }
    }
}
