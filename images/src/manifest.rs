//! The manifest of a template: everything needed to boot it, and how it came to be. It is the file
//! `templates/<name>.json`. Invariant: a manifest that was parsed names its parts by well-formed hashes only.

use jiff::Timestamp;
use nido_api::egress::{EGRESS_RULES_MAX, EgressRule};
use serde::{Deserialize, Serialize};

use crate::digest::is_sha256;

/// Version of the manifest and of what a build makes of a recipe. A template of another version is rebuilt, so a change of
/// the stages that must reach existing templates raises it.
pub const FORMAT: u32 = 1;
/// Version of a manifest with [`Manifest::allow`]: a program that does not know that field must not make VMs of the template.
const FORMAT_WITH_RULES: u32 = 2;

/// A template as published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`] of the program that wrote it, or that of a manifest with rules.
    pub format: u32,
    /// Name of the template.
    pub name: String,
    /// What it was built from.
    pub recipe: RecipeId,
    /// When it was published.
    pub created_at: Timestamp,
    /// Processor architecture, `x86_64`.
    pub architecture: String,
    /// The program that runs as process 1 once the root disk is mounted.
    pub init: Init,
    /// The ordinary user inside, uid 1000.
    pub user: String,
    /// Login shell of root and of `user`.
    pub shell: String,
    /// The kernel.
    pub kernel: Kernel,
    /// The files, by hash.
    pub parts: Parts,
    /// The agent inside the initramfs.
    pub agent: AgentId,
    /// Version of the nido that built it.
    pub built_by: String,
    /// The guest saved while it ran, once for each kind of machine: what VMs are forked from. May be empty.
    #[serde(default)]
    pub bakes: Vec<Bake>,
    /// Rules that bound those of the VMs made from it; no bound if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow: Option<Vec<EgressRule>>,
}

/// The recipe a template was built from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecipeId {
    /// Its name.
    pub name: String,
    /// SHA-256 over all its files.
    pub sha256: String,
}

/// The program that runs as process 1 in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// The guest agent itself.
    Agent,
    /// systemd; the agent is one of its services.
    Systemd,
}

/// The kernel of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// Release, as `uname -r` prints it.
    pub version: String,
    /// Kernel command line every machine type needs; the machine's own parameters are added to it.
    pub append: String,
}

/// The files of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parts {
    /// Uncompressed kernel (ELF).
    pub vmlinux: Part,
    /// Modules and agent (cpio, uncompressed).
    pub initramfs: Part,
    /// The part of the initramfs that depends on the kernel only.
    pub initramfs_base: Part,
    /// Root disk (qcow2, zstd clusters).
    pub root: Disk,
    /// Installed packages, one `name version architecture` a line, sorted.
    pub packages: Part,
}

/// One content-addressed file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// SHA-256 of the content, which is also the file's name.
    pub sha256: String,
    /// Its length in bytes.
    pub bytes: u64,
}

/// A content-addressed disk image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The file.
    #[serde(flatten)]
    pub file: Part,
    /// Size of the disk the guest sees, in bytes.
    pub virtual_bytes: u64,
}

/// The guest agent inside a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentId {
    /// SHA-256 of its binary.
    pub sha256: String,
    /// Version of the protocol it speaks.
    pub protocol: u16,
}

/// A guest of the template, saved while its agent waited for the host. A machine of the same kind resumes it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bake {
    /// When it was saved.
    pub created_at: Timestamp,
    /// The machine it was saved on.
    pub machine: BakedMachine,
    /// The QEMU it was saved by. No other can load it.
    pub qemu: QemuId,
    /// The token the saved agent expects, in hexadecimal. Used only until a fork's identity is reset.
    pub token: String,
    /// The guest's memory: a file as long as the memory, with holes. Its hash is that of [`crate::sparse_sha256`].
    pub memory: Part,
    /// Everything of the machine but its memory.
    pub state: Part,
    /// What the guest had written to its disk: an overlay on the template's root disk.
    pub disk: Disk,
}

impl std::fmt::Debug for Bake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the token.
        f.debug_struct("Bake").field("machine", &self.machine).field("qemu", &self.qemu).finish_non_exhaustive()
    }
}

