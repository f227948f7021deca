//! What the initramfs holds: the agent as `/init`, the modules it loads, the directories it mounts on. Nothing else.
//! It is two archives, one after the other: `base` (modules, made with the kernel) and the agent's. So a new agent costs no new
//! kernel stage. Invariant: `/lib/modules/list` names exactly the module files next to it, in loading order.

use crate::cpio::{Archive, Entry, TooLarge};

/// A kernel module ready to load: uncompressed, file name `<name>.ko`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// File name, for example `virtio_blk.ko`.
    pub file: String,
    /// The ELF object.
    pub bytes: Vec<u8>,
}

/// The archive that depends on the kernel only. Modules are in loading order.
///
/// # Errors
/// [`TooLarge`] if a module does not fit the format.
pub fn base(modules: &[Module]) -> Result<Vec<u8>, TooLarge> {
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "run", "newroot", "lib", "lib/modules"] {
        archive.add(directory, 0o755, Entry::Directory)?;
    }
    archive.add("dev/console", 0o600, Entry::CharacterDevice { major: 5, minor: 1 })?;
    let mut list = String::new();
    for module in modules {
        archive.add(&format!("lib/modules/{}", module.file), 0o644, Entry::File(&module.bytes))?;
        list.push_str(&module.file);
        list.push('\n');
    }
    archive.add("lib/modules/list", 0o644, Entry::File(list.as_bytes()))?;
    archive.finish()
}

/// The whole initramfs: `base` followed by the agent. Uncompressed, because decompression is slow under emulation.
///
/// # Errors
/// [`TooLarge`] if the agent does not fit the format.
pub fn with_agent(base: &[u8], agent: &[u8]) -> Result<Vec<u8>, TooLarge> {
    let mut archive = Archive::default();
    archive.add("init", 0o755, Entry::File(agent))?;
    let mut initramfs = base.to_vec();
    initramfs.extend_from_slice(&archive.finish()?);
    Ok(initramfs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpio::tests::read;

    #[test]
    fn the_list_names_the_modules_in_loading_order() {
        let module = |file: &str| Module { file: file.to_owned(), bytes: file.as_bytes().to_vec() };
        let base = base(&[module("vsock.ko"), module("a.ko")]).unwrap();
        let entries = read(&with_agent(&base, b"agent").unwrap());
        let content = |path: &str| entries.iter().find(|entry| entry.0 == path).map(|entry| entry.2.clone());
        assert_eq!(content("lib/modules/list").unwrap(), b"vsock.ko\na.ko\n");
        assert_eq!(content("lib/modules/vsock.ko").unwrap(), b"vsock.ko");
        assert_eq!(content("init").unwrap(), b"agent");
    }
}
