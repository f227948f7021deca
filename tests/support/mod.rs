//! What tests that run the real `nido` share: a home of their own, nido with a deadline, a terminal, and a guard.
//!
//! Invariant: when a [`Home`] is dropped, no process that belongs to it is left; if one was, the test fails.

pub mod http;
pub mod mcp;
pub mod processes;
pub mod random;
pub mod receiver;
pub mod run;
pub mod terminal;
pub mod tls;
pub mod websocket;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nido_images::{
    AGENT_PROTOCOL, AgentId, Disk, FORMAT, Init, Kernel, Manifest, Part, Parts, RecipeId, Store, hash_file,
};
use tempfile::TempDir;

pub use run::{Nido, RunningNido};

/// How long anything may take that a test waits for.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// How often a condition is checked: a test that waits leaves the processor to the processes that it waits for.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// A home of its own, with a fake QEMU.
pub struct Home {
    directory: TempDir,
    path: PathBuf,
}

impl Home {
    /// With the template `sandbox`, whose parts are a few bytes each, and a QEMU that behaves.
    pub fn new() -> Self {
        Self::at("home")
    }

    /// As [`Self::new`], at a path that ends in `tail`.
    pub fn at(tail: &str) -> Self {
        let home = Self::bare_at(tail);
        publish(&home.path(), "sandbox");
        home.qemu("");
        home
    }

    /// With nothing in it, and no QEMU.
    pub fn bare() -> Self {
        Self::bare_at("home")
    }

    fn bare_at(tail: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("nido-test-").tempdir().unwrap();
        let path = directory.path().join(tail);
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        Self { directory, path }
    }

    /// `NIDO_HOME`.
    pub fn path(&self) -> PathBuf {
        self.path.clone()
    }

    /// A place for the test's own files, outside of `NIDO_HOME`.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// From now on QEMU misbehaves like this; the words are those of `tests/fake-qemu/script.rs`.
    pub fn qemu(&self, words: &str) {
        let agent = self.scratch("agent");
        if !agent.exists() {
            write_program(&agent, nido_images::AGENT);
        }
        let fake = env!("CARGO_BIN_EXE_fake-qemu");
        let script = format!(
            "#!/bin/sh\nexport FAKE_QEMU='{words}' FAKE_QEMU_AGENT='{}'\nexec '{fake}' \"$@\"\n",
            agent.display()
        );
        // What was learned about another QEMU must not be remembered: the file may look the same otherwise.
        let _ = fs::remove_dir_all(self.path().join("cache"));
        write_program(&self.qemu_path(), script.as_bytes());
    }

    /// Where QEMU is, if there is one.
    pub fn qemu_path(&self) -> PathBuf {
        self.scratch("qemu")
    }

    /// A nido that is about to be run in this home.
    pub fn nido<const N: usize>(&self, arguments: [&str; N]) -> Nido<'_> {
        Nido::new(self, arguments.iter().map(Into::into).collect())
    }

    /// Spawns a VM and expects that to work.
    pub fn spawn(&self, name: &str) -> serde_json::Value {
        self.nido(["spawn", name, "--json", "--accel", "tcg"]).run().ok().json()
    }

    /// What nido reports about a VM.
    pub fn info(&self, name: &str) -> serde_json::Value {
        self.nido(["info", name, "--json"]).run().ok().json()
    }

    /// Waits until `wanted` holds for what nido reports about a VM.
    pub fn await_info(&self, name: &str, wanted: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
        until(&format!("the awaited state of {name}"), || Some(self.info(name)).filter(|info| wanted(info)))
    }

    /// Names of all VMs.
    pub fn names(&self) -> Vec<String> {
        self.nido(["ls", "-q"]).run().ok().text().lines().map(str::to_owned).collect()
    }

    /// Expects that there is nothing: no VM, no file of one, no process.
    pub fn expect_empty(&self) {
        assert_eq!(self.names(), Vec::<String>::new());
        let left: Vec<_> = fs::read_dir(self.path().join("vms")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(left, Vec::<PathBuf>::new(), "files of VMs are left");
        processes::expect_none(self.directory.path());
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if std::thread::panicking() {
            processes::end_all(self.directory.path());
            return;
        }
        if self.path().join("nido.db").exists() {
            let _ = fs::remove_file(self.qemu_path());
            for name in self.names() {
                self.nido(["delete", &name, "--force", "--yes"]).run().ok();
            }
        }
        processes::expect_none(self.directory.path());
    }
}