/// Everything of a machine that its guest may have noticed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BakedMachine {
    /// `microvm`, `pc` or `q35`.
    pub machine: String,
    /// `kvm` or `tcg`.
    pub accel: String,
    /// CPU model with its switches.
    pub cpu_model: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// `nat` or `none`.
    pub net: String,
    /// `vsock` or `virtio-serial`.
    pub transport: String,
    /// Rate of the time-stamp counter in kHz, if the guest was given it.
    pub tsc_khz: Option<u32>,
    /// The host's CPU, where the guest sees it (`kvm`).
    pub host_cpu: Option<String>,
    /// Digest of the devices and their switches, in hexadecimal digits; empty in what was saved before they counted.
    #[serde(default)]
    pub devices: String,
}

impl BakedMachine {
    /// Whether a request for the one machine may get the other: they differ, if at all, in what no user requests (the
    /// rate of the clock, the devices of another nido), so of two bakes of them the older is of no use.
    #[must_use]
    pub fn is_asked_for_as(&self, other: &Self) -> bool {
        let asked = Self { tsc_khz: other.tsc_khz, devices: other.devices.clone(), ..self.clone() };
        asked == *other
    }
}

/// One build of QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuId {
    /// Its version, for people.
    pub version: String,
    /// SHA-256 of the program.
    pub sha256: String,
}

/// How a part's hash is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Digest {
    /// Over its bytes.
    Plain,
    /// Over its blocks that are not all zero: [`crate::sparse_sha256`].
    Sparse,
}

impl Manifest {
    /// Every part with its name and the kind of its hash, those of the bakes included.
    pub fn all_parts(&self) -> impl Iterator<Item = (&'static str, &Part, Digest)> {
        let plain = self.parts.all().into_iter().map(|(name, part)| (name, part, Digest::Plain));
        plain.chain(self.bakes.iter().flat_map(|bake| {
            [
                ("memory", &bake.memory, Digest::Sparse),
                ("state", &bake.state, Digest::Plain),
                ("disk", &bake.disk.file, Digest::Plain),
            ]
        }))
    }

    /// Parses and checks a manifest.
    ///
    /// # Errors
    /// A sentence that describes the error.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        let manifest: Self = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        let format = manifest.format;
        if !(FORMAT..=FORMAT_WITH_RULES).contains(&format) {
            return Err(format!("its format is {format}, this program reads {FORMAT} and {FORMAT_WITH_RULES}"));
        }
        if (format == FORMAT_WITH_RULES) != manifest.allow.is_some() {
            return Err(format!("its format is {format}, which does not fit whether it has rules for the network"));
        }
        if manifest.allow.as_ref().is_some_and(|rules| rules.len() > EGRESS_RULES_MAX) {
            return Err(format!("it has more than {EGRESS_RULES_MAX} rules for the network"));
        }
        let malformed = manifest.all_parts().find(|(_, part, _)| !is_sha256(&part.sha256));
        if let Some((name, ..)) = malformed {
            return Err(format!("the hash of {name} is malformed"));
        }
        Ok(manifest)
    }

    /// The same with rules that bound those of its VMs.
    #[must_use]
    pub fn with_rules(self, allow: Option<Vec<EgressRule>>) -> Self {
        Self { format: if allow.is_some() { FORMAT_WITH_RULES } else { FORMAT }, allow, ..self }
    }

    /// The manifest as it is stored: indented JSON with a line end.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        // Plain structs with string keys always serialize.
        let mut json = serde_json::to_vec_pretty(self).unwrap_or_default();
        json.push(b'\n');
        json
    }
}

