//! The QEMU binary and its capabilities: probed over its monitor, and cached.
//!
//! Starting QEMU costs tens of milliseconds, so the replies are cached by the identity of the file (path, inode, size,
//! time of change). Invariant: a QEMU that hangs, exits or is another program is an error within the deadline, and
//! nothing of it stays running.

use std::fs;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::{cache, daemon};

/// The oldest QEMU that nido works with.
pub const MINIMUM_VERSION: QemuVersion = QemuVersion { major: 7, minor: 2, micro: 0 };
/// The name looked for in `PATH`.
pub const DEFAULT_PROGRAM: &str = "qemu-system-x86_64";
/// How long QEMU may take to report its version and features: usually 0.2 s; 9 s on a busy host that is itself emulated.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest reply (its schema is a quarter of a megabyte).
const OUTPUT_BYTES_MAX: u64 = 8 << 20;
/// Raised whenever [`QemuFacts`] or the way to them changes.
const CACHE_FORMAT: u32 = 3;

/// A version of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct QemuVersion {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub micro: u32,
}

impl std::fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// What one QEMU program can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuFacts {
    /// The program, as an absolute path.
    pub path: PathBuf,
    /// Its version.
    pub version: QemuVersion,
    /// The packager's version string; may be empty.
    pub package: String,
    /// SHA-256 of the program: two builds of one version may save machines differently.
    pub sha256: String,
    /// It has the machine type `microvm`.
    pub microvm: bool,
    /// It has the machine type `pc`.
    pub pc: bool,
    /// It has the machine type `q35`.
    pub q35: bool,
    /// It can use KVM.
    pub accel_kvm: bool,
    /// It can emulate.
    pub accel_tcg: bool,
    /// It can confine itself (`-sandbox`).
    pub sandbox: bool,
    /// It can pass frames to a socket as datagrams.
    pub datagram_network: bool,
    /// It has `vhost-vsock-device` (virtio-mmio).
    pub vhost_vsock_mmio: bool,
    /// It has `vhost-vsock-pci`.
    pub vhost_vsock_pci: bool,
    /// Its socket character devices take `reconnect-ms` (from 9.2).
    pub reconnect_ms: bool,
    /// Its file-backed memory has the property `rom` (from 8.2).
    pub memory_file_rom: bool,
    /// It migrates to and from `file:` addresses (from 8.2).
    pub file_migration: bool,
}