/// Polls until there is a result.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(began.elapsed() < DEADLINE, "{what}: not within {} s", DEADLINE.as_secs());
        std::thread::sleep(POLL_INTERVAL);
    }
}

fn write_program(path: &Path, content: &[u8]) {
    // Written under another name: a program that is being run cannot be written to.
    let fresh = path.with_extension("new");
    fs::write(&fresh, content).unwrap();
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(&fresh, path).unwrap();
}

/// Publishes a template whose parts are a few bytes each.
pub fn publish(home: &Path, name: &str) {
    let store = Store::new(home);
    store.create().unwrap();
    let lock = store.lock().unwrap();
    let part = |content: &str| {
        let path = home.join("part");
        fs::write(&path, content).unwrap();
        let part = hash_file(&path).unwrap();
        store.import(&path, &part, &lock).unwrap();
        part
    };
    let manifest = Manifest {
        format: FORMAT,
        name: name.into(),
        recipe: RecipeId { name: name.into(), sha256: "0".repeat(64) },
        created_at: "2024-05-06T07:08:09Z".parse().unwrap(),
        architecture: "x86_64".into(),
        init: Init::Agent,
        user: "user".into(),
        shell: "/bin/sh".into(),
        kernel: Kernel { version: "6.12.0-fake".into(), append: "quiet".into() },
        parts: Parts {
            vmlinux: part("vmlinux"),
            initramfs: part("initramfs"),
            initramfs_base: part("initramfs base"),
            root: Disk { file: part("root"), virtual_bytes: 64 << 20 },
            packages: part("packages"),
        },
        agent: AgentId { sha256: nido_images::agent_sha256().into(), protocol: 1 },
        built_by: env!("CARGO_PKG_VERSION").into(),
        bakes: Vec::new(),
        allow: None,
    };
    store.publish(&manifest, &lock).unwrap();
}

/// Publishes a template of a few MiB that an import takes: unlike that of [`Home::new`], it has a disk image and a kernel.
pub fn publish_whole(home: &Home, name: &str, packages: &[u8]) -> Manifest {
    let store = Store::new(&home.path());
    store.create().unwrap();
    let lock = store.lock().unwrap();
    let put = |content: &[u8]| {
        let path = home.scratch("part");
        fs::write(&path, content).unwrap();
        let part = hash_file(&path).unwrap();
        store.import(&path, &part, &lock).unwrap();
        part
    };
    let mut root = b"QFI\xfb\0\0\0\x03".to_vec();
    root.resize(4 << 20, 0);
    root[20..24].copy_from_slice(&16_u32.to_be_bytes());
    root[24..32].copy_from_slice(&(64_u64 << 20).to_be_bytes());
    root[100..104].copy_from_slice(&104_u32.to_be_bytes());
    // Noise, so that the archive is longer than a pipe holds.
    let mut noise = 1_u64;
    let vmlinux = std::iter::repeat_with(|| {
        noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (noise >> 56) as u8
    });
    let vmlinux: Vec<u8> = b"\x7fELF".iter().copied().chain(vmlinux.take(1 << 20)).collect();
    let part: [Part; 5] = [put(&vmlinux), put(b"initramfs"), put(b"base"), put(&root), put(packages)];
    let [vmlinux, initramfs, initramfs_base, root, packages] = part;
    let manifest = Manifest {
        format: FORMAT,
        name: name.into(),
        recipe: RecipeId { name: name.into(), sha256: "0".repeat(64) },
        created_at: "2024-05-06T07:08:09Z".parse().unwrap(),
        architecture: "x86_64".into(),
        init: Init::Agent,
        user: "user".into(),
        shell: "/bin/sh".into(),
        kernel: Kernel { version: "6.12.0-fake".into(), append: "quiet".into() },
        parts: Parts {
            vmlinux,
            initramfs,
            initramfs_base,
            root: Disk { file: root, virtual_bytes: 64 << 20 },
            packages,
        },
        agent: AgentId { sha256: "0".repeat(64), protocol: AGENT_PROTOCOL },
        built_by: env!("CARGO_PKG_VERSION").into(),
        bakes: Vec::new(),
        allow: None,
    };
    store.publish(&manifest, &lock).unwrap();
    manifest
}

/// Replaces a template by one whose rules bound those of its VMs.
pub fn bound_template(home: &Path, name: &str, rules: &[&str]) {
    let store = Store::new(home);
    let lock = store.lock().unwrap();
    let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
    store.publish(&store.open(name).unwrap().with_rules(Some(rules)), &lock).unwrap();
}
