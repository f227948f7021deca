//! Homes with small templates in them, and archives made by hand.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use super::super::{ImportOptions, ImportOutcome, OwnAgent, import_with};
use crate::archive::{Frame, Head};
use crate::digest::{sha256, sparse_sha256, unhex};
use crate::error::ImageError;
use crate::export::{ExportOptions, ExportOutcome, export};
use crate::manifest::tests::sample;
use crate::manifest::{Bake, BakedMachine, Digest, Disk, Manifest, Part, QemuId};
use crate::store::Store;
use crate::transfer::TransferWatch;

/// The agent of the homes here, of which only this much matters.
pub const AGENT: OwnAgent<'static> = OwnAgent {
    binary: b"the agent",
    sha256: "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    protocol: 1,
};

/// The contents of a template's parts.
pub struct Contents {
    pub vmlinux: Vec<u8>,
    pub initramfs: Vec<u8>,
    pub base: Vec<u8>,
    pub root: Vec<u8>,
    pub packages: Vec<u8>,
    pub memory: Vec<u8>,
    pub state: Vec<u8>,
    /// The backing layer of the bake, if not the overlay that belongs to the root disk.
    pub overlay: Option<Vec<u8>>,
}

/// A home.
pub struct Rig {
    home: tempfile::TempDir,
    /// Of the template `sandbox`, if there is one.
    pub manifest: Manifest,
}