/// Why nothing is known about QEMU.
#[derive(Debug, thiserror::Error)]
pub enum QemuProbeError {
    /// There is no such program.
    #[error("QEMU was not found: {looked}")]
    Missing {
        /// Where it was looked for.
        looked: String,
    },
    /// The program cannot be started.
    #[error("QEMU cannot be started: {path}", path = .path.display())]
    CannotRun {
        /// The program.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The program did not report its features in time.
    #[error("{path} did not reply within {timeout_ms} ms", path = .path.display())]
    Hangs {
        /// The program.
        path: PathBuf,
        /// How long it was waited for.
        timeout_ms: u128,
    },
    /// The program does not speak as QEMU does.
    #[error("{path} does not behave like QEMU", path = .path.display())]
    NotQemu {
        /// The program.
        path: PathBuf,
        /// The end of what it wrote to its standard error; escape it before showing it.
        stderr_tail: String,
    },
}

/// Finds the program: the one named (by option or `NIDO_QEMU`), else [`DEFAULT_PROGRAM`] in `PATH`.
///
/// # Errors
/// [`QemuProbeError::Missing`] with the places looked at.
pub fn find(named: Option<&Path>) -> Result<PathBuf, QemuProbeError> {
    find_in(named, std::env::var_os("PATH").as_deref())
}

fn find_in(named: Option<&Path>, path: Option<&std::ffi::OsStr>) -> Result<PathBuf, QemuProbeError> {
    let program = named.unwrap_or(Path::new(DEFAULT_PROGRAM));
    let missing = |looked| Err(QemuProbeError::Missing { looked });
    if program.components().count() > 1 {
        return match std::path::absolute(program) {
            Ok(absolute) if is_program(&absolute) => Ok(absolute),
            _ => missing(format!("{} is not a program", program.display())),
        };
    }
    let dirs = path.map(|p| std::env::split_paths(p).collect::<Vec<_>>()).unwrap_or_default();
    match dirs.iter().filter(|d| d.is_absolute()).map(|d| d.join(program)).find(|p| is_program(p)) {
        Some(found) => Ok(found),
        None => missing(format!("no program {} in PATH", program.display())),
    }
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[derive(PartialEq, Serialize, Deserialize)]
struct CacheKey {
    format: u32,
    path: PathBuf,
    device: u64,
    inode: u64,
    bytes: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

/// What the program can do: from the cache in `cache_dir`, or by running it once. Blocks; see [`find`] for `program`.
///
/// # Errors
/// It cannot be run, hangs, or is not QEMU.
pub fn probe(program: &Path, cache_dir: &Path) -> Result<QemuFacts, QemuProbeError> {
    let cannot_run = |source| QemuProbeError::CannotRun { path: program.into(), source };
    let meta = fs::metadata(program).map_err(cannot_run)?;
    let key = CacheKey {
        format: CACHE_FORMAT,
        path: program.into(),
        device: meta.dev(),
        inode: meta.ino(),
        bytes: meta.len(),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        ctime: (meta.ctime(), meta.ctime_nsec()),
    };
    let digest = Sha256::digest(program.as_os_str().as_encoded_bytes());
    let name = format!("qemu-{}.json", digest.iter().take(8).map(|b| format!("{b:02x}")).collect::<String>());
    if let Some(facts) = cache::get(cache_dir, &name, &key) {
        return Ok(facts);
    }
    let hash = hash_of(program).map_err(|source| QemuProbeError::CannotRun { path: program.into(), source })?;
    let facts = QemuFacts { sha256: hash, ..probe_program(program, PROBE_TIMEOUT)? };
    cache::put(cache_dir, &name, &key, &facts);
    Ok(facts)
}

fn hash_of(program: &Path) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    let mut file = fs::File::open(program)?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => hash.update(&buffer[..count]),
        }
    }
    Ok(nido_api::hex::encode(&hash.finalize()))
}

const QUESTIONS: &str = concat!(
    r#"{"execute":"qmp_capabilities","id":"capabilities"}"#,
    "\n",
    r#"{"execute":"qom-list-types","arguments":{"implements":"machine"},"id":"machines"}"#,
    "\n",
    r#"{"execute":"qom-list-types","arguments":{"implements":"accel"},"id":"accels"}"#,
    "\n",
    r#"{"execute":"qom-list-types","arguments":{"implements":"virtio-device"},"id":"virtio"}"#,
    "\n",
    r#"{"execute":"qom-list-types","arguments":{"implements":"pci-device"},"id":"pci"}"#,
    "\n",
    r#"{"execute":"qom-list-properties","arguments":{"typename":"memory-backend-file"},"id":"memory-file"}"#,
    "\n",
    r#"{"execute":"query-command-line-options","id":"options"}"#,
    "\n",
    r#"{"execute":"query-qmp-schema","id":"schema"}"#,
    "\n",
);