impl Parts {
    /// Every part with its name.
    #[must_use]
    pub fn all(&self) -> [(&'static str, &Part); 5] {
        [
            ("vmlinux", &self.vmlinux),
            ("initramfs", &self.initramfs),
            ("initramfs_base", &self.initramfs_base),
            ("root", &self.root.file),
            ("packages", &self.packages),
        ]
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::digest::sha256;

    pub(crate) fn sample(name: &str) -> Manifest {
        let part = |content: &str| Part { sha256: sha256(content.as_bytes()), bytes: content.len() as u64 };
        Manifest {
            format: FORMAT,
            name: name.to_owned(),
            recipe: RecipeId { name: name.to_owned(), sha256: sha256(b"recipe") },
            created_at: Timestamp::from_second(1_700_000_000).unwrap(),
            architecture: "x86_64".to_owned(),
            init: Init::Systemd,
            user: "user".to_owned(),
            shell: "/bin/bash".to_owned(),
            kernel: Kernel { version: "6.12.1".to_owned(), append: "quiet".to_owned() },
            parts: Parts {
                vmlinux: part("vmlinux"),
                initramfs: part("initramfs"),
                initramfs_base: part("base"),
                root: Disk { file: part("root"), virtual_bytes: 1 << 31 },
                packages: part("packages"),
            },
            agent: AgentId { sha256: sha256(b"agent"), protocol: 1 },
            built_by: "0.1.0".to_owned(),
            bakes: Vec::new(),
            allow: None,
        }
    }

    #[test]
    fn a_manifest_survives_the_file() {
        let manifest = sample("sandbox");
        assert_eq!(Manifest::parse(&manifest.to_json()).unwrap(), manifest);
    }

    #[test]
    fn rules_survive_the_file_and_need_a_program_that_knows_them() {
        for rules in [vec![], vec!["pypi.org:443".parse().unwrap()]] {
            let manifest = sample("sandbox").with_rules(Some(rules));
            assert_eq!(manifest.format, FORMAT_WITH_RULES);
            assert_eq!(Manifest::parse(&manifest.to_json()).unwrap(), manifest);
            let ignored = Manifest { format: FORMAT, ..manifest.clone() };
            assert!(Manifest::parse(&ignored.to_json()).unwrap_err().contains("rules"));
            assert_eq!(manifest.with_rules(None), sample("sandbox"));
        }
        let without = Manifest { format: FORMAT_WITH_RULES, ..sample("sandbox") };
        assert!(Manifest::parse(&without.to_json()).unwrap_err().contains("rules"));
        let many = vec!["host:1".parse().unwrap(); EGRESS_RULES_MAX + 1];
        assert!(Manifest::parse(&sample("sandbox").with_rules(Some(many)).to_json()).unwrap_err().contains("256"));
    }

    #[test]
    fn a_hash_that_is_a_path_is_refused() {
        let mut manifest = sample("sandbox");
        manifest.parts.root.file.sha256 = "../../../etc/shadow".to_owned();
        assert!(Manifest::parse(&manifest.to_json()).unwrap_err().contains("root"));
    }

    #[test]
    fn of_two_bakes_that_differ_only_by_host_one_is_kept() {
        let machine = BakedMachine {
            machine: "microvm".to_owned(),
            accel: "tcg".to_owned(),
            cpu_model: "max".to_owned(),
            cpus: 1,
            memory_mib: 512,
            net: "nat".to_owned(),
            transport: "virtio-serial".to_owned(),
            tsc_khz: Some(2_000_000),
            host_cpu: None,
            devices: "d0".to_owned(),
        };
        let elsewhere = BakedMachine { tsc_khz: None, devices: "d1".to_owned(), ..machine.clone() };
        assert!(elsewhere.is_asked_for_as(&machine));
        assert!(!BakedMachine { memory_mib: 1024, ..machine.clone() }.is_asked_for_as(&machine));
        assert!(!BakedMachine { host_cpu: Some(String::new()), ..machine.clone() }.is_asked_for_as(&machine));
    }

    #[test]
    fn another_format_is_refused_by_its_number() {
        let mut manifest = sample("sandbox");
        manifest.format = FORMAT_WITH_RULES + 1;
        assert!(Manifest::parse(&manifest.to_json()).unwrap_err().contains("format"));
    }

    #[test]
    fn fuzz_manifest() {
        nido_fuzz::fuzz("manifest", &[sample("box").to_json()], |input| {
            if let Ok(manifest) = Manifest::parse(input) {
                assert_eq!(Manifest::parse(&manifest.to_json()), Ok(manifest));
            }
        });
    }
}