/// A qcow2 image of a GiB according to its header; on `backing` if that is not empty.
pub fn qcow2(backing: &str, length: usize) -> Vec<u8> {
    let mut image = b"QFI\xfb\0\0\0\x03".to_vec();
    image.resize(length.max(1024), 0);
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(20, &16_u32.to_be_bytes());
    put(24, &(1_u64 << 30).to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    if !backing.is_empty() {
        put(8, &512_u64.to_be_bytes());
        put(16, &u32::try_from(backing.len()).unwrap().to_be_bytes());
        put(104, &0xe279_2aca_u32.to_be_bytes());
        put(108, &5_u32.to_be_bytes());
        put(112, b"qcow2");
        put(512, backing.as_bytes());
    }
    image
}

impl Contents {
    fn small() -> Self {
        let base = b"modules".to_vec();
        let mut root = qcow2("", 2 * 65536 + 700);
        root[2 * 65536 + 20] = 1;
        let mut memory = vec![0; 1 << 20];
        memory[3 * 65536..3 * 65536 + 20].copy_from_slice(b"what a guest was at ");
        Self {
            vmlinux: b"\x7fELF the kernel".to_vec(),
            initramfs: crate::initramfs::with_agent(&base, AGENT.binary).unwrap(),
            base,
            root,
            packages: b"bash 5.2 amd64\n".to_vec(),
            memory,
            state: b"registers".to_vec(),
            overlay: None,
        }
    }
}

impl Rig {
    /// Without a template.
    pub fn empty() -> Self {
        Self { home: tempfile::tempdir().unwrap(), manifest: sample("sandbox") }
    }

    /// With a template of a few hundred bytes and one bake.
    pub fn small() -> Self {
        Self::with(|_| {})
    }

    /// With a template that has large holes.
    pub fn large() -> Self {
        Self::with(|parts| {
            parts.memory = vec![0; 64 << 20];
            parts.memory[40 << 20] = 1;
            parts.memory[(64 << 20) - 1] = 2;
            parts.root = qcow2("", 3 << 20);
            parts.root[(3 << 20) - 5] = 3;
            parts.vmlinux = [b"\x7fELF".to_vec(), (0..400_000_u32).flat_map(u32::to_le_bytes).collect()].concat();
        })
    }

    /// With a small template of other contents.
    pub fn with(change: impl FnOnce(&mut Contents)) -> Self {
        let mut contents = Contents::small();
        change(&mut contents);
        let mut rig = Self::empty();
        rig.publish(&contents);
        rig
    }

    fn publish(&mut self, contents: &Contents) {
        let store = Store::new(self.home());
        store.create().unwrap();
        let lock = store.lock().unwrap();
        let put = |content: &[u8], digest: Digest| {
            let path = self.home().join("new");
            fs::write(&path, content).unwrap();
            let hash = match digest {
                Digest::Plain => sha256(content),
                Digest::Sparse => sparse_sha256(&fs::File::open(&path).unwrap()).unwrap().0,
            };
            let part = Part { sha256: hash, bytes: content.len() as u64 };
            store.import(&path, &part, &lock).unwrap();
            part
        };
        let plain = |content: &[u8]| put(content, Digest::Plain);
        let disk = |file: Part| Disk { file, virtual_bytes: 1 << 30 };
        let mut manifest = sample("sandbox");
        manifest.parts.vmlinux = plain(&contents.vmlinux);
        manifest.parts.initramfs = plain(&contents.initramfs);
        manifest.parts.initramfs_base = plain(&contents.base);
        manifest.parts.root = disk(plain(&contents.root));
        manifest.parts.packages = plain(&contents.packages);
        manifest.agent.sha256 = AGENT.sha256.to_owned();
        let backing = format!("../../blobs/sha256/{}", manifest.parts.root.file.sha256);
        let overlay = contents.overlay.clone().unwrap_or_else(|| qcow2(&backing, 1024));
        manifest.bakes.push(Bake {
            created_at: manifest.created_at,
            machine: BakedMachine {
                machine: "microvm".into(),
                accel: "tcg".into(),
                cpu_model: "max".into(),
                cpus: 1,
                memory_mib: u32::try_from(contents.memory.len() >> 20).unwrap(),
                net: "nat".into(),
                transport: "virtio-serial".into(),
                tsc_khz: Some(2_000_000),
                host_cpu: None,
                devices: String::new(),
            },
            qemu: QemuId { version: "7.2".into(), sha256: sha256(b"qemu") },
            token: "00ff".into(),
            memory: put(&contents.memory, Digest::Sparse),
            state: plain(&contents.state),
            disk: disk(plain(&overlay)),
        });
        store.publish(&manifest, &lock).unwrap();
        self.manifest = manifest;
    }

    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// The template as an archive.
    pub fn archive(&self) -> Vec<u8> {
        self.export(ExportOptions::default())
    }

    pub fn export(&self, options: ExportOptions) -> Vec<u8> {
        let mut archive = Vec::new();
        let done = self.try_export(options, &mut archive).unwrap();
        assert_eq!(done.archive_bytes, archive.len() as u64);
        archive
    }

    pub fn try_export(&self, options: ExportOptions, target: &mut dyn Write) -> Result<ExportOutcome, ImageError> {
        let cancel = AtomicBool::new(false);
        let mut watch = TransferWatch { progress: &mut |_| {}, cancel: &cancel };
        export(self.home(), "sandbox", options, (target, Path::new("test")), &mut watch)
    }

    pub fn import(&self, archive: &[u8], options: &ImportOptions) -> Result<ImportOutcome, ImageError> {
        import_into(AGENT, self.home(), archive, options)
    }

    /// Expects that an archive is refused and nothing of it is left; gives the reason.
    #[track_caller]
    pub fn refuses(&self, archive: &[u8]) -> String {
        let refused = self.import(archive, &ImportOptions::default()).unwrap_err();
        assert!(matches!(refused, ImageError::ArchiveRefused { .. }), "{refused}");
        assert_eq!(self.leftovers(), [""; 0]);
        refused.to_string()
    }

    /// Every file but those of the store, and those too if no template names them.
    pub fn leftovers(&self) -> Vec<String> {
        let store = Store::new(self.home());
        let named: Vec<_> = store.ls().unwrap().into_iter().map(Result::unwrap).collect();
        walkdir::WalkDir::new(self.home())
            .min_depth(1)
            .into_iter()
            .map(Result::unwrap)
            .filter(|entry| entry.file_type().is_file() || entry.path().parent().unwrap().ends_with("build"))
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| {
                let of = |manifest: &Manifest| {
                    *name == format!("{}.json", manifest.name)
                        || manifest.all_parts().any(|(_, p, _)| p.sha256 == *name)
                };
                !named.iter().any(of)
            })
            .collect()
    }

    pub fn blobs(&self) -> usize {
        fs::read_dir(self.home().join("blobs/sha256")).unwrap().count()
    }
}

pub fn import_into(
    agent: OwnAgent<'_>,
    home: &Path,
    mut archive: &[u8],
    options: &ImportOptions,
) -> Result<ImportOutcome, ImageError> {
    let cancel = AtomicBool::new(false);
    let mut watch = TransferWatch { progress: &mut |_| {}, cancel: &cancel };
    import_with(agent, home, &mut archive, options, &mut watch)
}

/// The archive of these bytes.
pub fn compress(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Head and manifest, as JSON that may be anything.
pub fn opening(json: &[u8]) -> Vec<u8> {
    [Head::of(json).encode(), json.to_vec()].concat()
}

/// The frames of one part with one extent.
pub fn part(part: &Part, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap();
    let begin = Frame::Part { sha256: unhex(&part.sha256).unwrap(), bytes: part.bytes }.encode();
    [begin, Frame::Extent { offset: 0, length }.encode(), content.to_vec(), Frame::PartEnd.encode()].concat()
}