/// Runs the program without a machine and probes it.
fn probe_program(program: &Path, timeout: Duration) -> Result<QemuFacts, QemuProbeError> {
    let mut command = Command::new(program);
    daemon::set_qemu_environment(&mut command);
    let child = command
        .args(["-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => ReapedChild(child),
        Err(source) => return Err(QemuProbeError::CannotRun { path: program.into(), source }),
    };
    let (stdin, stdout, stderr) = (child.0.stdin.take(), child.0.stdout.take(), child.0.stderr.take());
    let (sender, receiver) = mpsc::channel();
    // The threads end when the child does: its death closes the pipes.
    // Its input stays open until the replies are there: a QEMU that ends, or is left, drops what it has not yet written.
    let _input = std::thread::spawn(move || stdin.map(|mut pipe| pipe.write_all(QUESTIONS.as_bytes()).map(|()| pipe)));
    let errors = std::thread::spawn(move || stderr.map(|pipe| read_capped(pipe, 64 << 10)).unwrap_or_default());
    std::thread::spawn(move || sender.send(stdout.map(read_answers).unwrap_or_default()));
    let output = receiver.recv_timeout(timeout);
    drop(child);
    let Ok(output) = output else {
        return Err(QemuProbeError::Hangs { path: program.into(), timeout_ms: timeout.as_millis() });
    };
    parse(program, &output).ok_or_else(|| {
        let said = errors.join().unwrap_or_default();
        let tail = said.get(said.len().saturating_sub(2000)..).unwrap_or_default();
        QemuProbeError::NotQemu { path: program.into(), stderr_tail: String::from_utf8_lossy(tail).trim().into() }
    })
}

/// A child that is gone, and waited for, when this is.
struct ReapedChild(Child);

impl Drop for ReapedChild {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads up to the reply to the last question.
fn read_answers(pipe: impl Read) -> Vec<u8> {
    let mut pipe = BufReader::new(pipe.take(OUTPUT_BYTES_MAX));
    let mut bytes = Vec::new();
    loop {
        let from = bytes.len();
        let last = matches!(pipe.read_until(b'\n', &mut bytes), Ok(0) | Err(_));
        if last || serde_json::from_slice(&bytes[from..]).is_ok_and(|line: Value| line["id"] == "schema") {
            return bytes;
        }
    }
}

fn read_capped(pipe: impl Read, bytes_max: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = pipe.take(bytes_max).read_to_end(&mut bytes);
    bytes
}

/// The facts in a monitor's answers; `None` if there was no greeting. A question it could not answer counts as "no".
fn parse(program: &Path, output: &[u8]) -> Option<QemuFacts> {
    let lines: Vec<Value> =
        output.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
    let version = lines.iter().find_map(|line| line.pointer("/QMP/version"))?;
    // A truncated reply is invalid: what it lacks would count as "no", and be cached.
    lines.iter().find(|line| line["id"] == "schema")?;
    let number = |key: &str| version.pointer(key)?.as_u64()?.try_into().ok();
    let answer = |id: &str| lines.iter().find(|line| line["id"] == id).map_or(&Value::Null, |line| &line["return"]);
    let has = |id: &str, name: &str| each(answer(id)).any(|item| item["name"] == name);
    let machine = |prefix: &str| {
        each(answer("machines"))
            .filter_map(|m| m["name"].as_str())
            .any(|m| m.starts_with(prefix) && m.ends_with("-machine"))
    };
    let option = |name: &str| each(answer("options")).find(|o| o["option"] == name);
    let schema_enum = |member: &str, beside: &str| {
        let holds = |e: &Value, name: &str| each(&e["values"]).any(|v| v == name);
        each(answer("schema")).any(|e| e["meta-type"] == "enum" && holds(e, member) && holds(e, beside))
    };
    let schema_member = |member: &str, beside: &str| {
        let holds = |e: &Value, name: &str| each(&e["members"]).any(|m| m["name"] == name);
        each(answer("schema")).any(|e| e["meta-type"] == "object" && holds(e, member) && holds(e, beside))
    };
    Some(QemuFacts {
        path: program.into(),
        version: QemuVersion {
            major: number("/qemu/major")?,
            minor: number("/qemu/minor")?,
            micro: number("/qemu/micro")?,
        },
        package: version["package"].as_str().unwrap_or_default().into(),
        sha256: String::new(),
        microvm: has("machines", "microvm-machine"),
        pc: machine("pc-i440fx-"),
        q35: machine("pc-q35-"),
        accel_kvm: has("accels", "kvm-accel"),
        accel_tcg: has("accels", "tcg-accel"),
        sandbox: option("sandbox").is_some(),
        datagram_network: schema_enum("dgram", "hubport"),
        vhost_vsock_mmio: has("virtio", "vhost-vsock-device"),
        vhost_vsock_pci: has("pci", "vhost-vsock-pci"),
        reconnect_ms: schema_member("reconnect-ms", "telnet"),
        memory_file_rom: has("memory-file", "rom"),
        file_migration: schema_enum("file", "exec"),
    })
}

fn each(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests;
